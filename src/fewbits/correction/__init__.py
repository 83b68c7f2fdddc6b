"""Correction: undoing, after quantization, the shift that it left in the mean of weights or of a layer's output."""

from fewbits.correction.analytic import clipped_normal, mean_output
from fewbits.correction.bias import channel_mean, corrected_bias
from fewbits.correction.weight_moments import moment_correction, moved_grid, with_real_offset

__all__ = [
    "channel_mean",
    "clipped_normal",
    "corrected_bias",
    "mean_output",
    "moment_correction",
    "moved_grid",
    "with_real_offset",
]
