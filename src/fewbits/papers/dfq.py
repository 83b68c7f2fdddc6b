"""DFQ: Data-Free Quantization Through Weight Equalization and Bias Correction.

Nagel, van Baalen, Blankevoort, Welling (Qualcomm AI Research); ICCV 2019.

Brings transforms: cross-layer equalization, which balances the weight ranges of a channel between layers joined by
ReLU or nothing, pairs and depthwise triples, over and over until it stands still (section 4.1), and the absorption of
the high biases that this leaves into the next layer (4.1.3). Brings corrections: the mean error of a layer's output is
taken from its bias, with the input's mean from batch-norm statistics (4.2), or, `correction=empirical`, from data.
Activation ranges come from the same statistics, beta +- 6 gamma (section 5), sums as sums of independent normals.
Reuses batch-norm folding, ReLU6 run as ReLU, and min/max per-tensor grids rounded to nearest. No data is needed.
Joined with a paper that rounds a unit's weights together for its output (brecq, qdrop), biases are left as they are.

Departs from the released code (`variant="released"`: one pass): any grouped convolution takes part, as do attention
values and gates. Departs from the paper: zeros that convolutions pad with are counted in the mean inputs; ranges
behind layers without a norm take inputs as independent; of the network's input the ends of normalised pixels are known.
"""

from __future__ import annotations

from typing import Literal

from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, PerTensor, affine, symmetric
from fewbits.papers.common import HEAD, input_rules, weight_rules
from fewbits.ranges import MinMax
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.batchnorm import FoldBatchNorm
from fewbits.steps.correct_bias import CorrectBiasByData, CorrectBiasByMoments
from fewbits.steps.equalize import AbsorbBias, Equalize, ReplaceClips
from fewbits.steps.moments import PropagateMoments, RangesFromMoments
from fewbits.steps.nearest import RoundNearest


def recipe(
    bits: Bits,
    *,
    equalize: bool = True,
    passes: int = 0,
    absorb: bool = True,
    absorb_sigmas: float = 3.0,
    correction: Literal["analytic", "empirical", "none"] = "analytic",
    range_sigmas: float = 6.0,
    input_range: str = "",
    unknown: Literal["data", "dynamic"] = "data",
    symmetric_weights: bool = False,
    per_channel: bool = False,
    variant: Literal["paper", "released"] = "paper",
) -> Recipe:
    """`passes`: of equalization over all pairs and triples; 0 until nothing moves. `absorb_sigmas`, `range_sigmas`: in
    standard deviations of a channel.

    `input_range`: "LOW,HIGH" of the network's input, by default from the model's preprocessing. `unknown`: ranges where
    no statistics reach, from calibration data (an error without any) or fitted on every call. `equalize`, `absorb` and
    `correction` turn parts off for comparisons.
    """
    steps: list[Step] = [FoldBatchNorm()]
    if equalize:
        steps += [ReplaceClips(), Equalize(1 if variant == "released" and not passes else passes)]
    if absorb:
        steps.append(AbsorbBias(absorb_sigmas))
    steps.append(PropagateMoments(range_sigmas, _ends(input_range)))
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        steps.append(RangesFromMoments(unknown))
        activations = input_rules(QSpec(affine(bits.activation), PerTensor(), MinMax()), without=HEAD)
    steps.append(RoundNearest())
    if correction != "none":
        steps.append(CorrectBiasByMoments() if correction == "analytic" else CorrectBiasByData())
    grid = symmetric(bits.weight or 8) if symmetric_weights else affine(bits.weight or 8)
    granularity = None if bits.group else PerChannel(0) if per_channel else PerTensor()
    weights = weight_rules(bits, grid, MinMax(), without=HEAD, granularity=granularity)
    return Recipe(
        "dfq",
        bits,
        Scheme(weights, activations),
        tuple(steps),
        Calibration(samples=128, batch_size=32),
        frozenset({"transform", "correction"}),
    )


def _ends(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise FewbitsError(f"option input_range={text!r}: write LOW,HIGH, as in -2.2,2.7") from error
    if not low < high:
        raise FewbitsError(f"option input_range={text!r}: LOW must be below HIGH")
    return low, high
