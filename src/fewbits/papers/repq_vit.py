"""RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers.

Li, Xiao, Yang, Gu (Institute of Automation, Chinese Academy of Sciences); ICCV 2023.

Brings the split of calibration quantizers from inference quantizers (section 4). Inputs that a LayerNorm feeds are
calibrated channel by channel, then turned into one quantizer per tensor by a scale and a shift folded into the norm and
the next weights, which are re-calibrated; attention maps use a log-sqrt2 grid, run as base-2 shifts with a parity
factor. Ranges are the best of three quantiles by squared error. Weights are per output channel, asymmetric; inputs of
convolutions stay at 8 bits. Everything is calibrated in one forward in which earlier quantizers already act.

Departs from the released code (`variant="released"` reproduces it): the mean zero point is rounded first, so codes are
integers; the top code of the log grid is kept for exact zero, so that it has 2^b levels, not 2^b + 1.
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import LogSqrt2, PerChannel, PerTensor, raw_affine
from fewbits.papers.common import HEAD, at_bits, input_rules, weight_rules
from fewbits.ranges import QuantileSearch
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme
from fewbits.steps.calibrate import CalibrateInline
from fewbits.steps.nearest import RoundNearest
from fewbits.steps.norm_folds import FOLDABLE, Reparameterize


def recipe(bits: Bits, *, samples_at_once: int = 32, variant: Literal["paper", "released"] = "paper") -> Recipe:
    """`samples_at_once`: images in the one calibration forward."""
    released = variant == "released"
    search = QuantileSearch()
    weights = weight_rules(bits, raw_affine(bits.weight or 8), search, without=HEAD)
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        tensor = QSpec(raw_affine(bits.activation), PerTensor(), search)
        channel = QSpec(raw_affine(bits.activation), PerChannel(-1), search)
        maps = QSpec(LogSqrt2(bits.activation, zero_code=not released), PerTensor(), search)
        activations = (
            *input_rules(tensor, without=HEAD),
            Rule(channel, roles=("input",), tags=frozenset({FOLDABLE}), without=HEAD),
            Rule(maps, roles=("lhs", "input"), tags=frozenset({"matmul_operand", "post_softmax"})),
            Rule(at_bits(tensor, 8), roles=("input",), tags=frozenset({"layer_input", "conv"})),
        )
    return Recipe(
        "repq-vit",
        bits,
        Scheme(weights, activations),
        (CalibrateInline(samples_at_once), Reparameterize(round_zero_point=not released), RoundNearest()),
        Calibration(samples=32, batch_size=32),
        frozenset({"transform", "activations", "weight_grid"}),
    )
