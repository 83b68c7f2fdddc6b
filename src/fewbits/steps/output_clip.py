"""AWQ's clipping: every weight clamped, per row and group, where the layer's output suffers least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewbits.engine.context import UnitContext
from fewbits.engine.statistics import Rows, multiplies_rows
from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, PerGroup
from fewbits.graph.attention import score_products
from fewbits.graph.types import Graph, Site, Unit
from fewbits.ranges.output_clip import output_clip
from fewbits.recipe import Step


@dataclass(frozen=True)
class ClipOutputs(Step):
    """Clamp a unit's weights to the magnitudes that `ranges.output_clip` finds on the float unit's own inputs.

    Of the rows a layer multiplies, every max(1, n // `tokens`)-th judges it. Layers that make queries or keys are left
    alone: their output is measured before the product, which says too little. All are searched before any is clamped.
    """

    steps: int = 20
    max_shrink: float = 0.5
    tokens: int = 512

    part: ClassVar[str] = "transform"
    stage: ClassVar[int] = 14
    streams: ClassVar[frozenset[str]] = frozenset({"float"})

    def apply(self, unit: UnitContext) -> None:
        asking = score_products(unit.graph)
        samples = sum(size * unit.run.uses(unit.unit, number) for number, size in enumerate(unit.run.sizes))
        rows: dict[str, Rows] = {}
        for site in unit.weights():
            if site.call in asking:
                continue
            reason = _unclippable(unit, site)
            if reason is None:
                rows[site.name] = Rows(site, unit.graph.calls[site.call], samples, self.tokens)
            else:
                unit.note(f"not clipped: {reason}")
        requests: dict[str, list[Rows]] = {}
        for name, statistic in rows.items():
            requests.setdefault(unit.input_of(unit.graph.sites[name]).name, []).append(statistic)
        unit.gather({name: list(held) for name, held in requests.items()}, "float")
        for number, (name, statistic) in enumerate(rows.items()):
            if statistic.seen:
                self._clip(unit, unit.graph.sites[name], statistic)
            else:
                unit.note(f"not clipped: no calibration data reached {name}")
            unit.run.progress.part((number + 1) / len(rows))

    def _clip(self, unit: UnitContext, site: Site, statistic: Rows) -> None:
        spec, inputs, weight = unit.spec(site), statistic.value(), unit.weight(site)
        assert spec is not None
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
        try:
            limits = output_clip(
                weight.unflatten(0, (len(inputs), -1)), inputs.to(weight.device), spec.format, spec.range,
                group_size=size, steps=self.steps, max_shrink=self.max_shrink,
            ).flatten(0, 1)  # fmt: skip
        except FewbitsError as error:
            raise FewbitsError(f"{site.name}: {error}") from error
        bound = spec.granularity.expand(limits, weight.shape)
        unit.set_weight(site, weight.clamp(-bound, bound))

    def statistics_bytes(self, graph: Graph, unit: Unit) -> int:
        total = 0
        for site in graph.sites_of(unit):
            if site.role == "weight" and site.op != "embedding":
                columns = torch.Size(site.shape).numel() // max(1, site.shape[-1 if site.layout == "io" else 0])
                total += 2 * self.tokens * columns * 4
        return total


def _unclippable(unit: UnitContext, site: Site) -> str | None:
    """Why a weight cannot be clipped row by row and group by group; None where it can."""
    spec = unit.spec(site)
    assert spec is not None
    plain = spec.granularity == PerChannel(0) or (
        isinstance(spec.granularity, PerGroup) and spec.granularity.axis == -1
    )
    if not plain:
        return f"{spec.granularity.describe()} weights share a grid over rows"
    if site.used_by:
        return f"{site.name} is also read by {site.used_by[0]}"
    if not multiplies_rows(unit.graph.calls[site.call]):
        return f"weights of {unit.graph.calls[site.call].op}, which do not multiply rows of one input"
    return None
