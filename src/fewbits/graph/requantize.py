"""A fourth placement of activation quantizers: where a device with integer units alone makes bytes of a result.

`requantized` are the outputs of what such a device does in one go: a layer with the batch norm and the ReLU or ReLU6
that alone follow it, a sum or product with its ReLU, a norm, an activation function, a softmax, an average, a
concatenation. `entering` are operands that none of these covers: the network's input, above all. Maxima, moved
elements and zero padding stay on the grid they are on. Averages and concatenations share one grid with what they read
(Jacob et al., CVPR 2018, sections 2 and 3 and appendix A).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fewbits.graph.ops import IDENTITY, JOINS, LAYOUT, MATMUL, POOLS
from fewbits.graph.results import relu_kind
from fewbits.graph.types import Call, CallKey, Graph, Ref, Site

TAGS = frozenset({"requantized", "entering"})
_RELUS = frozenset({"before_relu", "before_relu6"})


@dataclass
class Placement:
    """Where bytes are made.

    chains: first call -> the calls done in one go, itself first. fused: calls inside such a chain, the first left out.
    carried: value -> the `requantized` site whose grid its elements are on, where one covers it. outputs, entering:
    names of the tagged sites. shared: groups of site names that need one grid.
    """

    chains: dict[int, list[Call]] = field(default_factory=dict)
    fused: set[int] = field(default_factory=set)
    carried: dict[int, str] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    entering: list[str] = field(default_factory=list)
    shared: list[list[str]] = field(default_factory=list)


def tag_requantized(graph: Graph, sites: dict[str, Site]) -> None:
    """Give `sites` these tags and no older ones of theirs, in place."""
    placement = find_placement(graph)
    for site in sites.values():
        site.tags -= TAGS
    for tag, names in (("requantized", placement.outputs), ("entering", placement.entering)):
        for name in names:
            sites[name].tags |= {tag}


def find_placement(graph: Graph) -> Placement:
    """Read the placement off a recorded forward."""
    return _Finder(graph).run()


def chain_of(graph: Graph, call: Call) -> list[Call]:
    """The calls that are done in one go with a layer, norm, sum or product, itself first: a batch norm with stored
    statistics, if the call is a layer, and a ReLU or ReLU6, if each alone reads what comes before it."""
    chain = [call]
    after = _only_reader(graph, call)
    if after is not None and after.op == "batch_norm" and graph.flow.is_weighted(call) and is_fixed(graph, after):
        chain.append(after)
        after = _only_reader(graph, after)
    if after is not None and relu_kind(after) in _RELUS:
        chain.append(after)
    return chain


def is_fixed(graph: Graph, norm: Call) -> bool:
    """Whether a batch norm works with stored statistics, not with those of its batch."""
    training = norm.kwargs.get("training", norm.args[5] if len(norm.args) > 5 else False)
    return not training and all(graph.stored_in(norm, slot) for slot in ("running_mean", "running_var"))


def is_average(call: Call) -> bool:
    """Whether a call takes means over axes of its first operand, and nothing else."""
    if call.op.startswith(("avg_pool", "adaptive_avg_pool")):
        return True
    return call.op == "mean" and len(list(call.refs())) == 1 and (len(call.args) > 1 or "dim" in call.kwargs)


def keeps_grid(call: Call) -> bool:
    """Whether every element of the result is one of the first operand's, or zero."""
    if call.op == "pad":
        value = call.kwargs.get("value", call.args[3] if len(call.args) > 3 else None)
        return not value or call.kwargs.get("mode", call.args[2] if len(call.args) > 2 else "constant") != "constant"
    return call.op in LAYOUT or call.op in IDENTITY or "max_pool" in call.op


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.found = Placement()
        self._at: dict[CallKey, dict[str, Site]] = {}
        for site in graph.sites.values():
            self._at.setdefault(site.key, {}).setdefault(site.role, site)
        self._parent: dict[str, str] = {}
        self._entered: dict[int, str] = {}  # value -> the site where it enters
        self._averaged: dict[int, str] = {}  # value without a site of its own -> whose grid it should be on

    def run(self) -> Placement:
        for call in self.graph.calls:
            if call.index in self.found.fused:
                continue
            held = self._at.get(call.key, {}) if call.key is not None else {}
            held = {role: site for role, site in held.items() if role != "weight"}
            if "output" not in held or call.op == "embedding":
                self._pass(call, call.op == "embedding", held)
                continue
            if call.op != "softmax":  # it may read masked scores, whose range no grid holds
                self._read(call, held)
            if "max_pool" in call.op:
                self._pass(call, False, held)
                continue
            self._make(call)
        groups: dict[str, list[str]] = {}
        for name in self.graph.sites:
            if name in self._parent:
                groups.setdefault(self._root(name), []).append(name)
        self.found.shared = [group for group in groups.values() if len(group) > 1]
        return self.found

    def _pass(self, call: Call, starts: bool, held: dict[str, Site]) -> None:
        """A call that makes no bytes: what it reads may go on through it."""
        if starts:
            self._put(call, held.get("output"))
            return
        reads = self.graph.flow.reads[call.index]
        if not reads:
            return
        first = reads[0]
        for table in (self.found.carried, self._averaged):
            if first in table and keeps_grid(call):
                table.update(dict.fromkeys(call.outputs, table[first]))
        if "max_pool" in call.op and first not in self.found.carried and first in self._entered:
            self.found.carried[call.outputs[0]] = self._entered[first]
        if is_average(call) and first in self.found.carried:
            self._averaged[call.outputs[0]] = self.found.carried[first]

    def _read(self, call: Call, held: dict[str, Site]) -> None:
        """Operands that are on no grid get one where they are read."""
        for role, ref in self._operands(call):
            site = held.get(role)
            if site is None or ref.value in self.found.carried:
                continue
            if site.name not in self.found.entering:
                self.found.entering.append(site.name)
            other = self._averaged.get(ref.value) or self._entered.get(ref.value)
            if other is not None:
                self._join(site.name, other)
            self._entered.setdefault(ref.value, site.name)

    def _operands(self, call: Call) -> Iterable[tuple[str, Ref]]:
        for role, ref in self.graph.flow.operands(call).items():
            value = self.graph.values[ref.value]
            if role in ("input", "lhs", "rhs") and value.dtype.is_floating_point:
                yield role, ref

    def _make(self, call: Call) -> None:
        layer = self.graph.flow.is_weighted(call)
        fusing = layer or call.op in ("batch_norm", "add", "mul") or call.op in MATMUL
        chain = chain_of(self.graph, call) if fusing else [call]
        end = chain[-1]
        made = self._at.get(end.key, {}).get("output") if end.key is not None else None
        if made is None:  # the activation lies outside of what carries sites
            chain, made = [call], self._at[call.key]["output"]  # type: ignore[index]
        self.found.chains[call.index] = chain
        self.found.fused.update(other.index for other in chain[1:])
        self._put(chain[-1], made)
        if call.op in JOINS or call.op in POOLS:
            for value in self.graph.flow.reads[call.index]:
                owner = self.found.carried.get(value) or self._entered.get(value)
                if owner is not None:
                    self._join(made.name, owner)

    def _put(self, call: Call, site: Site | None) -> None:
        if site is not None:
            if site.name not in self.found.outputs:
                self.found.outputs.append(site.name)
            self.found.carried[call.outputs[0]] = site.name

    def _join(self, first: str, second: str) -> None:
        self._parent[self._root(first)] = self._root(second)
        self._parent.setdefault(second, second)

    def _root(self, name: str) -> str:
        while self._parent.setdefault(name, name) != name:
            name = self._parent[name]
        return name


def _only_reader(graph: Graph, call: Call) -> Call | None:
    """The call that alone reads a call's output, which is no output of the model either; past dropout and the like."""
    value = call.outputs[0]
    readers = graph.consumers.get(value, [])
    if len(readers) != 1 or value in graph.outputs:
        return None
    reader = graph.calls[readers[0]]
    return _only_reader(graph, reader) if reader.op in IDENTITY else reader
