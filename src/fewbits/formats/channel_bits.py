"""Uniform grids whose number of bits differs from block to block, under one mean.

ACIQ (Banner, Nahshan, Soudry; NeurIPS 2019), section 4: channels of a tensor share a budget of bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params, ParamSpec, formats
from fewbits.formats.packing import pack_codes, unpack_codes


@formats.register
@dataclass(frozen=True)
class ChannelBits(Format):
    """x_hat = (q - zero_point) * scale with q in [0, 2^m - 1], m = `bits` of the block (param, 0 to `ceiling`).

    bits: the mean of m that is aimed for; also the m of every block where `from_range` is not told otherwise.
    ceiling: most bits of a block, at most 16.
    zero_point: "integer" (zero is a level wherever the range holds it), or "real" for grids whose offset was moved.
    eps: smallest scale.

    A code is round(x / scale + zero_point), clamped. A block of 0 bits has the one level `lo` of its range and no
    stored codes. Codes are packed with the bits of their block.
    """

    kind: ClassVar[str] = "channel_bits"

    bits: int = 4
    ceiling: int = 8
    zero_point: Literal["integer", "real"] = "integer"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name, value, most in (("ceiling", self.ceiling, 16), ("bits", self.bits, self.ceiling)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise FewbitsError(f"channel_bits format: {name} must be an integer from 1 to {most}, got {value!r}")
        if self.zero_point not in ("integer", "real"):
            raise FewbitsError(f"channel_bits format: zero_point={self.zero_point!r}; choose integer or real")
        if not self.eps > 0:
            raise FewbitsError("channel_bits format: eps must be positive")

    @property
    def code_min(self) -> int:
        return 0

    @property
    def code_max(self) -> int:
        return int(2**self.ceiling - 1)

    @property
    def code_bits(self) -> int:
        """Bits of one stored code on average, as budgeted; `mean_code_bits` tells what the parameters came to."""
        return self.bits

    def mean_code_bits(self, params: Mapping[str, Tensor]) -> float:
        return float(params["bits"].mean())

    def param_specs(self) -> tuple[ParamSpec, ...]:
        return (
            ParamSpec("scale", 32, learnable=True, positive=True),
            ParamSpec("zero_point", 32),
            ParamSpec("bits", self.ceiling.bit_length()),
        )

    def from_range(self, lo: Tensor, hi: Tensor, bits: Tensor | None = None) -> Params:
        """`bits`: whole numbers in the shape of `lo`, the budget's mean for every block if not given."""
        lo, hi = lo.float(), hi.float()
        bits = torch.full_like(lo, float(self.bits)) if bits is None else bits.float()
        top = torch.exp2(bits) - 1
        zero = torch.zeros_like(lo)
        # a constant is an end of [0, c]; where there is one level only, it is that level
        low, high = torch.where(hi <= lo, torch.minimum(lo, zero), lo), torch.where(hi <= lo, hi.clamp_min(0), hi)
        steps = top.clamp_min(1)
        scale = high / steps - low / steps
        scale = torch.where(torch.isinf(high - low), scale, (high - low) / steps)
        alone = torch.where(lo == 0, torch.ones_like(lo), lo.abs())
        scale = torch.where(top > 0, scale, alone).clamp_min(self.eps)
        ratio = torch.where(top > 0, low, lo) / scale
        return {
            "scale": scale,
            "zero_point": zero - (ratio if self.zero_point == "real" else torch.round(ratio)),
            "bits": bits,
        }

    def code_bounds(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Lowest and highest code of every block."""
        return torch.zeros_like(params["bits"]), torch.exp2(params["bits"]) - 1

    def _codes(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        free = torch.round(x / params["scale"] + params["zero_point"])
        return free, free.clamp(*(bound.to(free.dtype) for bound in self.code_bounds(params)))

    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        free, code = self._codes(x, params)
        return (code - params["zero_point"]) * params["scale"], free == code

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._codes(torch.nan_to_num(x, nan=0.0, posinf=torch.inf, neginf=-torch.inf), params)[1].to(
            self.code_dtype
        )

    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return (codes.float() - params["zero_point"]) * params["scale"]

    def check_params(self, params: Mapping[str, Tensor], where: str = "quantizer") -> None:
        super().check_params(params, where)
        bits = params["bits"]
        if not bool(((bits >= 0) & (bits <= self.ceiling) & (bits == bits.round())).all()):
            raise FewbitsError(f"{where}: bits of a block must be whole numbers from 0 to {self.ceiling}")

    def pack(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Blocks of 1 bit first, then those of 2, and so on; row-major within a width."""
        width = params["bits"].expand(codes.shape)
        return torch.cat([pack_codes(codes[width == b], b) for b in range(1, self.ceiling + 1)])

    def unpack(self, packed: Tensor, params: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        width = params["bits"].expand(tuple(shape))
        codes = torch.zeros(tuple(shape), dtype=self.code_dtype, device=packed.device)
        at = 0
        for b in range(1, self.ceiling + 1):
            mine = width == b
            count = int(mine.sum())
            size = -(-count * b // 8)
            codes[mine] = unpack_codes(packed[at : at + size], b, (count,)).to(self.code_dtype)
            at += size
        if at != packed.numel():
            raise FewbitsError(f"packed codes hold {packed.numel()} bytes, the blocks' bits need {at}")
        return codes
