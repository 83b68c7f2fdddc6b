"""Which modules are processed at once: a rule without class names, and what each unit needs from the ones before it.

A module *weighs* the number of distinct weight parameters that linear, convolution and product calls read under it. A
*stage* is a module that runs several children of one class, each of weight two or more, one after another. Stages,
plain containers and everything that holds a stage are opened from the root downward; what is then left with a weight
of two or more is a unit, and a single left-over weighted op becomes a unit with the norms and activations that its
module holds.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from fewbits.errors import FewbitsError
from fewbits.graph.ops import ACTIVATIONS, NORMS
from fewbits.graph.types import Call, Graph, ModuleCall, Unit

#: Calls whose output sizes depend on the values they are given.
_DATA_SIZED = frozenset("nonzero argwhere masked_select unique unique_consecutive nms batched_nms".split())
#: Calls that write into their first operand and so keep its size.
_KEEPS_FIRST = frozenset(
    "setitem index_add index_copy index_put index_fill scatter scatter_add scatter_reduce masked_scatter copy "
    "slice_scatter select_scatter".split()
)


def find_units(graph: Graph, pattern: str | Iterable[str] | None = None, *, embeddings: bool = False) -> list[Unit]:
    """The units of a recorded forward, disjoint, in the order of their first call.

    `pattern` (one glob or several; `*` stays within one path segment, `**` does not) makes the modules it matches
    units; the rest of the model follows the default rule. `embeddings` counts lookup tables as weighted ops. Fills
    `graph.unowned` with weighted calls that lie in no unit and `graph.opened` with modules that could not be units,
    and why. Raises `FewbitsError` where a pattern matches no module that ran, or one that cannot be run again from
    its recorded inputs.
    """
    return _Finder(graph, embeddings).find([pattern] if isinstance(pattern, str) else list(pattern or ()))


def unit_needs(graph: Graph, units: list[Unit] | None = None) -> dict[str, set[str]]:
    """For every unit, the other units whose outputs reach its inputs without passing through a further unit.

    An output has to be kept until the last unit that needs it has run. Calls in no unit are re-run as glue.
    """
    units = graph.units if units is None else units
    owner = {index: unit.name for unit in units for index in unit.calls}
    given: dict[str, set[int]] = defaultdict(set)
    names = {unit.name for unit in units}
    for note in graph.module_io:
        if note.path in names:
            given[note.path].update(note.inputs)
    needs: dict[str, set[str]] = {}
    for unit in units:
        frontier = list(given[unit.name])
        for index in unit.calls:
            frontier.extend(ref.value for ref in graph.calls[index].refs())
        seen: set[int] = set()
        found: set[str] = set()
        while frontier:
            value = frontier.pop()
            if value in seen:
                continue
            seen.add(value)
            made = graph.values[value].call
            if made is None:
                continue
            if made in owner:
                found.add(owner[made])
            else:
                frontier.extend(ref.value for ref in graph.calls[made].refs())
        needs[unit.name] = found - {unit.name}
    return needs


@dataclass
class _Node:
    """A module in the tree of names."""

    path: str
    children: list[_Node] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # recorded calls of the module itself, not of its children
    weights: set[str] = field(default_factory=set)  # distinct weighted parameters at or below
    weighted: list[int] = field(default_factory=list)  # the module's own weighted calls
    notes: list[ModuleCall] = field(default_factory=list)

    @property
    def weight(self) -> int:
        return len(self.weights)

    def walk(self) -> Iterable[_Node]:
        yield self
        for child in self.children:
            yield from child.walk()

    def all_calls(self) -> list[int]:
        return sorted(index for node in self.walk() for index in node.calls)


class _Finder:
    def __init__(self, graph: Graph, embeddings: bool) -> None:
        self.graph = graph
        self.embeddings = embeddings
        self.nodes: dict[str, _Node] = {}
        for path in sorted(graph.module_classes, key=lambda p: (p.count("."), p != "")):
            self._node(path)
        self.root = self._node("")
        for note in graph.module_io:
            self._node(note.path).notes.append(note)
        for call in graph.calls:
            node = self._node(call.module)
            node.calls.append(call.index)
            if self._is_weighted(call):
                node.weighted.append(call.index)
                name = graph.flow.weight_param(call) or f"{call.module}.{call.op}"
                for path in _ancestors(call.module):
                    self.nodes[path].weights.add(graph.tied.get(name, name))
        self.forced: set[str] = set()
        self._stages: dict[str, bool] = {}
        self.block_classes = self._block_classes()
        self.units: list[Unit] = []
        self.unowned: list[str] = []
        self.opened: dict[str, str] = {}

    def _node(self, path: str) -> _Node:
        node = self.nodes.get(path)
        if node is None:
            node = self.nodes[path] = _Node(path)
            if path:
                self._node(path.rpartition(".")[0]).children.append(node)
        return node

    def _is_weighted(self, call: Call) -> bool:
        if call.op == "embedding":
            return self.embeddings
        return self.graph.flow.is_weighted(call)

    # -- stages ------------------------------------------------------------------------------------------------------
    def _block_classes(self) -> set[str]:
        """Classes of which a module runs two or more in series, each of weight two or more."""
        found: set[str] = set()
        for node in self.nodes.values():
            for name, group in self._same_class(node).items():
                if name not in found and self._serial(group):
                    found.add(name)
        return found

    def _same_class(self, node: _Node) -> dict[str, list[_Node]]:
        groups: dict[str, list[_Node]] = defaultdict(list)
        for child in node.children:
            if child.weight >= 2:
                groups[self.graph.module_classes[child.path]].append(child)
        return {name: group for name, group in groups.items() if len(group) >= 2}

    def _serial(self, group: list[_Node]) -> bool:
        """Whether some child reads what the one before it made."""
        ordered = sorted(((node.all_calls(), node) for node in group), key=lambda pair: pair[0][0])
        return any(self._feeds(first, second) for (first, _), (second, _) in pairwise(ordered))

    def _feeds(self, first: list[int], second: list[int]) -> bool:
        inside, target = set(first), set(second)
        reached: set[int] = set()
        for index in range(first[0], second[-1] + 1):
            call = self.graph.calls[index]
            if index in inside:
                reached.update(call.outputs)
            elif any(ref.value in reached for ref in call.refs()):
                if index in target:
                    return True
                reached.update(call.outputs)
        return False

    def is_stage(self, node: _Node) -> bool:
        known = self._stages.get(node.path)
        if known is None:
            known = self._stages[node.path] = self._find_stage(node)
        return known

    def _find_stage(self, node: _Node) -> bool:
        classes = self.graph.module_classes
        heavy = [child for child in node.children if child.weight]
        if not heavy or node.weighted:
            return False
        if len(heavy) == 1:
            child = heavy[0]
            if child.weight < 2 or child.path in self.graph.containers:
                return False
            alone_in_list = node.path in self.graph.containers and not node.notes
            return alone_in_list or classes[child.path] in self.block_classes
        alike = len({classes[child.path] for child in heavy}) == 1
        if node.path not in self.graph.containers and not alike:
            return False
        return any(self._serial(group) for group in self._same_class(node).values())

    def holds_stage(self, node: _Node) -> bool:
        return any(self.is_stage(inner) for inner in node.walk())

    # -- walking down ------------------------------------------------------------------------------------------------
    def find(self, patterns: list[str]) -> list[Unit]:
        for pattern in patterns:
            self._force(pattern)
        self._walk(self.root)
        self._mark_repeated()
        self.units.sort(key=lambda unit: unit.calls[0])
        self.graph.unowned, self.graph.opened = self.unowned, self.opened
        return self.units

    def _force(self, pattern: str) -> None:
        regex = _glob(pattern)
        hits = [
            node for path, node in self.nodes.items() if path and regex.fullmatch(path) and node.weight and node.notes
        ]
        if not hits:
            raise FewbitsError(
                f"unit pattern {pattern!r} matches no module with weights that ran; there are {self._examples()}"
            )
        for node in hits:
            reason = self._why_not(node)
            if reason:
                raise FewbitsError(f"unit pattern {pattern!r}: {node.path} {reason}; choose modules inside it")
            self.forced.add(node.path)

    def _examples(self) -> str:
        paths = [path for path, node in self.nodes.items() if path and node.weight >= 2 and node.notes]
        return ", ".join(paths[:5]) or "nothing (no module with weights ran)"

    def _walk(self, node: _Node) -> None:
        if not node.weights:
            return
        if node.path in self.forced:
            self._add(node)
            return
        if self._must_open(node):
            if node is self.root and not node.children:
                self._add(node)
                return
            self._open(node)
        elif node.weight >= 2 or self._holds_more(node):
            self._add(node)
        else:
            self._single(node)

    def _must_open(self, node: _Node) -> bool:
        if node is self.root or any(path.startswith(node.path + ".") for path in self.forced):
            return True
        if node.weight >= 2 and (node.path in self.graph.plain_containers or self._wraps(node)):
            return True
        if not node.notes:
            return True
        if self.holds_stage(node):
            return True
        reason = self._why_not(node)
        if reason:
            self.opened[node.path] = reason
        return reason is not None

    def _wraps(self, node: _Node) -> bool:
        """Whether nothing but wrappers lies between the root and this module."""
        parent = self.nodes[node.path.rpartition(".")[0]]
        if sum(1 for child in parent.children if child.weights) != 1 or parent.weighted:
            return False
        return parent is self.root or self._wraps(parent)

    def _open(self, node: _Node) -> None:
        for index in node.weighted:
            call = self.graph.calls[index]
            name = self.graph.flow.weight_param(call) or "a computed weight"
            place = f"{call.module}.{call.op}" if call.module else call.op
            self.unowned.append(f"{place} ({name})")
        for child in node.children:
            self._walk(child)

    def _single(self, node: _Node) -> None:
        """A module with one weighted op and nothing else worth a unit: the op's own module."""
        while not node.weighted:
            node = next(child for child in node.children if child.weights)
        self._add(node)

    def _holds_more(self, node: _Node) -> bool:
        """Whether a module with one weighted op also holds norms, activations or further parameters."""
        if sum(bool(child.calls) for child in node.walk()) == 1 and not any(child.weights for child in node.children):
            own = set(node.weighted)
            others = [self.graph.calls[index] for index in node.calls if index not in own]
        else:
            own = {index for child in node.walk() for index in child.weighted}
            others = [self.graph.calls[index] for index in node.all_calls() if index not in own]
        values = self.graph.values
        for call in others:
            if call.op in NORMS or call.op in ACTIVATIONS:
                return True
            for ref in call.refs():
                value = values[ref.value]
                name = value.param
                if name is not None and value.kind != "buffer" and self.graph.tied.get(name, name) not in node.weights:
                    return True
        return False

    def _add(self, node: _Node) -> None:
        calls = tuple(node.all_calls())
        kind = "op" if node.weight == 1 and not self._holds_more(node) else "module"
        self.units.append(Unit(node.path, kind, calls, max(1, len(node.notes))))

    def _mark_repeated(self) -> None:
        """A class that makes up several units, or that some module runs in series, is a block class."""
        classes = self.graph.module_classes
        heavy = [unit for unit in self.units if self.nodes[unit.name].weight >= 2]
        count = Counter(classes[unit.name] for unit in heavy)
        for unit in heavy:
            if count[classes[unit.name]] >= 2 or classes[unit.name] in self.block_classes:
                unit.kind = "block"

    # -- can it be run again? ----------------------------------------------------------------------------------------
    def _why_not(self, node: _Node) -> str | None:
        """Why a module cannot be run again from the tensors it was given, or None."""
        calls = node.all_calls()
        inside = set(calls)
        if any(not any(note.start <= index < note.stop for note in node.notes) for index in calls):
            return "runs partly outside its own forward"
        given = {value for note in node.notes for value in note.inputs}
        read = {ref.value for index in calls for ref in self.graph.calls[index].refs()}
        for note in node.notes:
            if (read - given) & set(note.held_in):
                return f"reads tensors out of an argument that is no plain container ({', '.join(note.objects_in)})"
            if any(self.graph.values[value].call in inside for value in note.held_out):
                return f"returns tensors in something else than a plain container ({', '.join(note.objects_out)})"
        outside = [value for value in read - given if self.graph.values[value].call not in (None, *inside)]
        if outside:
            made = self.graph.calls[self.graph.values[outside[0]].call or 0]
            return f"reads a tensor it was not given (made by {made.op} in {made.module or 'the model'})"
        if self._ragged(calls) & {value for note in node.notes for value in note.outputs}:
            return "returns tensors whose sizes depend on the data"
        return None

    def _ragged(self, calls: list[int]) -> set[int]:
        """Values made by these calls whose sizes depend on other values (selections, suppressed boxes)."""
        found: set[int] = set()
        for index in calls:
            call = self.graph.calls[index]
            refs = list(call.refs())
            if (
                call.op in _DATA_SIZED
                or (call.op == "where" and len(refs) == 1)
                or (call.op == "getitem" and self._by_mask(call))
            ):
                found.update(call.outputs)
            elif call.op in _KEEPS_FIRST:
                if refs and refs[0].value in found:
                    found.update(call.outputs)
            elif any(ref.value in found for ref in refs):
                found.update(out for out in call.outputs if self.graph.values[out].shape)
        return found

    def _by_mask(self, call: Call) -> bool:
        return any(str(self.graph.values[ref.value].dtype) == "torch.bool" for ref in list(call.refs())[1:])


def _ancestors(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [""] + [".".join(parts[: i + 1]) for i in range(len(parts))]


def _glob(pattern: str) -> re.Pattern[str]:
    """A glob over dotted paths: `*` within a segment, `**` across segments, `?` and `[...]` as usual."""
    out = ""
    i = 0
    while i < len(pattern):
        char = pattern[i]
        if pattern.startswith("**", i):
            out += ".*"
            i += 1
        elif char == "*":
            out += r"[^.]*"
        elif char == "?":
            out += r"[^.]"
        elif char == "[" and "]" in pattern[i:]:
            end = pattern.index("]", i)
            body = pattern[i + 1 : end]
            out += f"[{'^' + body[1:] if body.startswith('!') else body}]"
            i = end
        else:
            out += re.escape(char)
        i += 1
    return re.compile(out)
