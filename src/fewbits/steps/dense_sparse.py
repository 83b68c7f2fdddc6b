"""Sensitivity-weighted codebooks with the outliers beside them in a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.engine.context import ModelContext, UnitContext
from fewbits.engine.gradients_fisher import natural_loss, squared_weight_gradients
from fewbits.engine.losses import LossKind
from fewbits.errors import FewbitsError
from fewbits.formats.codebook import half
from fewbits.graph.types import Graph, Site, Unit
from fewbits.outliers.dense_sparse import outlying_values, quartile_threshold, reach_for_share, sensitive_values
from fewbits.outliers.parts import Sparse
from fewbits.quantizer import Quantizer
from fewbits.ranges.kmeans import KMeans
from fewbits.recipe import Step

FISHER, REACH = "fisher-diagonal", "outlier-reach"


@dataclass(frozen=True)
class FisherDiagonal(Step):
    """Squared task-loss gradients of every quantized weight, once, on the floating-point model.

    Kept as F w^2, the squared gradient with respect to log |w|: scaling a channel between two layers, as a later
    transform may do, leaves it what it is, so that F of the changed weight is had by dividing by its square.
    """

    loss: LossKind | Literal["auto"] = "auto"

    part: ClassVar[str] = "rounding"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 0
    streams: ClassVar[frozenset[str]] = frozenset({"float"})
    gradients: ClassVar[bool] = True

    def apply(self, model: ModelContext) -> None:
        model.remembered(FISHER, lambda: self._compute(model))

    def statistics_bytes(self, graph: Graph, unit: Unit) -> int:
        """The whole model's, held during every unit: one float32 a weight."""
        return sum(4 * torch.Size(site.shape).numel() for site in graph.sites.values() if site.role == "weight")

    def _compute(self, model: ModelContext) -> dict[str, Tensor]:
        kind = natural_loss(model) if self.loss == "auto" else self.loss
        sites = model.weights()
        found = squared_weight_gradients(model, sites, kind)
        return {site.name: _relative(found[site.name]) * _relative(model.weight(site)).square() for site in sites}


def _relative(x: Tensor) -> Tensor:
    """To the largest magnitude: only ratios within a weight matter, and squares of small numbers must not vanish."""
    return x / x.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class OutlierReach(Step):
    """The multiple of the quartile distance beyond which a `share` of all quantized weights of the model lies."""

    share: float = 0.004

    part: ClassVar[str] = "rounding"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 0

    def apply(self, model: ModelContext) -> None:
        model.remembered(REACH, lambda: {"reach": torch.tensor(self._reach(model), dtype=torch.float64)})

    def _reach(self, model: ModelContext) -> float:
        sites = model.weights()
        total = sum(torch.Size(site.shape).numel() for site in sites)
        return reach_for_share((model.weight(site) for site in sites), self.share, total)


@dataclass(frozen=True)
class DenseAndSparse(Step):
    """Move sensitive values and outliers of each weight into a sparse part, cluster the others by k-means weighted by
    the Fisher diagonal, round to the nearest center (SqueezeLLM).

    sensitive_percent: of each weight's values. reach: outliers lie this many quartile distances beyond a quartile; None
    takes what `OutlierReach` found, or none where `outliers` is False. half_tables: centers as float16 holds them.
    """

    sensitive_percent: float = 0.05
    outliers: bool = True
    reach: float | None = None
    half_tables: bool = False

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40

    def apply(self, unit: UnitContext) -> None:
        fisher = unit.remembered(FISHER, _missing)
        reach = self.reach
        if reach is None and self.outliers:
            reach = float(unit.remembered(REACH, _missing)["reach"])
        for site in unit.weights():
            self._commit(unit, site, fisher[site.name].to(unit.device), reach)

    def _commit(self, unit: UnitContext, site: Site, invariant: Tensor, reach: float | None) -> None:
        spec = unit.spec(site)
        assert spec is not None
        if not isinstance(spec.range, KMeans):
            raise FewbitsError(f"{site.name}: Fisher-weighted clustering needs a codebook filled by k-means")
        weight = unit.weight(site)
        sensitivity = torch.where(weight == 0, 0, invariant / _relative(weight).square())
        if not bool(sensitivity.any()):
            unit.note(f"{site.name}: no gradient reached this weight; its values are clustered with equal weights")
        moved = sensitive_values(sensitivity, self.sensitive_percent)
        if reach is not None:
            moved = moved | outlying_values(weight, quartile_threshold(weight, reach))
        dense = weight.masked_fill(moved, 0)
        kept = sensitivity.masked_fill(dense == 0, 0)
        params = spec.range.fit_weighted(dense, kept, spec.format, spec.granularity)
        if self.half_tables:
            params = {"table": half(params["table"])}
        quantizer = Quantizer(spec, site.name).to(unit.device)
        quantizer.set_params(params)
        codes = quantizer.encode(dense)
        parts = [Sparse.from_dense(weight - quantizer.decode(codes), moved)] if bool(moved.any()) else []
        unit.quantize_weight(site, codes, params, parts=parts)


def _missing() -> dict[str, Tensor]:
    raise FewbitsError("the model's sensitivities were not gathered before the sweep")
