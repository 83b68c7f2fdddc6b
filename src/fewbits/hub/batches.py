"""The shape of a batch: a tensor (one argument), a dict (keyword arguments) or `(args, kwargs)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def call(model: torch.nn.Module, batch: Any) -> Any:
    """Run the model on a batch of any of the three shapes."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch as `(args, kwargs)`."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, dict):
        return (), batch
    args, kwargs = batch
    return tuple(args), dict(kwargs)


def to_device(batch: Any, device: str | torch.device) -> Any:
    """The batch with every tensor on `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def batch_length(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first tensor with one."""
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    return 1
