"""Argument and output trees: the tensors inside nested containers, and batches of them put together by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewbits.errors import FewbitsError

Tree = Any
#: A batch: a tensor (the only argument), a tuple of arguments, a dict of keyword arguments, or (args, kwargs).
Batch = Any


def as_call(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch in any of its forms."""
    if isinstance(batch, dict):
        return (), dict(batch)
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
        return batch[0], dict(batch[1])
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def tensors(tree: Tree) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def map_tensors(fn: Callable[[Tensor], Any], tree: Tree) -> Tree:
    return pytree.tree_map(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    return map_tensors(lambda t: t.to(device), tree)


def to_host(t: Tensor, stream: torch.cuda.Stream | None = None) -> Tensor:
    """A tensor in host memory; what a GPU holds is copied to page-locked memory.

    With a stream the copy travels on it and is there once that stream has come so far.
    """
    if t.device.type != "cuda":
        return t.cpu()
    out = torch.empty_like(t, device="cpu", pin_memory=True)
    if stream is None:
        return out.copy_(t.detach())
    stream.wait_stream(torch.cuda.current_stream(t.device))
    with torch.cuda.stream(stream):
        out.copy_(t.detach(), non_blocking=True)
    t.record_stream(stream)
    return out


def nbytes(tree: Tree) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(tree))


def batch_size(batch: Batch) -> int:
    """Samples in a batch: the first axis of its first tensor."""
    first = next(tensors(batch), None)
    if first is None or first.dim() == 0:
        raise FewbitsError("a calibration batch holds no tensor with a batch axis")
    return int(first.shape[0])


def share(tree: Tree, reference: Tree) -> Tree:
    """`tree` with every tensor that equals the reference's at the same place replaced by it (masks, rotary tables)."""
    leaves, spec = pytree.tree_flatten(tree)
    others, other_spec = pytree.tree_flatten(reference)
    if spec != other_spec:
        return tree
    return pytree.tree_unflatten([b if same(a, b) else a for a, b in zip(leaves, others, strict=True)], spec)


def same(a: Any, b: Any) -> bool:
    """Whether both are tensors of one type, place, shape and values."""
    return (
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
        and a.device == b.device and torch.equal(a, b)
    )  # fmt: skip


@dataclass
class Samples:
    """Trees of several batches joined along the sample axis, so that any rows can be drawn.

    A tensor whose first axis is a multiple of its batch's size is per sample; any other must be the same in every
    batch.
    """

    leaves: list[Any]
    per_sample: list[int]  # rows per sample, 0 for shared leaves
    spec: Any
    count: int

    @classmethod
    def join(cls, trees: list[Tree], sizes: list[int], what: str) -> Samples:
        flat = [pytree.tree_flatten(tree) for tree in trees]
        spec = flat[0][1]
        if any(other != spec for _, other in flat):
            raise FewbitsError(f"{what}: calibration batches reach it with different argument structures")
        leaves: list[Any] = []
        per_sample: list[int] = []
        for column in zip(*(leaf for leaf, _ in flat), strict=True):
            first = column[0]
            if not isinstance(first, Tensor):
                leaves.append(first)
                per_sample.append(0)
                continue
            shared = all(c is first for c in column[1:]) and len(column) > 1
            rows = [c.shape[0] / size if c.dim() else 0.5 for c, size in zip(column, sizes, strict=True)]
            regular = rows[0] == int(rows[0]) and all(row == rows[0] for row in rows) and rows[0] >= 1
            trailing = all(c.shape[1:] == first.shape[1:] for c in column)
            if regular and trailing and not (shared and first.shape[0] == 1):
                leaves.append(torch.cat(list(column)) if len(column) > 1 else first)
                per_sample.append(int(rows[0]))
            elif shared or all(same(c, first) for c in column):
                leaves.append(first)
                per_sample.append(0)
            else:
                shapes = sorted({tuple(c.shape) for c in column})
                raise FewbitsError(
                    f"{what}: inputs of shapes {shapes} cannot be joined by sample; give batches of one shape, "
                    "samples along the first axis"
                )
        return cls(leaves, per_sample, spec, sum(sizes))

    def rows(self, index: Tensor) -> Tree:
        """The tree of the chosen samples (int64 index)."""
        out = []
        for leaf, rows in zip(self.leaves, self.per_sample, strict=True):
            if rows == 0:
                out.append(leaf)
            elif rows == 1:
                out.append(leaf[index.to(leaf.device)])
            else:
                out.append(leaf.unflatten(0, (self.count, rows))[index.to(leaf.device)].flatten(0, 1))
        return pytree.tree_unflatten(out, self.spec)
