"""Which columns of a weight a low-bit grid serves worst, and how many of them an average bit width pays for.

OWQ (Lee, Jin, Kim, Kim, Park; AAAI 2024), section "Outlier-aware weight quantization".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.errors import FewbitsError


def column_sensitivity(weight: Tensor, quantized: Tensor | None, hessian: Tensor) -> Tensor:
    """H_jj * sum_i (W_ij - Q_ij)^2: what leaving column j on the grid alone adds to the layer's squared output error.

    weight, quantized: [out, in], or [batch, out, in] of a grouped convolution. hessian: [..., in, in], undamped.
    `quantized` is the weight rounded to nearest on a grid fitted to all of it; None ranks by H_jj alone. Returns float
    [in]; the groups of a batch are summed, as a column of the whole weight runs through all of them.
    """
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    if quantized is not None:
        diagonal = diagonal * (weight.to(diagonal) - quantized.to(diagonal)).square().sum(-2)
    return diagonal.sum(0) if diagonal.dim() == 2 else diagonal


def weakest_columns(sensitivity: Tensor, count: int) -> Tensor:
    """The `count` columns of largest sensitivity [in], in descending order, the lower index first of equals: int64."""
    return sensitivity.argsort(descending=True, stable=True)[:count]


def columns_in_budget(
    shapes: Sequence[tuple[int, int]],
    bits: int,
    target: float,
    *,
    selected: Sequence[bool] | None = None,
    value_bits: int = 16,
    even: bool = True,
) -> list[int]:
    """How many full-precision columns each weight of a block gets so that the block averages `target` bits a weight.

    shapes: (out, in) of the block's weights, all at `bits`. selected: which of them may keep columns (all). Every
    selected weight gets the same share of the block's spare bits, so k = share / (value_bits - bits) / out, rounded to
    nearest and then up to an even number (released kernels want pairs), at most the number of columns.

    With the shapes of OPT, LLaMA and Falcon blocks this is the released rule, k = in * r * ratio with
    r = 12 / (16 - b) * (B - b) / n and a table of ratios by architecture (attention 1, MLP 1/4 or 3/8): the ratios are
    those of in * out / in. Rounding and pairing move the average by at most 1.5 columns a weight.
    """
    chosen = [True] * len(shapes) if selected is None else list(selected)
    if target < bits or target > value_bits or bits >= value_bits:
        raise FewbitsError(
            f"an average of {target:g} bits is not possible between {bits} and {value_bits} bits a weight"
        )
    count = sum(chosen)
    if not count:
        return [0] * len(shapes)
    share = (target - bits) / (value_bits - bits) * sum(out * columns for out, columns in shapes) / count
    kept = []
    for (out, columns), use in zip(shapes, chosen, strict=True):
        k = round(share / out) if use else 0
        kept.append(min(k + (k % 2 if even else 0), columns))
    return kept
