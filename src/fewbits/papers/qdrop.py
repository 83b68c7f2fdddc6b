"""QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization.

Wei, Gong, Li, Liu, Yu (Beihang University, SenseTime Research); ICLR 2022; openreview ySQH0oDyp7.

Brings dropping to reconstruction: rounding variables and activation step sizes of a block are trained together while,
element by element and anew at every step, half of each quantized activation is left in floating point: of the block's
input, of every quantizer inside, of its own output (section 4). Noise in many directions flattens the loss around data
beyond the calibration set. Ranges are searched over width and zero point together, the activations' on the first 256
images of the float model. Reuses BRECQ's blocks, inputs from the quantized prefix, AdaRound's relaxation, and LSQ's
gradient of step sizes. Weights of the first and the last layer and the activation that the last layer reads have 8
bits; all units are trained, the first included; the image is not quantized.

Departs from the released code: where pooling or a norm lies before the last layer, what comes out of it is quantized
too, to 8 bits, beside what goes in.
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import PerTensor, Uniform, affine
from fewbits.papers.common import HEAD, block_rules, edge_rules, weight_rules
from fewbits.ranges import JointSearch
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.batchnorm import FoldBatchNorm
from fewbits.steps.calibrate import CalibrateActivations
from fewbits.steps.reconstruct import Annealing, ReconstructDropping


def _grid(bits: int) -> Uniform:
    """Unsigned with an integer zero point; a tensor of zeros gets the smallest step, 1e-8."""
    return affine(bits, eps=1e-8, zero_range="eps")


def recipe(
    bits: Bits,
    *,
    iters: int = 20_000,
    batch: int = 32,
    keep: float = 0.5,
    round_weight: float = 0.01,
    scale_lr: float = 4e-5,
    observe: int = 256,
    candidates: int = 100,
    edges_8bit: bool = True,
    placement: Literal["outputs", "inputs"] = "outputs",
    arithmetic: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Recipe:
    """`keep`: probability that an element stays quantized, 1 for no dropping. `round_weight`: of the rounding
    regulariser; 0.1 for MobileNetV2, 0.2 for MnasNet. `scale_lr`: learning rate of activation steps.

    `observe`: images for the activation ranges. `candidates`: widths tried for a range. `edges_8bit`: 8 bits at the
    first and last layer. `placement`: activation quantizers at the outputs of layers and blocks, or at the inputs of
    layers. `arithmetic`: what blocks run in while they are learned; 16 bits take less time on a GPU.
    """
    search = JointSearch(candidates, p=2.4)
    weights = weight_rules(bits, _grid(bits.weight or 8), search, without=HEAD)
    steps: tuple[Step, ...] = (
        FoldBatchNorm(),
        ReconstructDropping(
            iters,
            batch,
            keep=keep,
            scale_lr=scale_lr,
            samples=observe,
            annealing=Annealing(round_weight),
            arithmetic=arithmetic,
        ),
    )
    activations: tuple[Rule, ...] = ()
    overrides: tuple[Rule, ...] = ()
    if bits.activation is not None:
        spec = QSpec(_grid(bits.activation), PerTensor(), search)
        steps = (*steps, CalibrateActivations(observe, stream="float"))
        activations = block_rules(spec, placement)
    if edges_8bit:
        overrides = edge_rules(weights, ("first_layer", "last_layer"), 8)
        overrides += edge_rules(activations, ("feeds_last_layer", "last_layer"), 8)
    return Recipe(
        "qdrop",
        bits,
        Scheme(weights, activations, overrides),
        steps,
        Calibration(1024, 32),
        frozenset({"rounding", "tuning"}),
    )
