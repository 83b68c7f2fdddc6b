"""Triton kernel: the end of a product with packed weights.

Adds up the splits of the input axis in order, then what is kept beside the codes (columns in full precision, compressed
sparse rows) and the bias, in float32, and rounds once.
"""

from __future__ import annotations

import triton
import triton.language as tl

CONFIGS = [triton.Config({"BLOCK_N": block}, num_warps=warps) for block, warps in ((64, 2), (64, 4), (128, 4))]


@triton.jit
def _finish_kernel(
    partial, x, bias, index, columns, starts, places, entries, out, splits, rows, outputs, stride_x, kept,
    BIAS: tl.constexpr, COLUMNS: tl.constexpr, SPARSE: tl.constexpr, BLOCK_N: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < outputs
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + (split * rows + row).to(tl.int64) * outputs + column, mask=there, other=0.0)
    if COLUMNS:
        for at in range(kept):
            value = tl.load(x + row * stride_x + tl.load(index + at)).to(tl.float32)
            acc += value * tl.load(columns + at * outputs + column, mask=there, other=0.0).to(tl.float32)
    if SPARSE:
        start = tl.load(starts + column, mask=there, other=0)
        count = tl.load(starts + column + 1, mask=there, other=0) - start
        for at in range(0, tl.max(count, 0), ENTRIES):
            nth = at + tl.arange(0, ENTRIES)
            inside = nth[None, :] < count[:, None]
            entry = start[:, None] + nth[None, :]
            place = tl.load(places + entry, mask=inside, other=0)
            value = tl.load(x + row * stride_x + place, mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(value * tl.load(entries + entry, mask=inside, other=0.0).to(tl.float32), 1)
    if BIAS:
        acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * outputs + column
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)
