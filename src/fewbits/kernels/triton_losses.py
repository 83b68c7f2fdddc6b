"""Squared error in one pass each way, its gradient laid out as the prediction is.

torch's own comes with a gradient in the usual layout, and every pass behind it then reads two layouts at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _sum_kernel(prediction, target, out, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    difference = tl.load(prediction + at, mask=there, other=0.0) - tl.load(target + at, mask=there, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(difference * difference, 0))


@triton.jit
def _gradient_kernel(prediction, target, gradient, out, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    difference = tl.load(prediction + at, mask=there, other=0.0) - tl.load(target + at, mask=there, other=0.0)
    tl.store(out + at, 2.0 * tl.load(gradient) * difference, mask=there)


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(prediction, target)
        total = prediction.numel()
        parts = prediction.new_empty(triton.cdiv(total, BLOCK))
        _sum_kernel[(len(parts),)](prediction, target, parts, total, BLOCK=BLOCK, num_warps=8)
        return parts.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        prediction, target = ctx.saved_tensors
        total = prediction.numel()
        out = torch.empty_like(prediction)
        grid = (triton.cdiv(total, BLOCK),)
        _gradient_kernel[grid](prediction, target, gradient, out, total, BLOCK=BLOCK, num_warps=8)
        return out, None


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of (prediction - target)^2, differentiable in the prediction; see `fits` for what the tensors must be."""
    return _SquaredError.apply(prediction, target)


def fits(prediction: Tensor, target: Tensor) -> bool:
    """Whether both are float32 of one layout without gaps, none empty, and only the prediction is learned."""
    return (
        prediction.dtype == target.dtype == torch.float32
        and prediction.shape == target.shape
        and prediction.stride() == target.stride()
        and prediction.numel() > 0
        and torch.empty_like(prediction).stride() == prediction.stride()
        and not target.requires_grad
    )
