"""The column solver with the weakest columns of each weight kept in full precision."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.formats import PerChannel
from fewbits.graph import operands
from fewbits.graph.types import Site
from fewbits.outliers.weak_columns import column_sensitivity, columns_in_budget, weakest_columns
from fewbits.ranges import JointSearch, Range
from fewbits.recipe import QSpec
from fewbits.rounding.nearest import nearest
from fewbits.steps.gptq import ColumnSolver


@dataclass(frozen=True)
class WeakColumnSolver(ColumnSolver):
    """GPTQ's sweep with each weight's most sensitive columns at its end: never rounded, they take up the error of the
    others (OWQ).

    How many: `columns` of every weight, or as many as `target_bits` bits a weight pay for, averaged over each unit
    (`outliers.weak_columns.columns_in_budget`). `layers` are globs of the weights that may keep columns; the others
    spend nothing of their unit's budget. Ranked by H_jj times the column's squared error under rounding to nearest on a
    grid that `ranking` fits row by row, or by H_jj alone (`by_error` False). Weights at other bits than the recipe's
    (a first layer at 8) keep no columns. A grouped convolution keeps the same columns in all groups.

    `bare` fits the grid of weights that keep no column, in place of a joint search: a search that does not see the
    inputs clips what meets an outlier channel, and there is nothing then that keeps it.
    """

    bits: int = 3
    target_bits: float = 3.01
    columns: int | None = None
    layers: tuple[str, ...] = ("*",)
    by_error: bool = True
    ranking: Range = field(default_factory=lambda: JointSearch(num=40))
    bare: Range | None = None

    stacks: ClassVar[bool] = False

    part: ClassVar[str] = "rounding"

    def kept(self, unit: UnitContext, site: Site, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor | None]:
        count = self.counts(unit).get(site.name, 0)
        if not count and not self.act_order:
            return torch.empty(0, dtype=torch.int64), None
        quantized = None
        if self.by_error:
            spec = unit.spec(site)
            assert spec is not None
            rows = weight.flatten(0, -2)
            params = self.ranking.fit(rows, spec.format, PerChannel(0), where=site.name)
            quantized = nearest(rows, spec.format, PerChannel(0), params)[0].view(weight.shape)
        sensitivity = column_sensitivity(weight, quantized, hessian)
        return weakest_columns(sensitivity, count), sensitivity

    def range_for(self, spec: QSpec, kept: Tensor) -> Range:
        if self.bare is not None and not len(kept) and isinstance(spec.range, JointSearch):
            return self.bare
        return spec.range

    def apply(self, unit: UnitContext) -> None:
        counts = self.counts(unit)
        if self.columns is None and self.target_bits > self.bits and counts and not any(counts.values()):
            size = sum(torch.Size(site.shape).numel() for site in unit.weights())
            unit.note(
                f"an average of {self.target_bits:g} bits pays for no full-precision column in a unit of {size} "
                "weights; raise target_bits, or give weak_columns"
            )
        super().apply(unit)

    def counts(self, unit: UnitContext) -> dict[str, int]:
        """How many columns each weight of a unit keeps."""
        specs = ((site, unit.spec(site)) for site in unit.weights())
        sites = [site for site, spec in specs if spec is not None and spec.format.bits == self.bits]
        chosen = [
            self.solvable(unit, site) and any(fnmatch.fnmatchcase(site.name, glob) for glob in self.layers)
            for site in sites
        ]
        shapes = [_matrix_shape(site) for site in sites]
        if self.columns is not None:
            kept = [min(self.columns, shape[1]) if use else 0 for shape, use in zip(shapes, chosen, strict=True)]
        else:
            kept = columns_in_budget(shapes, self.bits, self.target_bits, selected=chosen)
        return {site.name: count for site, count in zip(sites, kept, strict=True)}


def _matrix_shape(site: Site) -> tuple[int, int]:
    """(out, columns) of a weight site."""
    matrix = operands.canonical(torch.empty(site.shape, device="meta"), site.layout, site.groups).flatten(1)
    return matrix.shape[0], matrix.shape[1]
