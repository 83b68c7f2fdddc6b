"""The Pareto frontier of an additive table, row by row (ZeroQ section 3.2): exact, without enumeration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbits.allocation.table import Choice, Table
from fewbits.errors import FewbitsError

# partial choices kept at once: some hundred megabytes
_LIMIT = 4_000_000


@dataclass(frozen=True)
class Frontier:
    """Choices that no other one beats in both cost and loss, by rising cost: cost int64 (points,), loss float64
    (points,), index int64 (points, rows)."""

    cost: Tensor
    loss: Tensor
    index: Tensor


def frontier(table: Table) -> Frontier:
    """All Pareto-optimal choices. Raises `FewbitsError` where they are too many to hold; `solve` needs far fewer."""
    cost, loss, back = _sweep(table, None)
    points = np.arange(len(cost))
    return Frontier(torch.from_numpy(cost), torch.from_numpy(loss), torch.from_numpy(_trace(back, points)))


def solve_pareto(table: Table, budget: int) -> Choice:
    """The least loss within the budget. Exact."""
    smallest = table.smallest(budget, "pareto")
    if not smallest.feasible:
        return smallest
    cost, _, back = _sweep(table, budget)
    return table.choice(torch.from_numpy(_trace(back, np.array([len(cost) - 1]))[0]), budget, "pareto")


def _sweep(table: Table, budget: int | None) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Cost and loss of the undominated choices, and per row (parent point, option) of every point.

    With a budget, partial choices go that cannot be completed within it, or not below a loss already reached.
    """
    losses, costs = table.loss.numpy(), table.cost.numpy()
    allowed = np.isfinite(losses)
    bound = None if budget is None else _Bound(losses, costs, budget)
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    back: list[tuple[np.ndarray, np.ndarray]] = []
    for row in range(len(losses)):
        options = np.flatnonzero(allowed[row])
        new_cost = (cost[:, None] + costs[row, options]).ravel()
        new_loss = (loss[:, None] + losses[row, options]).ravel()
        place = np.arange(len(new_cost))
        if bound is not None:
            place = place[bound.holds(new_cost, new_loss, row + 1)]
        place = place[np.lexsort((new_loss[place], new_cost[place]))]
        lowest = np.minimum.accumulate(new_loss[place])
        place = place[np.r_[True, new_loss[place][1:] < lowest[:-1]]]
        if len(place) > _LIMIT:
            raise FewbitsError(
                f"{len(place)} partial choices at row {row + 1} of {len(losses)} are too many to hold; "
                "use method 'ilp', or count costs in larger units"
            )
        cost, loss = new_cost[place], new_loss[place]
        back.append(((place // len(options)).astype(np.int32), options[place % len(options)].astype(np.int16)))
    return cost, loss, back


class _Bound:
    """Whether a partial choice can still end within the budget and below a loss that is known to be reachable.

    What the remaining rows lose at least is bounded by their Lagrangian: for any price p >= 0 of a unit of cost it is
    not less than sum min(loss + p cost) - p (budget left).
    """

    def __init__(self, losses: np.ndarray, costs: np.ndarray, budget: int) -> None:
        self.budget = budget
        reach = np.where(np.isfinite(losses), costs, np.iinfo(np.int64).max).min(1)
        self.left = np.r_[np.cumsum(reach[::-1])[::-1], 0]
        rows = np.arange(len(losses))
        # at this price every row takes its cheapest option
        finite = losses[np.isfinite(losses)]
        low, high, price = 0.0, 0.0, 2.0 * float(finite.max() - finite.min()) + 1e-300
        self.known = np.inf
        for _ in range(100):
            taken = (losses + price * costs).argmin(1)
            if costs[rows, taken].sum() <= budget:
                self.known = min(self.known, losses[rows, taken].sum())
                high = price
            else:
                low = price
            price = (low + high) / 2
        self.price = high
        best = (losses + high * costs).min(1)
        self.rest = np.r_[np.cumsum(best[::-1])[::-1], 0.0]
        # sums are rounded: what ties with the bound stays
        self.slack = 1e-9 * float(np.abs(finite).sum()) + 1e-12 * high * float(budget + costs.sum())

    def holds(self, cost: np.ndarray, loss: np.ndarray, row: int) -> np.ndarray:
        least = loss + self.rest[row] + self.price * (cost.astype(np.float64) - self.budget)
        return (cost + self.left[row] <= self.budget) & (least <= self.known + self.slack)


def _trace(back: list[tuple[np.ndarray, np.ndarray]], points: np.ndarray) -> np.ndarray:
    """(points, rows): the options that led to the given points."""
    out = np.empty((len(points), len(back)), np.int64)
    for row in range(len(back) - 1, -1, -1):
        parent, option = back[row]
        out[:, row] = option[points]
        points = parent[points]
    return out
