"""What every choice costs and what it loses: the one thing that bit allocation is decided on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class Table:
    """Rows (layers, sites, blocks) and, for each, options (bit widths).

    names: of the rows. options: of the columns, the same for all rows. loss: float64 (rows, options), what a row loses
    with an option; losses of rows add up. Infinity marks an option that a row does not have. cost: int64 (rows,
    options), in whole units (bits, cycles, nanoseconds), not negative.

    Raises `FewbitsError` for other shapes, NaN, negative costs, or a row without any option.
    """

    names: tuple[str, ...]
    options: tuple[int, ...]
    loss: Tensor
    cost: Tensor

    def __post_init__(self) -> None:
        shape = (len(self.names), len(self.options))
        object.__setattr__(self, "loss", self.loss.detach().cpu().double())
        if not shape[0] or not shape[1]:
            raise FewbitsError("an allocation table needs at least one row and one option")
        if tuple(self.loss.shape) != shape or tuple(self.cost.shape) != shape:
            raise FewbitsError(
                f"an allocation table of {shape[0]} rows and {shape[1]} options needs loss and cost of that shape, "
                f"got {tuple(self.loss.shape)} and {tuple(self.cost.shape)}"
            )
        if self.cost.is_floating_point():
            raise FewbitsError("allocation costs are counted in whole units (bits, cycles, nanoseconds)")
        object.__setattr__(self, "cost", self.cost.detach().cpu().long())
        if bool(self.loss.isnan().any()) or bool((self.loss == -torch.inf).any()) or bool((self.cost < 0).any()):
            raise FewbitsError("an allocation table holds a NaN or infinitely negative loss, or a negative cost")
        lacking = [name for name, row in zip(self.names, self.loss, strict=True) if not bool(row.isfinite().any())]
        if lacking:
            raise FewbitsError(f"{lacking[0]} has no option with a finite loss")

    def choice(self, index: Tensor | Sequence[int], budget: int, method: str) -> Choice:
        """The choice that takes option `index[row]` in every row, (rows,)."""
        index = torch.as_tensor(index).long()
        rows = torch.arange(len(self.names))
        cost = int(self.cost[rows, index].sum())
        return Choice(index, float(self.loss[rows, index].sum()), cost, cost <= budget, method)

    def smallest(self, budget: int, method: str) -> Choice:
        """The cheapest choice; of equally cheap options the one that loses least."""
        cost = self.cost.masked_fill(~self.loss.isfinite(), torch.iinfo(torch.int64).max)
        cheapest = cost == cost.amin(1, keepdim=True)
        return self.choice(self.loss.masked_fill(~cheapest, torch.inf).argmin(1), budget, method)


@dataclass(frozen=True)
class Choice:
    """One option per row: int64 (rows,), with its total loss and cost.

    feasible: whether the cost is within the budget that was asked for; where it is not, nothing cheaper exists.
    """

    index: Tensor
    loss: float
    cost: int
    feasible: bool
    method: str
