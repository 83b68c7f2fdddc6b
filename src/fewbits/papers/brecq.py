"""BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction.

Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu (UESTC, SenseTime Research); ICLR 2021.

Brings the residual block as the unit of reconstruction: the rounding variables of all weights in a block are trained
together on the block's output error, optionally weighted by the diagonal or full Fisher information (sections 3.2 and
3.3). Then, weights final, the step sizes of the activation quantizers are tuned block by block. Reuses AdaRound's
relaxation, batch-norm folding, per-channel affine weights and per-tensor activations, both with the range of least
|error|^2.4. First and last layer: 8-bit weights, and the first layer is rounded to nearest. Activations are quantized
after a layer's activation and after a residual add's, not on the branches. On a transformer that puts one range on the
residual stream, twice a block, where no norm has tamed it; `placement` "inputs" leaves the stream in floating point.

Departs from the released code: the tensor that feeds the last layer is kept at 8 bits itself, before pooling or a final
norm (the release sets another tensor on ResNets). The paper's genetic mixed-precision search is not in this recipe.
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import PerTensor, raw_affine
from fewbits.papers.common import HEAD, block_rules, edge_rules, weight_rules
from fewbits.ranges import ShrinkSearch
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.batchnorm import FoldBatchNorm
from fewbits.steps.calibrate import CalibrateInline
from fewbits.steps.reconstruct import Annealing, LearnSteps, ReconstructUnit


def recipe(
    bits: Bits,
    *,
    iters_w: int = 20_000,
    iters_a: int = 5_000,
    batch: int = 32,
    round_weight: float = 0.01,
    lr: float = 4e-4,
    opt_mode: Literal["mse", "fisher_diag", "fisher_full"] = "mse",
    fisher_damping: float = 1.0,
    edges_8bit: bool = True,
    placement: Literal["outputs", "inputs"] = "outputs",
    arithmetic: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Recipe:
    """`lr`: of the activation step sizes. `edges_8bit`: first and last layer at 8 bits.

    `placement`: activation quantizers at the outputs of layers and blocks, or at the inputs of layers.
    `arithmetic`: what blocks run in while they are learned; 16 bits take less time on a GPU.
    """
    search = ShrinkSearch()
    weights = weight_rules(bits, raw_affine(bits.weight or 8), search, without=HEAD)
    steps: tuple[Step, ...] = (
        FoldBatchNorm(),
        ReconstructUnit(
            iters_w,
            batch,
            loss=opt_mode,
            fisher_damping=fisher_damping,
            annealing=Annealing(round_weight),
            arithmetic=arithmetic,
        ),
    )
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        spec = QSpec(raw_affine(bits.activation), PerTensor(), search)
        tuning = LearnSteps(iters_a, batch, lr, arithmetic=arithmetic)
        steps = (*steps, CalibrateInline(samples=64, weights=False, late=True), tuning)
        activations = block_rules(spec, placement)
    overrides: tuple[Rule, ...] = ()
    if edges_8bit:
        overrides = edge_rules(weights, ("first_layer", "last_layer"), 8)
        overrides += edge_rules(activations, ("first_layer", "feeds_last_layer", "last_layer"), 8)
    return Recipe(
        "brecq",
        bits,
        Scheme(weights, activations, overrides),
        steps,
        Calibration(1024, 32),
        frozenset({"rounding", "tuning"}),
    )
