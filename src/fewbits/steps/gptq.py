"""The column solver on every weight of a unit, on inputs that came through what is already quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.engine.statistics import Hessian
from fewbits.errors import FewbitsError
from fewbits.formats import Params, PerBlock, PerGroup, PerTensor, expand_params
from fewbits.graph.types import Graph, Site, Unit
from fewbits.outliers.parts import Columns
from fewbits.quantizer import Quantizer
from fewbits.ranges import Range
from fewbits.recipe import QSpec, Step
from fewbits.rounding.gptq import gptq
from fewbits.steps.nearest import fitted, round_nearest


def fixed_grid(quantizer: Quantizer, weight: Tensor) -> tuple[Params, int | None]:
    """A weight quantizer's parameters as the solver takes them, and the columns in a group (None: all).

    weight: [out, in], or [groups, out, in] of a grouped convolution. Parameters of one value stay so; others become
    [(groups,) out, column groups].
    """
    fmt, granularity = quantizer.spec.format, quantizer.spec.granularity
    matrix = weight.flatten(0, -2)
    size = granularity.size if isinstance(granularity, PerGroup) else None
    if isinstance(granularity, PerBlock) and granularity.columns > 1:
        size = matrix.shape[1] // granularity.columns
    spread = expand_params(fmt, granularity, quantizer.params, matrix.shape)
    rows = {
        name: value
        if quantizer.params[name].dim() == 0
        else value.expand(matrix.shape)[:, :: size or matrix.shape[1]].unflatten(0, weight.shape[:-1])
        for name, value in spread.items()
    }
    return rows, size


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
    #: Whether weights on one input may be solved as one; not where `kept` looks at each.
    stacks: ClassVar[bool] = True

    def apply(self, unit: UnitContext) -> None:
        sites = unit.weights()
        solvable: list[Site] = []
        for site in sites:
            if self.solvable(unit, site):
                solvable.append(site)
            else:
                unit.note(f"{site.name}: {unit.graph.calls[site.call].op} has no column Hessian, rounded to nearest")
                round_nearest(unit, site)
        for group in self._sets(unit, solvable):
            self._solve(unit, group)

    def solvable(self, unit: UnitContext, site: Site) -> bool:
        """Whether the weight's columns multiply the columns of an input, so that it has a Hessian."""
        op = unit.graph.calls[site.call].op.partition("@")[0]
        return op in ("linear", "addmm", "matmul", "conv1d", "conv2d", "conv3d")

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
        # The widest first: its Hessian is what takes most memory.
        stacks = sorted(self._stacks(unit, sites, hessians), key=lambda group: -hessians[group[0].name].input.columns)
        values = [hessians[group[0].name].value() for group in stacks]
        hessians.clear()
        for group in stacks:
            weights = [unit.weight(site) for site in group]
            if values[0].dim() == 3:  # a grouped convolution: one problem per group, all at once
                weights = [weights[0].unflatten(0, (values[0].shape[0], -1))]
            # The last solve that reads a Hessian may use up its memory, and lets go of it.
            last = all(values[0].data_ptr() != other.data_ptr() for other in values[1:])
            self._commit(unit, group, weights, values.pop(0), last)

    def _stacks(self, unit: UnitContext, sites: list[Site], hessians: dict[str, Hessian]) -> list[list[Site]]:
        """Weights that are solved as one: rows do not see each other, so those on one input and grid share the
        factorisation of its Hessian and the sweep."""
        stacks: dict[Any, list[Site]] = {}
        for site in sites:
            spec, hessian = unit.spec(site), hessians[site.name].value()
            assert spec is not None
            alone = not self.stacks or hessian.dim() == 3 or _fixed(spec)
            stacks.setdefault(site.name if alone else (hessian.data_ptr(), spec), []).append(site)
        return list(stacks.values())

    def kept(self, unit: UnitContext, site: Site, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor | None]:
        """Columns to keep in full precision, int64 [k], and what act-order sorts by [columns] (None: H's diagonal)."""
        return torch.empty(0, dtype=torch.int64), None

    def range_for(self, spec: QSpec, kept: Tensor) -> Range:
        """What fits the grid of a weight that keeps these columns."""
        return spec.range

    def _commit(self, unit: UnitContext, sites: list[Site], weights: list[Tensor], hessian: Tensor, last: bool) -> None:
        """Solve and commit weights [out, in] of one input, or one [groups, out, in] with a Hessian for each group.

        `last`: nothing else is solved with this Hessian.
        """
        site, rows = sites[0], [len(weight) for weight in weights]
        weight = torch.cat(weights, -2) if len(weights) > 1 else weights[0]
        weights.clear()
        spec = unit.spec(site)
        assert spec is not None
        held = fitted(unit, site) if _fixed(spec) else None
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
        grid = None
        if held is not None:
            grid, size = fixed_grid(held, weight)
        try:
            kept, order_by = self.kept(unit, site, weight, hessian)
            solution = gptq(
                weight,
                hessian,
                spec.format,
                self.range_for(spec, kept),
                params=grid,
                group_size=size,
                block_size=self.block_size,
                damping=self.damping,
                act_order=self.act_order,
                order_by=order_by,
                static_groups=self.static_groups,
                stale_groups=self.stale_groups,
                kept=kept,
                spend=last,
            )
        except FewbitsError as error:
            raise FewbitsError(f"{site.name}: {error}") from error
        del hessian
        codes, params, index = solution.codes, solution.params, solution.group_index
        if held is not None or self.static_groups or not (self.act_order or len(kept)):
            index = None  # contiguous groups need no table
        parts = [Columns(kept.cpu(), solution.weight.flatten(0, -2)[:, kept].float().cpu())] if len(kept) else []
        damping, no_data = solution.damping, solution.no_data
        grouped = weight.dim() == 3
        del weight, solution
        if grouped:
            codes = codes.flatten(0, 1)
            params = {name: value.flatten(-3, -2) if value.dim() > 2 else value for name, value in params.items()}
            if index is not None:
                if not bool((index == index[0]).all()):
                    raise FewbitsError(
                        f"{site.name}: act-order with dynamic groups is not possible on a grouped convolution; "
                        "use static_groups"
                    )
                index = index[0]
        if held is not None:
            params = held.params
        if len(sites) == 1:
            unit.quantize_weight(site, codes, params, index, parts)
        else:
            start = 0
            for one, count in zip(sites, rows, strict=True):
                own_rows = slice(start, start := start + count)
                own = {name: value[..., own_rows, :] if value.dim() > 1 else value for name, value in params.items()}
                unit.quantize_weight(one, codes[own_rows], own, index, [])
        worst = float(damping.max())
        for one in sites:
            if bool(no_data.all()):
                unit.note(f"{one.name}: no calibration data reached it, rounded to nearest")
            elif bool(no_data.any()):
                dead, of = int(no_data.sum()), no_data.numel()
                unit.note(f"{one.name}: {dead} of {of} groups read only zeros and are rounded to nearest")
            if worst > self.damping * 1.5:
                unit.note(f"{one.name}: damping raised to {worst:g} for the Hessian to factorise")

    def statistics_bytes(self, graph: Graph, unit: Unit) -> int:
        total, seen = 0, set()
        for site in graph.sites_of(unit):
            if site.role == "weight" and site.op != "embedding":
                given = graph.sites.get(site.name.removesuffix("weight") + "input")
                shared = site.name if given is None or site.uses > 1 else given.value
                if shared in seen and site.op == "linear":  # layers on one input share its Hessian
                    continue
                seen.add(shared)
                columns = site.shape[-2] if site.layout == "io" else 1
                if site.layout != "io":
                    for extent in site.shape[1:]:
                        columns *= extent
                total += 4 * columns * columns * (site.groups if site.op.startswith("conv") else 1)
        return total


def _fixed(spec: QSpec) -> bool:
    """Whether a weight's grid is known before its columns are visited: found at the output, or one for all rows."""
    return spec.range.at_output or isinstance(spec.granularity, PerTensor)
