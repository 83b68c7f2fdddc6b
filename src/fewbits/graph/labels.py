"""Channel labels: which elements of which values must be scaled together.
 Every output channel of every parameter that can be scaled gets a fresh integer label; a value carries an int64 label
tensor of its own shape. Two labels are special: FIXED (no free scale) and WILD (the element is exactly zero, so any
scale fits). A union-find joins labels that must share a scale; a class of labels may be blocked, with the reasons
kept, and may carry tags. Label tensors stay small: dimensions along which labels do not vary have stride 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

FIXED, WILD, FIRST = 0, 1, 2


class Labels:
    """The union-find and what is known about its classes. All methods work on whole label tensors at once."""

    def __init__(self) -> None:
        self._parent = np.arange(1 << 12, dtype=np.int64)
        self._size = FIRST
        self._marks: dict[tuple[str, str], np.ndarray] = {}  # bool over labels

    def __len__(self) -> int:
        return self._size

    def fresh(self, *shape: int) -> Tensor:
        """New labels, each its own class. int64 of the given shape."""
        count = int(np.prod(shape, dtype=np.int64))
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            grown = np.arange(max(self._size, 2 * len(self._parent)), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return torch.arange(start, self._size).view(shape)

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The class of each label: its smallest member."""
        parent = self._parent
        roots = parent[labels]
        while True:
            above = parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        parent[labels] = roots
        return roots

    def classes(self, labels: Tensor) -> np.ndarray:
        """The classes of a label tensor, flat int64; FIXED and WILD stay."""
        return self.find(labels.reshape(-1).numpy())

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Join labels position by position (they broadcast). Meeting FIXED blocks a label; WILD meets anything."""
        first, second = _pairs(a, b)
        live_first, live_second = first >= FIRST, second >= FIRST
        self.block_classes(first[live_first & (second == FIXED)], reason)
        self.block_classes(second[live_second & (first == FIXED)], reason)
        both = live_first & live_second
        first, second = first[both], second[both]
        parent = self._parent
        while first.size:
            first, second = self.find(first), self.find(second)
            differ = first != second
            first, second = first[differ], second[differ]
            np.minimum.at(parent, np.maximum(first, second), np.minimum(first, second))

    def along(self, labels: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        """Join all labels along some dimensions; one representative is kept there (those sizes become 1)."""
        for dim in dims:
            kept = labels.narrow(dim, 0, 1) if labels.stride(dim) == 0 else labels.amax(dim, keepdim=True)
            if labels.stride(dim) != 0:
                self.unite(labels, kept.expand_as(labels), reason)
            labels = kept
        return labels

    def settled(self, labels: Tensor) -> Tensor:
        """Each label replaced by its class, in as little memory as that allows."""
        small = base(labels)
        return compact(torch.from_numpy(self.find(small.reshape(-1).numpy())).view(small.shape).expand(labels.shape))

    # -- marks on classes --------------------------------------------------------------------------------------------
    def mark(self, kind: str, name: str, labels: Tensor | None) -> None:
        """Remember something about every class in a label tensor; `marked` reads it back after all unions."""
        if labels is not None:
            self._mark(kind, name, base(labels).reshape(-1).numpy())

    def block(self, labels: Tensor | None, reason: str) -> None:
        self.mark("block", reason, labels)

    def block_classes(self, labels: np.ndarray, reason: str) -> None:
        self._mark("block", reason, labels)

    def _mark(self, kind: str, name: str, labels: np.ndarray) -> None:
        labels = labels[labels >= FIRST]
        if not labels.size:
            return
        flags = self._marks.get((kind, name), np.zeros(0, dtype=bool))
        if len(flags) < self._size:
            flags = np.concatenate([flags, np.zeros(len(self._parent) - len(flags), dtype=bool)])
            self._marks[(kind, name)] = flags
        flags[labels] = True

    def marked(self, kind: str) -> dict[str, np.ndarray]:
        """Name -> bool array over labels, true at the class representatives that carry the mark."""
        out: dict[str, np.ndarray] = {}
        for (held, name), marked in self._marks.items():
            if held == kind:
                flags = np.zeros(self._size, dtype=bool)
                flags[self.find(np.flatnonzero(marked))] = True
                out[name] = flags
        return out


def base(labels: Tensor) -> Tensor:
    """The same labels with every stride-0 dimension cut to size 1."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """Equal labels, in as little memory as their variation needs."""
    if labels.numel() == 0:
        return labels
    shape, small = labels.shape, base(labels)
    for dim in range(small.dim()):
        if small.shape[dim] < 2:
            continue
        first = small.narrow(dim, 0, 1)
        # the cheap look at one neighbour settles most dimensions
        if torch.equal(first, small.narrow(dim, 1, 1)) and bool((small == first).all()):
            small = first
    if small.numel() < labels.numel():
        small = small.clone(memory_format=torch.contiguous_format)
    return small.expand(shape)


def reshaped(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """The labels of a reshaped value; a dimension that stays whole, and along which none vary, takes no memory."""
    small, sizes = labels, list(shape)
    for dim, size in enumerate(labels.shape):
        if labels.stride(dim) == 0 and size > 1:
            before = math.prod(labels.shape[:dim])
            for place, other in enumerate(shape):
                if other == size and math.prod(shape[:place]) == before:
                    small, sizes[place] = small.narrow(dim, 0, 1), 1
    return small.reshape(sizes).expand(*shape)


def thin(parts: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Labels to be joined along a dimension, cut to size 1 along any other that none of them varies along."""
    found = list(parts)
    for other in range(found[0].dim()):
        if other != dim % found[0].dim() and all(x.dim() > other and x.stride(other) == 0 for x in found):
            found = [x.narrow(other, 0, 1) if x.shape[other] else x for x in found]
    return found


def full(label: int, shape: Iterable[int]) -> Tensor:
    """One label everywhere, in the memory of one."""
    shape = tuple(shape)
    return torch.full([1] * len(shape), label, dtype=torch.int64).expand(shape)


def holds(labels: Tensor, label: int) -> bool:
    """Whether any element has this label."""
    return labels.numel() > 0 and bool((base(labels) == label).any())


def is_live(labels: Tensor | None) -> bool:
    """Whether any element has a label of its own."""
    return labels is not None and labels.numel() > 0 and bool((base(labels) >= FIRST).any())


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Labels of an elementwise sum: WILD elements take the other side's label, FIXED ones stay FIXED."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    small_a, small_b = together(a, b)
    return torch.where(small_a == WILD, small_b, torch.where(small_b == FIXED, small_b, small_a)).expand(shape)


def together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both broadcast to one shape, every dimension along which neither varies cut to size 1."""
    a, b = torch.broadcast_tensors(a, b)
    for dim in range(a.dim()):
        if a.stride(dim) == 0 and b.stride(dim) == 0 and a.shape[dim] > 1:
            a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
    return a, b


def _pairs(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The labels that meet, pair by pair."""
    a, b = together(a, b)
    return a.reshape(-1).numpy(), b.reshape(-1).numpy()
