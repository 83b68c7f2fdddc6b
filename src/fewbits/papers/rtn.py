"""RTN: round to nearest, the baseline every paper is measured against.

Weights: one min/max range per output row (or group), asymmetric, zero inside. Activations: one min/max range per
tensor, from the float model. No data is needed unless activations are quantized.
"""

from __future__ import annotations

from fewbits.formats import PerTensor, affine
from fewbits.papers.common import EMBEDDING, HEAD, input_rules, weight_rules
from fewbits.ranges import MinMax
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.calibrate import CalibrateActivations
from fewbits.steps.nearest import RoundNearest


def recipe(bits: Bits, *, quantize_head: bool = False) -> Recipe:
    """`quantize_head`: also the output layer of language models, which papers keep in floating point."""
    without = EMBEDDING if quantize_head else HEAD
    steps: tuple[Step, ...] = (RoundNearest(),)
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        steps = (CalibrateActivations(), *steps)
        activations = input_rules(QSpec(affine(bits.activation), PerTensor(), MinMax()), without=without)
    weights = weight_rules(bits, affine(bits.weight or 8), MinMax(), without=without)
    return Recipe("rtn", bits, Scheme(weights, activations), steps, Calibration(samples=128, regime="parallel"))
