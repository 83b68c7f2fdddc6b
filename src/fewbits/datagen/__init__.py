"""Calibration data made from a trained model: a loop over images, and the objectives that pull at them."""

from fewbits.datagen.images import Pixels, Plateau, integer_noise, optimise_images
from fewbits.datagen.matching import (
    InputMatching,
    Objective,
    StatisticsMatching,
    feature_statistics,
    matching_loss,
    stored_statistics,
)

__all__ = [
    "InputMatching",
    "Objective",
    "Pixels",
    "Plateau",
    "StatisticsMatching",
    "feature_statistics",
    "integer_noise",
    "matching_loss",
    "optimise_images",
    "stored_statistics",
]
