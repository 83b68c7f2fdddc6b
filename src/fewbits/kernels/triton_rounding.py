"""Learned rounding in one kernel each way: the soft weight, the penalty that anneals it, and their gradients.

In plain torch both are some ten passes over the weight, forwards and backwards, and on small activations they take
longer than the products. The formulas are those of `fewbits.rounding.adaround`, which says what they are for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
SMALLEST = tl.constexpr(1e-30)  # has a logarithm, and no power of it shows beside 1


@triton.jit
def _share(alpha, LOWEST: tl.constexpr, SPAN: tl.constexpr):
    """(h, dh / d alpha) of the rectified sigmoid."""
    sigmoid = 1.0 / (1.0 + tl.exp(-alpha))
    free = sigmoid * SPAN + LOWEST
    slope = tl.where((free >= 0.0) & (free <= 1.0), SPAN * sigmoid * (1.0 - sigmoid), 0.0)
    return tl.minimum(tl.maximum(free, 0.0), 1.0), slope


@triton.jit
def _grid_at(at, columns, scale, zero, scale_row, scale_column, zero_row, zero_column, there):
    row, column = at // columns, at % columns
    s = tl.load(scale + row * scale_row + column * scale_column, mask=there, other=1.0)
    z = tl.load(zero + row * zero_row + column * zero_column, mask=there, other=0.0)
    return s, z


@triton.jit
def _soft_code(alpha, low, z, at, there, SHIFTED: tl.constexpr, LOWEST: tl.constexpr, SPAN: tl.constexpr):
    """(code before it is clamped, slope of its share in alpha)."""
    h, slope = _share(tl.load(alpha + at, mask=there, other=0.0), LOWEST, SPAN)
    code = tl.load(low + at, mask=there, other=0.0) + h
    return code if SHIFTED else code + z, slope


@triton.jit
def _soft_kernel(
    alpha, low, scale, zero, out, total, columns, scale_row, scale_column, zero_row, zero_column,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SHIFTED: tl.constexpr, LOWEST: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    s, z = _grid_at(at, columns, scale, zero, scale_row, scale_column, zero_row, zero_column, there)
    code, _ = _soft_code(alpha, low, z, at, there, SHIFTED, LOWEST, SPAN)
    tl.store(out + at, (tl.minimum(tl.maximum(code, QMIN), QMAX) - z) * s, mask=there)


@triton.jit
def _soft_gradient_kernel(
    alpha, low, scale, zero, gradient, out, total, columns, scale_row, scale_column, zero_row, zero_column,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SHIFTED: tl.constexpr, LOWEST: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    s, z = _grid_at(at, columns, scale, zero, scale_row, scale_column, zero_row, zero_column, there)
    code, slope = _soft_code(alpha, low, z, at, there, SHIFTED, LOWEST, SPAN)
    g = tl.load(gradient + at, mask=there, other=0.0) * s * slope
    tl.store(out + at, tl.where((code >= QMIN) & (code <= QMAX), g, 0.0), mask=there)


@triton.jit
def _penalty_kernel(
    alpha, beta, out, total, LOWEST: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    h, _ = _share(tl.load(alpha + at, mask=there, other=0.0), LOWEST, SPAN)
    distance = tl.abs(2.0 * h - 1.0)
    power = tl.exp2(tl.load(beta) * tl.log2(tl.maximum(distance, SMALLEST)))
    tl.store(out + tl.program_id(0), tl.sum(tl.where(there, 1.0 - power, 0.0), 0))


@triton.jit
def _penalty_gradient_kernel(
    alpha, beta, gradient, out, total, LOWEST: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    h, slope = _share(tl.load(alpha + at, mask=there, other=0.0), LOWEST, SPAN)
    signed = 2.0 * h - 1.0
    exponent = tl.load(beta)
    power = tl.exp2((exponent - 1.0) * tl.log2(tl.maximum(tl.abs(signed), SMALLEST)))
    towards = tl.where(signed > 0.0, -2.0, tl.where(signed < 0.0, 2.0, 0.0))
    tl.store(out + at, tl.load(gradient) * exponent * power * towards * slope, mask=there)


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, low: Tensor, scale: Tensor, zero: Tensor, constants: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(alpha, low, scale, zero)
        ctx.constants = constants
        out = torch.empty_like(alpha)
        _over(_soft_kernel, alpha, alpha, low, scale, zero, out, *_walk(alpha, scale, zero), **constants)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        alpha, low, scale, zero = ctx.saved_tensors
        out = torch.empty_like(alpha)
        _over(
            _soft_gradient_kernel, alpha, alpha, low, scale, zero, gradient.contiguous(), out,
            *_walk(alpha, scale, zero), **ctx.constants,
        )  # fmt: skip
        return out, None, None, None, None


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, beta: Tensor, constants: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(alpha, beta)
        ctx.constants = constants
        parts = alpha.new_empty(triton.cdiv(alpha.numel(), BLOCK))
        _over(_penalty_kernel, alpha, alpha, beta, parts, alpha.numel(), **constants)
        return parts.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        alpha, beta = ctx.saved_tensors
        out = torch.empty_like(alpha)
        _over(_penalty_gradient_kernel, alpha, alpha, beta, gradient, out, alpha.numel(), **ctx.constants)
        return out, None, None


def soft_weight(
    alpha: Tensor, low: Tensor, scale: Tensor, zero: Tensor, bounds: tuple[int, int], *, shifted: bool,
    stretch: tuple[float, float],
) -> Tensor:  # fmt: skip
    """(clamp(low + h(alpha) + zero, *bounds) - zero) * scale, without the first zero where `low` holds it (`shifted`).

    alpha, low: float32 [out, columns], contiguous. scale, zero: float32, broadcast against them. stretch: limits that
    the sigmoid is stretched to. Differentiable in alpha; the gradient is 0 where h or the code is clamped.
    """
    constants = {"QMIN": float(bounds[0]), "QMAX": float(bounds[1]), "SHIFTED": shifted, **_limits(stretch)}
    return _Soft.apply(alpha, low, scale.expand(alpha.shape), zero.expand(alpha.shape), constants)


def penalty(alpha: Tensor, beta: Tensor, *, stretch: tuple[float, float]) -> Tensor:
    """Sum of 1 - |2 h(alpha) - 1|^beta, differentiable in alpha; beta: one float32 on alpha's device."""
    return _Penalty.apply(alpha, beta, _limits(stretch))


def _limits(stretch: tuple[float, float]) -> dict[str, float]:
    low, high = stretch
    return {"LOWEST": low, "SPAN": high - low}


def _walk(alpha: Tensor, scale: Tensor, zero: Tensor) -> tuple[int, ...]:
    return alpha.numel(), alpha.shape[1], *scale.stride(), *zero.stride()


def _over(kernel: Any, alpha: Tensor, *arguments: Any, **constants: Any) -> None:
    kernel[(triton.cdiv(alpha.numel(), BLOCK),)](*arguments, **constants, BLOCK=BLOCK, num_warps=4)
