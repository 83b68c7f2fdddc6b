"""Convolution weights as the matrices that column solvers work on, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Params


def weight_matrix(weight: Tensor, groups: int = 1) -> Tensor:
    """[out, in/groups, *kernel] (a linear's [out, in] too) -> [out, columns], or [groups, out/groups, columns].

    Columns are in the order of `conv_patches`; a grouped convolution is one independent problem per group.
    """
    if weight.ndim < 2 or weight.shape[0] % groups:
        raise FewbitsError(f"weight {tuple(weight.shape)} does not split into {groups} groups of output channels")
    matrix = weight.flatten(1)
    return matrix if groups == 1 else matrix.unflatten(0, (groups, -1))


def matrix_weight(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `weight_matrix`, for weights and codes; shape: that of the weight."""
    return matrix.reshape(tuple(shape))


def row_params(params: Params, shape: Sequence[int]) -> Params:
    """Per-row params [..., out, 1] or [..., groups, out/groups, 1] of a solve, as `PerChannel(0)` keeps them for a
    weight of `shape`: [..., out, 1, ..., 1]. Params of the whole weight stay as they are.
    """
    target = (shape[0], *[1] * (len(shape) - 1))
    found = {}
    for name, value in params.items():
        if value.ndim <= 1:
            found[name] = value
            continue
        if value.shape[-1] != 1:
            raise FewbitsError(
                f"params[{name!r}] {tuple(value.shape)} varies along the columns; keep it with its group index"
            )
        rows, wide = 1, list(value.shape[:-1])
        while wide and rows < shape[0]:
            rows *= wide.pop()
        found[name] = value.reshape(*wide, *target)
    return found
