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
    w, factor, scale, zero, value, code, error, outputs, columns, QMIN: tl.constexpr, QMAX: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < outputs
    j = tl.arange(0, COLUMNS)
    errors = tl.zeros((COLUMNS, ROWS), tl.float32)
    base = entry.to(tl.int64) * columns
    for i in range(columns):
        # factor is upper triangular: row i of its transpose holds u[j, i], zero for j > i
        u = tl.load(factor + (base + i) * columns + j, mask=j < columns, other=0.0)
        diagonal = tl.load(factor + (base + i) * columns + i)
        at = (base + i) * outputs + row
        owed = tl.sum(tl.where(j < i, u, 0.0)[:, None] * errors, 0)
        x = tl.load(w + at, mask=there, other=0.0) - owed
        s = tl.load(scale + at, mask=there, other=1.0)
        z = tl.load(zero + at, mask=there, other=0.0)
        # Far off values are clamped before the conversion; 1.5 * 2^23 rounds ties to even within its range.
        ratio = tl.minimum(tl.maximum(tl.div_rn(x, s), -4194304.0), 4194304.0)
        rounded = (ratio + 12582912.0) - 12582912.0
        q = tl.minimum(tl.maximum(rounded + z, QMIN), QMAX)
        v = (q - z) * s
        e = tl.div_rn(x - v, diagonal + tl.zeros_like(x))
        errors = tl.where(j[:, None] == i, e[None, :], errors)
        tl.store(value + at, v, mask=there)
        tl.store(code + at, q, mask=there)
        tl.store(error + at, e, mask=there)


def solve_block(
    w: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, q_min: int, q_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of a block one after another, each after the errors of those before it.

    w: float32 [batch, columns, out], contiguous. factor: float32 [batch, columns, columns], upper triangular. scale,
    zero: float32 [batch, columns, out]; code = clamp(round(w / scale) + zero, q_min, q_max), ties to even.
    Returns (values, codes, errors), float32 [batch, columns, out], errors divided by the factor's diagonal.
    """
    batch, columns, outputs = w.shape
    value, code, error = (w.new_empty(w.shape) for _ in range(3))
    grid = (triton.cdiv(outputs, ROWS), batch)
    _block[grid](
        w, factor.transpose(1, 2).contiguous(), scale.contiguous(), zero.contiguous(), value, code, error, outputs,
        columns, q_min, q_max, COLUMNS=triton.next_power_of_2(columns), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return value, code, error
