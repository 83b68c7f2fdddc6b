"""4-bit codes in the order a W4A16 matrix kernel reads them: four rows side by side in 16-bit words.

The layout of AWQ's TinyChat kernels (Lin et al., MLSys 2024, released code). Along a row, codes are reordered within
runs of 32 so that one 32-bit load unpacks into neighbours with two masks; then runs of 64 columns of four rows follow
each other, and every four codes share a word, the first in its lowest bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

RUN, ROWS, STRIDE, BITS, PER_WORD = 32, 4, 64, 4, 4


def pack4(codes: Tensor) -> Tensor:
    """codes [out, in], integers 0..15 -> int16 words [ceil(out / 4), ceil(in / 64) * 64]; missing codes are 0.

    Raises FewbitsError where codes are not a matrix of integers in 0..15.
    """
    if (
        codes.ndim != 2
        or codes.is_floating_point()
        or (codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 15))
    ):
        raise FewbitsError(f"pack4: expected integer codes [out, in] in 0..15, got {codes.dtype} {tuple(codes.shape)}")
    out, columns = codes.shape
    full = codes.new_zeros(-(-out // ROWS) * ROWS, -(-columns // STRIDE) * STRIDE, dtype=torch.int32)
    full[:out, :columns] = codes
    full = full.view(-1, full.shape[1] // RUN, RUN)[..., _order(codes.device)].flatten(1)
    blocks = full.view(-1, ROWS, full.shape[1] // STRIDE, STRIDE).transpose(1, 2)
    nibbles = blocks.reshape(len(full) // ROWS, -1, PER_WORD)
    words = (nibbles << torch.arange(0, BITS * PER_WORD, BITS, device=codes.device)).sum(-1)
    # the same 16 bits as a signed number
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def unpack4(words: Tensor, rows: int, columns: int) -> Tensor:
    """int16 words [ceil(rows / 4), ceil(columns / 64) * 64] -> codes uint8 [rows, columns]; the inverse of `pack4`."""
    shape = (-(-rows // ROWS), -(-columns // STRIDE) * STRIDE)
    if tuple(words.shape) != shape or words.dtype != torch.int16:
        raise FewbitsError(
            f"unpack4: {rows} rows of {columns} columns need int16 words {list(shape)}, "
            f"got {words.dtype} {tuple(words.shape)}"
        )
    shifts = torch.arange(0, BITS * PER_WORD, BITS, device=words.device)
    nibbles = (words.int().unsqueeze(-1) >> shifts) & 15
    blocks = nibbles.view(shape[0], shape[1] // STRIDE, ROWS, STRIDE).transpose(1, 2)
    full = blocks.reshape(shape[0] * ROWS, shape[1] // RUN, RUN)
    codes = torch.empty_like(full)
    codes[..., _order(words.device)] = full
    return codes.flatten(1)[:rows, :columns].to(torch.uint8).contiguous()


def _order(device: torch.device) -> Tensor:
    """Which code of a run of 32 comes at each place.

    Pairs of neighbours are dealt out from the four quarters of the run, then even places come before odd ones in every
    eight.
    """
    dealt = torch.arange(RUN, device=device).view(4, 4, 2).transpose(0, 1).reshape(4, 4, 2)
    return dealt.transpose(1, 2).flatten()
