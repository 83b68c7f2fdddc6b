"""Outliers: weights as sums of typed parts, and how the few values that a grid serves badly are found."""

from fewbits.outliers.parts import Columns, Part, Sparse, part_from_tensors

__all__ = ["Columns", "Part", "Sparse", "part_from_tensors"]
