"""Triton kernel: a batch of activations times a weight of packed codes, with scales and zero points or a table.

As in `triton_vector`, for more rows: tiles of codes are decoded for `tl.dot`, sums are float32 in a fixed order, and a
split of the input axis goes through a workspace [splits, m, n] that `triton_finish` adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbits.kernels.triton_words import codes, load_words, to_float

MATRIX_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "RUNS": runs}, num_warps=warps, num_stages=stages)
    for m, n, runs, warps, stages in (
        (16, 64, 4, 4, 3),
        (16, 128, 2, 4, 3),
        (32, 64, 2, 4, 3),
        (64, 128, 2, 4, 3),
        (128, 128, 2, 8, 3),
        (128, 256, 2, 8, 3),
    )
]


@triton.jit
def _matrix_kernel(
    x, words, scale, zero, table, out, inputs, outputs, runs, group_runs, runs_per_split, stride_x, rows,
    BITS: tl.constexpr, TABLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < outputs
    start = split * runs_per_split
    stop = tl.minimum(start + runs_per_split, runs)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(start, stop, RUNS):
        run = at + tl.arange(0, RUNS)
        inside = (run < stop)[:, None] & there[None, :]
        w = load_words(words, run, column, inside, outputs, BITS)
        k = at * 32 + tl.arange(0, RUNS * 32)
        taken = tl.load(
            x + row[:, None].to(tl.int64) * stride_x + k[None, :],
            mask=(row < rows)[:, None] & (k < tl.minimum(inputs, stop * 32))[None, :],
            other=0.0,
        )
        if TABLE:
            place = codes(w, BITS).to(tl.int32) * outputs + column[None, None, :]
            value = tl.load(table + place, mask=inside[:, None, :], other=0.0).to(tl.float32)
        else:
            group = (run // group_runs)[:, None] * outputs + column[None, :]
            step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
            offset = tl.load(zero + group, mask=inside, other=0.0).to(tl.float32)
            value = (to_float(codes(w, BITS)) - offset[:, None, :]) * step[:, None, :]
        tile = tl.reshape(value, (RUNS * 32, BLOCK_N)).to(taken.dtype)
        acc = tl.dot(taken, tile, acc, input_precision="ieee")
    place = (split * rows + row)[:, None].to(tl.int64) * outputs + column[None, :]
    tl.store(out + place, acc, mask=(row < rows)[:, None] & there[None, :])
