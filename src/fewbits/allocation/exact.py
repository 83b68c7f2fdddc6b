"""Exact solvers beside the frontier: integer linear programming, and enumeration for small tables."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from fewbits.allocation.table import Choice, Table
from fewbits.errors import FewbitsError

_LARGEST = 2_000_000


def solve_ilp(table: Table, budget: int) -> Choice:
    """The least loss within the budget as a 0/1 programme, one option per row (scipy.optimize.milp, HiGHS). Exact."""
    smallest = table.smallest(budget, "ilp")
    if not smallest.feasible:
        return smallest
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    losses, costs = table.loss.numpy(), table.cost.numpy()
    rows, options = losses.shape
    allowed = np.isfinite(losses)
    finite = np.where(allowed, losses, 0.0)
    finite = np.where(allowed, finite - np.where(allowed, losses, np.inf).min(1, keepdims=True), 0.0)
    # The solver's tolerances are absolute: losses are brought to thousands, costs to their common unit.
    scale = 1e4 / finite.max() if finite.max() > 0 else 1.0
    unit = max(1, int(np.gcd.reduce(costs.ravel())))
    one_each = csr_array(np.kron(np.eye(rows), np.ones((1, options))))
    found = milp(
        (finite * scale).ravel(),
        integrality=np.ones(rows * options),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array((costs // unit).reshape(1, -1).astype(float)), ub=budget // unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise FewbitsError(f"the integer programme was not solved: {found.message}")
    choice = table.choice(torch.from_numpy(found.x.reshape(rows, options).argmax(1)), budget, "ilp")
    if not choice.feasible:
        raise FewbitsError("the integer programme's answer exceeds the budget by rounding; use method 'pareto'")
    return choice


def solve_enumerate(table: Table, budget: int) -> Choice:
    """The least loss within the budget by trying everything. Raises `FewbitsError` beyond two million choices."""
    options = [row.isfinite().nonzero().flatten().tolist() for row in table.loss]
    count = 1
    for row in options:
        count *= len(row)
    if count > _LARGEST:
        raise FewbitsError(f"{count} choices are too many to try; use method 'pareto' or 'ilp'")
    smallest = table.smallest(budget, "enumerate")
    if not smallest.feasible:
        return smallest
    tried = torch.tensor(list(product(*options)))
    rows = torch.arange(len(table.names))
    loss = table.loss[rows, tried].sum(1).masked_fill(table.cost[rows, tried].sum(1) > budget, torch.inf)
    return table.choice(tried[loss.argmin()], budget, "enumerate")
