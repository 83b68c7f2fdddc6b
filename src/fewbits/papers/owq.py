"""OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models.

Lee, Jin, Kim, Kim, Park (POSTECH, SqueezeBits); AAAI 2024; arXiv:2306.02272.

Brings the ranking of weight columns by H_jj times their rounding error and a budget of full-precision columns (section
"Outlier-aware weight quantization"): the weakest columns of every weight are kept as they are, stay out of the grid's
fit and, at the end of GPTQ's column order, take up the error of all others; and a grid searched jointly over width and
zero point for the least |error|^2.4. Reuses GPTQ's solver. Head and embeddings stay float. The kept columns can be
tuned on a task afterwards (weak column tuning): `fewbits.outliers.weak_column_parameters(model)`.

How many columns: every weight of a block gets an equal share of the bits that `target_bits` leaves above the base
width, counted in values. For OPT, LLaMA and Falcon that is the released rule with its ratios by layer type (1 for
attention, 1/4 or 3/8 for MLP), without a table of architectures; counts are rounded to nearest, then up to even.

Departs from the released code: a weight whose share pays for no column gets its grid from the extremes, as all do where
no columns are asked for, not from a search that would clip what meets an outlier channel (`variant="released"` searches
as soon as the target exceeds the base width); a fused or grouped-query projection gets the share that its own size
implies, where the release has one ratio for all attention layers; the parameters of all groups are kept, where its
packing holds those of the last; a dead column that is kept is not zeroed. Grouped convolutions keep the same columns in
all groups.
"""

from __future__ import annotations

from typing import Literal

from fewbits.errors import FewbitsError
from fewbits.formats import Format, Uniform, gptq_grid
from fewbits.papers.common import HEAD, token_rules, weight_rules
from fewbits.ranges import AbsMax, JointSearch, MinMax, Range
from fewbits.recipe import Bits, Calibration, Recipe, Scheme
from fewbits.steps.calibrate import AttachDynamic
from fewbits.steps.weak_columns import WeakColumnSolver


def owq_grid(bits: int, sym: bool = False) -> Format:
    """Asymmetric with zero inside, or codes -2^(b-1) .. 2^(b-1)-1 with step absmax / 2^(b-1)."""
    return Uniform(bits, signed=True, symmetric=True, zero_point="none", step="levels") if sym else gptq_grid(bits)


def recipe(
    bits: Bits,
    *,
    target_bits: float | None = None,
    weak_columns: int | None = None,
    layers: str = "*",
    frob_norm: bool = True,
    sym: bool = False,
    tuning: Literal["auto", "mse", "minmax"] = "auto",
    percdamp: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    stale_groups: bool = True,
    variant: Literal["paper", "released"] = "paper",
) -> Recipe:
    """`target_bits`: average bits a weight, 0.01 above the weights' own by default. `weak_columns`: as many in every
    weight instead. `layers`: globs of the weights that may keep some, separated by commas. `frob_norm`: rank by H_jj
    times squared error, not H_jj alone. `tuning`: grids by search or from the extremes; auto searches for weights that
    keep columns. `percdamp`: 1.0 for Falcon. `act_order`: columns in descending sensitivity."""
    base = bits.weight or 8
    target = base + 0.01 if target_bits is None else target_bits
    if not base <= target < 16:
        raise FewbitsError(f"owq: target_bits={target:g} must lie between the weights' {base} bits and 16")
    if weak_columns is not None and weak_columns < 0:
        raise FewbitsError(f"owq: weak_columns={weak_columns} must not be negative")
    keeps = weak_columns > 0 if weak_columns is not None else target > base
    extremes: Range = AbsMax() if sym else MinMax()
    search = tuning == "mse" or (tuning == "auto" and keeps)
    coarse: Range = JointSearch(num=40) if search else extremes
    fine: Range = JointSearch(num=100) if search else extremes
    solver = WeakColumnSolver(
        damping=percdamp,
        block_size=block_size,
        act_order=act_order,
        stale_groups=stale_groups,
        bits=base,
        target_bits=target,
        columns=weak_columns,
        layers=tuple(glob.strip() for glob in layers.split(",")),
        by_error=frob_norm,
        ranking=coarse,
        bare=extremes if tuning == "auto" and variant == "paper" else None,
    )
    weights = weight_rules(bits, owq_grid(base, sym), coarse if bits.group else fine, without=HEAD)
    return Recipe(
        "owq",
        bits,
        Scheme(weights, token_rules(bits, without=HEAD)),
        (AttachDynamic(), solver),
        Calibration(samples=128, batch_size=16, seqlen=2048, regime="sequential"),
        frozenset({"rounding"}),
    )
