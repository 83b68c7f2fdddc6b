"""Solvers without a proof: greedy, and the genetic search that also takes losses which do not add up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.allocation.table import Choice, Table
from fewbits.errors import FewbitsError


def solve_greedy(table: Table, budget: int) -> Choice:
    """From the cheapest options upwards: the exchange that gains most per unit of cost, as long as one still fits."""
    smallest = table.smallest(budget, "greedy")
    if not smallest.feasible:
        return smallest
    index, rows = smallest.index.clone(), torch.arange(len(table.names))
    left = budget - smallest.cost
    while True:
        gain = table.loss[rows, index].unsqueeze(1) - table.loss
        extra = table.cost - table.cost[rows, index].unsqueeze(1)
        rate = torch.where(extra > 0, gain / extra.clamp_min(1), gain * torch.inf)
        rate = rate.masked_fill((gain <= 0) | (extra > left), -torch.inf)
        best = int(rate.argmax())
        row, option = divmod(best, len(table.options))
        if not bool(rate.flatten()[best] > 0):
            return table.choice(index, budget, "greedy")
        left -= int(extra[row, option])
        index[row] = option


def solve_genetic(
    table: Table,
    budget: int,
    *,
    generator: torch.Generator,
    population: int = 50,
    iterations: int = 100,
    mutation: float = 0.1,
    parents: int = 10,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Choice:
    """A population of choices that fit the budget, improved by crossing and mutating the best (BRECQ section 3.4).

    Each iteration keeps the `parents` best and fills up with children: half of them take every row from one of two
    parents, half are a parent whose rows change with probability `mutation`. A child beyond the budget is discarded.
    loss: choices int64 (n, rows) -> (n,), in place of the table's sum, for losses that do not add up (joint losses
    inside a block). No proof of optimality.
    """
    if population < 2 or not 1 <= parents <= population or not 0 <= mutation <= 1 or iterations < 0:
        raise FewbitsError(
            f"genetic search: population={population}, parents={parents}, mutation={mutation}, iterations={iterations}"
        )
    smallest = table.smallest(budget, "genetic")
    if not smallest.feasible:
        return smallest
    search = _Search(table, budget, generator)
    rate = loss or (lambda index: table.loss[search.rows, index].sum(1))
    alive = torch.cat([smallest.index.unsqueeze(0), search.random(population - 1)])
    scores = rate(alive)
    for _ in range(iterations):
        best = scores.argsort(stable=True)[:parents]
        elite = alive[best]
        children = search.children(elite, population - len(elite), mutation)
        alive, scores = torch.cat([elite, children]), torch.cat([scores[best], rate(children)])
    chosen = alive[scores.argmin()]
    found = table.choice(chosen, budget, "genetic")
    return found if loss is None else Choice(chosen, float(scores.min()), found.cost, True, "genetic")


class _Search:
    """Random choices within the budget."""

    def __init__(self, table: Table, budget: int, generator: torch.Generator) -> None:
        self.table, self.budget, self.generator = table, budget, generator
        self.rows = torch.arange(len(table.names))
        self.allowed = table.loss.isfinite()

    def fits(self, index: Tensor) -> Tensor:
        return self.table.cost[self.rows, index].sum(1) <= self.budget

    def random(self, count: int) -> Tensor:
        """Options drawn at random; where they cost too much, random rows become cheaper until the choice fits."""
        index = self._options(count)
        while True:
            over = ~self.fits(index)
            if not bool(over.any()):
                return index
            cheaper = self._options(count)
            better = self.table.cost[self.rows, cheaper] < self.table.cost[self.rows, index]
            changed = torch.rand(index.shape, generator=self.generator) < max(0.1, 1 / len(self.rows))
            index = torch.where(over.unsqueeze(1) & better & changed, cheaper, index)

    def children(self, elite: Tensor, count: int, mutation: float) -> Tensor:
        found: list[Tensor] = []
        missing = count
        for _ in range(20):
            if missing <= 0:
                break
            pair = elite[torch.randint(len(elite), (2, 2 * missing), generator=self.generator)]
            crossed = torch.where(self._coin(pair.shape[1:], 0.5), pair[0], pair[1])
            mutated = torch.where(self._coin(pair.shape[1:], mutation), self._options(2 * missing), pair[0])
            either = torch.where(self._coin((2 * missing, 1), 0.5), crossed, mutated)
            child = either[self.fits(either)][:missing]
            found.append(child)
            missing -= len(child)
        return torch.cat([*found, self.random(missing)]) if missing > 0 else torch.cat(found)

    def _coin(self, shape: tuple[int, ...] | torch.Size, chance: float) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator) < chance

    def _options(self, count: int) -> Tensor:
        """(count, rows): any of the options that each row has, equally likely."""
        weights = self.allowed.double()
        return torch.multinomial(weights, count, replacement=True, generator=self.generator).T
