"""Rounding: from a weight and what is known of its inputs to codes on a grid."""

from fewbits.rounding.adaround import (
    LearnedRounding,
    RoundingRegulariser,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_penalty,
    temperature,
)
from fewbits.rounding.column_grids import decode_columns, spread_columns
from fewbits.rounding.gptq import Solution, gptq
from fewbits.rounding.hessian import HessianAccumulator, conv_patches
from fewbits.rounding.matrix import matrix_weight, row_params, weight_matrix
from fewbits.rounding.nearest import nearest

__all__ = [
    "HessianAccumulator",
    "LearnedRounding",
    "RoundingRegulariser",
    "Solution",
    "conv_patches",
    "decode_columns",
    "gptq",
    "inverse_rectified_sigmoid",
    "matrix_weight",
    "nearest",
    "rectified_sigmoid",
    "rounding_penalty",
    "row_params",
    "spread_columns",
    "temperature",
    "weight_matrix",
]
