"""Eight-bit floating point: E4M3 (no infinities, largest value 448) and E5M2 (largest finite value 57344)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params, ParamSpec, formats

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@formats.register
@dataclass(frozen=True)
class Float8(Format):
    """OCP 8-bit floats, saturating, round to nearest even: x_hat = s * cast(clamp(x / s, +-max)).

    variant: "e4m3" or "e5m2". scaled: the largest magnitude of the range is mapped to the largest value; otherwise s =
    1 (a plain cast). eps: smallest scale. Codes are the bit patterns; they are ordered by sign and magnitude, not by
    value, and the NaN and infinity patterns never occur. -0 keeps its sign.
    """

    kind: ClassVar[str] = "float8"

    variant: Literal["e4m3", "e5m2"] = "e4m3"
    scaled: bool = True
    eps: float = 1e-20
    bits: int = field(default=8, init=False)

    def __post_init__(self) -> None:
        if self.variant not in _DTYPES:
            raise FewbitsError(f"float8 format: variant={self.variant!r}; choose one of {', '.join(_DTYPES)}")

    @property
    def dtype(self) -> torch.dtype:
        """The torch type with the same bit patterns."""
        return _DTYPES[self.variant]

    @property
    def largest(self) -> float:
        """Largest finite value of the unscaled grid."""
        return torch.finfo(self.dtype).max

    @property
    def code_min(self) -> int:
        return 0

    @property
    def code_max(self) -> int:
        return 255

    def param_specs(self) -> tuple[ParamSpec, ...]:
        return (ParamSpec("scale", 32 if self.scaled else 0, learnable=self.scaled, positive=True),)

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        bound = torch.maximum(lo.float().abs(), hi.float().abs())
        if not self.scaled:
            return {"scale": torch.ones_like(bound)}
        bound = torch.where(bound == 0, torch.ones_like(bound), bound)
        return {"scale": (bound / self.largest).clamp_min(self.eps)}

    def _cast(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(-self.largest, self.largest).float().to(self.dtype)

    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio = x / params["scale"]
        return self._cast(ratio).float() * params["scale"], ratio.abs() <= self.largest

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        ratio = x.to(torch.promote_types(x.dtype, torch.float32)) / params["scale"]
        return self._cast(torch.where(torch.isnan(ratio), torch.zeros_like(ratio), ratio)).view(torch.uint8)

    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return codes.to(torch.uint8).view(self.dtype).float() * params["scale"]
