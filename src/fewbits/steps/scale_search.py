"""AWQ's scaling: per group of layers that share an input, a searched scale folded into whatever makes that input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.engine.context import UnitContext
from fewbits.engine.module_calls import ModuleCalls
from fewbits.engine.statistics import AbsMean, Hessian
from fewbits.formats import quantize
from fewbits.graph import operands
from fewbits.graph.attention import score_products
from fewbits.graph.relations import End, Relation
from fewbits.graph.types import Call, CallKey, Graph, Site, Unit
from fewbits.graph.weights import scale
from fewbits.recipe import Step
from fewbits.rounding.precision import tensor_core_float32
from fewbits.transforms.searched_scaling import search_scales


@dataclass(frozen=True)
class ScaleGroup:
    """Layers that take one scale: the relation it is folded along, the weights the scheme quantizes, the judge.

    A relation without producers stands for an activation function, whose output is multiplied at run time.
    """

    relation: Relation
    layers: tuple[tuple[End, Site], ...]
    module: str  # the module whose output says how good a scale is


@dataclass(frozen=True)
class SearchScales(Step):
    """Scale the input channels of a unit's layers by a power of their mean magnitude (`transforms.searched_scaling`).

    `grid` exponents from 0 to 1 are tried per group. The loss is what the smallest module that holds all the group's
    layers puts out in floating point, those weights quantized; for layers that make queries or keys the module that
    multiplies these. It is measured on about `tokens` tokens (positions): on every so many-th batch where the
    calibration data hold more. Magnitudes are those of all data. Every group of a unit is searched on the float unit,
    then all are applied. Behind an activation function that passes no scale, the inverse is a factor at run time
    (`behind_activations`).
    """

    grid: int = 20
    dead: Literal["keep", "clamp"] = "keep"
    behind_activations: bool = True
    tokens: int = 65536

    part: ClassVar[str] = "transform"
    stage: ClassVar[int] = 12
    streams: ClassVar[frozenset[str]] = frozenset({"float"})

    def apply(self, unit: UnitContext) -> None:
        groups = self._groups(unit)
        if not groups:
            return
        sites = {unit.input_of(site).name: site for group in groups for _, site in group.layers}
        means = {name: AbsMean(input_axis(site)) for name, site in sites.items()}
        grams = {
            unit.input_of(site).name: Hessian(site, unit.graph.calls[site.call], unit.device)
            for group in groups
            if (site := _judges_itself(unit, group)) is not None
        }
        unit.gather({name: [held[name] for held in (means, grams) if name in held] for name in sites}, "float")
        found: list[tuple[ScaleGroup, Tensor]] = []
        for number, group in enumerate(groups):
            search = partial(search_scales, _magnitude(unit, group, means), grid=self.grid, dead=self.dead)
            name = unit.input_of(group.layers[0][1]).name
            gram = grams.pop(name, None)
            if gram is not None and means[name].seen:
                found.append((group, search(_gram_loss(unit, group, gram, means[name].rows)).scale))
            else:
                every = max(1, max(means[unit.input_of(site).name].rows for _, site in group.layers) // self.tokens)
                with unit.module_calls(group.module, "float", every) as calls, _kept(unit, group.layers):
                    found.append((group, search(_module_loss(unit, group, calls)).scale))
            unit.run.progress.part((number + 1) / len(groups))
        for group, s in found:
            if bool((s == 1).all()):
                continue
            scale(unit.model, group.relation, 1 / s.double())
            if not group.relation.producers:
                ((_, site),) = group.layers
                unit.multiply(unit.input_of(site), 1 / s, input_axis(site))

    def _groups(self, unit: UnitContext) -> list[ScaleGroup]:
        """In forward order of the layers."""
        graph = unit.graph
        quantized = {site.name: site for site in unit.weights()}
        products = score_products(graph)
        groups: list[ScaleGroup] = []
        shared: set[str] = set()
        for relation in graph.relations:
            inside = all(unit.unit.contains(end.site) for end in relation.ends)
            layers = [(end, quantized.get(f"{end.site}.weight")) for end in relation.consumers if end.axis == "in"]
            chosen = tuple((end, site) for end, site in layers if site is not None)
            if not inside or "positive_scale" not in relation.permits or not any(_mixes(*layer) for layer in chosen):
                continue
            if relation.uncovered:
                unit.note(
                    f"{relation.name} is not scaled: the recorded forward did not use all of "
                    f"{', '.join(relation.uncovered[:3])}"
                )
            elif "attention" in relation.tags and any(_repeats(end) for end, _ in chosen):
                unit.note("values that several heads share (grouped-query attention) are not scaled")
                shared |= {site.name for _, site in chosen}
            else:
                groups.append(ScaleGroup(relation, chosen, _judge(unit, chosen, products)))
        scaled = {site.name for group in groups for _, site in group.layers}
        for site in quantized.values():
            if not self.behind_activations or site.name in scaled or not _follows_activation(unit, site):
                continue
            end = _whole_input(graph, site)
            if _mixes(end, site):
                relation = Relation(
                    site.name, (), (end,), len(end.channel_of), frozenset(), frozenset({"positive_scale"})
                )
                groups.append(ScaleGroup(relation, ((end, site),), _judge(unit, [(end, site)], products)))
                scaled.add(site.name)
        if set(quantized) - scaled - shared:
            unit.note("layers whose input no norm, layer or activation function of their unit makes are not scaled")
        return sorted(groups, key=lambda group: min(site.call for _, site in group.layers))

    def statistics_bytes(self, graph: Graph, unit: Unit) -> int:
        """The float weights of a unit's layers, kept while quantized ones stand in for them, and what makes these."""
        return 8 * sum(
            torch.Size(site.shape).numel()
            for site in graph.sites_of(unit)
            if site.role == "weight" and site.op != "embedding"
        )


def input_axis(site: Site) -> int:
    """The channel axis of the tensor that a weight site multiplies."""
    if site.op.startswith("conv"):
        return -1 - int(site.op.removesuffix("d")[-1])
    return -2 if site.op == "matmul" and site.slot == "lhs" else -1


def column_factors(end: End, rows: int, columns: int, s: Tensor) -> Tensor:
    """What a canonical weight (rows, columns) is multiplied with where the end's channels are multiplied by `s`.

    float32 (1 or rows, columns); a channel that takes no part gets 1.
    """
    taking = end.channel_of >= 0
    channels = torch.ones(len(end.channel_of))
    channels[taking] = s.float().cpu()[end.channel_of[taking]]
    parts = max(1, len(channels) // columns) if end.layout.startswith("expert") else end.groups
    channels = channels.view(parts, 1, -1, 1)
    spread = channels.expand(-1, 1 if parts == 1 else rows // parts, -1, columns * parts // len(end.channel_of))
    return spread.reshape(-1, columns)


def _judges_itself(unit: UnitContext, group: ScaleGroup) -> Site | None:
    """The only layer of a group that is its own judge, on a GPU and a plain linear layer: its loss needs no forward."""
    (_, site), *others = group.layers
    module = unit.model.get_submodule(group.module)
    plain = type(module).forward is nn.Linear.forward and site.key[0] == group.module and site.layout == "oi"
    return site if plain and not others and unit.device.type == "cuda" else None


def _scaled_and_rounded(unit: UnitContext, end: End, site: Site, weight: Tensor, s: Tensor) -> Tensor:
    """What a weight (out, columns) acts as when it is quantized under a scale."""
    spec = unit.spec(site)
    assert spec is not None
    factor = column_factors(end, weight.shape[0], weight.shape[1], s).to(weight.device)
    scaled = weight * factor
    params = spec.range.fit(scaled, spec.format, spec.granularity, where=site.name)
    return quantize(scaled, spec.format, spec.granularity, params) / factor


def _module_loss(unit: UnitContext, group: ScaleGroup, calls: ModuleCalls) -> Callable[[Tensor], float]:
    """The judging module's squared error with the group's weights quantized under a scale."""
    weights = [unit.weight(site) for _, site in group.layers]

    def loss(s: Tensor) -> float:
        for (end, site), weight in zip(group.layers, weights, strict=True):
            unit.set_weight(site, _scaled_and_rounded(unit, end, site, weight, s))
        return calls.squared_error()

    return loss


def _gram_loss(unit: UnitContext, group: ScaleGroup, gram: Hessian, rows: int) -> Callable[[Tensor], float]:
    """The same of a linear layer that judges itself, from its inputs' second moments alone.

    With D the change of the weight, the mean of |X D^T|^2 over `rows` tokens and the outputs is tr(D X^T X D^T) over
    their number, and the Hessian is 2 X^T X over the samples.
    """
    ((end, site),) = group.layers
    weight, hessian, samples = unit.weight(site), gram.value(), gram.accumulator.samples
    stored = operands.operand(unit.model, site).dtype

    def loss(s: Tensor) -> float:
        change = _scaled_and_rounded(unit, end, site, weight, s).to(stored).float() - weight
        with tensor_core_float32(unit.device):
            moved = change @ hessian
        return float(moved.mul_(change).sum()) * samples / 2 / (rows * len(weight))

    return loss


@contextmanager
def _kept(unit: UnitContext, layers: Iterable[tuple[End, Site]]) -> Iterator[None]:
    """Bring the weights back, bit for bit, when the context ends."""
    held = [(operand := operands.operand(unit.model, site), operand.clone()) for _, site in layers]
    try:
        yield
    finally:
        for operand, before in held:
            operand.copy_(before)


def _magnitude(unit: UnitContext, group: ScaleGroup, statistics: dict[str, AbsMean]) -> Tensor:
    """Mean |x| per channel of the relation, over the columns and layers that read it; zero where no data came."""
    total, count = torch.zeros(group.relation.size), torch.zeros(group.relation.size)
    for end, site in group.layers:
        statistic = statistics[unit.input_of(site).name]
        if not statistic.seen:
            continue  # an expert no token reached
        seen = statistic.value().cpu()
        taking = end.channel_of >= 0
        seen = seen.repeat(len(end.channel_of) // len(seen))[taking]
        total.index_add_(0, end.channel_of[taking], seen)
        count.index_add_(0, end.channel_of[taking], torch.ones_like(seen))
    return total / count.clamp_min(1)


def _judge(unit: UnitContext, layers: Iterable[tuple[End, Site]], products: dict[int, list[Call]]) -> str:
    """The smallest module of the unit that runs all the layers, and the products of the queries and keys they make."""
    keys: list[CallKey] = []
    for end, site in layers:
        keys += [site.key, *end.calls]
        keys += [call.key for call in products.get(site.call, ()) if call.key is not None]
    path = keys[0][0].split(".") if keys[0][0] else []
    for key in keys:
        other = key[0].split(".")
        while path != other[: len(path)]:
            path = path[:-1]
    while path and ".".join(path) != unit.name and not unit.graph.module_calls.get(".".join(path)):
        path = path[:-1]
    found = ".".join(path)
    return found if unit.unit.contains(found) else unit.name


def _mixes(end: End, site: Site) -> bool:
    """Whether a row adds up several channels: the scale of a single one changes nothing that is rounded."""
    return site.layout.startswith("expert") or len(end.channel_of) > site.groups


def _repeats(end: End) -> bool:
    """Whether several columns read one channel."""
    return int(torch.bincount(end.channel_of[end.channel_of >= 0]).max()) > 1


def _follows_activation(unit: UnitContext, site: Site) -> bool:
    """Whether a layer reads what an activation function of its own unit made, and can be scaled by itself."""
    given = unit.input_of(site)
    if "post_activation" not in given.tags or "expert" in site.tags or site.used_by:
        return False
    made = unit.graph.flow.origin(given.value)
    return made is not None and unit.unit.contains(made.module) and site.layout in ("oi", "io", "io_conv")


def _whole_input(graph: Graph, site: Site) -> End:
    """The side of a weight that takes part with every input channel."""
    given = graph.sites[site.name.removesuffix("weight") + "input"]
    channels = given.shape[input_axis(site)]
    return End(
        site.name.removesuffix(".weight"), site.op, "in", site.param or "", torch.arange(channels), site.layout,
        site.groups, site.view, calls=(site.key,),
    )  # fmt: skip
