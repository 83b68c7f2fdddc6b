"""SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models.

Xiao, Lin, Seznec, Wu, Demouth, Han (MIT, NVIDIA); ICML 2023; arXiv:2211.10438.

Brings a transform: between each norm and the linears that read it, channel j is divided by s_j = max|X_j|^alpha /
max|W_j|^(1-alpha) and the weights' column j multiplied by it (section 4, equation 4), folded into the norm. One s for
all linears that share the input. Reuses symmetric absmax grids. Efficiency levels: weights per tensor (or per output
channel), activations per token (or per tensor), dynamic or static. Head, embeddings, norms, softmax and residuals stay
floating point; out-projection and second MLP layer are quantized but not smoothed.

Departs from the released code: a channel that is zero on all calibration data keeps s = 1 (`variant="released"` lets
the clamp at 1e-5 decide). `quantize_bmm` puts quantizers on both operands of the attention products (the released code:
on the outputs of q, k, v).
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import PerChannel, PerTensor, PerToken, symmetric
from fewbits.papers.common import HEAD, input_rules, weight_rules
from fewbits.ranges import AbsMax
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme
from fewbits.steps.calibrate import CalibrateActivations
from fewbits.steps.nearest import RoundNearest
from fewbits.steps.norm_folds import Smooth


def recipe(
    bits: Bits,
    *,
    alpha: float = 0.5,
    weights: Literal["channel", "tensor"] = "channel",
    activations: Literal["token", "tensor", "tensor_static"] = "token",
    quantize_bmm: bool = False,
    variant: Literal["paper", "released"] = "paper",
) -> Recipe:
    """`alpha`: 0.5 for OPT and BLOOM, 0.85 for LLaMA-2 and -3, 0.8 for Mistral, 0.6 for Falcon-7B.

    O1 is weights=tensor, activations=token; O2 weights=tensor, activations=tensor; O3 activations=tensor_static.
    """
    rows = PerTensor() if weights == "tensor" else PerChannel(0)
    grid = weight_rules(
        bits, symmetric(bits.weight or 8), AbsMax(), without=HEAD, granularity=None if bits.group else rows
    )
    rules: tuple[Rule, ...] = ()
    if bits.activation is not None:
        spread = PerToken(-1) if activations == "token" else PerTensor()
        spec = QSpec(symmetric(bits.activation), spread, AbsMax(), dynamic=activations != "tensor_static")
        rules = input_rules(spec, matmuls=quantize_bmm, without=HEAD)
    return Recipe(
        "smoothquant",
        bits,
        Scheme(grid, rules),
        (Smooth(alpha, "clamp" if variant == "released" else "keep"), CalibrateActivations(), RoundNearest()),
        Calibration(samples=512, batch_size=16, seqlen=512, regime="parallel"),
        frozenset({"transform"}),
    )
