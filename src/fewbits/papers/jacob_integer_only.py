"""Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.

Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko (Google); CVPR 2018.

Brings the grid of integer-only devices: per-tensor affine bytes in which real zero has a code of its own (section 2.1),
weights without the lowest code, and biases that are int32 at the product of input and weight scale (2.4). Brings the
placement of activation quantizers where such a device makes bytes (section 3): the network's input; a layer's output
with batch norm and ReLU done; sums, whose inputs are bytes too; concatenations and averages, which share one grid with
what they read. Ranges are min/max of the float network's activations, or, `ema` above 0, the moving averages of the
paper's training. Reuses batch-norm folding and rounding to nearest. `fewbits.export.integer` runs the result in
integers alone. The training half of the paper (fake quantization with gradients) is no post-training method and is
left out.

Departs from the paper's text: layers whose weights stay in floating point (embeddings, language-model heads) keep
float outputs; ops that the paper does not treat (norms, attention products) get bytes at their outputs by the same
rule. `per_channel` is later practice: symmetric weights with one scale per output channel.
"""

from __future__ import annotations

from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, PerTensor, integer_affine, symmetric
from fewbits.papers.common import HEAD, weight_rules
from fewbits.ranges import Fixed, MinMax
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.batchnorm import FoldBatchNorm
from fewbits.steps.integer_only import CalibrateShared, RoundBias
from fewbits.steps.nearest import RoundNearest


def recipe(
    bits: Bits,
    *,
    ema: float = 0.0,
    narrow_weights: bool = True,
    per_channel: bool = False,
    quantize_output: bool = True,
    integer_bias: bool = True,
) -> Recipe:
    """`ema`: smoothing of the activation ranges over calibration batches, as 0.99; 0 takes the extremes of all.
    `narrow_weights`: leave the lowest weight code free (the generic library uses it). `quantize_output`: also what the
    last layer puts out. `integer_bias`: round biases to the int32 grid.
    """
    if bits.group:
        raise FewbitsError("jacob-integer-only: integer accumulators need one weight scale a tensor (or channel), not "
                           "one a group; leave the group out of the bits")  # fmt: skip
    steps: list[Step] = [FoldBatchNorm()]
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        grid = integer_affine(bits.activation)
        spec = QSpec(grid, PerTensor(), MinMax())
        last = frozenset() if quantize_output else frozenset({"last_layer"})
        softmax = QSpec(grid, PerTensor(), Fixed(0.0, 1 - 2.0**-bits.activation))
        activations = (
            Rule(spec, roles=("output",), tags=frozenset({"requantized"}), without=HEAD | last),
            Rule(softmax, roles=("output",), tags=frozenset({"requantized", "post_softmax"})),
            Rule(spec, roles=("input", "lhs", "rhs"), tags=frozenset({"entering"}), without=HEAD),
        )
        steps.append(CalibrateShared(ema))
    steps.append(RoundNearest())
    if integer_bias and bits.activation is not None and bits.weight is not None:
        steps.append(RoundBias())
    width = bits.weight or 8
    weights = weight_rules(
        bits,
        symmetric(width, rounding="half_away") if per_channel else integer_affine(width, narrow=narrow_weights),
        MinMax(),
        without=HEAD,
        granularity=PerChannel(0) if per_channel else PerTensor(),
    )
    return Recipe(
        "jacob-integer-only",
        bits,
        Scheme(weights, activations),
        tuple(steps),
        Calibration(samples=256, batch_size=32, regime="parallel"),
        frozenset({"activations", "weight_grid"}),
    )
