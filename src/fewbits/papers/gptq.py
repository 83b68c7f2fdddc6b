"""GPTQ: Accurate Post-training Quantization for Generative Pre-trained Transformers.

Frantar, Ashkboos, Hoefler, Alistarh; ICLR 2023; arXiv:2210.17323.

Brings a rounding solver: all rows of a weight share one column order, each rounded column's error is pushed into the
columns still to come through the Cholesky factor of the inverse Hessian, in lazy blocks of 128 (sections 3.2 and 3.3).
Blocks of the model are solved in order, on inputs that came through the blocks already quantized. Embeddings and the
language-model head stay float. Grids: min/max per row or group, asymmetric, zero inside; with `sym`, symmetric.
Activations, where bits ask for them, are per-token (not part of the paper).

Departs from the released code (`variant="paper"`, the default): a symmetric grid does not saturate rows without
negative values; `variant="released"` reproduces that. As released, groups smaller than a block are fitted on weights
that lack the block's own updates; `stale_groups=false` fits them on fully updated ones.
"""

from __future__ import annotations

from typing import Literal

from fewbits.formats import gptq_grid
from fewbits.papers.common import HEAD, token_rules, weight_rules
from fewbits.ranges import MinMax, ShrinkSearch
from fewbits.recipe import Bits, Calibration, Recipe, Scheme
from fewbits.steps.calibrate import AttachDynamic
from fewbits.steps.gptq import ColumnSolver


def recipe(
    bits: Bits,
    *,
    percdamp: float = 0.01,
    block_size: int = 128,
    sym: bool = False,
    mse: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    stale_groups: bool = True,
    variant: Literal["paper", "released"] = "paper",
) -> Recipe:
    """`percdamp`: damping as a share of the Hessian's mean diagonal. `mse`: ranges shrunk for the least |error|^2.4."""
    grid = gptq_grid(bits.weight or 8, sym=sym, saturate_one_sided=variant == "released")
    ranges = ShrinkSearch(steps=80, step=0.01, p=2.4, reduction="sum") if mse else MinMax()
    return Recipe(
        "gptq",
        bits,
        Scheme(weight_rules(bits, grid, ranges, without=HEAD), token_rules(bits, without=HEAD)),
        (AttachDynamic(), ColumnSolver(percdamp, block_size, act_order, static_groups, stale_groups)),
        Calibration(samples=128, batch_size=16, seqlen=2048, regime="sequential"),
        frozenset({"rounding"}),
    )
