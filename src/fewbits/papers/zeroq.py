"""ZeroQ: A Novel Zero Shot Quantization Framework.

Cai, Yao, Dong, Gholami, Mahoney, Keutzer (Peking University, UC Berkeley); CVPR 2020; arXiv:2001.00281.

Brings calibration data made from the model (section 3.1): images are optimised from noise until, sample by sample, mean
and standard deviation of every batch norm's input are what the norm remembers, and those of the image 0 and 1. Brings
bits per layer (sections 3.2 and 3.3), where `average_bits` or `target_size` is set: the sensitivity of a layer is the
KL divergence of the outputs when it alone is quantized, and the Pareto frontier of summed sensitivity and size is built
exactly, layer by layer. Quantizers are plain: asymmetric min/max, weights per output channel, activations per tensor
after ReLU and ReLU6, fitted in one forward in which earlier quantizers already act. First and last layer take part;
batch norms stay unfolded. Joined with another recipe it supplies data and bits, and the other one does the rest.

Departs from the released code: it holds neither the sensitivities nor the frontier nor the percentile range, which
follow the text; a constant channel keeps its value where the release divides by 1e-8; features without space are
matched over the batch, where the release has no variance.
"""

from __future__ import annotations

from typing import Literal

from fewbits.allocation.solvers import Method
from fewbits.errors import FewbitsError
from fewbits.formats import PerTensor, Uniform, raw_affine
from fewbits.papers.common import HEAD, input_rules, weight_rules
from fewbits.ranges import MinMax, Percentile, Range
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme, Step
from fewbits.steps.allocate import MixedPrecision
from fewbits.steps.calibrate import CalibrateInline
from fewbits.steps.nearest import RoundNearest
from fewbits.steps.synthesize import MatchBatchNorms


def asymmetric(bits: int) -> Uniform:
    """ZeroQ's grid: signed codes of round(x / s + z), z a whole number from the raw minimum, no clamp of z."""
    return raw_affine(bits, signed=True, order="shift_then_round", min_span=1e-8)


def recipe(
    bits: Bits,
    *,
    images: int = 32,
    iterations: int = 500,
    lr: float = 0.5,
    match: Literal["sample", "batch"] = "sample",
    placement: Literal["relu", "activations", "inputs"] = "relu",
    percentile: float | None = None,
    average_bits: float | None = None,
    target_size: float | None = None,
    candidates: str = "2,4,8",
    solver: Method = "pareto",
) -> Recipe:
    """`match`: statistics of every image, or of the batch. `placement`: activation quantizers after ReLU and ReLU6,
    after every activation function, or at the inputs of layers. `percentile`: share of activation values within the
    range, as 0.999 (default: all). `average_bits`, or `target_size` in MiB: mixed precision of the weights, from the
    `candidates`.
    """
    weights = weight_rules(bits, asymmetric(bits.weight or 8), MinMax(), without=HEAD)
    steps: tuple[Step, ...] = (MatchBatchNorms(images, iterations, lr, per=match),)
    brings = frozenset({"datagen"})
    if average_bits is not None or target_size is not None:
        steps = (*steps, MixedPrecision(_widths(candidates), average_bits, target_size, solver))
        brings |= {"allocation"}
    activations: tuple[Rule, ...] = ()
    if bits.activation is not None:
        range_: Range = MinMax() if percentile is None else Percentile(percentile)
        spec = QSpec(asymmetric(bits.activation), PerTensor(), range_)
        if placement == "inputs":
            activations = input_rules(spec, without=HEAD)
        else:
            tags = ("post_relu", "post_relu6") if placement == "relu" else ("post_activation",)
            activations = tuple(Rule(spec, roles=("output",), tags=frozenset({tag})) for tag in tags)
        steps = (*steps, CalibrateInline(samples=images))
    return Recipe(
        "zeroq",
        bits,
        Scheme(weights, activations),
        (*steps, RoundNearest()),
        Calibration(samples=images, batch_size=32),
        brings,
    )


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise FewbitsError(f"option candidates={text!r}: write bit widths separated by commas, as 2,4,8") from None
