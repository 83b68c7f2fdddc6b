"""One call for every solver: `solve(table, budget, method=...)`."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from fewbits.allocation.exact import solve_enumerate, solve_ilp
from fewbits.allocation.heuristic import solve_genetic, solve_greedy
from fewbits.allocation.pareto import solve_pareto
from fewbits.allocation.table import Choice, Table
from fewbits.errors import FewbitsError

Method = Literal["pareto", "ilp", "enumerate", "greedy", "genetic"]


def solve(
    table: Table,
    budget: int,
    method: Method = "pareto",
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Choice:
    """One option per row with little total loss and a total cost of at most `budget`.

    method: "pareto" (dynamic programme over the frontier), "ilp" (integer programme) and "enumerate" (small tables)
    are exact; "greedy" and "genetic" are not. `generator` and `options` are for "genetic" (`solve_genetic`).
    A budget below the cheapest choice is no error: that choice is returned with `feasible` False.
    """
    if method == "genetic":
        return solve_genetic(table, budget, generator=generator or torch.Generator().manual_seed(0), **options)
    solvers = {"pareto": solve_pareto, "ilp": solve_ilp, "enumerate": solve_enumerate, "greedy": solve_greedy}
    if method not in solvers:
        raise FewbitsError(f"allocation method {method!r}: choose one of {', '.join(get_args(Method))}")
    if options:
        raise FewbitsError(f"allocation method {method!r} takes no option {', '.join(options)}")
    return solvers[method](table, budget)
