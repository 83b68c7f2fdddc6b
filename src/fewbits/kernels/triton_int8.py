"""Triton kernels for 8-bit activations: quantize rows, multiply int8 matrices, and normalise and quantize in one pass.

Grids are those of `formats.Uniform`: code = clamp(round_half_even(x / scale) + zero), x = (code - zero) * scale. Codes
are stored as int8 whatever their sign; an unsigned grid is moved down by 128 with its zero point.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _tilings(*sizes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Of (rows, columns, depth, warps, stages)."""
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in sizes
    ]


MATRIX_CONFIGS = _tilings(
    (128, 256, 128, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 128, 128, 4, 3), (128, 128, 128, 8, 4),
    (64, 128, 128, 4, 4), (64, 64, 128, 4, 4), (32, 64, 128, 4, 4), (16, 64, 256, 4, 4),
)  # fmt: skip


@triton.jit
def round_half_even(x):
    """x rounded to integers, ties to even, |x| below 2^22: adding 1.5 * 2^23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _encode(x, scale, zero, low, high, INSIDE: tl.constexpr, EMULATED: tl.constexpr):
    """int32 codes of `x` on the grid of one `scale`. INSIDE: of which no value is beyond the ends.

    A division a value would take longer than reading it. From the reciprocal, rounded correctly, two corrections by
    the remainder lead to the same quotient: the first to a neighbour at most, the second to the one that is nearest
    (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
    EMULATED: divide, where multiply-adds round twice.
    """
    if not INSIDE:
        most = tl.minimum(scale * 2097152.0, 3.0e38)
        x = tl.minimum(tl.maximum(x, -most), most)
    if EMULATED:
        ratio = tl.math.div_rn(x, scale)
    else:
        inverse = tl.math.div_rn(1.0, scale)
        ratio = x * inverse
        ratio = tl.fma(tl.fma(-ratio, scale, x), inverse, ratio)
        ratio = tl.fma(tl.fma(-ratio, scale, x), inverse, ratio)
    code = round_half_even(ratio) + zero
    if not INSIDE:
        code = tl.minimum(tl.maximum(code, low), high)
    return code.to(tl.int32)


@triton.jit
def _row_grid(value, low, high, middle, floor, SYMMETRIC: tl.constexpr):
    """Scale and zero point of one row from its range: the largest magnitude, or the whole range with zero inside it.

    What is beyond the row is zero, which changes neither.
    """
    if SYMMETRIC:
        bound = tl.maximum(tl.max(tl.abs(value), 0), floor)
        bound = tl.where(bound == 0.0, 1.0, bound)
        return tl.maximum(tl.math.div_rn(bound, high - middle), 1e-20), middle
    low_value = tl.minimum(tl.min(value, 0), 0.0)
    high_value = tl.maximum(tl.max(value, 0), 0.0)
    flat = low_value == high_value
    low_value, high_value = tl.where(flat, -1.0, low_value), tl.where(flat, 1.0, high_value)
    scale = tl.maximum(tl.math.div_rn(high_value - low_value, high - low), 1e-20)
    zero = low - round_half_even(tl.math.div_rn(low_value, scale))
    return scale, tl.minimum(tl.maximum(zero, low), high)


@triton.jit
def _quantize_rows_kernel(
    x, weight, bias, scale, zero, normed, codes, scales, zeros, sums, columns, stride_x, low, high, middle, shift,
    floor, norm_eps,
    STATIC: tl.constexpr, SYMMETRIC: tl.constexpr, NORM: tl.constexpr, TWICE: tl.constexpr, BIAS: tl.constexpr,
    KEEP: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """One row a program. NORM: 0 none, 1 RMS, 2 layer norm; TWICE: `operands.Norm`; KEEP: write it to `normed` too.
    WHOLE: a row fills a block.

    The row's sum of codes goes to `sums`.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < (BLOCK if WHOLE else columns)
    value = tl.load(x + row.to(tl.int64) * stride_x + column, mask=there, other=0.0).to(tl.float32)
    if NORM != 0:
        if NORM == 2:
            value = tl.where(there, value - tl.sum(value, 0) / columns, 0.0)
        value = value * (1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / columns + norm_eps))
        if TWICE:
            value = value.to(x.dtype.element_ty).to(tl.float32)
        value = value * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
        if BIAS:
            value = value + tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)  # as a norm of its own would have
        if KEEP:
            tl.store(normed + row.to(tl.int64) * columns + column, rounded, mask=there)
        value = rounded.to(tl.float32)
    if STATIC:
        step, offset = tl.load(scale), tl.load(zero)
    else:
        step, offset = _row_grid(value, low, high, middle, floor, SYMMETRIC)
    inside: tl.constexpr = SYMMETRIC and not STATIC
    code = _encode(value, step, offset, low, high, inside, EMULATED) - shift
    if not WHOLE:
        code = tl.where(there, code, 0)
    tl.store(codes + row.to(tl.int64) * columns + column, code.to(tl.int8), mask=there)
    tl.store(scales + row, step)
    tl.store(zeros + row, offset - shift)
    tl.store(sums + row, tl.sum(code, 0))


@triton.jit
def corner(number, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of a tile: those that share columns of b have numbers together, to keep them cached."""
    across, down = (n + BLOCK_N - 1) // BLOCK_N, (m + BLOCK_M - 1) // BLOCK_M
    first = number // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    return (
        (first + number % (GROUP * across) % height) * BLOCK_M,
        number % (GROUP * across) // height * BLOCK_N,
    )


@triton.jit
def store(
    acc, row, column, scales_a, zeros_a, sums_a, scales_b, zeros_b, sums_b, bias, out, m, n, k,
    BIAS: tl.constexpr, ZERO_B: tl.constexpr,
):  # fmt: skip
    """Take the zero points off a tile of sums, scale it, add the bias, store it."""
    there_m, there_n = row < m, column < n
    # the zero points in integers: exact where the codes are
    zero_a = tl.load(zeros_a + row, mask=there_m, other=0.0).to(tl.int32)
    sum_b = tl.load(sums_b + column, mask=there_n, other=0)
    acc -= zero_a[:, None] * sum_b[None, :]
    if ZERO_B:
        zero_b = tl.load(zeros_b + column, mask=there_n, other=0.0).to(tl.int32)
        sum_a = tl.load(sums_a + row, mask=there_m, other=0)
        acc -= (sum_a - k * zero_a)[:, None] * zero_b[None, :]
    scale_a = tl.load(scales_a + row, mask=there_m, other=0.0)
    scale_b = tl.load(scales_b + column, mask=there_n, other=0.0)
    value = acc.to(tl.float32) * scale_a[:, None] * scale_b[None, :]
    if BIAS:
        value += tl.load(bias + column, mask=there_n, other=0.0).to(tl.float32)[None, :]
    place = row[:, None].to(tl.int64) * n + column[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=there_m[:, None] & there_n[None, :])


@triton.jit
def _matrix_kernel(
    a, b, scales_a, zeros_a, sums_a, scales_b, zeros_b, sums_b, bias, out, m, n, k,
    BIAS: tl.constexpr, ZERO_B: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[m, n] = scales_a[m] * scales_b[n] * sum_k (a[m, k] - zeros_a[m]) * (b[n, k] - zeros_b[n]) + bias[n]."""
    row, column = corner(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    row, column = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # rows past the end read others again, which spares a mask; what they make is not stored
    at_a = a + (row % m)[:, None].to(tl.int64) * k + inner[None, :]
    at_b = b + (column % n)[None, :].to(tl.int64) * k + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for at in range(0, k, BLOCK_K):
        if EVEN:
            tile_a, tile_b = tl.load(at_a), tl.load(at_b)
        else:
            left = inner < k - at
            tile_a = tl.load(at_a, mask=left[None, :], other=0)
            tile_b = tl.load(at_b, mask=left[:, None], other=0)
        acc = tl.dot(tile_a, tile_b, acc, out_dtype=tl.int32)
        at_a += BLOCK_K
        at_b += BLOCK_K
    store(
        acc, row, column, scales_a, zeros_a, sums_a, scales_b, zeros_b, sums_b, bias, out, m, n, k, BIAS, ZERO_B
    )  # fmt: skip
