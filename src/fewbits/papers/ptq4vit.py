"""PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform Quantization.

Yuan, Xue, Chen, Wu, Sun (Peking University, Houmo AI); ECCV 2022.

Brings twin uniform grids (section 3.1): one bit picks one of two regions whose steps differ by a power of two, by
magnitude behind softmax, by sign behind GELU. Brings the Hessian-guided search (section 3.2): the intervals of weights
and activations are searched in turn, each candidate judged by the error it makes at the layer's output, weighted with
the squared gradient of the task loss there. Everything is symmetric, without zero points: one interval for a linear's
weight, one for each of q, k and v where one layer makes them, one per head for the operands of attention products, one
per channel for convolutions. All statistics come from the float model. `base` is the base PTQ of the same paper: cosine
similarity, uniform grids everywhere, one round, a narrower range of candidates.

Departs from the released code (`variant="released"` reproduces it): the softmax grid chooses its region instead of
adding both regions' values; the positive step behind GELU is tied to the negative one by a power of two. The release
differentiates the divergence of the float model from itself, which is zero but for round-off; here the loss is defined
(`loss`). Outside ViTs, inputs of convolutions are quantized too, save those of the first layer.
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import (
    Granularity,
    PerBlock,
    PerChannel,
    PerHead,
    PerTensor,
    TwinMagnitude,
    TwinSign,
    symmetric,
)
from fewbits.papers.common import HEAD, input_rules, weight_rules
from fewbits.ranges import LayerSearch
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.layer_search import HEADS, SearchLayers, SplitFused, TaskGradients
from fewbits.steps.nearest import RoundNearest

CONV = frozenset({"conv"})
Metric = Literal["hessian", "cosine", "pearson", "l2", "l1", "linear_weighted_l2", "square_weighted_l2"]


def recipe(
    bits: Bits,
    *,
    metric: Metric | None = None,
    loss: Literal["pseudo", "sampled", "next_token", "kl"] = "pseudo",
    alpha: float | None = None,
    beta: float = 1.2,
    candidates: int = 100,
    rounds: int | None = None,
    twin_softmax: bool | None = None,
    twin_gelu: bool | None = None,
    gelu_tie: Literal["negative", "positive", "none"] | None = None,
    row_blocks: int = 1,
    column_blocks: int = 1,
    input_chunks: int = 1,
    sequential: bool = False,
    base: bool = False,
    variant: Literal["paper", "released"] = "paper",
) -> Recipe:
    """`metric`: hessian unless `base`. `loss`: whose gradient the Hessian metric takes. `alpha`, `beta`: candidates lie
    between these multiples of the min-max interval (alpha 0.01, 0.5 with `base`). `rounds`: 3, 1 with `base`.
    `gelu_tie`: how the two steps behind GELU belong together (`formats.twin.TwinSign`; "none" as released).
    `row_blocks`, `column_blocks`, `input_chunks`: intervals per weight (per operand of a fused projection) and input.
    `sequential`: layers see what the quantized units before them give.
    """
    released = variant == "released"
    metric = metric or ("cosine" if base else "hessian")
    rounds = rounds if rounds is not None else (1 if base else 3)
    alpha = alpha if alpha is not None else (0.5 if base else 0.01)
    search = LayerSearch(alpha, beta, candidates)

    def uniform(width: int, granularity: Granularity) -> QSpec:
        # the first interval is max|t| / (2^(b-1) - 1/2)
        return QSpec(symmetric(width, narrow=False, step="span"), granularity, search)

    weights: tuple[Rule, ...] = ()
    if bits.weight is not None:
        blocks = PerTensor() if row_blocks == column_blocks == 1 else PerBlock(row_blocks, column_blocks)
        linear = uniform(bits.weight, blocks)
        grid = None if bits.group else linear.granularity
        weights = weight_rules(bits, linear.format, search, without=HEAD, granularity=grid)
        if not bits.group:
            conv = uniform(bits.weight, PerTensor() if base else PerChannel(0))
            weights = (*weights, Rule(conv, roles=("weight",), tags=CONV, without=HEAD))
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        width = bits.activation
        tensor = uniform(width, PerTensor())
        chunks = tensor if input_chunks == 1 else uniform(width, PerHead(-1, heads=input_chunks))
        rules = [
            *input_rules(chunks, without=HEAD),
            Rule(tensor, roles=("lhs", "rhs"), tags=frozenset({"matmul_operand"})),
            Rule(uniform(width, PerHead(1)), roles=("lhs", "rhs"), tags=frozenset({"matmul_operand", HEADS})),
            Rule(tensor, roles=("input",), tags=frozenset({"layer_input", "conv"})),
        ]
        if twin_gelu if twin_gelu is not None else not base:
            tie = gelu_tie or ("none" if released else "negative")
            spec = QSpec(TwinSign(width, tie=tie), PerTensor(), search)
            rules.append(Rule(spec, roles=("input",), tags=frozenset({"layer_input", "post_gelu"}), without=HEAD))
        if twin_softmax if twin_softmax is not None else not base:
            spec = QSpec(TwinMagnitude(width, additive=released), PerTensor(), search)
            rules.append(Rule(spec, roles=("lhs", "rhs"), tags=frozenset({"matmul_operand", "post_softmax"})))
        # pixels stay as they are
        rules.append(Rule(None, roles=("input",), tags=frozenset({"conv", "first_layer"})))
        activations = tuple(rules)
    steps: list[Step] = [SplitFused(row_blocks)]
    if metric == "hessian":
        steps.append(TaskGradients(loss))
    stream: Literal["float", "quantized"] = "quantized" if sequential else "float"
    steps += [SearchLayers(metric, rounds, stream), RoundNearest()]
    return Recipe(
        "ptq4vit",
        bits,
        Scheme(weights, activations),
        tuple(steps),
        Calibration(samples=32, batch_size=8, regime="sequential" if sequential else "parallel"),
        frozenset({"activations", "weight_grid"}),
    )
