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
    difference = tl.load(prediction + at, mask=there, other=0.0).to(tl.float32)
    difference -= tl.load(target + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(difference * difference, 0))


@triton.jit
def _gradient_kernel(prediction, target, gradient, out, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    difference = tl.load(prediction + at, mask=there, other=0.0).to(tl.float32)
    difference -= tl.load(target + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, 2.0 * tl.load(gradient) * difference, mask=there)


def _parts(prediction: Tensor, target: Tensor) -> Tensor:
    """Sums of squares of BLOCK differences each, float32."""
    total = prediction.numel()
    parts = prediction.new_empty(triton.cdiv(total, BLOCK), dtype=torch.float32)
    _sum_kernel[(len(parts),)](prediction, target, parts, total, BLOCK=BLOCK, num_warps=8)
    return parts


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(prediction, target)
        return _parts(prediction, target).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        prediction, target = ctx.saved_tensors
        total = prediction.numel()
        out = torch.empty_like(prediction)
        grid = (triton.cdiv(total, BLOCK),)
        _gradient_kernel[grid](prediction, target, gradient, out, total, BLOCK=BLOCK, num_warps=8)
        return out, None


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of (prediction - target)^2, float32, differentiable in the prediction; see `fits` for what the tensors must
    be. The gradient has the prediction's type."""
    return _SquaredError.apply(prediction, target)


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """The same in float64, for tensors that `alike` holds of and that nothing is learned through."""
    return _parts(one, other).double().sum()


def fits(prediction: Tensor, target: Tensor) -> bool:
    """Whether both are `alike`, and only the prediction is learned."""
    return alike(prediction, target) and not target.requires_grad


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether both are of one type of 16 or 32-bit numbers and one layout without gaps, none empty."""
    return (
        one.dtype == other.dtype
        and one.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and one.device == other.device
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.numel() > 0
        and torch.empty_like(one).stride() == one.stride()
    )
