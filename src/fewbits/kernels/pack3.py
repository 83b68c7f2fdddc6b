"""3-bit codes in 32-bit words: 32 codes along the input axis share 3 words (`kernels.words`).

The layout of GPTQ's 3-bit matrix-vector kernel (Frantar et al., ICLR 2023, released code).
"""

from __future__ import annotations

from torch import Tensor

from fewbits.kernels.words import pack_words, unpack_words


def pack3(codes: Tensor) -> Tensor:
    """codes [out, in], integers 0..7 -> int32 words [ceil(in / 32) * 3, out]; a last partial run is filled with code 0.

    Raises FewbitsError where codes are not a matrix of integers in 0..7.
    """
    return pack_words(codes, 3)


def unpack3(words: Tensor, columns: int) -> Tensor:
    """int32 words [ceil(columns / 32) * 3, out] -> codes uint8 [out, columns]; the inverse of `pack3`."""
    return unpack_words(words, 3, columns)
