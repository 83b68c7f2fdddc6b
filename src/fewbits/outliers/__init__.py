"""Outliers: weights as sums of typed parts, and how the few values that a grid serves badly are found."""

from fewbits.outliers.parts import Columns, Part, Sparse, part_from_tensors
from fewbits.outliers.tuning import settle_weak_columns, weak_column_parameters
from fewbits.outliers.weak_columns import column_sensitivity, columns_in_budget, weakest_columns

__all__ = [
    "Columns",
    "Part",
    "Sparse",
    "column_sensitivity",
    "columns_in_budget",
    "part_from_tensors",
    "settle_weak_columns",
    "weak_column_parameters",
    "weakest_columns",
]
