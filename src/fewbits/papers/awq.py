"""AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han (MIT, SJTU, NVIDIA, Tsinghua); MLSys 2024; arXiv:2306.00978.

Brings a transform and a range. Weights that meet loud activation channels matter most, so input channel j of the layers
that share an input is scaled by s_j = mean|X_j|^alpha before rounding and the activation divided by it; alpha is the
best of 20 on the output error of the module around these layers (section 3.2). The inverse is folded into the norm or
layer before; behind an activation function it is a factor at run time. Then every row and group of a weight is clamped
where the layer's own output error is least, but for queries and keys. All statistics come from the float model; no
gradients, no reconstruction. Reuses group-wise min/max integers (128 columns) and folding. Activations, where bits ask
for them, are per-token (not part of the paper).

Departs from the released code (`variant="released"` reproduces the first two): the grid of a group always contains zero
(released: a group of one sign saturates, a constant one is lost); a channel that is silent on all calibration data
keeps s = 1 (released: it is clamped at 1e-4 and drags the others). Scales are judged on about 65536 tokens, as many as
the released code has (128 sequences of 512), on evenly drawn batches where more are given. Fewer than 512 calibration
tokens, any number of rows and a last short group are fine. Which layers share an input, and what can take the inverse,
is read off the data flow: values to output projections are scaled for fused projections too, but, as released, not for
grouped-query heads.
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import Format, PerChannel, PerGroup, affine, symmetric
from fewbits.papers.common import HEAD, token_rules, weight_rules
from fewbits.ranges import MinMax
from fewbits.recipe import Bits, Calibration, Recipe, Scheme, Step
from fewbits.steps.calibrate import AttachDynamic
from fewbits.steps.nearest import RoundNearest
from fewbits.steps.output_clip import ClipOutputs
from fewbits.steps.scale_search import SearchScales


def grid(bits: int, *, sym: bool = False, released: bool = False) -> Format:
    """The integers of one group."""
    if sym:
        return symmetric(bits, narrow=False)
    if released:
        return affine(bits, include_zero=False, min_span=1e-5, zero_range="eps", constant="lost")
    return affine(bits)


def recipe(
    bits: Bits,
    *,
    group_size: int = 128,
    sym: bool = False,
    ratios: int = 20,
    search_tokens: int = 65536,
    behind_activations: bool = True,
    clip: bool = True,
    clip_steps: int = 20,
    max_shrink: float = 0.5,
    clip_tokens: int = 512,
    variant: Literal["paper", "released"] = "paper",
) -> Recipe:
    """`group_size`: columns per grid where the bits name none (0: a whole row). `ratios`: exponents tried, each judged
    on about `search_tokens` tokens.

    `max_shrink`: the largest share of max|w| that may be clipped, in steps of 1/`clip_steps`, judged on `clip_tokens`
    rows. `behind_activations`: also scale behind GELU and the like, with a factor at run time.
    """
    released = variant == "released"
    size = bits.group or group_size
    weights = weight_rules(
        bits, grid(bits.weight or 8, sym=sym, released=released), MinMax(), without=HEAD,
        granularity=PerGroup(size, -1) if size else PerChannel(0),
    )  # fmt: skip
    steps: list[Step] = [SearchScales(ratios, "clamp" if released else "keep", behind_activations, search_tokens)]
    if clip:
        steps.append(ClipOutputs(clip_steps, max_shrink, clip_tokens))
    return Recipe(
        "awq",
        bits,
        Scheme(weights, token_rules(bits, without=HEAD)),
        (*steps, AttachDynamic(), RoundNearest()),
        Calibration(samples=128, batch_size=16, seqlen=512, regime="parallel"),
        frozenset({"transform"}),
    )
