"""Channel changes folded into a norm and the linears after it: SmoothQuant's scaling, RepQ-ViT's scale and shift."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.engine.statistics import AbsMax, Bounds
from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, PerTensor, Uniform
from fewbits.graph.relations import End, Relation
from fewbits.graph.types import Graph, Site, Unit
from fewbits.graph.weights import channels, scale, shift
from fewbits.quantizer import Quantizer
from fewbits.recipe import Step
from fewbits.transforms.reparameterize import reparameterize
from fewbits.transforms.smoothing import smoothing_scales

#: Tag of a layer input that a norm makes and that can be changed channel by channel by folding.
FOLDABLE = "norm_fold"


def norm_relations(graph: Graph, unit: Unit, use: str = "positive_scale") -> list[Relation]:
    """Norm-to-linear relations that lie wholly inside a unit and permit `use`."""
    return [
        relation
        for relation in graph.relations
        if relation.kind == "norm->linear"
        and use in relation.permits
        and all(unit.contains(end.site) for end in relation.ends)
        and all(end.axis == "in" for end in relation.consumers)
    ]


def input_site(graph: Graph, end: End) -> Site:
    """The activation site that a consuming end multiplies."""
    found = graph.sites.get(f"{end.site}.input")
    if found is None:
        raise FewbitsError(f"{end.site} has no input site")
    return found


@dataclass(frozen=True)
class Smooth(Step):
    """Balance the largest activation and weight of every channel between a norm and the linears that read it.

    All linears that share the input share one scale. Statistics come from the float model before any change.
    """

    alpha: float = 0.5
    dead: Literal["keep", "clamp"] = "keep"

    part: ClassVar[str] = "transform"
    stage: ClassVar[int] = 10
    streams: ClassVar[frozenset[str]] = frozenset({"float"})

    def apply(self, unit: UnitContext) -> None:
        relations = norm_relations(unit.graph, unit.unit)
        usable = [relation for relation in relations if not relation.uncovered]
        for relation in relations:
            if relation.uncovered:
                unit.note(
                    f"{relation.name} is not smoothed: the recorded forward did not use all of "
                    f"{', '.join(relation.uncovered[:3])}"
                )
        if not usable:
            return
        statistics = {input_site(unit.graph, end).name: AbsMax() for relation in usable for end in relation.consumers}
        unit.gather({name: [statistic] for name, statistic in statistics.items()}, "float")
        for relation in usable:
            activation = torch.zeros(relation.size)
            weight = torch.zeros(1, relation.size)
            for end in relation.consumers:
                statistic = statistics[input_site(unit.graph, end).name]
                # An expert that no calibration token reached still counts through its weights.
                seen = statistic.value().cpu() if statistic.seen else torch.zeros(len(end.channel_of))
                largest = channels(unit.model, end).abs().amax(1).float().cpu()
                taking = end.channel_of >= 0
                index = end.channel_of[taking]
                columns = seen.repeat(len(end.channel_of) // len(seen)) if len(seen) != len(end.channel_of) else seen
                activation.scatter_reduce_(0, index, columns[taking], "amax")
                weight[0].scatter_reduce_(0, index, largest[taking], "amax")
            s = smoothing_scales(activation, [weight], self.alpha, dead=self.dead)
            scale(unit.model, relation, 1 / s.double())


@dataclass(frozen=True)
class Reparameterize(Step):
    """Turn channel-wise input quantizers behind a norm into one per tensor, by a scale and shift folded around them.

    With an integer zero point the codes stay exactly what they were. `round_zero_point` rounds the mean zero point
    first; the released code leaves it fractional.
    """

    round_zero_point: bool = True

    part: ClassVar[str] = "transform"
    stage: ClassVar[int] = 30
    new_sweep: ClassVar[bool] = True
    streams: ClassVar[frozenset[str]] = frozenset({"float"})  # to know channels that never change

    def prepare(self, graph: Graph, units: list[Unit]) -> None:
        """Tag the inputs that may be calibrated channel by channel, since a scale and shift of theirs can be folded."""
        for unit in units:
            for relation in norm_relations(graph, unit, "shift"):
                if relation.uncovered:
                    continue
                for end in relation.consumers:
                    site = input_site(graph, end)
                    site.tags = site.tags | {FOLDABLE}

    def apply(self, unit: UnitContext) -> None:
        for relation in norm_relations(unit.graph, unit.unit, "shift"):
            sites = [input_site(unit.graph, end) for end in relation.consumers]
            held = [unit.quantizer(site) for site in sites]
            wise = [q for q in held if q is not None and isinstance(q.spec.granularity, PerChannel)]
            if not wise:
                continue
            if len(wise) != len(held) or any(not torch.equal(q.params["scale"], wise[0].params["scale"]) for q in wise):
                raise FewbitsError(
                    f"{relation.name}: the linears that share this input have different quantizers; they must agree"
                )
            bounds = Bounds(PerChannel(-1))
            unit.gather({sites[0].name: [bounds]}, "float")
            self._fold(unit, relation, sites, wise, bounds.value())

    def _fold(
        self,
        unit: UnitContext,
        relation: Relation,
        sites: list[Site],
        wise: list[Quantizer],
        bounds: tuple[Tensor, Tensor],
    ) -> None:
        params = wise[0].params
        found = reparameterize(
            params["scale"], params["zero_point"], round_zero_point=self.round_zero_point, bounds=bounds
        )
        end = relation.consumers[0]
        order = _by_channel(end, relation.size)
        shift(unit.model, relation, found.shift.cpu()[order])
        scale(unit.model, relation, 1 / found.r1.cpu().double()[order])
        fmt = wise[0].spec.format
        assert isinstance(fmt, Uniform)
        if not self.round_zero_point:
            fmt = dataclasses.replace(fmt, zero_point="real")
        for site, quantizer in zip(sites, wise, strict=True):
            spec = dataclasses.replace(quantizer.spec, format=fmt, granularity=PerTensor())
            new = Quantizer(spec, site.name)
            new.set_params({"scale": found.scale, "zero_point": found.zero_point})
            unit.set_quantizer(site, new)
        spread = float(found.r1.max() / found.r1.min())
        if spread > 1e3:
            unit.note(f"{relation.name}: channel scales differ by {spread:.0f}x, which the weights now carry")


def _by_channel(end: End, size: int) -> Tensor:
    """For each channel of a relation, a column of the end that carries it."""
    order = torch.zeros(size, dtype=torch.long)
    taking = (end.channel_of >= 0).nonzero().flatten()
    order[end.channel_of[taking]] = taking
    return order
