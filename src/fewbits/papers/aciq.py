"""ACIQ: Post-training 4-bit quantization of convolutional networks for rapid deployment.

Banner, Nahshan, Soudry (Intel, Technion); NeurIPS 2019; arXiv:1810.05723.

Brings three formulas, none of which needs training. Activations are clipped where the expected error of a Laplace (or
normal) prior is least for the bits at hand (section 3). Channels of a tensor share its bits by spread^(2/3), up to 4 of
them on average, and each is clipped as its own number of bits asks (section 4). Rounding to nearest moves the mean of a
weight channel, and its deviation; that is undone in scale and offset (section 5). Weights themselves are not clipped.
Reuses batch-norm folding and asymmetric grids with an integer zero point.

Quantizers sit on what layers compute, before residual sums; where a ReLU follows, the range starts at zero and so does
the work of the ReLU. Convolutions are quantized channel by channel, everything else per tensor. First layer, classifier
and pools: 8 bits, not clipped.

Departs from the released code: bits meet their mean exactly where they can (`variant="released"`: ten rounds that may
end beside it); a normal prior's clip follows the bits of the channel too; offline extremes are those of all samples,
not averages; 8-bit grids round half to even, not away; Inception's second convolution is quantized like others. Beyond
the paper's networks: a ReLU6 bounds the range at 6; other activations are quantized behind them, and so are layer
inputs that norms, products or softmax make.
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import ChannelBits, Format, PerChannel, PerTensor, raw_affine
from fewbits.papers.common import HEAD, weight_rules
from fewbits.ranges import Analytic, MinMax, Range
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.batchnorm import FoldBatchNorm
from fewbits.steps.calibrate import AttachDynamic, CalibrateActivations
from fewbits.steps.nearest import RoundNearest
from fewbits.steps.weight_moments import CorrectWeightMoments


def recipe(
    bits: Bits,
    *,
    prior: Literal["laplace", "gauss", "deviations", "none"] = "laplace",
    statistics: Literal["offline", "online"] = "offline",
    allocation: Literal["both", "weights", "activations", "none"] = "both",
    bit_rounding: Literal["round", "ceil"] = "round",
    correction: Literal["mean", "deviation", "both", "none"] = "mean",
    variant: Literal["paper", "released"] = "paper",
) -> Recipe:
    """`prior`: of the activations; `deviations` clips at two standard deviations, `none` at the extremes.

    `statistics`: averages over calibration samples, or fitted to every batch that comes (needs no data).
    `allocation`: which tensors share bits among channels; those of more than 4 bits never do. `correction`: of the
    weights' channels.
    """
    online = statistics == "online"
    budget: Literal["exact", "rounds"] = "exact" if variant == "paper" else "rounds"

    def spread(width: int, what: str) -> Format:
        return ChannelBits(width) if width <= 4 and allocation in ("both", what) else grid(width)

    weights: tuple[Rule, ...] = ()
    if bits.weight is not None:
        fmt = spread(bits.weight, "weights")
        shared = Analytic("none", rounding=bit_rounding, budget=budget)
        own: Range = shared if isinstance(fmt, ChannelBits) else MinMax()
        edge = QSpec(grid(8), PerChannel(0), MinMax())
        weights = (
            *weight_rules(bits, fmt, own, without=HEAD),
            *(Rule(edge, ("weight",), tags=frozenset({tag}), without=HEAD) for tag in ("first_layer", "last_layer")),
        )
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        flat, maps = grid(bits.activation), spread(bits.activation, "activations")

        def rules(roles: tuple[str, ...], tags: set[str], half: bool = False, most: float | None = None) -> list[Rule]:
            clip = Analytic(prior, half, most, rounding=bit_rounding, budget=budget)
            every, convolved = QSpec(flat, PerTensor(), clip, online), QSpec(maps, PerChannel(1), clip, online)
            return [
                Rule(spec, roles, tags=frozenset(tags | more), without=HEAD)
                for spec, more in ((every, set[str]()), (convolved, {"feature_map"}))
            ]

        def edges(tags: set[str], half: bool = False, most: float | None = None) -> list[Rule]:
            spec = QSpec(grid(8), PerTensor(), Analytic("none", half, most), online)
            return [Rule(spec, ("output", "input"), tags=frozenset(tags), without=HEAD)]

        activations = (
            *rules(("output",), {"layer_result"}),
            *rules(("output",), {"layer_result", "before_relu"}, True),
            *rules(("output",), {"layer_result", "before_relu6"}, True, 6.0),
            *rules(("input", "lhs", "rhs"), {"bare_of_results"}),
            *rules(("lhs", "rhs", "input"), {"bare_of_results", "post_softmax"}, True),
            *edges({"layer_result", "first_layer"}),
            *edges({"layer_result", "first_layer", "before_relu"}, True),
            *edges({"layer_result", "first_layer", "before_relu6"}, True, 6.0),
            *edges({"layer_result", "last_layer"}),
            *edges({"bare_of_results", "last_layer"}),
            *edges({"pooled"}),
        )
    steps: list[Step] = [FoldBatchNorm()]
    if bits.activation is not None:
        steps.append(AttachDynamic() if online else CalibrateActivations())
    steps.append(RoundNearest())
    if correction != "none":
        steps.append(CorrectWeightMoments(correction != "deviation", correction != "mean"))
    return Recipe(
        "aciq",
        bits,
        Scheme(weights, activations),
        tuple(steps),
        Calibration(32, 32, regime="parallel"),
        frozenset({"activations", "weight_grid", "correction"}),
    )


def grid(bits: int) -> Format:
    """The integer quantizer of the paper: asymmetric, zero exactly representable where the range holds it."""
    return raw_affine(bits, order="shift_then_round", eps=1e-8, zero_range="eps")
