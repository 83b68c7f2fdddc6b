"""AdaRound: Up or Down? Adaptive Rounding for Post-Training Quantization.

Nagel, Amjad, van Baalen, Louizos, Blankevoort (Qualcomm AI Research); ICML 2020.

Brings a rounding: every weight goes up or down as a rectified sigmoid decides that is trained, layer by layer in
forward order, on the layer's output error past its activation (float target, input from the quantized prefix) and
annealed to 0 or 1 (section 4). Reuses batch-norm folding and a weight range of least squared error. Activations are
quantized afterwards, min/max per tensor.

The paper's tables use one symmetric grid per tensor; `per_channel` takes one per output channel. The exponent of the
regulariser falls on a cosine from step 0, as in the authors' library.
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import PerChannel, PerTensor, affine, symmetric
from fewbits.papers.common import HEAD, input_rules, weight_rules
from fewbits.ranges import MinMax, ShrinkSearch
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.batchnorm import FoldBatchNorm
from fewbits.steps.calibrate import CalibrateActivations
from fewbits.steps.reconstruct import Annealing, ReconstructLayers


def recipe(
    bits: Bits,
    *,
    iterations: int = 0,
    batch: int = 32,
    lr: float = 1e-3,
    reg_param: float = 0.01,
    warm_start: float = 0.2,
    per_channel: bool = False,
    arithmetic: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Recipe:
    """`iterations`: optimiser steps per layer; 0 means 10,000 for 8-bit weights and 15,000 below.

    `arithmetic`: what layers run in while they are learned; 16 bits take less time on a GPU.
    """
    steps_taken = iterations or (15_000 if (bits.weight or 8) < 8 else 10_000)
    annealing = Annealing(reg_param, warm_start, schedule="cosine", first_count=0)
    granularity = PerChannel(0) if per_channel or bits.group else PerTensor()
    grid = symmetric(bits.weight or 8, narrow=False)
    steps: tuple[Step, ...] = (FoldBatchNorm(), ReconstructLayers(steps_taken, batch, lr, annealing, arithmetic))
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        steps = (*steps, CalibrateActivations(late=True))
        activations = input_rules(QSpec(affine(bits.activation), PerTensor(), MinMax()), without=HEAD)
    weights = weight_rules(
        bits, grid, ShrinkSearch(p=2.0), without=HEAD, granularity=None if bits.group else granularity
    )
    return Recipe("adaround", bits, Scheme(weights, activations), steps, Calibration(1024, 32), frozenset({"rounding"}))
