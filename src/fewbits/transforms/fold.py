"""The tensor edits every function-preserving transform is made of.

A change of channels x' = (x + shift) / scale is folded into what produces x and undone in what reads it. All functions
return new tensors in the dtype of their inputs, computed in float64, and change nothing in place.
Weights of Hugging Face's Conv1D ([in, out]) are transposed by the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError


@torch.no_grad()
def fold_into_norm(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None = None, *, offset: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Norm affine (weight, bias) [C] whose output is (x + shift) / scale instead of x.

    offset: the constant the norm adds to its weight (1 for norms that compute (1 + w) x, as Gemma's). A bias comes back
    as None only where there was none and nothing is shifted; a norm that cannot hold a new bias must refuse the shift.
    """
    _check_channels("norm weight", weight, 0, scale, shift)
    new_weight = ((weight.double() + offset) / scale.double() - offset).to(weight.dtype)
    if bias is None and shift is None:
        return new_weight, None
    total = torch.zeros_like(weight, dtype=torch.float64) if bias is None else bias.double()
    if shift is not None:
        total = total + shift.double()
    return new_weight, (total / scale.double()).to(weight.dtype)


@torch.no_grad()
def fold_into_outputs(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A linear or convolution whose output is (y + shift) / scale instead of y.

    weight: [out, in/groups, *kernel]; transposed convolution: [in, out/groups, *kernel]. scale, shift: [out]. A bias is
    created where there was none and a shift is given.
    """
    rows, new_bias = _scale_outputs(weight, bias, 1 / scale.double(), groups, transposed)
    if shift is None:
        return rows, new_bias
    if shift.shape != scale.shape:
        raise FewbitsError(f"fold: shift {tuple(shift.shape)} and scale {tuple(scale.shape)} must both be [out]")
    total = shift.double() if bias is None else bias.double() + shift.double()
    return rows, (total / scale.double()).to(weight.dtype)


@torch.no_grad()
def scale_inputs(weight: Tensor, scale: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """A weight that reads x / scale as the old one read x: input column c times scale_c.

    weight: [out, in/groups, *kernel] (depthwise: groups = in), transposed convolution [in, out/groups, *kernel].
    scale: [in].
    """
    if transposed:
        _check_channels("transposed weight", weight, 0, scale, None)
        return (weight.double() * scale.double().view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
    _check_channels("weight", weight, 1, scale, None, times=groups)
    per_group = scale.double().view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (weight.double().unflatten(0, (groups, -1)) * per_group).flatten(0, 1).to(weight.dtype)


@torch.no_grad()
def absorb_shift(weight: Tensor, bias: Tensor | None, shift: Tensor, *, groups: int = 1) -> Tensor:
    """The bias that lets a layer read x + shift with the same result: bias - W shift, summed over the kernel.

    weight: the one that multiplies x + shift, BEFORE any scaling of its columns, [out, in/groups, *kernel]; shift:
    [in]. Only true for convolutions without zero padding (padded positions are not shifted); the caller refuses others.
    """
    _check_channels("weight", weight, 1, shift, None, times=groups)
    per_channel = weight.double().flatten(2).sum(2) if weight.ndim > 2 else weight.double()
    moved = torch.einsum(
        "goc,gc->go", per_channel.unflatten(0, (groups, -1)), shift.double().view(groups, -1)
    ).flatten()
    return (-moved if bias is None else bias.double() - moved).to(weight.dtype)


class FoldedBatchNorm(NamedTuple):
    """A layer with its batch norm's scale inside, and the norm reduced to adding a constant.

    weight, bias: of the layer (bias None where it had none). The rest are the norm's own tensors, [out]: with eps they
    compute y + norm_bias (or y - norm_mean where the norm has no affine), so all state_dict names and shapes stay.
    """

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_mean: Tensor
    norm_var: Tensor


@torch.no_grad()
def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> FoldedBatchNorm:
    """Move an inference batch norm's scale into the convolution or linear before it; the float output stays.

    weight [out, in/groups, *kernel] (or transposed), bias [out] or None; mean, var: running statistics [out]; gamma,
    beta: affine [out] or None. With r = gamma / sqrt(var + eps): the weight's rows and the bias are multiplied by r,
    and the norm becomes weight 1, mean 0, variance 1 - eps, bias beta - mean r. Raises FewbitsError where eps >= 1 or
    shapes differ.
    """
    if not 0 <= eps < 1:
        raise FewbitsError(f"fold_batch_norm: eps={eps}; the remaining norm needs variance 1 - eps > 0")
    sigma = (var.double() + eps).sqrt()
    if not bool((sigma > 0).all()):
        raise FewbitsError("fold_batch_norm: a running variance is zero or negative; this norm was never trained")
    ratio = (1 if gamma is None else gamma.double()) / sigma
    new_weight, new_bias = _scale_outputs(weight, bias, ratio, groups, transposed)
    rest = (0 if beta is None else beta.double()) - mean.double() * ratio
    zeros, unit = torch.zeros_like(mean), torch.full_like(var, 1 - eps)
    if gamma is None or beta is None:
        # No learned bias to hold the constant: the running mean does. A gamma without beta becomes 1 all the same.
        ones = None if gamma is None else torch.ones_like(gamma)
        return FoldedBatchNorm(new_weight, new_bias, ones, None, (-rest).to(mean.dtype), unit)
    return FoldedBatchNorm(new_weight, new_bias, torch.ones_like(gamma), rest.to(beta.dtype), zeros, unit)


def _scale_outputs(
    weight: Tensor, bias: Tensor | None, ratio: Tensor, groups: int, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """Output rows and bias times ratio [out] (float64)."""
    rows = weight.double()
    if transposed:
        # the output axis is split: group g holds in/groups rows that feed the g-th out/groups outputs
        _check_channels("transposed weight", weight, 1, ratio, None, times=groups)
        per_group = ratio.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        rows = (rows.unflatten(0, (groups, -1)) * per_group).flatten(0, 1)
    else:
        _check_channels("weight", weight, 0, ratio, None)
        rows = rows * ratio.view(-1, *[1] * (weight.ndim - 1))
    return rows.to(weight.dtype), None if bias is None else (bias.double() * ratio).to(bias.dtype)


def _check_channels(
    what: str, weight: Tensor, axis: int, scale: Tensor, shift: Tensor | None, *, times: int = 1
) -> None:
    channels = weight.shape[axis] * times
    for vector in (scale, shift):
        if vector is not None and vector.shape != (channels,):
            raise FewbitsError(
                f"fold: {what} {tuple(weight.shape)} has {channels} channels there, "
                f"but got a vector {tuple(vector.shape)}"
            )
