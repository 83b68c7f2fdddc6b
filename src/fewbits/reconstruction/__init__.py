"""Reconstruction: optimise what a unit outputs. Losses, task gradients, sampling and the one loop."""

from fewbits.reconstruction.dropping import mixed, random_masks
from fewbits.reconstruction.fisher import fisher_weight, kl_gradients
from fewbits.reconstruction.loop import Group, minimise
from fewbits.reconstruction.losses import fisher_diagonal_loss, fisher_full_loss, power_loss
from fewbits.reconstruction.lsq import keep_positive, lsq_factor, lsq_quantize, scale_gradient
from fewbits.reconstruction.sampling import with_replacement, without_replacement

__all__ = [
    "Group",
    "fisher_diagonal_loss",
    "fisher_full_loss",
    "fisher_weight",
    "keep_positive",
    "kl_gradients",
    "lsq_factor",
    "lsq_quantize",
    "minimise",
    "mixed",
    "power_loss",
    "random_masks",
    "scale_gradient",
    "with_replacement",
    "without_replacement",
]
