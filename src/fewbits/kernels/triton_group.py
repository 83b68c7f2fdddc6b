"""Triton kernels: activations times weights of packed codes with a scale and a zero point per group, or with a table.

y[m, n] = sum_k x[m, k] * (code[n, k] - zero[g(k), n]) * scale[g(k), n], or sum_k x[m, k] * table[code[n, k], n].

Two kernels. A batch of a few rows is bound by memory, and then by the integer pipe of a GPU: `_vector_kernel` spends
one mask and one fused multiply-add a code in float32 (see `triton_words.mantissas`) and no tensor core, whose operands
would have to pass through shared memory at 16 bits each. Larger batches decode tiles for `tl.dot`. Both add in float32
and in a fixed order: a split of the input axis goes through a workspace [splits, m, n] that `triton_finish` adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbits.kernels.triton_words import codes, load_words, mantissa_weights, mantissas, to_float

VECTOR_CONFIGS = [
    triton.Config({"RUNS": runs, "BLOCK_N": block}, num_warps=warps, num_stages=stages)
    for runs, block, warps, stages in (
        (4, 128, 4, 1),
        (8, 128, 8, 1),
        (8, 64, 4, 1),
        (16, 64, 8, 1),
        (16, 64, 16, 1),
        (8, 64, 8, 2),
        (8, 64, 4, 3),
        (16, 64, 8, 3),
        (32, 64, 16, 2),
        (16, 32, 8, 1),
        (4, 128, 4, 3),
    )
]
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


@triton.jit(do_not_specialize=["one"])
def _vector_kernel(
    x, words, scale, zero, table, out, inputs, outputs, runs, group_runs, runs_per_split, stride_x, rows, one,
    BITS: tl.constexpr, TABLE: tl.constexpr, RUNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < outputs
    start = split * runs_per_split
    stop = tl.minimum(start + runs_per_split, runs)
    c = tl.arange(0, 32)
    acc = tl.zeros((RUNS, BLOCK_N), tl.float32)
    for at in range(start, stop, RUNS):
        run = at + tl.arange(0, RUNS)
        inside = (run < stop)[:, None] & there[None, :]
        w = load_words(words, run, column, inside, outputs, BITS)
        k = run[:, None] * 32 + c[None, :]
        taken = tl.load(x + row * stride_x + k, mask=(k < inputs) & (run < stop)[:, None], other=0.0).to(tl.float32)
        if TABLE:
            place = codes(w, BITS).to(tl.int32) * outputs + column[None, None, :]
            value = tl.load(table + place, mask=inside[:, None, :], other=0.0).to(tl.float32)
            acc += tl.sum(taken[:, :, None] * value, 1)
        else:
            weighted = taken * mantissa_weights(BITS)[None, :]
            product = tl.sum(weighted[:, :, None] * mantissas(w, one, BITS), 1)
            group = (run // group_runs)[:, None] * outputs + column[None, :]
            step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
            offset = tl.load(zero + group, mask=inside, other=0.0).to(tl.float32)
            acc += step * (product - tl.sum(weighted, 1)[:, None] - offset * tl.sum(taken, 1)[:, None])
    tl.store(out + (split * rows + row).to(tl.int64) * outputs + column, tl.sum(acc, 0), mask=there)


@triton.jit(do_not_specialize=["one"])
def _matrix_kernel(
    x, words, scale, zero, table, out, inputs, outputs, runs, group_runs, runs_per_split, stride_x, rows, one,
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
