"""What the rules of `propagate` work on: labels of every value, weight slots and vectors, and how a call is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewbits.graph.labels import FIXED, WILD, Labels, compact, full, holds, is_live, thin
from fewbits.graph.ops import IDENTITY
from fewbits.graph.types import CASTS, Call, CallKey, Graph, Ref, Value, View

#: Element-wise parameters (biases, norm weights, position tables) larger than this are left alone.
MAX_VECTOR = 1 << 22


@dataclass
class Slot:
    """One weight (or slice of one) as the forward uses it: labels for its output rows and its input columns."""

    name: str
    op: str
    param: str
    view: View | None
    index: Tensor | None  # element numbers of the operand where the forward copies the parameter
    layout: str
    groups: int
    out: Tensor  # flat: one label per output row (experts * rows for a stack)
    inputs: Tensor | None  # flat: one label per input column; None for embeddings
    shape: tuple[int, ...]
    order: int
    calls: list[CallKey] = field(default_factory=list)
    bias: str | None = None
    bias_index: Tensor | None = None  # flat element numbers in the bias, one per output row
    padded: bool = False
    touched: set[int] = field(default_factory=set)  # members of the stack that ran, for a stack used in one call


@dataclass
class Vector:
    """A parameter used element by element: one label per element."""

    param: str
    labels: Tensor  # flat, one per element
    touched: Tensor  # bool, flat: the elements the forward read
    order: int
    kind: str = "vector"  # "affine" where it multiplies
    inputs: Tensor | None = None  # labels of what an elementwise product multiplies (layer scale); None for norms
    offset: float = 0.0  # the forward multiplies by (offset + parameter)
    name: str = ""
    op: str = "vector"
    calls: list[CallKey] = field(default_factory=list)
    bias: str | None = None


class Propagation:
    """The labels of every value, and the slots and vectors they came from."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.labels = Labels()
        self.of: dict[int, Tensor] = {}
        self.slots: dict[tuple[Any, ...], Slot] = {}
        self.vectors: dict[str, Vector] = {}
        # query labels, key labels (flat, position by position), where
        self.pairs: list[tuple[Tensor, Tensor, CallKey]] = []
        self.active = graph.flow.active
        self.partial: list[str] = []  # parameters of which the forward used a part (filled by `relations`)
        self._names = _call_names(graph)
        self.by_param: dict[str, list[Slot]] = {}
        self._views: dict[int, tuple[View | None, Tensor | None]] = {}
        self.clashes: list[tuple[Slot, Slot]] = []
        self.aliased: set[int] = set()  # calls that write where something reads through an alias

    # -- reading a call ----------------------------------------------------------------------------------------------
    def get(self, arg: Any) -> Tensor | None:
        """Labels of an argument; None where every element is FIXED (constants, blocked values)."""
        return self.of.get(arg.value) if isinstance(arg, Ref) else None

    def put(self, call: Call, labels: Tensor | None, output: int = 0) -> None:
        if labels is None or output >= len(call.outputs):
            return
        value = self.graph.values[call.outputs[output]]
        if tuple(labels.shape) != value.shape:
            labels = labels.expand(value.shape)
        self.of[value.id] = labels

    def shape(self, arg: Any) -> tuple[int, ...]:
        return self.graph.values[arg.value].shape if isinstance(arg, Ref) else ()

    def value(self, arg: Any) -> Value | None:
        return self.graph.values[arg.value] if isinstance(arg, Ref) else None

    def out_shape(self, call: Call) -> tuple[int, ...]:
        return self.graph.values[call.outputs[0]].shape

    def block_all(self, call: Call, reason: str) -> None:
        for ref in call.refs():
            self.labels.block(self.of.get(ref.value), reason)

    def forbid(self, labels: Tensor | None, *uses: str) -> None:
        for use in uses:
            self.labels.mark("forbid", use, labels)

    def tag(self, labels: Tensor | None, name: str) -> None:
        self.labels.mark("tag", name, labels)

    # -- parameters --------------------------------------------------------------------------------------------------
    def root(self, arg: Any) -> Value | None:
        """The parameter a value is laid out from, if it is one."""
        value = self.value(arg)
        if value is None or value.param is None or not value.dtype.is_floating_point:
            return None
        while value.call is not None:
            first = next(self.graph.calls[value.call].refs())
            value = self.graph.values[first.value]
        return value if value.kind == "parameter" else None

    def param_name(self, root: Value) -> str:
        assert root.param is not None
        return self.graph.tied.get(root.param, root.param)

    def placed(self, arg: Ref, root: Value) -> tuple[View | None, Tensor | None]:
        """Where in its parameter a value lies: a strided view, or element numbers where the forward copies."""
        if arg.value not in self._views:
            view = self.graph.view_of(arg.value, root.shape)
            index = self.graph.index_of(arg.value, root.shape) if view is None else None
            self._views[arg.value] = (view, index)
        return self._views[arg.value]

    def elements(self, arg: Ref, root: Value) -> Tensor:
        """Element numbers of a value within its parameter, in the value's shape."""
        view, index = self.placed(arg, root)
        if index is not None:
            return index
        assert view is not None
        size, stride, offset = view
        return torch.arange(torch.Size(root.shape).numel()).as_strided(size, stride, offset)

    def vector(self, arg: Ref, call: Call, kind: str = "vector", offset: float = 0.0) -> Tensor | None:
        """Labels of a parameter used element by element, or None where it is not one (or too large)."""
        root = self.root(arg)
        if root is None or torch.Size(root.shape).numel() > MAX_VECTOR:
            return None
        name = self.param_name(root)
        vector = self.vectors.get(name)
        if vector is None:
            count = torch.Size(root.shape).numel()
            vector = Vector(
                name, self.labels.fresh(count), torch.zeros(count, dtype=torch.bool), call.index, kind, offset=offset
            )
            self.vectors[name] = vector
        if kind == "affine":
            if vector.kind == "affine" and vector.offset != offset:
                self.labels.block(vector.labels, "two forms of one norm weight")
            vector.kind, vector.offset = kind, offset
            vector.name, vector.op = self._names.get(call.index, ""), call.op
        if call.key is not None and call.key not in vector.calls:
            vector.calls.append(call.key)
        elements = self.elements(arg, root)
        vector.touched[elements.reshape(-1)] = True
        return compact(vector.labels[elements])

    def affine(self, arg: Any, call: Call) -> Tensor | None:
        """Labels of a parameter (or a number plus a parameter) that multiplies."""
        if not isinstance(arg, Ref):
            return None
        if self.root(arg) is not None:
            return self.vector(arg, call, "affine")
        made = self._origin(arg)
        if made is not None and made.op == "add":
            operands = [*made.args, *(v for k, v in made.kwargs.items() if k == "other")]
            numbers = [x for x in operands if isinstance(x, (int, float))]
            refs = [x for x in operands if isinstance(x, Ref)]
            if len(numbers) == 1 and len(refs) == 1 and self.shape(refs[0]) == self.shape(arg):
                return self.vector(refs[0], call, "affine", float(numbers[0]))
        return None

    def affine_inputs(self, arg: Ref, call: Call) -> Tensor:
        """Labels of what a multiplying parameter multiplies, in its shape. Call `affine` first."""
        if self.root(arg) is None:  # a number plus the parameter
            made = self._origin(arg)
            assert made is not None
            arg = next(made.refs())
        root = self.root(arg)
        assert root is not None
        vector = self.vectors[self.param_name(root)]
        if vector.inputs is None:
            vector.inputs = self.labels.fresh(len(vector.labels))
        if call.op == "mul" and self.graph.flow.is_functional_norm(call):
            vector.op = "rms_norm"
        return compact(vector.inputs[self.elements(arg, root)])

    def _origin(self, arg: Ref, through: frozenset[str] = CASTS | IDENTITY) -> Call | None:
        return self.graph.flow.origin(arg.value, through)

    def slot(
        self, call: Call, weight: Ref, layout: str, outs: int, ins: int, groups: int = 1, stack: int = 1
    ) -> Slot | None:
        """The weight slot a call uses, with fresh labels the first time. None where the operand is computed."""
        root = self.root(weight)
        if root is None:
            return None
        name = self.param_name(root)
        view, index = self.placed(weight, root)
        key = (
            name,
            layout,
            groups,
            view if view is not None else (call.key, tuple(index.shape) if index is not None else ()),
        )
        slot = self.slots.get(key)
        if slot is None:
            inputs = self.labels.fresh(stack * ins) if ins else None
            slot = Slot(
                self._names.get(call.index, call.module), call.op, name, view, index, layout, groups,
                self.labels.fresh(stack * outs), inputs, root.shape, call.index,
            )  # fmt: skip
            for other in self.by_param.setdefault(name, []):
                if _overlap(slot, other):
                    self.clashes.append((slot, other))
            self.by_param[name].append(slot)
            self.slots[key] = slot
        if call.key is not None and call.key not in slot.calls:
            slot.calls.append(call.key)
        return slot

    def bias(self, call: Call, arg: Any, slot: Slot | None, out: Tensor) -> None:
        """A bias added to the outputs `out` (flat labels, one per row)."""
        if not isinstance(arg, Ref):
            return
        labels = self.vector(arg, call)
        if labels is None:
            self.labels.block(out, "computed bias")
            self.labels.block(self.get(arg), "computed bias")
            return
        if labels.dim() != 1 or labels.shape != out.shape:
            self.labels.block(out, "bias")
            self.labels.block(labels, "bias")
            return
        self.labels.unite(labels, out, "bias")
        root = self.root(arg)
        assert root is not None
        if slot is not None and slot.bias is None:
            slot.bias, slot.bias_index = self.param_name(root), self.elements(arg, root)

    # -- shared by rules -----------------------------------------------------------------------------------------------
    def consume(self, x: Any, columns: Tensor) -> None:
        """Join a weight's input columns (broadcastable to the input) with the labels of the value it reads."""
        labels = self.get(x)
        if labels is None:
            self.labels.block(columns, "fixed input")
            return
        self.labels.unite(labels, columns, "fixed input")
        if holds(labels, WILD):
            self.forbid(labels, "shift")  # zeros stay zeros

    def run_layout(self, call: Call, fill_with: Callable[[Ref], Tensor | None] | None = None) -> None:
        """Run the call itself on label tensors. Integer operands are the recorded index tables."""
        refs = list(call.refs())
        if not any(is_live(self.of.get(ref.value)) or self._wild(ref) for ref in refs):
            return
        missing = False

        def fill(leaf: Any) -> Any:
            nonlocal missing
            if not isinstance(leaf, Ref):
                return leaf
            value = self.graph.values[leaf.value]
            if value.dtype.is_floating_point or value.dtype.is_complex:
                known = self.of.get(leaf.value)
                if known is None and fill_with is not None:
                    known = fill_with(leaf)
                return full(FIXED, value.shape) if known is None else known
            if value.data is None:
                missing = True
            return value.data

        args, kwargs = pytree.tree_map(fill, (call.args, call.kwargs), is_leaf=lambda x: isinstance(x, Ref))
        if missing:
            self.block_all(call, f"{call.op} by unknown indices")
            return
        if call.op == "setitem":
            target = args[0].clone(memory_format=torch.contiguous_format)
            args = (target, *args[1:])
        elif call.op == "cat" and args:
            args = (thin(args[0], argument(call, 1, "dim", "axis", default=0)), *args[1:])
        try:
            out = call.func(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
            self.block_all(call, call.op)
            return
        leaves = [target] if call.op == "setitem" else [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if call.op == "cat":
            leaves = [out.expand(self.out_shape(call))]
        if [tuple(x.shape) for x in leaves] != [self.graph.values[o].shape for o in call.outputs]:
            self.block_all(call, call.op)
            return
        for position, labels in enumerate(leaves):
            self.put(call, compact(labels.long()), position)

    def _wild(self, ref: Ref) -> bool:
        known = self.of.get(ref.value)
        return known is not None and known.numel() > 0


#: What an op does to labels.
Rule = Callable[[Propagation, Call], None]


def argument(call: Call, position: int, *names: str, default: Any = None) -> Any:
    if position < len(call.args):
        return call.args[position]
    return next((call.kwargs[name] for name in names if name in call.kwargs), default)


def _overlap(slot: Slot, other: Slot) -> bool:
    """Whether two operands laid out from one parameter share elements."""
    low, high = _reach(slot)
    other_low, other_high = _reach(other)
    if high < other_low or other_high < low:
        return False
    total = torch.Size(slot.shape).numel()
    if total > MAX_VECTOR:
        return True
    taken = torch.zeros(total, dtype=torch.bool)
    taken[_numbers(slot, total)] = True
    return bool(taken[_numbers(other, total)].any())


def _reach(slot: Slot) -> tuple[int, int]:
    if slot.view is None:
        assert slot.index is not None
        return int(slot.index.min()), int(slot.index.max())
    size, stride, offset = slot.view
    return offset, offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _numbers(slot: Slot, total: int) -> Tensor:
    if slot.view is None:
        assert slot.index is not None
        return slot.index.reshape(-1)
    return torch.arange(total).as_strided(*slot.view).reshape(-1)


def _call_names(graph: Graph) -> dict[int, str]:
    """Call index -> the name its sites go by, without the role; later calls of one key share the first one's."""
    by_key: dict[CallKey, str] = {}
    for site in graph.sites.values():
        by_key.setdefault(site.key, "" if site.name == site.role else site.name.removesuffix("." + site.role))
    return {call.index: by_key[call.key] for call in graph.calls if call.key is not None and call.key in by_key}
