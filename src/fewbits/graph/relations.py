"""Relations: sets of parameters whose channels may be changed together without changing the function.
 A relation says: multiply these producers' channels by s and divide those consumers' channels by s, and nothing else
of the model notices. They are read off the channel labels of `propagate`; no architecture is named anywhere. Which
other changes a relation permits (shift, permutation, rotation) follows from what its channels pass on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fewbits.graph.labels import FIRST, FIXED, base, together
from fewbits.graph.propagate import propagate
from fewbits.graph.propagation import Propagation, Slot, Vector
from fewbits.graph.rules_elementwise import REPLACEABLE
from fewbits.graph.types import CallKey, Graph, View

USES = frozenset({"scale", "positive_scale", "shift", "permute", "rotate"})
_TAG_FORBIDS: dict[str, frozenset[str]] = {
    "relu": frozenset({"scale", "shift", "rotate"}),
    "pool": frozenset({"scale", "shift", "rotate"}),
    "gate": frozenset({"shift", "permute", "rotate"}),
    "attention": frozenset({"permute", "rotate"}),
}
_NORM_OPS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")


@dataclass(frozen=True, eq=False)
class End:
    """One side of one parameter in a relation.

    `axis`: "out" (rows of a weight and the bias), "in" (columns), "affine" (a vector that multiplies: norm weights,
    layer scale; the forward uses offset + parameter), "vector" (a vector that is added). `channel_of` (int64, one
    entry per row, column or element of the operand) is the relation's channel number, -1 where that row takes no
    part. `layout` and `groups` are those of `operands.canonical` ("vector" for vectors); `view` places the operand in
    its contiguous parameter as (size, stride, offset), `index` by element numbers where the forward copies. Row r
    adds element `bias_index[r]` of `bias`.
    """

    site: str
    op: str
    axis: str
    param: str
    channel_of: Tensor
    layout: str = "oi"
    groups: int = 1
    view: View | None = None
    index: Tensor | None = None
    bias: str | None = None
    bias_index: Tensor | None = None
    offset: float = 0.0
    calls: tuple[CallKey, ...] = ()
    whole: bool = True  # the operand is the whole parameter

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.param.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Relation:
    """Channels that producers make and consumers read, and nothing else does.

    `size` channels. `blocked_by`: ops that must be replaced first (only in `would_be_relations`). `uncovered`:
    parameters that the recorded forward used in part only, or modules beside the ends that never ran: the relation
    may be incomplete. `moves`: calls whose outputs a change shows in; `meets`: calls that read the channels, whose
    outputs stay (a pair's products of queries and keys).
    """

    name: str
    producers: tuple[End, ...]
    consumers: tuple[End, ...]
    size: int
    tags: frozenset[str]
    permits: frozenset[str]
    blocked_by: frozenset[str] = frozenset()
    uncovered: tuple[str, ...] = ()
    moves: frozenset[CallKey] = frozenset()
    meets: tuple[CallKey, ...] = ()

    @property
    def ends(self) -> tuple[End, ...]:
        return (*self.producers, *self.consumers)

    @property
    def kind(self) -> str:
        """What is related: "norm->linear", "v->o", "up->down", "conv->conv", "linear->linear", "query-key", ..."""
        if "query_key" in self.tags:
            return "query-key"
        first, last = _kind_of(self.producers), _kind_of(self.consumers)
        if (first, last) == ("linear", "linear"):
            if "attention" in self.tags:
                return "v->o"
            if "gate" in self.tags:
                return "up->down"
        return f"{first}->{last}"

    def __repr__(self) -> str:
        return f"Relation({self.name!r}, {self.kind}, {self.size} channels, tags={sorted(self.tags)})"


def find_relations(graph: Graph) -> list[Relation]:
    """All relations of a recorded forward, in the order of their first producer."""
    return _Reader(graph).relations(frozenset())


def would_be_relations(graph: Graph, ops: Iterable[str] = REPLACEABLE) -> list[Relation]:
    """Relations that hold once the named ops (default: ReLU6 and bounded ReLUs) are replaced (see `blocked_by`)."""
    return _Reader(graph).relations(frozenset(ops))


def query_key_pairs(graph: Graph) -> list[Relation]:
    """Inverse pairs of attention: the producers of queries times s leave the products unchanged if those of keys are
    divided by s.

    `producers` are the ends on the query side, `consumers` those on the key side (ends of axis "out" all the same).
    """
    return _Reader(graph).pairs()


def propagation(graph: Graph) -> Propagation:
    """The graph's channel labels, computed once."""
    held = graph.__dict__.get("_propagation")
    if held is None:
        held = graph.__dict__["_propagation"] = propagate(graph)
        held.partial = _extend_stacks(held)
    return held


def _kind_of(ends: tuple[End, ...]) -> str:
    kinds = [_OP_KIND.get(end.op, end.op) if end.axis != "vector" else "vector" for end in ends]
    real = [kind for kind in kinds if kind != "vector"] or kinds
    return "conv" if "conv" in real else real[0]


_OP_KIND = {
    **{f"conv{t}{n}d": "conv" for t in ("", "_transpose") for n in (1, 2, 3)},
    "batch_norm": "conv",  # folds into the convolution before it
    **dict.fromkeys(("linear", "addmm", "matmul", "grouped_mm"), "linear"),
    **dict.fromkeys(_NORM_OPS, "norm"),
    "mul": "layer scale",
}


@dataclass
class _Member:
    """One parameter's side with its labels, before it is cut into relations."""

    end: End
    labels: Tensor
    produces: bool
    order: tuple[int, int]
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.p = propagation(graph)
        self.partial = self.p.partial
        self.members = _members(self.p)
        self.labels = self.p.labels
        for member in self.members:
            member.classes = self.labels.classes(member.labels)
        self.blocks = self.labels.marked("block")
        self.tags = self.labels.marked("tag")
        self.forbidden = self.labels.marked("forbid")
        self.idle = _idle_modules(graph)

    def relations(self, allowed: frozenset[str]) -> list[Relation]:
        n = len(self.labels)
        produced, consumed, blocked = (np.zeros(n, dtype=bool) for _ in range(3))
        lifted = np.zeros(n, dtype=bool)
        for reason, flags in self.blocks.items():
            if reason in allowed:
                lifted |= flags
            else:
                blocked |= flags
        for member in self.members:
            (produced if member.produces else consumed)[member.classes] = True
        keep = produced & consumed & ~blocked
        if allowed:
            keep &= lifted
        found = []
        for classes, members in self._groups(keep, np.arange(n)):
            by = frozenset(reason for reason in allowed if reason in self.blocks and self.blocks[reason][classes].any())
            makers = [m for m in members if m.produces]
            readers = [m for m in members if not m.produces]
            found.append(self._relation(makers, readers, classes, by, frozenset()))
        return self._placed(_named(found), [classes for classes, _ in self._groups(keep, np.arange(n))])

    def _groups(self, keep: np.ndarray, part: np.ndarray) -> Iterator[tuple[np.ndarray, list[_Member]]]:
        """The kept classes, cut into sets whose parts have the same members, in order of first appearance."""
        signature = np.zeros(len(keep), dtype=np.uint64)
        random = np.random.default_rng(0)
        for member in self.members:
            mine = np.unique(part[member.classes[keep[member.classes]]])
            signature[mine] += random.integers(1, 1 << 63, dtype=np.uint64)
        kept = np.flatnonzero(keep)
        _, first, which = np.unique(signature[part[kept]], return_index=True, return_inverse=True)
        number_of = np.full(len(keep), -1, dtype=np.int64)
        number_of[kept] = which
        members: dict[int, list[_Member]] = {}
        for member in self.members:
            for number in np.unique(number_of[member.classes]):
                members.setdefault(int(number), []).append(member)
        for number in np.argsort(first):
            yield kept[which == number], members[int(number)]

    def pairs(self) -> list[Relation]:
        n = len(self.labels)
        blocked, on_query, on_key = (np.zeros(n, dtype=bool) for _ in range(3))
        for reason, flags in self.blocks.items():
            if reason != "query_key":
                blocked |= flags
        edges = []
        for queries, keys, _ in self.p.pairs:
            q, k = (self.labels.classes(side) for side in together(queries, keys))
            live = (q >= FIRST) & (k >= FIRST)
            for one, other in ((q, k), (k, q)):
                blocked[one[(one >= FIRST) & (other == FIXED)]] = True
            on_query[q[live]] = True
            on_key[k[live]] = True
            edges.append(np.unique(np.stack([q[live], k[live]]), axis=1))
        if not edges:
            return []
        component = _components(np.concatenate(edges, axis=1), n)
        part = on_query | on_key
        bad = np.zeros(n, dtype=bool)
        bad[component[part & (blocked | (on_query & on_key))]] = True
        for member in self.members:
            if not member.produces:  # a channel that something else reads too is left alone
                bad[component[member.classes[part[member.classes]]]] = True
        keep = part & ~bad[component]
        found, taken = [], []
        for classes, members in self._groups(keep, component):
            mine = np.zeros(n, dtype=bool)
            mine[classes] = True
            askers = [m for m in members if (mine & on_query)[m.classes].any()]
            answerers = [m for m in members if (mine & on_key)[m.classes].any()]
            if askers and answerers:
                numbers = np.unique(component[classes])
                channel = np.full(n, -1, dtype=np.int64)
                channel[classes] = np.searchsorted(numbers, component[classes])
                left = _cut(askers, np.where(on_query, channel, -1))
                right = _cut(answerers, np.where(on_key, channel, -1))
                made = self._finish(left, right, classes, len(numbers), frozenset(), frozenset({"query_key"}))
                meets = dict.fromkeys(
                    key for queries_, _, key in self.p.pairs if mine[self.labels.classes(base(queries_))].any()
                )
                found.append(replace(made, meets=tuple(meets)))
                taken.append(classes)
        return self._placed(_named(found), taken)

    def _placed(self, found: list[Relation], classes: list[np.ndarray]) -> list[Relation]:
        """The relations with the calls in whose outputs they show."""
        number_of = np.full(len(self.labels), -1, dtype=np.int64)
        for number, mine in enumerate(classes):
            number_of[mine] = number
        moves: list[set[CallKey]] = [set() for _ in found]
        for call in self.graph.calls:
            for output in call.outputs if call.key is not None else ():
                labels = self.p.of.get(output)
                if labels is not None and labels.numel():
                    held = base(labels).reshape(-1).numpy()
                    numbers = np.unique(number_of[self.labels.find(held[held >= FIRST])])
                    for number in numbers[numbers >= 0]:
                        assert call.key is not None
                        moves[number].add(call.key)
        return [
            replace(
                relation,
                moves=frozenset(mine),
                meets=relation.meets or tuple(dict.fromkeys(key for end in relation.consumers for key in end.calls)),
            )
            for relation, mine in zip(found, moves, strict=True)
        ]

    def _relation(
        self,
        makers: list[_Member],
        readers: list[_Member],
        classes: np.ndarray,
        blocked_by: frozenset[str],
        tags: frozenset[str],
    ) -> Relation:
        channel = np.full(len(self.labels), -1, dtype=np.int64)
        channel[classes] = np.arange(len(classes))
        return self._finish(_cut(makers, channel), _cut(readers, channel), classes, len(classes), blocked_by, tags)

    def _finish(
        self,
        producers: tuple[End, ...],
        consumers: tuple[End, ...],
        classes: np.ndarray,
        size: int,
        blocked_by: frozenset[str],
        tags: frozenset[str],
    ) -> Relation:
        tags = tags | {tag for tag, flags in self.tags.items() if flags[classes].any()}
        permits = set(USES)
        for tag in tags:
            permits -= _TAG_FORBIDS.get(tag, frozenset())
        permits -= {use for use, flags in self.forbidden.items() if flags[classes].any()}
        permits -= _forbidden_by_ends(producers, consumers, size)
        if "query_key" in tags:
            permits &= {"scale", "positive_scale"}
        uncovered = [name for name in self.partial if any(end.param == name for end in (*producers, *consumers))]
        uncovered += _idle_beside((*producers, *consumers), self.idle)
        return Relation(
            "", producers, consumers, size, tags, frozenset(permits), blocked_by, tuple(dict.fromkeys(uncovered))
        )


def _cut(members: list[_Member], channel: np.ndarray) -> tuple[End, ...]:
    """The members' ends with their rows numbered by channel, in call order."""
    return tuple(
        replace(member.end, channel_of=torch.from_numpy(channel[member.classes]))
        for member in sorted(members, key=lambda m: m.order)
    )


def _components(edges: np.ndarray, n: int) -> np.ndarray:
    """The connected components of a graph over n nodes: the smallest node of each."""
    group = np.arange(n)
    while True:
        before = group.copy()
        low = np.minimum(group[edges[0]], group[edges[1]])
        np.minimum.at(group, edges[0], low)
        np.minimum.at(group, edges[1], low)
        if np.array_equal(before, group):
            return group


def _forbidden_by_ends(producers: tuple[End, ...], consumers: tuple[End, ...], size: int) -> set[str]:
    """Uses that some parameter cannot take part in."""
    out: set[str] = set()
    for end in producers:
        if end.axis == "affine" and end.bias is None:
            out.add("shift")  # nothing to add the shift to
        if end.axis == "out" and end.bias is None and not _can_hold_bias(end):
            out.add("shift")
    for end in consumers:
        if end.bias is None and not _can_hold_bias(end):
            out.add("shift")
    for end in (*producers, *consumers):
        used = end.channel_of[end.channel_of >= 0]
        counts = torch.bincount(used, minlength=size)
        if bool((counts != counts[0]).any()):
            out |= {"permute", "rotate"}
        elif int(counts[0]) != 1:
            out.add("rotate")
    return out


def _can_hold_bias(end: End) -> bool:
    return end.whole and end.param.endswith(".weight") and (end.op == "linear" or end.op.startswith("conv"))


def _named(relations: list[Relation]) -> list[Relation]:
    """Names from the first producer and the first consumer, made unique in order."""
    seen: dict[str, int] = {}
    out = []
    for relation in relations:
        real = [end for end in relation.producers if end.axis != "vector"] or list(relation.producers)
        name = f"{real[0].site}->{relation.consumers[0].site}"
        seen[name] = seen.get(name, 0) + 1
        out.append(replace(relation, name=name if seen[name] == 1 else f"{name}#{seen[name]}"))
    return out


def _members(p: Propagation) -> list[_Member]:
    """Every side of every parameter. A bias belongs to the weight or norm that adds it, or stands on its own."""
    members: list[_Member] = []
    claimed: dict[str, Tensor] = {}

    def claim(name: str | None, index: Tensor | None) -> Tensor | None:
        if name is None or index is None:
            return None
        taken = claimed.setdefault(name, torch.zeros(len(p.vectors[name].labels), dtype=torch.bool))
        if bool(taken[index].any()):
            return index[:0]  # a second reader of the same bias: its labels are joined, and it is scaled once
        taken[index] = True
        return index

    for slot in sorted(p.slots.values(), key=lambda s: s.order):
        bias_index = claim(slot.bias, slot.bias_index)
        whole = slot.view is not None and torch.Size(slot.view[0]).numel() == torch.Size(slot.shape).numel()
        end = End(
            slot.name, slot.op, "out", slot.param, slot.out, slot.layout, slot.groups, slot.view, slot.index,
            slot.bias, bias_index, 0.0, tuple(slot.calls), whole,
        )  # fmt: skip
        members.append(_Member(end, slot.out, True, (slot.order, 0)))
        if slot.inputs is not None:
            # the consumer's own bias takes up what a shift of its input adds
            reads = replace(end, axis="in", bias=slot.bias, bias_index=slot.bias_index)
            members.append(_Member(reads, slot.inputs, False, (slot.order, 1)))
    affine = [v for v in p.vectors.values() if v.kind == "affine"]
    for vector in affine:
        same = vector.bias is not None and len(p.vectors[vector.bias].labels) == len(vector.labels)
        bias_index = claim(vector.bias if same else None, torch.arange(len(vector.labels)))
        end = _vector_end(vector, vector.bias if bias_index is not None else None, bias_index)
        members.append(_Member(end, vector.labels, True, (vector.order, 0)))
        if vector.inputs is not None:
            members.append(
                _Member(replace(end, axis="in", bias=None, bias_index=None), vector.inputs, False, (vector.order, 1))
            )
    for vector in p.vectors.values():
        if vector.kind == "affine":
            continue
        taken = claimed.get(vector.param)
        if taken is None:
            members.append(_Member(_vector_end(vector, None, None), vector.labels, True, (vector.order, 2)))
        elif not bool(taken.all()):
            left = torch.where(taken, torch.zeros_like(vector.labels), vector.labels)
            members.append(_Member(_vector_end(vector, None, None), left, True, (vector.order, 2)))
    return members


def _vector_end(vector: Vector, bias: str | None, bias_index: Tensor | None) -> End:
    name = vector.name or vector.param
    return End(
        name,
        vector.op,
        vector.kind,
        vector.param,
        vector.labels,
        "vector",
        1,
        None,
        None,
        bias,
        bias_index,
        vector.offset,
        tuple(vector.calls),
    )


def _extend_stacks(p: Propagation) -> list[str]:
    """Join the members of a stack of weights (experts) that did not run with those that did; return what stays in
    part unseen.

    A side that all members seen share (they all read the same channels, or all add to the same ones) is shared by the
    unseen too. One member alone cannot tell.
    """
    partial: list[str] = []
    seen_in: dict[str, int] = {}
    for name, slots in p.by_param.items():
        shape = slots[0].shape
        stack = shape[0] if len(shape) == 3 else 0
        single = [s for s in slots if stack and _stack_member(s) is not None]
        if single and len(single) == len(slots):
            groups = {_stack_member(s): s for s in single}
            for number, slot in groups.items():
                slot.name = f"{name}.{number}"
            missing = [e for e in range(stack) if e not in groups]
            if not missing:
                continue
            if len(groups) == 1:
                partial.append(name)
                continue
            example = single[0]
            for number in missing:
                assert example.view is not None
                view = (example.view[0], example.view[1], number * example.shape[1] * example.shape[2])
                new = replace(
                    example,
                    name=f"{name}.{number}",
                    view=view,
                    out=p.labels.fresh(len(example.out)),
                    inputs=None if example.inputs is None else p.labels.fresh(len(example.inputs)),
                    order=max(s.order for s in single),
                    calls=[],
                    bias=None,
                    bias_index=None,
                )
                _join_if_shared(p, [s.out for s in single], new.out)
                if new.inputs is not None:
                    _join_if_shared(p, [s.inputs for s in single if s.inputs is not None], new.inputs)
                p.slots[(name, new.layout, new.groups, view)] = new
        elif len(slots) == 1 and slots[0].op == "grouped_mm":
            slot = slots[0]
            missing = [e for e in range(stack) if e not in slot.touched]
            if missing and len(slot.touched) == 1:
                partial.append(name)
            elif missing:
                for labels in (slot.out, slot.inputs):
                    if labels is not None:
                        rows = labels.view(stack, -1)
                        for number in missing:
                            _join_if_shared(p, [rows[e] for e in sorted(slot.touched)], rows[number])
        else:
            seen_in[name] = sum(
                s.index.numel()
                if s.view is None and s.index is not None
                else torch.Size((s.view or ((), (), 0))[0]).numel()
                for s in slots
            )
            if seen_in[name] < torch.Size(shape).numel():
                partial.append(name)
    partial += [name for name, vector in p.vectors.items() if not bool(vector.touched.all())]
    return partial


def _stack_member(slot: Slot) -> int | None:
    """Which matrix of a stack a slot is, if it is exactly one."""
    if slot.view is None or len(slot.shape) != 3:
        return None
    size, _, offset = slot.view
    inner = slot.shape[1] * slot.shape[2]
    return offset // inner if torch.Size(size).numel() == inner and offset % inner == 0 else None


def _join_if_shared(p: Propagation, seen: list[Tensor], new: Tensor) -> None:
    first = p.labels.classes(seen[0])
    if all(np.array_equal(first, p.labels.classes(other)) for other in seen[1:]):
        p.labels.unite(seen[0], new, "stack")


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _idle_modules(graph: Graph) -> set[str]:
    """Modules that never ran although something of their name pattern did."""
    containers = graph.plain_containers
    return {path for path in graph.module_classes if path and path not in graph.module_calls and path not in containers}


def _idle_beside(ends: tuple[End, ...], idle: set[str]) -> list[str]:
    """Idle modules that differ from an end's module by one number in the path: experts no token was sent to."""
    if not idle:
        return []
    pattern = {_NUMBER.sub("#", path): path for path in idle}
    found = []
    for end in ends:
        mine = _NUMBER.sub("#", end.module)
        beside = pattern.get(mine)
        if beside is not None and _NUMBER.sub("#", beside) == mine and _one_apart(beside, end.module):
            found.append(beside)
    return found


def _one_apart(a: str, b: str) -> bool:
    return sum(x != y for x, y in zip(a.split("."), b.split("."), strict=True)) == 1
