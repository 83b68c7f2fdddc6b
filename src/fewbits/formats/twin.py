"""Twin uniform grids: one bit picks one of two regions with a step of its own, the others count steps.

PTQ4ViT (Yuan et al., ECCV 2022), section 3.1. The steps of the regions differ by a power of two, so that products of
codes from both meet in one integer accumulator after a shift. Of b bits one is the region and b-1 are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params, ParamSpec, formats
from fewbits.formats.log import shift_right

#: Smallest value of GELU, negated; the constant of PTQ4ViT's released code.
GELU_BOUND = 0.16997124254703522
_SHIFTS = 100  # a step of bound * 2**-100 is still a normal float32


class _Twin(Format):
    """What both grids check."""

    bound: float

    def _check(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise FewbitsError(f"{self.kind} format: bits must be an integer from 2 to 8, got {self.bits!r}")
        if not 0 < self.bound < 2.0**16:
            raise FewbitsError(f"{self.kind} format: bound must be positive, got {self.bound!r}")

    @property
    def half(self) -> int:
        """Q = 2^(b-1), the codes of one region."""
        return 2 ** (self.bits - 1)

    def check_params(self, params: Mapping[str, Tensor], where: str = "quantizer") -> None:
        super().check_params(params, where)
        shift = params.get("shift")
        if shift is not None and not bool(((shift == shift.round()) & (shift.abs() <= _SHIFTS)).all()):
            raise FewbitsError(f"{where}: the shift of {self.kind} must be a whole number of at most {_SHIFTS} places")


@formats.register
@dataclass(frozen=True)
class TwinMagnitude(_Twin):
    """Softmax outputs: values of [0, bound] in a fine region [0, s) and a coarse one [s, bound], s = bound * 2**-shift.

    With Q = 2^(b-1) codes a region, the coarse step is bound / (Q-1), so that the bound itself is a level, and the fine
    step is s / (Q-1). The code is the region (1: coarse) above the b-1 bits of the count of steps. Errors are at most
    half a step of the value's region. Where s is less than half a coarse step (shift >= b), values from s up to there
    round to zero, as the paper's formula has it; for smaller shifts the grid is monotone.

    `additive` reproduces the released code, which adds both regions' clamped values instead of choosing one: fine
    values carry an extra round(s (Q-1)) / (Q-1), coarse ones an extra s.
    """

    kind: ClassVar[str] = "twin_magnitude"

    bits: int = 8
    bound: float = 1.0
    additive: bool = False

    def __post_init__(self) -> None:
        self._check()

    def param_specs(self) -> tuple[ParamSpec, ...]:
        return (ParamSpec("shift", 8),)

    @property
    def code_min(self) -> int:
        return 0

    @property
    def code_max(self) -> int:
        return 2 * self.half - 1

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        """The finest split that has all of [0, hi] in the fine region."""
        _, exponent = torch.frexp(hi.float().clamp_min(0) / self.bound)
        return {"shift": (-exponent).clamp(0, _SHIFTS).float()}

    def check_params(self, params: Mapping[str, Tensor], where: str = "quantizer") -> None:
        super().check_params(params, where)
        if bool((params["shift"] < 0).any()):
            raise FewbitsError(f"{where}: the shift of {self.kind} must not be negative")

    def _split(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(s, fine step)."""
        split = shift_right(params["shift"]) * self.bound
        return split, split / (self.half - 1)

    def _coarse(self, payload: Tensor) -> Tensor:
        return payload / ((self.half - 1) / self.bound)

    def _payloads(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(in the fine region, rounded steps of the value's region before clamping)."""
        split, step = self._split(params)
        small = x < split
        coarse = torch.round(x * ((self.half - 1) / self.bound))
        return small, torch.where(small, torch.round(x / step), coarse)

    def _value(self, small: Tensor, payload: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        split, step = self._split(params)
        fine, coarse = payload * step, self._coarse(payload)
        if self.additive:
            fine = fine + self._coarse(torch.round(split * ((self.half - 1) / self.bound)))
            coarse = coarse + split
        return torch.where(small, fine, coarse)

    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        small, free = self._payloads(x, params)
        payload = free.clamp(0, self.half - 1)
        return self._value(small, payload, params), free == payload

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        x = torch.nan_to_num(
            x.to(torch.promote_types(x.dtype, torch.float32)), nan=0.0, posinf=torch.inf, neginf=-torch.inf
        )
        small, free = self._payloads(x, params)
        payload = free.clamp(0, self.half - 1)
        return torch.where(small, payload, payload + self.half).to(self.code_dtype)

    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        code = codes.float()
        small = code < self.half
        return self._value(small, torch.where(small, code, code - self.half), params)


@formats.register
@dataclass(frozen=True)
class TwinSign(_Twin):
    """GELU outputs: values below zero with a step that covers [-bound, 0], the others with their own step.

    With Q = 2^(b-1): negative codes -Q..-1, the others 0..Q-1. A code is a b-bit signed integer whose sign bit is the
    region. tie says how the steps belong together:
    "negative": the negative step is bound / Q and the positive one 2**shift times that (the paper);
    "positive": the positive step is a free `scale` and the negative one scale / 2**shift, the least that is not below
        bound / Q: the codes align as well, and the positive step may have any size;
    "none": the negative step is bound / Q and the positive one a free `scale` (the released code).
    """

    kind: ClassVar[str] = "twin_sign"

    bits: int = 8
    bound: float = GELU_BOUND
    tie: Literal["negative", "positive", "none"] = "negative"
    eps: float = 1e-20

    def __post_init__(self) -> None:
        self._check()
        if self.tie not in ("negative", "positive", "none"):
            raise FewbitsError(f"{self.kind} format: tie={self.tie!r}; choose negative, positive or none")
        if not self.eps > 0:
            raise FewbitsError(f"{self.kind} format: eps must be positive")

    def param_specs(self) -> tuple[ParamSpec, ...]:
        scale, shift = ParamSpec("scale", 32, self.tie == "none", positive=True), ParamSpec("shift", 8)
        return {"negative": (shift,), "positive": (scale, shift), "none": (scale,)}[self.tie]

    @property
    def code_min(self) -> int:
        return -self.half

    @property
    def code_max(self) -> int:
        return self.half - 1

    @property
    def least_step(self) -> float:
        """The smallest negative step that covers [-bound, 0]."""
        return self.bound / self.half

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        """The positive step hi / (Q - 1/2), or the next of the tied steps above it."""
        step = hi.float().clamp_min(0) / (self.half - 0.5)
        if self.tie != "negative":
            return self.with_scale(step.clamp_min(self.eps))
        mantissa, exponent = torch.frexp(step / self.least_step)
        shift = torch.where(mantissa == 0.5, exponent - 1, exponent)
        return {"shift": shift.clamp(-_SHIFTS, _SHIFTS).float()}

    def with_scale(self, scale: Tensor) -> Params:
        """Parameters with the free positive step `scale`."""
        if self.tie == "none":
            return {"scale": scale}
        _, exponent = torch.frexp(scale / self.least_step)
        return {"scale": scale, "shift": (exponent - 1).clamp(-_SHIFTS, _SHIFTS).float()}

    def steps(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(negative step, positive step)."""
        some = next(iter(params.values()))
        least = torch.full((), self.least_step, dtype=torch.float32, device=some.device)
        if self.tie == "none":
            return least, params["scale"]
        shift = params["shift"]
        up, down = shift_right((-shift).clamp_min(0)), shift_right(shift.clamp_min(0))  # 2**shift is up / down
        if self.tie == "negative":
            return least, least / down * up
        return params["scale"] * down / up, params["scale"]

    def scale_of(self, params: Mapping[str, Tensor]) -> Tensor:
        """The positive step."""
        return self.steps(params)[1]

    def _free(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Rounded steps of the value's region before clamping."""
        negative, positive = self.steps(params)
        return torch.round(x / torch.where(x < 0, negative, positive))

    def _value(self, code: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        negative, positive = self.steps(params)
        return code * torch.where(code < 0, negative, positive)

    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        free = self._free(x, params)
        code = free.clamp(self.code_min, self.code_max)
        return self._value(code, params), free == code

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        x = torch.nan_to_num(
            x.to(torch.promote_types(x.dtype, torch.float32)), nan=0.0, posinf=torch.inf, neginf=-torch.inf
        )
        return self._free(x, params).clamp(self.code_min, self.code_max).to(self.code_dtype)

    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return self._value(codes.float(), params)

    def surrogate(self, x: Tensor, params: Mapping[str, Tensor], value: Tensor, inside: Tensor) -> Tensor:
        scale = params.get("scale")
        if scale is None or not scale.requires_grad:
            return super().surrogate(x, params, value, inside)
        out = super().surrogate(x, {"scale": scale.detach()}, value, inside)
        slope = (value - torch.where(inside, x.detach(), torch.zeros_like(value))) / scale.detach()
        # the step of the positive region plays no part below zero
        slope = torch.where(x.detach() < 0, torch.zeros_like(slope), slope)
        return out + slope * (scale - scale.detach())
