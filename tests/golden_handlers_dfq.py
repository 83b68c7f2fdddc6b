"""What each golden case of DFQ must reproduce: the parts that its steps are made of, on the case's arrays."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.correction import channel_mean, clipped_normal, corrected_bias, mean_output
from fewbits.transforms import absorb_shift, fold_into_outputs, scale_inputs
from fewbits.transforms.absorb import absorbable
from fewbits.transforms.equalize import column_ranges, pair_scales, row_ranges, triple_scales

RELATIVE = 1e-5


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=RELATIVE, atol=RELATIVE * float(expected.abs().max()))


def cle_conv_conv(data: dict) -> None:
    first, second = data["w0"], data["w1"]
    scale = pair_scales(row_ranges(first), column_ranges(second))
    close(scale, data["scale"])
    weight, bias = fold_into_outputs(first, data["b0"], scale)
    assert bias is not None
    close(weight, data["w0_eq"])
    close(bias, data["b0_eq"])
    close(scale_inputs(second, scale), data["w1_eq"])


def cle_conv_dw_conv(data: dict) -> None:
    first, middle, last = data["w0"], data["w1"], data["w2"]
    groups = middle.shape[0] // middle.shape[1]
    assert torch.equal(row_ranges(middle), column_ranges(middle, groups)), "one filter per channel"
    s12, s23 = triple_scales(row_ranges(first), row_ranges(middle), column_ranges(last))
    close(s12, data["s12"])
    close(s23, data["s23"])
    weight, bias = fold_into_outputs(first, data["b0"], s12)
    assert bias is not None
    close(weight, data["w0_eq"])
    close(bias, data["b0_eq"])
    weight, bias = fold_into_outputs(scale_inputs(middle, s12, groups=groups), data["b1"], s23)
    assert bias is not None
    close(weight, data["w1_eq"])
    close(bias, data["b1_eq"])
    close(scale_inputs(last, s23), data["w2_eq"])


def high_bias_absorption(data: dict) -> None:
    for mode in ("relu", "linear"):
        c = absorbable(data["beta"], data["gamma"], clipped=mode == "relu")
        for prefix, following, bias in (("", "w_next", "b_next"), ("dw_", "w_next_depthwise", "b_next_depthwise")):
            weight = data[following]
            groups = len(c) // weight.shape[1]
            before = f"{prefix}b_prev_out_{mode}"
            close(data["b_prev"] - c, data[before])
            close(absorb_shift(weight, data[bias], -c, groups=groups), data[f"{prefix}b_next_out_{mode}"])


def bias_correction(data: dict) -> None:
    ends = {"no_activation": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
    for mode, (low, high) in ends.items():
        mean, _ = clipped_normal(data["beta"], data["gamma"], low, high)
        for prefix in ("", "_dw"):
            weight, quantized, bias = data[f"w{prefix}"], data[f"w{prefix}_q"], data[f"b{prefix}"]
            groups = len(mean) // weight.shape[1]
            patch = mean.view(1, -1, 1, 1).expand(1, -1, *weight.shape[2:])
            reference, now = (
                mean_output(partial(_convolve, groups), held, patch, axis=1) for held in (weight, quantized)
            )
            close(corrected_bias(bias, now, reference), data[f"b{prefix}_corrected_{mode}"])
    means = (channel_mean(data[name], 1) for name in ("out_q", "out_fp"))
    close(corrected_bias(data["b"], *means), data["b_empirical"])


def _convolve(groups: int, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, groups=groups)


HANDLERS = {
    "dfq": {
        "cle_conv_conv": cle_conv_conv,
        "cle_conv_dw_conv": cle_conv_dw_conv,
        "high_bias_absorption": high_bias_absorption,
        "bias_correction": bias_correction,
    }
}
