"""Three levels: a positive one, a negative one and zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params, ParamSpec, formats


@formats.register
@dataclass(frozen=True)
class Ternary(Format):
    """GPTQ's "trits": x > threshold*positive becomes `positive`, x < threshold*negative becomes `negative`, the rest
    zero.

    The levels are the ends of the range widened to contain zero ([-1, 1] for an all-zero block), each of its own size.
    Codes 0, 1, 2 stand for negative, zero, positive; stored in 2 bits.
    """

    kind: ClassVar[str] = "ternary"

    threshold: float = 0.5
    bits: int = field(default=2, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise FewbitsError(f"ternary format: threshold must be in [0, 1), got {self.threshold!r}")

    @property
    def code_min(self) -> int:
        return 0

    @property
    def code_max(self) -> int:
        return 2

    def param_specs(self) -> tuple[ParamSpec, ...]:
        return (ParamSpec("positive", 32, learnable=True), ParamSpec("negative", 32, learnable=True))

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        lo, hi = lo.float().clamp_max(0), hi.float().clamp_min(0)
        flat = (lo == 0) & (hi == 0)
        ones = torch.ones_like(hi)
        return {"positive": torch.where(flat, ones, hi), "negative": torch.where(flat, -ones, lo)}

    def _signs(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        high, low = params["positive"], params["negative"]
        # a side without extent has no level of its own: its values are zero
        return (x > self.threshold * high) & (high > 0), (x < self.threshold * low) & (low < 0)

    def _value(self, up: Tensor, down: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float32, device=up.device)
        return torch.where(up, params["positive"], torch.where(down, params["negative"], zero))

    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        value = self._value(*self._signs(x, params), params)
        return torch.where(torch.isnan(x), x, value), (x >= params["negative"]) & (x <= params["positive"])

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        up, down = self._signs(x, params)
        return 1 + up.to(torch.uint8) - down.to(torch.uint8)

    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return self._value(codes == 2, codes == 0, params)

    def surrogate(self, x: Tensor, params: Mapping[str, Tensor], value: Tensor, inside: Tensor) -> Tensor:
        out = super().surrogate(x, params, value, inside)
        chosen = dict(zip(("positive", "negative"), self._signs(x.detach(), params), strict=True))
        for name, here in chosen.items():
            level = params[name]
            if level.requires_grad:
                out = out + torch.where(here, level - level.detach(), torch.zeros_like(value))
        return out
