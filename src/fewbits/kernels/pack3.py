"""3-bit codes in 32-bit words: 32 codes along the input axis share 3 words, no bit wasted.

The layout of GPTQ's 3-bit matrix-vector kernel (Frantar et al., ICLR 2023, released code): code k of a run of 32 takes
bits 3k..3k+2 of a 96-bit little-endian number, so codes 10 and 21 straddle two words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

RUN, WORDS, WORD_BITS, BITS = 32, 3, 32, 3


def pack3(codes: Tensor) -> Tensor:
    """codes [out, in], integers 0..7 -> int32 words [ceil(in / 32) * 3, out]; a last partial run is filled with code 0.

    Raises FewbitsError where codes are not a matrix of integers in 0..7.
    """
    if (
        codes.ndim != 2
        or codes.is_floating_point()
        or (codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 7))
    ):
        raise FewbitsError(f"pack3: expected integer codes [out, in] in 0..7, got {codes.dtype} {tuple(codes.shape)}")
    out, columns = codes.shape
    runs = -(-columns // RUN)
    code = torch.zeros(runs * RUN, out, dtype=torch.int64, device=codes.device)
    code[:columns] = codes.T
    code = code.view(runs, RUN, out)
    words = code.new_zeros(runs, WORDS + 1, out)
    for k in range(RUN):
        word, bit = divmod(BITS * k, WORD_BITS)
        shifted = code[:, k] << bit
        words[:, word] |= shifted & 0xFFFFFFFF
        words[:, word + 1] |= shifted >> WORD_BITS
    words = words[:, :WORDS]
    # the same 32 bits as a signed number
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).reshape(runs * WORDS, out)


def unpack3(words: Tensor, columns: int) -> Tensor:
    """int32 words [ceil(columns / 32) * 3, out] -> codes uint8 [out, columns]; the inverse of `pack3`."""
    runs = -(-columns // RUN)
    if words.ndim != 2 or words.dtype != torch.int32 or words.shape[0] != runs * WORDS:
        raise FewbitsError(
            f"unpack3: {columns} columns need int32 words [{runs * WORDS}, out], got {words.dtype} {tuple(words.shape)}"
        )
    word = words.view(runs, WORDS, -1).long() & 0xFFFFFFFF
    codes = []
    for k in range(RUN):
        at, bit = divmod(BITS * k, WORD_BITS)
        value = word[:, at] >> bit
        if bit > WORD_BITS - BITS:
            value = value | (word[:, at + 1] << (WORD_BITS - bit))
        codes.append(value & 7)
    return torch.stack(codes, 1).view(runs * RUN, -1)[:columns].T.to(torch.uint8).contiguous()
