"""The column solver on every weight of a unit, on inputs that came through what is already quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewbits.engine.context import UnitContext
from fewbits.engine.statistics import Hessian
from fewbits.errors import FewbitsError
from fewbits.formats import PerGroup
from fewbits.graph.types import Graph, Site, Unit
from fewbits.recipe import Step
from fewbits.rounding.gptq import gptq
from fewbits.steps.nearest import round_nearest


@dataclass(frozen=True)
class ColumnSolver(Step):
    """GPTQ's sweep over the columns of each weight (`rounding.gptq`).

    Weights of a unit are solved together, or, in the `true_sequential` regime, set by set: those that read one tensor
    form a set, and the Hessians of the next set are gathered with the earlier ones quantized.
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    static_groups: bool = False
    stale_groups: bool = True

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40
    streams: ClassVar[frozenset[str]] = frozenset({"prefix"})

    def apply(self, unit: UnitContext) -> None:
        sites = unit.weights()
        solvable: list[Site] = []
        for site in sites:
            call = unit.graph.calls[site.call]
            if call.op.partition("@")[0] in ("linear", "addmm", "matmul", "conv1d", "conv2d", "conv3d"):
                solvable.append(site)
            else:
                unit.note(f"{site.name}: {call.op} has no column Hessian, rounded to nearest")
                round_nearest(unit, site)
        for group in self._sets(unit, solvable):
            self._solve(unit, group)

    def _sets(self, unit: UnitContext, sites: list[Site]) -> list[list[Site]]:
        if unit.recipe.calibration.regime != "true_sequential":
            return [sites] if sites else []
        by_input: dict[int, list[Site]] = {}
        for site in sites:
            by_input.setdefault(unit.input_of(site).value, []).append(site)
        return list(by_input.values())

    def _solve(self, unit: UnitContext, sites: list[Site]) -> None:
        hessians = {site.name: Hessian(site, unit.graph.calls[site.call], unit.device) for site in sites}
        unit.gather({unit.input_of(site).name: [hessians[site.name]] for site in sites})
        for site in sites:
            spec = unit.spec(site)
            assert spec is not None
            size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
            weight = unit.weight(site)
            hessian = hessians[site.name].value()
            if hessian.dim() == 3:  # a grouped convolution: one problem per group, all at once
                weight = weight.unflatten(0, (hessian.shape[0], -1))
            try:
                solution = gptq(
                    weight,
                    hessian,
                    spec.format,
                    spec.range,
                    group_size=size,
                    block_size=self.block_size,
                    damping=self.damping,
                    act_order=self.act_order,
                    static_groups=self.static_groups,
                    stale_groups=self.stale_groups,
                )
            except FewbitsError as error:
                raise FewbitsError(f"{site.name}: {error}") from error
            codes, params, index = solution.codes, solution.params, solution.group_index
            if hessian.dim() == 3:
                codes = codes.flatten(0, 1)
                params = {name: value.flatten(0, 1) for name, value in params.items()}
                if index is not None and self.act_order and not self.static_groups:
                    raise FewbitsError(
                        f"{site.name}: act-order with dynamic groups is not possible on a grouped convolution; "
                        "use static_groups"
                    )
                index = None
            if not (self.act_order and not self.static_groups):
                index = None  # contiguous groups need no table
            unit.quantize_weight(site, codes, params, index)
            if bool(solution.no_data.all()):
                unit.note(f"{site.name}: no calibration data reached it, rounded to nearest")
            elif bool(solution.no_data.any()):
                dead, of = int(solution.no_data.sum()), solution.no_data.numel()
                unit.note(f"{site.name}: {dead} of {of} groups read only zeros and are rounded to nearest")
            worst = float(solution.damping.max())
            if worst > self.damping * 1.5:
                unit.note(f"{site.name}: damping raised to {worst:g} for the Hessian to factorise")

    def statistics_bytes(self, graph: Graph, unit: Unit) -> int:
        total = 0
        for site in graph.sites_of(unit):
            if site.role == "weight" and site.op != "embedding":
                columns = site.shape[-2] if site.layout == "io" else 1
                if site.layout != "io":
                    for extent in site.shape[1:]:
                        columns *= extent
                total += 4 * columns * columns * (site.groups if site.op.startswith("conv") else 1)
        return total
