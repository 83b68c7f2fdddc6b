"""Uniform grids whose step is a power of two, so that rescaling is a shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Params, ParamSpec, formats
from fewbits.formats.uniform import Uniform

Snap = Literal["nearest", "ceil", "floor"]


def snap_to_power_of_two(x: Tensor, how: Snap = "nearest") -> Tensor:
    """2**k for positive float32 `x`, exactly: k = log2(x) rounded to nearest (in the exponent), up or down."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    if how == "nearest":
        down = mantissa < 2.0**-0.5
    elif how == "ceil":
        down = mantissa == 0.5
    else:
        down = torch.ones_like(mantissa, dtype=torch.bool)
    # the whole float32 range fits: 2**-149 to 2**127
    exponent = (exponent - down.to(exponent.dtype)).clamp(-126, 127)
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32).to(x.dtype)


@formats.register
@dataclass(frozen=True)
class PowerOfTwo(Uniform):
    """`Uniform` with the step snapped to 2**k; every policy of Uniform applies to the step before snapping.

    snap: which neighbour in the exponent. "nearest" may clip up to a factor sqrt(2) of the range, "ceil" never clips.
    rescale_zero: the zero point is found on the unsnapped grid and multiplied by old step / new step, so that z * s
        stays what it was (RAPQ; needs zero_point="real"). Otherwise the zero point follows from the range on the
        snapped grid.

    A learned scale may leave the powers of two: what is used is always the snapped one, its gradient passed straight
    through.
    """

    kind: ClassVar[str] = "power_of_two"

    snap: Snap = "nearest"
    rescale_zero: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snap not in ("nearest", "ceil", "floor"):
            raise FewbitsError(f"power_of_two format: snap={self.snap!r}; choose one of nearest, ceil, floor")
        if self.rescale_zero and self.zero_point != "real":
            raise FewbitsError("power_of_two format: rescale_zero gives a real zero point; set zero_point='real'")

    def param_specs(self) -> tuple[ParamSpec, ...]:
        scale, *rest = super().param_specs()
        # what is stored of a power of two is its exponent
        return (ParamSpec(scale.name, 8, learnable=True, positive=True), *rest)

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        lo, hi = self.adjust_range(lo.float(), hi.float())
        free = self._scale(lo, hi).clamp_min(self.eps)
        scale = snap_to_power_of_two(free, self.snap)
        params = {"scale": scale}
        if self.rescale_zero:
            params["zero_point"] = self.rescaled_zero(self.q_min - torch.round(lo / free), free, scale)
        elif self.zero_point != "none":
            params["zero_point"] = self._zero_point(lo, hi, scale)
        return params

    def rescaled_zero(self, zero: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The zero point that keeps z * s when the step goes from `old` to `new` (a real number)."""
        zero = zero * old / new
        return zero.clamp(self.q_min, self.q_max) if self.clamp_zero_point else zero

    def scale_of(self, params: Mapping[str, Tensor]) -> Tensor:
        return snap_to_power_of_two(params["scale"], self.snap)
