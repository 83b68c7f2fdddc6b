"""Transforms: tensor edits that keep the float function while making it easier to quantize."""

from fewbits.transforms.fold import (
    FoldedBatchNorm,
    absorb_shift,
    fold_batch_norm,
    fold_into_norm,
    fold_into_outputs,
    scale_inputs,
)
from fewbits.transforms.reparameterize import Reparameterization, reparameterize
from fewbits.transforms.smoothing import smoothing_scales

__all__ = [
    "FoldedBatchNorm",
    "Reparameterization",
    "absorb_shift",
    "fold_batch_norm",
    "fold_into_norm",
    "fold_into_outputs",
    "reparameterize",
    "scale_inputs",
    "smoothing_scales",
]
