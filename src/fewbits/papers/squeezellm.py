"""SqueezeLLM: Dense-and-Sparse Quantization.

Kim, Hooper, Gholami, Dong, Li, Shen, Mahoney, Keutzer (UC Berkeley); ICML 2024; arXiv:2306.07629.

Brings codebooks of 2^b levels per output row, found by k-means weighted with the diagonal Fisher information of the
final loss (section 4.1: squared gradients, one backward pass per calibration sample, squared before they are added),
and the dense-and-sparse split (section 4.2): the most sensitive values, then outliers beyond a multiple of the quartile
distance, are moved into a sparse matrix in full precision. The multiple is tuned for the wanted share of outliers over
the whole model. Activations, embeddings and head stay floating point (bits below A16 add per-token inputs, not part of
the paper). The loss is next-token prediction for causal language models; other models take their own first choice as
the label, and outputs that are no classes a Gaussian one (not part of the paper).

A table entry counts for the 16 bits the paper stores; `half_tables` rounds to them, otherwise the simulation keeps
float32. A sparse value counts for 16 bits, its column for 16.

Departs from the paper's text as the released code does: the outlier threshold is one number per weight from its
quartiles, |w| >= max(|Q1 - r IQR|, |Q3 + r IQR|), not two percentiles; the sensitive share is strict, k - 1 values a
weight. Departs from the released code: k = 0 selects nothing instead of failing, a weight without spread has no
outliers, and `solver=exact` finds each row's optimum by dynamic programming (slower; never worse).
"""

from __future__ import annotations

from typing import Literal

from fewbits.errors import FewbitsError
from fewbits.formats import Codebook
from fewbits.papers.common import HEAD, token_rules, weight_rules
from fewbits.ranges import KMeans
from fewbits.recipe import Bits, Calibration, Recipe, Scheme, Step
from fewbits.steps.calibrate import AttachDynamic
from fewbits.steps.dense_sparse import DenseAndSparse, FisherDiagonal, OutlierReach


def recipe(
    bits: Bits,
    *,
    sensitive_percent: float = 0.05,
    outlier_percent: float = 0.4,
    reach: float | None = None,
    solver: Literal["lloyd", "exact"] = "lloyd",
    iterations: int = 50,
    starts: int = 1,
    uniform_start: bool = False,
    seed: int = 0,
    half_tables: bool = False,
    loss: Literal["auto", "next_token", "pseudo", "sampled", "gaussian"] = "auto",
) -> Recipe:
    """`sensitive_percent`, `outlier_percent`: of the weights, moved into the sparse part; both 0 for dense only.
    `reach`: the multiple of the quartile distance, given instead of tuned (1.5 to 2.0 for LLaMA). `starts`: k-means++
    starts a row, with `uniform_start` evenly spaced levels too. `loss`: what gradients are taken of."""
    if not (0 <= sensitive_percent <= 100 and 0 <= outlier_percent <= 100):
        raise FewbitsError("squeezellm: sensitive_percent and outlier_percent are percentages, 0 to 100")
    if reach is not None and reach < 0:
        raise FewbitsError(f"squeezellm: reach={reach:g} must not be negative")
    tuned = reach is None and outlier_percent > 0
    gather: tuple[Step, ...] = (FisherDiagonal(loss), *([OutlierReach(outlier_percent / 100)] if tuned else []))
    grid = Codebook(bits.weight or 8, table_bits=16)
    return Recipe(
        "squeezellm",
        bits,
        Scheme(
            weight_rules(bits, grid, KMeans(solver, iterations, starts, uniform_start, seed), without=HEAD),
            token_rules(bits, without=HEAD),
        ),
        (AttachDynamic(), *gather, DenseAndSparse(sensitive_percent, tuned, reach, half_tables)),
        Calibration(samples=100, batch_size=1, seqlen=512, regime="parallel"),
        frozenset({"weight_grid", "rounding"}),
    )
