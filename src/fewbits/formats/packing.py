"""Codes as a dense bit string: code i occupies bits i*b .. i*b+b-1, least significant first, bytes in order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

# codes handled at once; a multiple of 8, so that every chunk starts on a byte
_CHUNK = 1 << 22


def pack_codes(codes: Tensor, bits: int, *, offset: int = 0) -> Tensor:
    """Integer `codes` (any shape) minus `offset`, as a flat uint8 tensor of ceil(numel*bits/8) bytes, row-major order.

    bits: 1 to 16. offset: the format's `code_min`, for signed codes. Raises FewbitsError where a code does not fit.
    """
    _check_bits(bits)
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise FewbitsError(f"pack_codes needs integer codes, got {codes.dtype}")
    flat = codes.reshape(-1)
    pieces = [_pack(flat[at : at + _CHUNK].to(torch.int32) - offset, bits) for at in range(0, flat.numel(), _CHUNK)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=codes.device)


def _pack(codes: Tensor, bits: int) -> Tensor:
    low, high = (int(v) for v in torch.aminmax(codes))
    if low < 0 or high >= 1 << bits:
        raise FewbitsError(
            f"codes {low}..{high} do not fit {bits} bits (after the offset); pass the format's code_min as offset"
        )
    digits = ((codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device, dtype=torch.int32)) & 1).to(torch.uint8)
    digits = torch.nn.functional.pad(digits.reshape(-1), (0, -codes.numel() * bits % 8)).reshape(-1, 8)
    packed = digits[:, 0].clone()
    for place in range(1, 8):
        packed |= digits[:, place] << place
    return packed


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int], *, offset: int = 0) -> Tensor:
    """The codes `pack_codes` packed, in `shape`; the smallest torch integer type that holds `bits` bits and `offset`.

    Raises FewbitsError where `packed` is not the uint8 string of that many codes.
    """
    _check_bits(bits)
    count = math.prod(shape)
    expected = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != expected:
        raise FewbitsError(
            f"packed codes for shape {tuple(shape)} at {bits} bits must be {expected} bytes of uint8, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    out = torch.empty(count, dtype=_code_dtype(offset, offset + (1 << bits) - 1), device=packed.device)
    for at in range(0, count, _CHUNK):
        size = min(_CHUNK, count - at)
        start = at * bits // 8
        piece = packed[start : start + -(-size * bits // 8)]
        digits = (piece.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
        digits = digits.reshape(-1)[: size * bits].reshape(size, bits)
        codes = torch.full((size,), offset, dtype=torch.int32, device=packed.device)
        for place in range(bits):
            codes += digits[:, place].to(torch.int32) << place
        out[at : at + size] = codes.to(out.dtype)
    return out.reshape(tuple(shape))


def _code_dtype(low: int, high: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return dtype
    return torch.int32


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise FewbitsError(f"codes are packed at 1 to 16 bits, not {bits}")
