"""What the kernels multiply, each as one value: packed weights, and matrices of int8 codes with their grids.

Everything here hands it on whole. Only ops that torch knows take it in pieces, for theirs are tensors and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What an op of torch takes: activations, then the pieces of `PackedWeight.flat`.
ARGUMENTS = (
    "Tensor x, Tensor words, Tensor? scale, Tensor? zero, Tensor? table, SymInt bits, SymInt group, SymInt outputs, "
    "Tensor? bias=None, Tensor? index=None, Tensor? columns=None, Tensor? starts=None, Tensor? places=None, "
    "Tensor? entries=None"
)


class Beside(NamedTuple):
    """What is added to the product with a weight's codes; any of it may be missing.

    bias: [out]. columns: [kept, out], at the inputs `index`, int64 [kept]. Compressed sparse rows: `starts` int32
    [out + 1], the inputs `places` int32 [entries], `entries` [entries].
    """

    bias: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides the method of tuples
    columns: Tensor | None = None
    starts: Tensor | None = None
    places: Tensor | None = None
    entries: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to add."""
        return all(held is None for held in self)

    def lay_over(self, dense: Tensor) -> Tensor:
        """The weight `dense` [out, in] with columns and sparse rows added, in place and in its type."""
        if self.index is not None and self.columns is not None:
            dense.index_add_(1, self.index, self.columns.T.to(dense.dtype))
        if self.starts is not None and self.places is not None and self.entries is not None:
            row = torch.arange(len(self.starts) - 1, device=dense.device)
            # with its size given, a GPU is not waited for
            row = torch.repeat_interleave(row, self.starts.long().diff(), output_size=len(self.places))
            dense.index_put_((row, self.places.long()), self.entries.to(dense.dtype), accumulate=True)
        return dense


class PackedWeight(NamedTuple):
    """A weight [out, in] of codes with `bits` bits, packed into int32 `words` in the order of the op it is for.

    Either `scale` and `zero` [groups, out], the weight then being (code - zero) * scale with `group` columns a group (a
    multiple of 32, or at least `in`); or `table` [2^bits, out], one level a code. outputs: rows of the weight.
    """

    words: Tensor
    scale: Tensor | None
    zero: Tensor | None
    table: Tensor | None
    bits: int
    group: int
    outputs: int
    beside: Beside = Beside()

    def flat(self) -> tuple[Any, ...]:
        """The pieces, in the order of `ARGUMENTS`."""
        return (*self[:-1], *self.beside)

    @classmethod
    def of(cls, pieces: Sequence[Any]) -> PackedWeight:
        """The weight whose pieces these are; missing ones at the end are missing parts."""
        words, scale, zero, table, bits, group, outputs, *beside = pieces
        return cls(words, scale, zero, table, bits, group, outputs, Beside(*beside))


class RowGrid(NamedTuple):
    """A uniform grid of codes low..high for the rows of a matrix.

    `scale` and `zero` (one number each, on the device) fix it. Without them each row gets its own: `symmetric` [-b, b]
    with b = max(|x|, floor), zero in the middle, or else its range with zero inside.
    """

    scale: Tensor | None
    zero: Tensor | None
    low: int
    high: int
    symmetric: bool
    floor: float = 0.0

    @property
    def shift(self) -> int:
        """By how much codes are moved down to be int8."""
        return 128 if self.high > 127 else 0

    @property
    def middle(self) -> int:
        """The code of zero in a symmetric grid, before the shift."""
        return (self.low + self.high + 1) // 2 if self.low >= 0 else 0


class Norm(NamedTuple):
    """A layer norm (`centred`) or an RMS norm of rows [m, k], in float32; weight, bias: [k].

    `twice`: rounded to the type of the rows before it is multiplied by the weight, and again after that.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool
    twice: bool = False


class Int8Matrix(NamedTuple):
    """A matrix [rows, k] of about (codes - zeros) * scales.

    codes: int8 [rows, k]. scales: float32 [rows]. zeros: whole numbers, float32 [rows]. sums: of the codes of each row,
    int32 [rows]. symmetric: known to have no zeros but 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    sums: Tensor
    symmetric: bool = False

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors: what the op of torch that makes such a matrix gives."""
        return self.codes, self.scales, self.zeros, self.sums

    @classmethod
    def of(cls, pieces: Sequence[Tensor], symmetric: bool = False) -> Int8Matrix:
        """The matrix whose tensors these are."""
        codes, scales, zeros, sums = pieces
        return cls(codes, scales, zeros, sums, symmetric)
