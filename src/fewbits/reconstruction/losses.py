"""How far a unit's output is from its float output.

Every loss here sums over the channels of one position and averages over batch and positions. That normalisation is part
of the
methods: the rounding regulariser is a plain sum over weights, and its usual factor 0.01 balances a data term that grows
with the number of channels and not with the number of positions (AdaRound, section 3.3; BRECQ, section 3).

What a channel is must be said by `channel_axis`, because shape cannot tell: 1 for convolution outputs [N, C, H, W], -1
for tokens [N, T, C], for pooled features [N, C] and for channels-last images [N, H, W, C] (Swin). Released code takes
axis 1 always; on tokens that sums over the sequence and averages over features, so the same lambda weighs T/C times
differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels.available import has_triton

FULL_SCALE = 0.01  # of the loss by the full Fisher matrix, as released


def power_loss(prediction: Tensor, target: Tensor, *, channel_axis: int, p: float = 2.0) -> Tensor:
    """Scalar mean over batch and positions of sum over channels of |prediction - target|^p.

    p = 2 is the usual squared error; BRECQ learns activation steps with p = 2.4. Computed in float32 at least.
    """
    if p == 2 and prediction.is_cuda and has_triton():
        from fewbits.kernels.triton_losses import fits, squared_error

        if fits(prediction, target):  # the same sum in another order
            return squared_error(prediction, target) * (target.shape[channel_axis] / target.numel())
    difference = _difference(prediction, target)
    powered = difference.square() if p == 2 else difference.abs().pow(p)
    return powered.sum(channel_axis).mean()


def fisher_diagonal_loss(prediction: Tensor, target: Tensor, gradient: Tensor, *, channel_axis: int) -> Tensor:
    """Squared error weighted by the squared task gradient at this output: mean of sum over channels of (difference
    g)^2.

    gradient: g, shape of the output, usually from `fisher_weight`; all ones give `power_loss` exactly.
    """
    difference = _difference(prediction, target)
    _same_shape("gradient", gradient, target)
    return (difference.square() * gradient.square()).sum(channel_axis).mean()


def fisher_full_loss(prediction: Tensor, target: Tensor, gradient: Tensor, *, scale: float = FULL_SCALE) -> Tensor:
    """Error weighted by the full (rank-one) Fisher matrix of each sample: mean over all entries of d_n |difference|
    |g|, with d_n the sum of |difference| |g| over everything in sample n; times `scale` (the released code divides by
    100).
    """
    weighted = _difference(prediction, target).abs() * gradient.abs()
    _same_shape("gradient", gradient, target)
    per_sample = weighted.flatten(1).sum(1)
    return (per_sample.view(-1, *[1] * (weighted.ndim - 1)) * weighted).mean() * scale


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    _same_shape("prediction", prediction, target)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(dtype) - target.to(dtype)


def _same_shape(what: str, value: Tensor, target: Tensor) -> None:
    # broadcasting a loss is never meant
    if value.shape != target.shape:
        raise FewbitsError(f"reconstruction loss: {what} {tuple(value.shape)} but target {tuple(target.shape)}")
