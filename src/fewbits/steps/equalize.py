"""Cross-layer equalization of whole models: clips replaced, ranges balanced between layers, high biases handed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.engine.context import ModelContext
from fewbits.graph import operands
from fewbits.graph.ops import IDENTITY, LAYOUT, POOLS
from fewbits.graph.relations import End, Relation, would_be_relations
from fewbits.graph.types import Call, Graph, Site
from fewbits.graph.weights import scale, shift
from fewbits.recipe import Step
from fewbits.steps.batchnorm import fold_norm, foldable
from fewbits.transforms.absorb import absorbable
from fewbits.transforms.equalize import column_ranges, pair_scales, row_ranges, triple_scales

#: Activations that ReLU can stand for once their upper bound is given up.
CLIPS = ("relu6", "hardtanh")
_RELUS = frozenset({"relu", "leaky_relu", "prelu"})
_PASSING = LAYOUT | IDENTITY | frozenset(POOLS) | {"mean"}


@dataclass(eq=False)
class Link:
    """A relation between exactly two weights, of which nothing else takes part: what equalization works on.

    `rows` and `columns` give the relation's channel of each output row of `first` and of each input channel of
    `second` (-1: none). `norm` is the call of the batch norm folded into `first`, if there is one.
    """

    relation: Relation
    first: Site
    second: Site
    rows: Tensor
    columns: Tensor
    norm: Call | None = None
    total: Tensor = field(default_factory=lambda: torch.ones(0))  # scales found so far, float64 [channels]


def links(graph: Graph, relations: list[Relation]) -> list[Link]:
    """The relations with one weight on either side, in order of the forward.

    Left out are channels that several layers make or read (residual streams), shared weights, and norms in the middle.
    """
    weights = {site.call: site for site in graph.sites.values() if site.role == "weight"}
    by_key = {call.key: call for call in graph.calls if call.key is not None}
    folded = {norm.key: (site, norm) for site, norm in foldable(graph)}

    def site_of(end: End) -> Site | None:
        call = by_key.get(end.calls[0]) if len(end.calls) == 1 else None
        site = None if call is None else weights.get(call.index)
        usable = site is not None and site.view is not None and not site.used_by and site.uses == 1
        return site if usable else None

    found: list[Link] = []
    for relation in relations:
        if len(relation.producers) != 1 or len(relation.consumers) != 1 or relation.uncovered:
            continue
        maker, reader = relation.ends
        if "positive_scale" not in relation.permits or reader.layout in ("vector", "expert_io", "expert_oi"):
            continue
        second, norm = site_of(reader), None
        if maker.axis == "affine" and len(maker.calls) == 1 and maker.calls[0] in folded:
            first, norm = folded[maker.calls[0]]
        elif maker.axis == "out" and maker.layout not in ("expert_io", "expert_oi"):
            first_site = site_of(maker)
            if first_site is None:
                continue
            first = first_site
        else:
            continue
        if second is not None and first.param != second.param:
            found.append(Link(relation, first, second, maker.channel_of, reader.channel_of, norm))
    return found


def is_depthwise(site: Site, rows: int) -> bool:
    """Whether a weight is one filter per channel."""
    return site.op.startswith("conv") and site.groups > 1 and site.groups == rows == _inputs(site)


def _inputs(site: Site) -> int:
    return site.shape[0] if site.layout == "io_conv" else site.shape[1] * site.groups


@dataclass(frozen=True)
class ReplaceClips(Step):
    """Run ReLU in place of ReLU6 wherever that alone keeps two layers from being equalized."""

    part: ClassVar[str] = "transform"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 1

    def apply(self, unit: ModelContext) -> None:
        blocked = [link.relation for link in links(unit.graph, would_be_relations(unit.graph, CLIPS))]
        moved = frozenset(key for relation in blocked for key in relation.moves)
        calls = [call for call in unit.graph.calls if call.op in CLIPS and call.key in moved]
        names = sorted({call.op for call in calls})
        for call in calls:
            unit.replace_op(call, "relu")
        if calls:
            unit.note(f"{len(calls)} clipped activations ({', '.join(names)}) run as ReLU, for layers to be equalized")


@dataclass(frozen=True)
class Equalize(Step):
    """Give the channels between two layers equal ranges in both, depthwise layers in the middle in closed form.

    `passes`: over all pairs and triples in the order of the forward; 0 goes on until no scale moves by more than
    `tolerance` (relative), at most `limit` times.
    """

    passes: int = 0
    tolerance: float = 1e-3
    limit: int = 200

    part: ClassVar[str] = "transform"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 2

    def apply(self, unit: ModelContext) -> None:
        found = links(unit.graph, unit.graph.relations)
        partly = [r for r in unit.graph.relations if r.uncovered and len(r.producers) == len(r.consumers) == 1]
        for relation in partly:
            unit.note(
                f"{relation.name} is not equalized: the recorded forward did not use all of "
                f"{', '.join(relation.uncovered[:3])}"
            )
        if not found:
            unit.note("no two layers of this model can be equalized: nothing positively homogeneous joins them alone")
            return
        sites = {site.name: site for link in found for site in (link.first, link.second)}
        held = {name: _Ranges(operands.read(unit.model, site), site) for name, site in sites.items()}
        for link in found:
            link.total = torch.ones(link.relation.size, dtype=torch.float64)
        sets = _sets(found, held)
        for _ in range(self.passes or self.limit):
            moved = max(_balance(chain, held) for chain in sets)
            if not self.passes and moved <= self.tolerance:
                break
        else:
            if not self.passes:
                unit.note(f"equalization: scales still moved by {moved:.1e} after {self.limit} passes")
        for link in found:
            scale(unit.model, link.relation, 1 / link.total)
            if link.norm is not None:
                fold_norm(unit, link.first, link.norm)
                statistics = unit.run.norms.get(link.norm.outputs[0])
                if statistics is not None:
                    factor = _at(1 / link.total, link.rows, 1.0)
                    unit.run.norms[link.norm.outputs[0]] = (statistics[0] * factor, statistics[1] * factor)


class _Ranges:
    """The largest |w| per output row and input channel of one weight, while its rows and columns are scaled."""

    def __init__(self, weight: Tensor, site: Site) -> None:
        magnitude = weight.double().abs().cpu()
        self.matrix = magnitude.flatten(2).amax(2) if magnitude.dim() > 2 else magnitude
        self.groups = site.groups
        self.depthwise = is_depthwise(site, len(self.matrix))

    def rows(self) -> Tensor:
        return row_ranges(self.matrix)

    def columns(self) -> Tensor:
        return column_ranges(self.matrix, self.groups)

    def multiply(self, rows: Tensor | None, columns: Tensor | None) -> None:
        if rows is not None:
            self.matrix = self.matrix * rows[:, None]
        if columns is not None:
            split = self.matrix.unflatten(0, (self.groups, -1)) * columns.view(self.groups, 1, -1)
            self.matrix = split.flatten(0, 1)


def _sets(found: list[Link], held: dict[str, _Ranges]) -> list[tuple[Link, ...]]:
    """Pairs, and triples around depthwise layers: two links each, that are solved together."""
    into = {link.second.name: link for link in found if _one_to_one(link.columns, link.relation.size)}
    sets: list[tuple[Link, ...]] = []
    taken: set[str] = set()
    for link in found:
        if link.relation.name in taken:
            continue
        before = into.get(link.first.name)
        middle = held[link.first.name].depthwise and _one_to_one(link.rows, link.relation.size)
        if before is not None and middle and (before,) in sets:
            sets[sets.index((before,))] = (before, link)
        else:
            sets.append((link,))
        taken.add(link.relation.name)
    return sets


def _one_to_one(channel_of: Tensor, size: int) -> bool:
    return len(channel_of) == size and bool((channel_of >= 0).all()) and len(channel_of.unique()) == size


def _balance(chain: tuple[Link, ...], held: dict[str, _Ranges]) -> float:
    """Solve one pair or triple; returns how far its scales are from 1."""
    first, last = chain[0], chain[-1]
    before = _by_channel(held[first.first.name].rows(), first.rows, first.relation.size)
    after = _by_channel(held[last.second.name].columns(), last.columns, last.relation.size)
    if len(chain) == 1:
        found = [pair_scales(before, after)]
    else:
        # The depthwise filters in the order of the first link's channels, and where the last link has each of them.
        order = torch.argsort(first.columns)
        there = last.rows[order]
        s12, s23 = triple_scales(before, held[last.first.name].rows()[order], after[there])
        found = [s12, torch.empty_like(s23).index_copy_(0, there, s23)]
    for link, s in zip(chain, found, strict=True):
        link.total = link.total * s
        held[link.first.name].multiply(_at(1 / s, link.rows, 1.0), None)
        held[link.second.name].multiply(None, _at(s, link.columns, 1.0))
    return max(float(s.log().abs().max()) for s in found)


def _by_channel(values: Tensor, channel_of: Tensor, size: int) -> Tensor:
    """The largest value of each channel."""
    taking = channel_of >= 0
    return values.new_zeros(size).scatter_reduce_(0, channel_of[taking], values[taking], "amax")


def _at(values: Tensor, channel_of: Tensor, neutral: float) -> Tensor:
    """Each row's value from its channel's."""
    out = torch.full((len(channel_of),), neutral, dtype=torch.float64)
    taking = channel_of >= 0
    out[taking] = values.double()[channel_of[taking]]
    return out


@dataclass(frozen=True)
class AbsorbBias(Step):
    """Move the part of each bias that a ReLU passes unchanged into the layer after it, by the norms' statistics.

    `sigmas`: how many standard deviations of a channel must stay above zero.
    """

    sigmas: float = 3.0

    part: ClassVar[str] = "transform"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 3

    def apply(self, unit: ModelContext) -> None:
        unknown: list[str] = []
        parted: list[str] = []
        found = links(unit.graph, unit.graph.relations)
        for link in found:
            value = None if link.norm is None else link.norm.outputs[0]
            if value is None or value not in unit.run.norms:
                unknown.append(link.relation.name)
                continue
            path = _path(unit.graph, value, link.second)
            if path is None:
                parted.append(link.relation.name)
                continue
            beta, gamma = unit.run.norms[value]
            c = absorbable(beta, gamma, clipped=any(call.op in _RELUS for call in path), sigmas=self.sigmas)
            taking = link.rows >= 0
            c = torch.where(taking, c, torch.zeros_like(c))
            if bool((c != 0).any()):
                moved = torch.zeros(link.relation.size, dtype=torch.float64)
                moved[link.rows[taking]] = c[taking]
                shift(unit.model, link.relation, -moved, force=True)
                unit.run.norms[value] = (beta - c, gamma)
        for names, reason in ((unknown, "no batch norm tells of them"), (parted, "split, joined or gated on the way")):
            if names:
                more = ", ..." if len(names) > 1 else ""
                unit.note(f"no bias is absorbed in {len(names)} of {len(found)} pairs ({reason}): {names[0]}{more}")


def _path(graph: Graph, value: int, reader: Site) -> list[Call] | None:
    """The calls between a value and the layer that alone reads it; None if one of them would not pass a shift on."""
    path: list[Call] = []
    while True:
        readers = [graph.calls[index] for index in graph.consumers.get(value, ())]
        if len(readers) != 1:
            return None
        (call,) = readers
        if call.index == reader.call:
            return path
        if not (call.op in _RELUS or call.op in _PASSING) or len(call.outputs) != 1:
            return None
        path.append(call)
        value = call.outputs[0]
