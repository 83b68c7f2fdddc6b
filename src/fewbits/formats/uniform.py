"""Uniform grids and their policies.

x_hat = (q - z) * s with integer codes q. Papers agree on that line and on little else, so every disagreement is a
field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params, ParamSpec, formats
from fewbits.formats.rounding import Rounding, round_to_integer

ZeroPoint = Literal["none", "middle", "integer", "real", "centre"]


@formats.register
@dataclass(frozen=True)
class Uniform(Format):
    """A uniform grid with explicit policies.

    bits: b, 1 to 16.
    signed: codes are [-2^(b-1), 2^(b-1)-1], otherwise [0, 2^b-1].
    narrow: signed codes without the lowest one, +-(2^(b-1)-1).
    symmetric: the range is mirrored about zero before the step is computed.
    one_sided: what symmetric does to a range without negative values: "mirror" it anyway, or "keep" [0, hi].
    step: "span" (hi-lo)/(levels-1); "levels" (hi-lo)/levels; "positive" max(|lo|,|hi|)/(largest code minus zero point),
        the usual absmax/(2^(b-1)-1) (needs a fixed zero point: "none" or "middle").
    zero_point: "none" z=0; "middle" z=2^(b-1) above the lowest code, whatever the range;
        "integer" z = q_min - round(lo/s), or as `zero_rounding` says; "real" z = q_min - lo/s;
        "centre" z = middle - round((lo+hi)/(2s)).
    zero_rounding: "half_even", or "half_away" for an integer z = round(q_min - lo/s) with ties away from zero, worked
        out in float64 from the step as it is stored.
    clamp_zero_point: z is kept inside the code range (the range then moves when it excludes zero).
    include_zero: the range is first widened to contain zero.
    rounding: "half_even", "half_away", "half_up" or "floor".
    order: "round_then_shift" clamp(round(x/s)+z) or "shift_then_round" clamp(round(x/s+z)): different on ties and
        with a real z.
    eps: smallest step. min_span: smallest hi-lo that enters the step (the zero point still comes from lo).
    zero_range: an all-zero block gets the step of range [-1, 1] ("unit"), `eps` ("eps"), or step 1 and the lowest code
        for zero ("one"); it decodes to exact zeros either way.
    constant: what happens to a range of no extent off zero (a constant block): it is pulled to zero, so that its value
        is the end point of the grid ("kept"), or left to `min_span` and `eps`, and its value is "lost".
    arithmetic: precision in which step and zero point are computed before they are kept as float32.

    With a real zero point and "round_then_shift" (released RepQ-ViT after averaging, RAPQ) the end codes lie off the
    lattice: one level more than 2^b exists, `code_bits` is b+1, and quantizing an end value again may move it.
    """

    kind: ClassVar[str] = "uniform"

    bits: int = 8
    signed: bool = False
    narrow: bool = False
    symmetric: bool = False
    one_sided: Literal["mirror", "keep"] = "mirror"
    step: Literal["span", "levels", "positive"] = "span"
    zero_point: ZeroPoint = "integer"
    clamp_zero_point: bool = True
    include_zero: bool = True
    rounding: Rounding = "half_even"
    order: Literal["round_then_shift", "shift_then_round"] = "round_then_shift"
    eps: float = 1e-20
    min_span: float = 0.0
    zero_range: Literal["unit", "eps", "one"] = "unit"
    constant: Literal["kept", "lost"] = "kept"
    arithmetic: Literal["float32", "float64"] = "float32"
    zero_rounding: Literal["half_even", "half_away"] = "half_even"

    def __post_init__(self) -> None:
        choices = {
            "one_sided": ("mirror", "keep"),
            "step": ("span", "levels", "positive"),
            "zero_point": ("none", "middle", "integer", "real", "centre"),
            "rounding": ("half_even", "half_away", "half_up", "floor"),
            "order": ("round_then_shift", "shift_then_round"),
            "zero_range": ("unit", "eps", "one"),
            "constant": ("kept", "lost"),
            "arithmetic": ("float32", "float64"),
            "zero_rounding": ("half_even", "half_away"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise FewbitsError(
                    f"uniform format: {name}={getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 16:
            raise FewbitsError(f"uniform format: bits must be an integer from 1 to 16, got {self.bits!r}")
        if self.narrow and (not self.signed or self.bits < 2):
            raise FewbitsError("uniform format: narrow needs signed codes of at least 2 bits")
        if self.step == "positive" and self.zero_point not in ("none", "middle"):
            raise FewbitsError("uniform format: step='positive' needs zero_point 'none' or 'middle'")
        if self.step == "positive" and self._positive_codes < 1:
            raise FewbitsError("uniform format: step='positive' needs at least one positive code")
        if not self.eps > 0 or self.min_span < 0:
            raise FewbitsError("uniform format: eps must be positive and min_span not negative")

    # -- codes -------------------------------------------------------------------------------------------------------

    @property
    def q_min(self) -> int:
        """Lowest value a code is clamped to."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + (1 if self.narrow else 0)

    @property
    def q_max(self) -> int:
        """Highest value a code is clamped to."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code in the middle of the range: 0 when signed, 2^(b-1) when not."""
        return 0 if self.signed else 2 ** (self.bits - 1)

    @property
    def fractional(self) -> bool:
        """Whether codes may carry the fraction of a real zero point (then code i stands for the i-th level from
        below)."""
        return self.zero_point == "real" and self.order == "round_then_shift"

    @property
    def code_min(self) -> int:
        return self.q_min

    @property
    def code_max(self) -> int:
        return self.q_max + (1 if self.fractional else 0)

    @property
    def _positive_codes(self) -> int:
        return self.q_max - (self.middle if self.zero_point == "middle" else 0)

    def param_specs(self) -> tuple[ParamSpec, ...]:
        scale = ParamSpec("scale", 32, learnable=True, positive=True)
        if self.zero_point == "none":
            return (scale,)
        bits = 0 if self.zero_point == "middle" else 32
        if self.zero_point in ("integer", "centre") and self.clamp_zero_point:
            bits = self.bits
        return (scale, ParamSpec("zero_point", bits, learnable=True))

    # -- parameters --------------------------------------------------------------------------------------------------

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        dtype = torch.float64 if self.arithmetic == "float64" else torch.float32
        lo, hi = self.adjust_range(lo.to(dtype), hi.to(dtype))
        scale = self._scale(lo, hi).clamp_min(self.eps)
        params = {"scale": scale.float()}
        if self.zero_point != "none":
            params["zero_point"] = self._zero_point(lo, hi, scale).float()
        return params

    def adjust_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The range the grid is built on: widened, mirrored and never without extent, as the policies say."""
        zero = torch.zeros_like(lo)
        always = self.include_zero or self.constant == "lost"
        pull = torch.full_like(lo, self.include_zero, dtype=torch.bool) if always else hi <= lo
        lo, hi = torch.where(pull, torch.minimum(lo, zero), lo), torch.where(pull, torch.maximum(hi, zero), hi)
        if self.symmetric:
            bound = torch.maximum(lo.abs(), hi.abs())
            mirrored = -bound if self.one_sided == "mirror" else torch.where(lo < 0, -bound, lo)
            lo, hi = mirrored, bound
        if self.zero_range == "unit":
            flat = (lo == 0) & (hi == 0)
            # a real zero point puts 0 on the grid only when it is an end of the range
            low = 0.0 if self.zero_point == "real" else -1.0
            lo, hi = torch.where(flat, torch.full_like(lo, low), lo), torch.where(flat, torch.ones_like(hi), hi)
        elif self.zero_range == "one":
            hi = torch.where((lo == 0) & (hi == 0), torch.full_like(hi, float(self.q_max - self.q_min)), hi)
        return lo, hi

    def _scale(self, lo: Tensor, hi: Tensor) -> Tensor:
        if self.step == "positive":
            # unsigned codes without a zero point cannot reach below zero, so only the upper end sets their step
            one_way = self.q_min == 0 and self.zero_point == "none"
            bound = hi.clamp_min(0) if one_way else torch.maximum(lo.abs(), hi.abs())
            if self.zero_range == "unit":
                bound = torch.where(bound == 0, torch.ones_like(bound), bound)
            return bound.clamp_min(self.min_span) / self._positive_codes
        steps = self.q_max - self.q_min + (1 if self.step == "levels" else 0)
        span = (hi - lo).clamp_min(self.min_span)
        # hi - lo can overflow where both ends are representable
        return torch.where(torch.isinf(span), hi / steps - lo / steps, span / steps)

    def _zero_point(self, lo: Tensor, hi: Tensor, scale: Tensor) -> Tensor:
        if self.zero_point == "middle":
            return torch.full_like(scale, float(self.middle))
        if self.zero_point == "integer" and self.zero_rounding == "half_away":
            zero = round_to_integer(self.q_min - lo.double() / scale.float().double(), "half_away")
        elif self.zero_point == "integer":
            zero = self.q_min - torch.round(lo / scale)
        elif self.zero_point == "real":
            zero = self.q_min - lo / scale
        else:
            zero = self.middle - torch.round((lo + hi) / (2 * scale))
            zero = torch.where(torch.isfinite(zero), zero, self.middle - torch.round((lo / 2 + hi / 2) / scale))
        return zero.clamp(self.q_min, self.q_max) if self.clamp_zero_point else zero

    # -- values ------------------------------------------------------------------------------------------------------

    def shifted(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The float code of every value before clamping: an integer, or an integer plus the fraction of a real zero
        point."""
        ratio = x / self.scale_of(params)
        zero = params.get("zero_point")
        if zero is None:
            return round_to_integer(ratio, self.rounding)
        if self.order == "round_then_shift":
            return round_to_integer(ratio, self.rounding) + zero
        return round_to_integer(ratio + zero, self.rounding)

    def code_bounds(self, params: Mapping[str, Tensor]) -> tuple[int, int]:
        """Lowest and highest value a code is clamped to."""
        return self.q_min, self.q_max

    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        free = self.shifted(x, params)
        code = free.clamp(self.q_min, self.q_max)
        return self._value(code, params), free == code

    def _value(self, code: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        zero = params.get("zero_point")
        return (code if zero is None else code - zero) * self.scale_of(params)

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        x = torch.nan_to_num(
            x.to(torch.promote_types(x.dtype, torch.float32)), nan=0.0, posinf=torch.inf, neginf=-torch.inf
        )
        if self.fractional:
            # code i is the i-th level from below: q_min, then the lattice points above it, then q_max
            zero = params["zero_point"]
            code = round_to_integer(x / self.scale_of(params), self.rounding) + torch.ceil(zero)
            top = self.q_max + torch.ceil(zero) - torch.floor(zero)
            return torch.minimum(code.clamp_min(self.q_min), top).to(self.code_dtype)
        return self.shifted(x, params).clamp(self.q_min, self.q_max).to(self.code_dtype)

    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        code = codes.float()
        if self.fractional:
            zero = params["zero_point"]
            code = (code - torch.ceil(zero) + zero).clamp(self.q_min, self.q_max)
        return self._value(code, params)

    def surrogate(self, x: Tensor, params: Mapping[str, Tensor], value: Tensor, inside: Tensor) -> Tensor:
        out = super().surrogate(x, params, value, inside)
        zero = params.get("zero_point")
        if zero is not None and zero.requires_grad:
            # inside, z cancels; where clipped, the end of the range moves with -z * s
            slope = torch.where(inside, torch.zeros_like(value), -self.scale_of(params).detach().expand_as(value))
            out = out + slope * (zero - zero.detach())
        return out


def affine(bits: int, **policy: object) -> Uniform:
    """Unsigned affine grid with integer zero point, zero exactly representable. `policy` overrides fields of
    Uniform."""
    return Uniform(bits=bits, **policy)  # type: ignore[arg-type]


def symmetric(bits: int, *, narrow: bool = True, **policy: object) -> Uniform:
    """Signed grid, no zero point, step absmax/(2^(b-1)-1); `narrow` drops the code that only negatives could use."""
    fields: dict[str, object] = {
        "signed": True,
        "narrow": narrow,
        "symmetric": True,
        "zero_point": "none",
        "step": "positive",
    }
    return Uniform(bits=bits, **{**fields, **policy})  # type: ignore[arg-type]


def gptq_grid(bits: int, *, sym: bool = False, saturate_one_sided: bool = False) -> Uniform:
    """GPTQ's row grid: unsigned, range containing zero, [-1, 1] for zero rows, no clamp of the zero point.

    sym: zero point fixed at 2^(b-1) and step 2*absmax/(2^b-1). `saturate_one_sided` reproduces the released code, where
    a row without negative values gets the step of [0, max] and so saturates near half its maximum.
    """
    if not sym:
        return Uniform(bits=bits, clamp_zero_point=False)
    return Uniform(
        bits=bits,
        symmetric=True,
        zero_point="middle",
        one_sided="keep" if saturate_one_sided else "mirror",
        clamp_zero_point=False,
    )


def raw_affine(bits: int, **policy: object) -> Uniform:
    """Affine grid on the raw range: zero not forced in, zero point an unclamped integer (BRECQ 'mse', RepQ-ViT).

    Unsigned unless `policy`, which overrides fields of Uniform, says otherwise.
    """
    fields: dict[str, object] = {"include_zero": False, "clamp_zero_point": False}
    return Uniform(bits=bits, **{**fields, **policy})  # type: ignore[arg-type]


def integer_affine(bits: int, *, narrow: bool = False, **policy: object) -> Uniform:
    """Grid of integer-only inference: zero widened in and a code of its own, every rounding half away from zero.

    Unsigned, for activations; `narrow` for weights: signed codes without the lowest, so that in b bits unsigned the
    code 0 is free (Jacob et al., sections 2 and 3; gemmlowp's `ChooseQuantizationParams`).
    """
    fields: dict[str, object] = {
        "signed": narrow,
        "narrow": narrow,
        "rounding": "half_away",
        "order": "shift_then_round",
        "zero_rounding": "half_away",
        "zero_range": "one",
    }
    return Uniform(bits=bits, **{**fields, **policy})  # type: ignore[arg-type]
