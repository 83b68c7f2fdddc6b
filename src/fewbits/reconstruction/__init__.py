"""Reconstruction: optimise what a unit outputs. Losses, task gradients, sampling and the one loop."""

from fewbits.reconstruction.fisher import fisher_weight, kl_gradients
from fewbits.reconstruction.loop import Group, minimise
from fewbits.reconstruction.losses import fisher_diagonal_loss, fisher_full_loss, power_loss
from fewbits.reconstruction.sampling import with_replacement, without_replacement

__all__ = [
    "Group",
    "fisher_diagonal_loss",
    "fisher_full_loss",
    "fisher_weight",
    "kl_gradients",
    "minimise",
    "power_loss",
    "with_replacement",
    "without_replacement",
]
