"""What a site carries beside the grid it is put on, as a few numbers to draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.diagnosis.measures import excerpt
from fewbits.formats import Params, PerTensor, Uniform, expand_params
from fewbits.quantizer import Quantizer

BINS = 80
#: Levels that are drawn as lines of their own.
LEVELS = 260


def histogram(x: Tensor, quantized: Tensor, quantizer: Quantizer, *, permuted: bool = False) -> dict[str, Any] | None:
    """Counts of a tensor's values and the levels that its quantized self takes.

    Where one grid serves the whole tensor, values are as they are; otherwise each is divided by its own block's step
    (uniform grids) or largest level, so that one axis serves all blocks: `unit` is "value", "step" or "largest".
    `permuted` weights have groups that are not contiguous: their unit is the row's largest value.

    Returns:
        JSON-able: `unit`, `low` and `width` of the bins, `counts`, `levels` (ascending; empty where there are more
        than LEVELS), `clipped` (share of the values beyond the ends of the grid, None for permuted weights). None where
        nothing is finite.
    """
    exact = x.detach().float()
    params = None if permuted else _params(quantizer, exact)
    scale, unit = _unit(quantizer, exact, params)
    values, levels = excerpt(exact / scale), excerpt(quantized.detach().float() / scale)
    values, levels = values[values.isfinite()], levels[levels.isfinite()]
    if not len(values) or not len(levels):
        return None
    low, high = float(torch.minimum(values.min(), levels.min())), float(torch.maximum(values.max(), levels.max()))
    width = (high - low) / BINS or 1.0
    counts = torch.histc(values, BINS, min=low, max=low + BINS * width)
    distinct = torch.unique((levels / width).mul(64).round()) / 64 * width
    clipped = None
    if params is not None:
        clipped = float((~quantizer.spec.format.nearest(exact, params)[1]).float().mean())
    return {
        "unit": unit,
        "low": low,
        "width": width,
        "counts": [int(count) for count in counts],
        "levels": [float(f"{level:.5g}") for level in distinct] if len(distinct) <= LEVELS else [],
        "clipped": clipped,
    }


def _params(quantizer: Quantizer, x: Tensor) -> Params:
    """The quantizer's parameters, spread over the tensor."""
    spec = quantizer.spec
    params = quantizer.fit(x) if spec.dynamic else quantizer.params
    params = {name: value.to(x.device) for name, value in params.items()}
    return expand_params(spec.format, spec.granularity, params, x.shape)


def _unit(quantizer: Quantizer, x: Tensor, params: Params | None) -> tuple[Tensor, str]:
    """What to divide each value by, and its name."""
    spec = quantizer.spec
    if params is None:
        return x.abs().amax(-1, keepdim=True).clamp_min(1e-30), "largest"
    if isinstance(spec.granularity, PerTensor) and not spec.dynamic:
        return torch.ones((), device=x.device), "value"
    if isinstance(spec.format, Uniform):
        return spec.format.scale_of(params), "step"
    largest = spec.format.nearest(x, params)[0].abs()
    top = spec.granularity.reduce(largest, lambda block: block.amax(1)).clamp_min(1e-30)
    return spec.granularity.expand(top, x.shape), "largest"
