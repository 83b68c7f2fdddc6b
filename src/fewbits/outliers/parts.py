"""A weight as the sum of typed parts: a grid, and laid over it full-precision columns or a sparse matrix.

The grid's codes and parameters live in a quantizer as for any weight; the parts here are what the literature keeps
beside it for the few values that a low-bit grid serves badly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

#: Bits of one stored full-precision value and of one index, as the papers store them.
VALUE_BITS, INDEX_BITS, POINTER_BITS = 16, 16, 32


@dataclass(frozen=True)
class Part(ABC):
    """One part besides the grid. Fields are CPU tensors; `kind` names it in files."""

    kind: ClassVar[str] = ""

    @abstractmethod
    def apply(self, dense: Tensor) -> Tensor:
        """The weight (out, columns) with this part laid over `dense`; a new float32 tensor."""

    @abstractmethod
    def storage_bits(self) -> int:
        """Stored bits: values of 16 bits and their indices."""

    @abstractmethod
    def check(self, shape: Sequence[int], where: str) -> None:
        """Raises `FewbitsError`, naming `where`, unless the part fits a weight matrix of this shape."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores of it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Columns(Part):
    """Whole columns in full precision; the grid contributes nothing there (OWQ's weak columns).

    index: int64 [k], ascending not required, distinct. values: float32 [out, k].
    """

    index: Tensor
    values: Tensor

    kind: ClassVar[str] = "columns"

    def apply(self, dense: Tensor) -> Tensor:
        out = dense.clone()
        out[:, self.index.to(dense.device)] = self.values.to(dense.device, dense.dtype)
        return out

    def storage_bits(self) -> int:
        return self.values.numel() * VALUE_BITS + self.index.numel() * POINTER_BITS

    def check(self, shape: Sequence[int], where: str) -> None:
        index, values = self.index, self.values
        fits = index.dtype == torch.int64 and index.dim() == 1 and values.shape == (shape[0], len(index))
        if not fits or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < shape[1]):
            raise FewbitsError(f"{where}: the full-precision columns do not fit a weight of {tuple(shape)}")
        if len(index.unique()) != len(index):
            raise FewbitsError(f"{where}: a full-precision column is named twice")


@dataclass(frozen=True)
class Sparse(Part):
    """Compressed sparse rows added to the grid part (SqueezeLLM's outliers).

    rows: int32 [out + 1], where each row's entries start. columns: int32 [entries]. values: float32 [entries], net of
    what the grid emits at those places.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    kind: ClassVar[str] = "sparse"

    def apply(self, dense: Tensor) -> Tensor:
        counts = self.rows.long().diff()
        row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        place = (row.to(dense.device), self.columns.long().to(dense.device))
        return dense.index_put(place, self.values.to(dense.device, dense.dtype), accumulate=True)

    def storage_bits(self) -> int:
        return self.values.numel() * (VALUE_BITS + INDEX_BITS) + self.rows.numel() * POINTER_BITS

    def check(self, shape: Sequence[int], where: str) -> None:
        rows, columns, values = self.rows, self.columns, self.values
        fits = (
            rows.dtype == columns.dtype == torch.int32
            and rows.shape == (shape[0] + 1,)
            and columns.dim() == 1
            and columns.shape == values.shape
            and int(rows[0]) == 0
            and int(rows[-1]) == len(columns)
            and bool((rows.diff() >= 0).all())
        )
        if not fits or (len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < shape[1]):
            raise FewbitsError(f"{where}: the sparse part does not fit a weight of {tuple(shape)}")

    @classmethod
    def from_dense(cls, values: Tensor, kept: Tensor) -> Sparse:
        """The entries of `values` [out, columns] where `kept` is True."""
        row, column = kept.cpu().nonzero(as_tuple=True)
        rows = torch.zeros(len(kept) + 1, dtype=torch.int32)
        rows[1:] = torch.bincount(row, minlength=len(kept)).cumsum(0).to(torch.int32)
        return cls(rows, column.to(torch.int32), values.detach().float().cpu()[row, column])


KINDS: dict[str, type[Part]] = {part.kind: part for part in (Columns, Sparse)}


def part_from_tensors(kind: str, tensors: dict[str, Tensor], where: str) -> Part:
    """The part a checkpoint describes. Raises `FewbitsError` for an unknown kind or missing tensors."""
    cls = KINDS.get(kind)
    if cls is None:
        raise FewbitsError(f"{where}: unknown part {kind!r}; known: {', '.join(sorted(KINDS))}")
    if set(tensors) != {field.name for field in fields(cls)}:
        raise FewbitsError(f"{where}: the stored {kind} part is incomplete")
    return cls(**tensors)
