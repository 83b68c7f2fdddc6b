"""Number grids: the interface every format of every paper is written against.

A `Format` is a frozen description of a grid. It knows nothing about sites or about how finely its parameters vary: it
is given `params`, a dict of float32 tensors that broadcast against the values, and turns values into integer codes and
back. Parameters whose spec has `width > 1` carry that many values per block in a *leading* axis, so a plain parameter
has the granularity's param shape `P` and a wide one has `(width, *P)`; `Granularity.expand` keeps leading axes.

How the other grids in the literature fit, without touching this file or the code that uses it:

* **Twin / two-region** (PTQ4ViT, TSPTQ-ViT, MPTQ-ViT): `TwinMagnitude`, `TwinSign`. Param `shift`, the power of two
  between the steps; the code carries the region in its top bit, chosen inside `nearest` by sign or by magnitude.
* **Piecewise linear** (PWLQ): params `breakpoint`, `bound`; the code is region bit plus piece code, so `levels` is that
  of b+1 bits, and `code_bits` reports what is really stored.
* **Binary-coded sums** (MR-BiQ) and **multipoint sums** (Multipoint): one param `alpha` of width q (leading axis); the
  code is the tuple of the q member codes packed into one integer, `decode` sums `alpha[i] * member[i]`.
  Multipoint's varying number of points per channel is a zero alpha, accounted by overriding `count_bits`.
* **Dynamic bit window** (SPARQ): no params of its own beyond the wide grid's scale; `nearest` keeps n bits at a
  per-value shift and the code stores window and shift. Pairwise budget sharing reads the neighbour, which `nearest`
  sees in `x`.
* **Per-channel power-of-two factor** (FQ-ViT): params `scale` (one per tensor), `exponent` (one per channel) with a
  shared `zero_point`; a spec says `per="tensor"` where one value serves all blocks. The rest is Uniform with step
  `scale * 2**exponent`.
* **Subset codebooks, NF4, k-means LUTs** (subset quantization, SqueezeLLM): `Codebook`, fixed levels or a free table.
* **Fractional bit-widths** (Bit-shrinking): Uniform with a real number of levels during training; exported as Uniform.
* **Second-level quantized parameters** (SpQR): two Formats; the parameters of the first are the values of the second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.packing import pack_codes, unpack_codes
from fewbits.formats.registry import Described, Registry

Params = dict[str, Tensor]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of a format.

    name: key in the params dict.
    bits: bits of one stored value, for accounting; 0 where the value follows from the format and is not stored.
    learnable: whether `Format.quantize` has a gradient for it.
    width: values per block; above 1 they sit in a leading axis.
    positive: whether a value must be above zero to make sense.
    per: "block" (the granularity's param shape) or "tensor" (one for the whole tensor whatever the granularity).
    """

    name: str
    bits: int
    learnable: bool = False
    width: int = 1
    positive: bool = False
    per: str = "block"


class Format(Described, ABC):
    """A number grid. Subclasses are frozen dataclasses with a `kind` and, usually, a `bits` field.

    `bits` is the b that papers write. `code_min..code_max` are the codes that `encode` can return; some released grids
    use one code more than 2**b, and `code_bits`, the bits of one stored code, says so.
    """

    bits: int

    @abstractmethod
    def param_specs(self) -> tuple[ParamSpec, ...]:
        """The parameters `from_range` returns, in a fixed order."""

    @property
    @abstractmethod
    def code_min(self) -> int:
        """Smallest integer `encode` returns."""

    @property
    @abstractmethod
    def code_max(self) -> int:
        """Largest integer `encode` returns."""

    @abstractmethod
    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        """Parameters for blocks whose values lie in [lo, hi] (float tensors of one shape, finite, lo <= hi).

        Never returns NaN, infinite or non-positive scales: a block without extent gets parameters that keep its value.
        """

    @abstractmethod
    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Integer codes of `x`, dtype `code_dtype`; `params` broadcast against `x`.

        Values off the ends take the end code, infinities too; NaN takes the code of zero or the nearest to it.
        """

    @abstractmethod
    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """float32 values of integer `codes`; `params` broadcast against `codes`."""

    @abstractmethod
    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(value, inside): the quantized value of every float32 or float64 `x`, equal to decode(encode(x)) where x is
        not NaN (NaN stays NaN), and a bool tensor, False where the value was clipped (there the gradient to `x` is
        zero)."""

    # -- what every format shares ------------------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.code_max - self.code_min + 1

    @property
    def code_bits(self) -> int:
        """Bits of one stored code."""
        return max(1, (self.levels - 1).bit_length())

    @property
    def code_dtype(self) -> torch.dtype:
        """Smallest torch integer type that holds every code."""
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            info = torch.iinfo(dtype)
            if info.min <= self.code_min and self.code_max <= info.max:
                return dtype
        raise FewbitsError(f"{self} has too many codes")

    def quantize(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """decode(encode(x)) as a function with useful gradients, float32 (float64 for float64 `x`).

        To `x`: straight-through, 1 inside the grid and 0 where clipped. To the learnable parameters: see `surrogate`.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.no_grad():
            value, inside = self.nearest(x, params)
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params.values())):
            return self.surrogate(x, params, value, inside)
        return value

    def surrogate(self, x: Tensor, params: Mapping[str, Tensor], value: Tensor, inside: Tensor) -> Tensor:
        """`value`, with gradients attached.

        Every scaled grid is y = s * Q(x / s); with dQ/dv = 1 inside and 0 outside, dy/ds = Q(v) - v inside and Q(v)
        outside: the learned-step rule (LSQ), no gradient scaling. The terms below are exactly zero in value, so nothing
        is perturbed.
        """
        out = value
        if x.requires_grad:
            out = out + torch.where(inside, x - x.detach(), torch.zeros_like(x))
        scale = params.get("scale")
        if scale is not None and scale.requires_grad:
            step = self.scale_of(params).detach()
            slope = (value - torch.where(inside, x.detach(), torch.zeros_like(x))) / step
            out = out + slope * (scale - scale.detach())
        return out

    def scale_of(self, params: Mapping[str, Tensor]) -> Tensor:
        """The scale in use; formats that constrain theirs override this."""
        return params["scale"]

    def count_bits(self, numel: int, blocks: int) -> int:
        """Stored bits of `numel` codes and the parameters of `blocks` blocks."""
        params = sum(spec.bits * spec.width * (blocks if spec.per == "block" else 1) for spec in self.param_specs())
        return numel * self.code_bits + params

    def mean_code_bits(self, params: Mapping[str, Tensor]) -> float:
        """Bits of one stored code, on average over the blocks; formats whose blocks differ in width override this."""
        return float(self.code_bits)

    def pack(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Integer codes as a flat uint8 tensor; `params` broadcast against `codes`."""
        return pack_codes(codes, self.code_bits, offset=self.code_min)

    def unpack(self, packed: Tensor, params: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The codes of `shape` that `pack` packed with the same parameters. FewbitsError for anything else."""
        return unpack_codes(packed, self.code_bits, shape, offset=self.code_min)

    def check_params(self, params: Mapping[str, Tensor], where: str = "quantizer") -> None:
        """Raise FewbitsError, naming `where`, unless `params` hold exactly this format's finite parameters."""
        names = [spec.name for spec in self.param_specs()]
        if sorted(params) != sorted(names):
            raise FewbitsError(f"{where}: {self.kind} needs parameters {names}, got {sorted(params)}")
        for spec in self.param_specs():
            value = params[spec.name]
            if not bool(torch.isfinite(value).all()):
                raise FewbitsError(f"{where}: parameter {spec.name} of {self.kind} is not finite")
            if spec.positive and not bool((value > 0).all()):
                raise FewbitsError(f"{where}: parameter {spec.name} of {self.kind} must be positive")


formats: Registry[Format] = Registry("format")


def format_from_dict(data: dict[str, Any]) -> Format:
    """The format described by `Format.to_dict()` output. Raises FewbitsError for anything it does not understand."""
    return formats.from_dict(data)
