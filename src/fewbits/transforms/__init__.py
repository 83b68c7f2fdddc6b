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
from fewbits.transforms.searched_scaling import SearchedScale, magnitude_scales, search_scales
from fewbits.transforms.smoothing import smoothing_scales

__all__ = [
    "FoldedBatchNorm",
    "Reparameterization",
    "SearchedScale",
    "absorb_shift",
    "fold_batch_norm",
    "fold_into_norm",
    "fold_into_outputs",
    "magnitude_scales",
    "reparameterize",
    "scale_inputs",
    "search_scales",
    "smoothing_scales",
]
