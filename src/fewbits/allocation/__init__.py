"""Who gets how many bits: a table of losses and costs, and solvers under a budget."""

from fewbits.allocation.pareto import Frontier, frontier
from fewbits.allocation.sensitivity import output_divergence
from fewbits.allocation.solvers import solve
from fewbits.allocation.table import Choice, Table

__all__ = ["Choice", "Frontier", "Table", "frontier", "output_divergence", "solve"]
