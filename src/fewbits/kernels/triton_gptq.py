"""One lazy block of the column solver as one Triton kernel, instead of about ten launches a column.

A program owns some output rows and walks through the block's columns; what the columns done so far owe to the next one
is a product of their errors, held in registers, with one column of the triangular factor. Nothing is shared between
rows, so nothing is synchronised.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # output rows of a program: 32 x 128 float32 errors are 16 KiB of registers


@triton.jit
def _block(
    w, code, factor, scale, zero, which, error, start, outputs, width, groups, columns, QMIN: tl.constexpr,
    QMAX: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < outputs
    j = tl.arange(0, COLUMNS)
    errors = tl.zeros((COLUMNS, ROWS), tl.float32)
    for i in range(columns):
        # factor is upper triangular: row i of its transpose holds u[j, i], zero for j > i
        u = tl.load(factor + (entry * columns + i) * columns + j, mask=j < columns, other=0.0)
        diagonal = tl.load(factor + (entry * columns + i) * columns + i)
        at = (entry * width + start + i) * outputs + row
        grid = (entry * groups + tl.load(which + entry * columns + i)) * outputs + row
        owed = tl.sum(tl.where(j < i, u, 0.0)[:, None] * errors, 0)
        x = tl.load(w + at, mask=there, other=0.0) - owed
        s = tl.load(scale + grid, mask=there, other=1.0)
        z = tl.load(zero + grid, mask=there, other=0.0)
        # Far off values are clamped before the conversion; 1.5 * 2^23 rounds ties to even within its range.
        ratio = tl.minimum(tl.maximum(tl.div_rn(x, s), -4194304.0), 4194304.0)
        rounded = (ratio + 12582912.0) - 12582912.0
        q = tl.minimum(tl.maximum(rounded + z, QMIN), QMAX)
        v = (q - z) * s
        e = tl.div_rn(x - v, diagonal + tl.zeros_like(x))
        errors = tl.where(j[:, None] == i, e[None, :], errors)
        tl.store(w + at, v, mask=there)
        tl.store(code + at, q.to(tl.int32).to(code.dtype.element_ty), mask=there)
        tl.store(error + (entry * columns + i) * outputs + row, e, mask=there)


def solve_block(
    w: Tensor, codes: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, which: Tensor, start: int, q_min: int,
    q_max: int,
) -> Tensor:  # fmt: skip
    """Round the columns of a block one after another, each after the errors of those before it.

    w: float32 [batch, in, out], contiguous, of which the columns from `start` on are replaced by their quantized
    values; codes: integers of w's shape, which get theirs. factor: float32 [batch, columns, columns], upper triangular.
    scale, zero: float32 [batch, groups, out], contiguous, and which: int32 [batch, columns], the group of each column;
    code = clamp(round(w / scale) + zero, q_min, q_max), ties to even.
    Returns the errors, float32 [batch, columns, out], divided by the factor's diagonal.
    """
    batch, width, outputs = w.shape
    columns = factor.shape[-1]
    error = w.new_empty(batch, columns, outputs)
    grid = (triton.cdiv(outputs, ROWS), batch)
    _block[grid](
        w, codes, factor.transpose(1, 2).contiguous(), scale, zero, which, error, start, outputs, width,
        scale.shape[1], columns, q_min, q_max, COLUMNS=triton.next_power_of_2(columns), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return error
