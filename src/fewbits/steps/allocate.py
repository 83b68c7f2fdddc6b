"""Bits chosen layer by layer under a budget, by how far the outputs move when one layer alone is quantized."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.allocation import Choice, Table, output_divergence, solve
from fewbits.allocation.solvers import Method
from fewbits.engine.context import ModelContext
from fewbits.engine.gradients import first_output
from fewbits.engine.tree import as_call, to
from fewbits.errors import FewbitsError
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.recipe import QSpec, Step

_MIB = 8 * 2**20


@dataclass(frozen=True)
class MixedPrecision(Step):
    """Weight bits per layer: the least summed sensitivity under a size budget (ZeroQ sections 3.2 and 3.3).

    The sensitivity of a layer at k bits is the KL divergence of the network's outputs, on the calibration data, from
    those with only this layer's weights rounded to k bits. `candidates`: the widths to choose from. The budget is on
    the bits of the weights alone, without scales: `average_bits` per weight, or `target_size` in MiB (2^20 bytes).
    Layers that the scheme keeps at another width than the recipe's stay there and count in the budget. A budget that
    cannot be met is noted, and the smallest model is made.
    """

    candidates: tuple[int, ...] = (2, 4, 8)
    average_bits: float | None = None
    target_size: float | None = None
    solver: Method = "pareto"

    part: ClassVar[str] = "allocation"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 15
    streams: ClassVar[frozenset[str]] = frozenset({"float"})

    def __post_init__(self) -> None:
        if (self.average_bits is None) == (self.target_size is None):
            raise FewbitsError("mixed precision: give one of average_bits and target_size")
        if not (self.average_bits or self.target_size or 0) > 0:
            raise FewbitsError("mixed precision: the budget must be above zero")
        if not self.candidates or any(not 1 <= bits <= 8 for bits in self.candidates):
            raise FewbitsError(f"mixed precision: candidate bits {self.candidates} must lie in 1 to 8")

    def apply(self, unit: ModelContext) -> None:
        sites = [s for s in unit.weights() if any(held.contains(s.module) for held in unit.run.units)]
        free = [site for site in sites if self._may_vary(unit, site)]
        if not free:
            raise FewbitsError(f"{unit.recipe.name}: no weight at {unit.recipe.bits} whose bits could be chosen")
        if not unit.run.batches:
            raise FewbitsError(f"{unit.recipe.name}: sensitivities are measured on calibration data; give some")
        table = self._table(unit, sites, free)
        weights = sum(math.prod(site.shape) for site in sites)
        budget = int((self.average_bits or 0) * weights if self.target_size is None else self.target_size * _MIB)
        choice = solve(table, budget, self.solver, generator=unit.generator("bit allocation"))
        for site, option in zip(sites, choice.index.tolist(), strict=True):
            spec = unit.spec(site)
            assert spec is not None
            if site in free and spec.format.bits != table.options[option]:
                unit.override(site, spec.at_bits(table.options[option]))
        self._report(unit, table, choice, weights, budget)

    def _may_vary(self, unit: ModelContext, site: Site) -> bool:
        """Whether nothing else, in the recipe or by the user, fixes the weight's width."""
        spec = unit.spec(site)
        if spec is None or spec.format.bits != unit.recipe.bits.weight:
            return False
        try:
            wanted = [spec.at_bits(bits) for bits in self.candidates]
        except FewbitsError:
            unit.note(f"{site.name}: {spec.format.kind} cannot take all of {self.candidates} bits and keeps its width")
            return False
        return all(unit.recipe.scheme.changed(site, each) == each for each in wanted)

    def _table(self, unit: ModelContext, sites: list[Site], free: list[Site]) -> Table:
        """All quantized weights; a fixed one has its own width as the only option, and loses nothing there."""
        measured = unit.remembered("sensitivity", lambda: {"loss": sensitivities(unit, free, self.candidates)})["loss"]
        rows = dict(zip((site.name for site in free), measured, strict=True))
        widths = {site.name: _width(unit, site) for site in sites}
        options = tuple(sorted({*self.candidates, *(widths[s.name] for s in sites if s.name not in rows)}))
        loss = torch.full((len(sites), len(options)), torch.inf, dtype=torch.float64)
        for row, site in enumerate(sites):
            if site.name in rows:
                for place, bits in enumerate(self.candidates):
                    loss[row, options.index(bits)] = rows[site.name][place]
            else:
                loss[row, options.index(widths[site.name])] = 0
        sizes = torch.tensor([math.prod(site.shape) for site in sites])
        return Table(tuple(s.name for s in sites), options, loss, sizes.unsqueeze(1) * torch.tensor(options))

    def _report(self, unit: ModelContext, table: Table, choice: Choice, weights: int, budget: int) -> None:
        counts = Counter(table.options[option] for option in choice.index.tolist())
        layers = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items()))
        unit.note(
            f"mixed precision: {choice.cost / weights:.3f} bits per weight, {choice.cost / _MIB:.4g} MiB "
            f"(budget {budget / weights:.3f}); layers: {layers}; summed sensitivity {choice.loss:.4g}"
        )
        if not choice.feasible:
            unit.note(
                f"mixed precision: the budget of {budget / weights:.3f} bits per weight is below the smallest choice "
                f"from {self.candidates} bits, which was taken"
            )


def sensitivities(unit: ModelContext, sites: list[Site], candidates: tuple[int, ...]) -> Tensor:
    """Mean KL of the outputs with one weight alone at each width: float64 (sites, widths), on all calibration data.

    The model's parameters are not touched: the weight is rounded in the forward.
    """
    run = unit.run
    run.progress.working("measuring sensitivities")
    reference = [_logits(unit, number) for number in range(len(run.batches))]
    total = torch.zeros(len(sites), len(candidates), dtype=torch.float64)
    for row, site in enumerate(sites):
        spec = unit.spec(site)
        assert spec is not None
        weight = unit.weight(site)
        for place, bits in enumerate(candidates):
            quantizer = Quantizer(spec.at_bits(bits), site.name)
            quantizer.calibrate(weight)
            unit.set_quantizer(site, quantizer)
            try:
                for number, expected in enumerate(reference):
                    moved = output_divergence(expected, _logits(unit, number), 1 if expected.dim() > 3 else -1)
                    total[row, place] += moved.sum()
            finally:
                unit.set_quantizer(site, None)
            run.progress.part((row * len(candidates) + place + 1) / total.numel())
    return total / sum(run.sizes)


def _logits(unit: ModelContext, number: int) -> Tensor:
    args, kwargs = as_call(to(unit.run.batches[number], unit.device))
    with torch.no_grad():
        return first_output(unit.model(*args, **kwargs)).detach().cpu()


def _width(unit: ModelContext, site: Site) -> int:
    spec: QSpec | None = unit.spec(site)
    assert spec is not None
    return spec.format.bits
