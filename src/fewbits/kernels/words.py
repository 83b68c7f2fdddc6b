"""Codes in 32-bit words along the input axis: 32 codes share as many words as a code has bits, no bit wasted.

The layout of GPTQ's and SqueezeLLM's matrix-vector kernels: code k of a run of 32 takes bits b*k .. b*k + b - 1 of a
32*b-bit little-endian number. At 4 bits a word holds 8 codes, lowest first; at 3 bits codes 10 and 21 straddle words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

RUN, WORD_BITS = 32, 32


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """codes [out, in], integers below 2^bits -> int32 words [ceil(in / 32) * bits, out].

    A last partial run is filled with code 0. Raises FewbitsError where codes are not a matrix of such integers, or bits
    not 1 to 8.
    """
    _check_bits(bits)
    if (
        codes.ndim != 2
        or codes.is_floating_point()
        or (codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits))
    ):
        raise FewbitsError(
            f"pack{bits}: expected integer codes [out, in] in 0..{2**bits - 1}, got {codes.dtype} {tuple(codes.shape)}"
        )
    out, columns = codes.shape
    runs = -(-columns // RUN)
    code = torch.zeros(runs * RUN, out, dtype=torch.int64, device=codes.device)
    code[:columns] = codes.T
    code = code.view(runs, RUN, out)
    words = code.new_zeros(runs, bits + 1, out)
    for k in range(RUN):
        word, bit = divmod(bits * k, WORD_BITS)
        shifted = code[:, k] << bit
        words[:, word] |= shifted & 0xFFFFFFFF
        words[:, word + 1] |= shifted >> WORD_BITS
    words = words[:, :bits]
    # the same 32 bits as a signed number
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).reshape(runs * bits, out)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 words [ceil(columns / 32) * bits, out] -> codes uint8 [out, columns]; the inverse of `pack_words`."""
    _check_bits(bits)
    runs = -(-columns // RUN)
    if words.ndim != 2 or words.dtype != torch.int32 or words.shape[0] != runs * bits:
        raise FewbitsError(
            f"unpack{bits}: {columns} columns need int32 words [{runs * bits}, out], "
            f"got {words.dtype} {tuple(words.shape)}"
        )
    word = words.view(runs, bits, -1).long() & 0xFFFFFFFF
    codes = []
    for k in range(RUN):
        at, bit = divmod(bits * k, WORD_BITS)
        value = word[:, at] >> bit
        if bit > WORD_BITS - bits:
            value = value | (word[:, at + 1] << (WORD_BITS - bit))
        codes.append(value & ((1 << bits) - 1))
    return torch.stack(codes, 1).view(runs * RUN, -1)[:columns].T.to(torch.uint8).contiguous()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FewbitsError(f"codes are packed into words at 1 to 8 bits, not {bits}")
