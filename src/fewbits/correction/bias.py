"""Biases that take back what quantization does to a layer's mean output."""

from __future__ import annotations

from torch import Tensor

from fewbits.errors import FewbitsError


def corrected_bias(bias: Tensor, quantized: Tensor, reference: Tensor) -> Tensor:
    """bias - (quantized - reference), all [out]: the mean output is the reference's again.

    The means come from statistics (`correction.analytic`) or from data (Nagel et al., ICCV 2019, section 4.2 and
    appendix D: layer by layer, everything before quantized and corrected already). In the bias's dtype, computed in
    float64.
    """
    if not bias.shape == quantized.shape == reference.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (bias, quantized, reference))
        raise FewbitsError(f"bias correction: bias and means must have one shape, not {shapes}")
    return (bias.double() - (quantized.double() - reference.double())).to(bias.dtype)


def channel_mean(x: Tensor, axis: int) -> Tensor:
    """Mean over everything but the channel axis, float64 [channels]."""
    return x.double().movedim(axis, 0).flatten(1).mean(1)
