"""Triton functions that turn words of packed codes into numbers, for the kernels in this package to share.

Words are those of `kernels.words`: a run of 32 codes of b bits takes b words of 32 bits, and the words of one output
lie `out` apart, so that neighbouring threads read neighbouring words whatever b is. A tile is [runs, 32, outputs].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_word(words, run, column, inside, outputs, WORD: tl.constexpr, BITS: tl.constexpr):
    """uint32 [runs, outputs]: word number WORD of each run, the first where there are fewer; 0 where not `inside`."""
    at = words + (run[:, None] * BITS + (WORD if WORD < BITS else 0)).to(tl.int64) * outputs + column[None, :]
    return tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def load_words(words, run, column, inside, outputs, BITS: tl.constexpr):
    """The words of each run in eight places, of which the first BITS are used."""
    return (
        load_word(words, run, column, inside, outputs, 0, BITS),
        load_word(words, run, column, inside, outputs, 1, BITS),
        load_word(words, run, column, inside, outputs, 2, BITS),
        load_word(words, run, column, inside, outputs, 3, BITS),
        load_word(words, run, column, inside, outputs, 4, BITS),
        load_word(words, run, column, inside, outputs, 5, BITS),
        load_word(words, run, column, inside, outputs, 6, BITS),
        load_word(words, run, column, inside, outputs, 7, BITS),
    )


@triton.jit
def pick(w, index, BITS: tl.constexpr):
    """The word with the given index [1, 32, 1] of each run. The indices are constants: no selection is left over."""
    out = w[0][:, None, :]
    if BITS > 1:
        out = tl.where(index == 1, w[1][:, None, :], out)
    if BITS > 2:
        out = tl.where(index == 2, w[2][:, None, :], out)
    if BITS > 3:
        out = tl.where(index == 3, w[3][:, None, :], out)
    if BITS > 4:
        out = tl.where(index == 4, w[4][:, None, :], out)
    if BITS > 5:
        out = tl.where(index == 5, w[5][:, None, :], out)
    if BITS > 6:
        out = tl.where(index == 6, w[6][:, None, :], out)
    if BITS > 7:
        out = tl.where(index == 7, w[7][:, None, :], out)
    return out


@triton.jit
def codes(w, BITS: tl.constexpr):
    """uint32 [runs, 32, outputs]: the codes of each run."""
    bit = (tl.arange(0, 32) * BITS)[None, :, None]
    index, place = bit // 32, bit % 32
    value = pick(w, index, BITS) >> place.to(tl.uint32)
    if 32 % BITS != 0:
        over = place + BITS > 32
        rest = pick(w, index + 1, BITS) << ((32 - place) % 32).to(tl.uint32)
        value = value | tl.where(over, rest, 0)
    return value & ((1 << BITS) - 1)


@triton.jit
def to_float(code):
    """float32 of codes below 2^23, without the slow integer conversion: the code becomes a mantissa."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
