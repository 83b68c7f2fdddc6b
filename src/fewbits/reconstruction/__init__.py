"""Reconstruction: optimise what a unit outputs. Losses, task gradients, sampling and the one loop."""

from fewbits.reconstruction.dropping import RandomMasks, mixed
from fewbits.reconstruction.fisher import fisher_weight, kl_gradients
from fewbits.reconstruction.loop import minimise
from fewbits.reconstruction.losses import fisher_diagonal_loss, fisher_full_loss, power_loss
from fewbits.reconstruction.lsq import keep_positive, lsq_factor, lsq_quantize, scale_gradient
from fewbits.reconstruction.sampling import with_replacement, without_replacement
from fewbits.reconstruction.steps import Group, Steady

__all__ = [
    "Group",
    "RandomMasks",
    "Steady",
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
    "scale_gradient",
    "with_replacement",
    "without_replacement",
]
