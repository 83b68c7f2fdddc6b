"""Channel labels carried through a recorded forward: about fifteen rules, and layout ops run on the labels themselves.
 `propagate(graph)` gives every parameter element that could be scaled a label, joins labels that must share a scale,
and blocks those that reach something no scale passes. What it finds is read off by `relations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fewbits.graph.labels import FIRST, FIXED, WILD, Labels, compact, full, is_live, merged
from fewbits.graph.ops import IDENTITY, LAYOUT
from fewbits.graph.types import CASTS, Call, CallKey, Graph, Ref, Value

#: Strided placement of an operand within its contiguous parameter: size, stride, offset.
View = tuple[tuple[int, ...], tuple[int, ...], int]
#: Element-wise parameters (biases, norm weights, position tables) larger than this are left alone.
MAX_VECTOR = 1 << 22
#: Ops a step can replace by ReLU: labels pass, the class is blocked by the op's name.
REPLACEABLE = ("relu6", "hardtanh", "clamp")


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
        self.pairs: list[
            tuple[Tensor, Tensor, CallKey]
        ] = []  # query labels, key labels (flat, position by position), where
        self.active = graph.flow.active
        self.partial: list[str] = []  # parameters of which the forward used a part (filled by `relations`)
        self._names = _call_names(graph)
        self._by_param: dict[str, list[Slot]] = {}
        self._views: dict[int, tuple[View | None, Tensor | None]] = {}
        self._clashes: list[tuple[Slot, Slot]] = []
        self._aliased: set[int] = set()  # calls that write where something reads through an alias

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
        known = self._views.get(arg.value)
        if known is None:
            source = torch.empty(root.shape, device="meta")
            try:
                operand = self.graph.replay(arg.value, source)
            except (RuntimeError, TypeError, IndexError, NotImplementedError):
                operand = None
            if operand is not None and (operand is source or operand._is_view()):
                known = ((tuple(operand.shape), tuple(operand.stride()), int(operand.storage_offset())), None)
            else:
                known = (None, self.graph.index_of(arg.value, root.shape))
            self._views[arg.value] = known
        return known

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
            for other in self._by_param.setdefault(name, []):
                if _overlap(slot, other):
                    self._clashes.append((slot, other))
            self._by_param[name].append(slot)
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

    # -- the run -----------------------------------------------------------------------------------------------------
    def run(self) -> Propagation:
        self._refuse_aliases()
        for call in self.graph.calls:
            rule = RULES.get(call.op)
            if rule is not None:
                rule(self, call)
            else:
                self.block_all(call, call.op)
        held = {value for note in self.graph.module_io if note.path == "" for value in note.held_out}
        passed = {value for note in self.graph.module_io if note.path == "" for value in note.outputs} - held
        for value_id in self.graph.outputs:
            # tensors inside caches are the model's own business: only it reads them
            if value_id not in held or value_id in passed:
                self.labels.block(self.of.get(value_id), "output")
        for value_id in self.graph.escaped:
            self.labels.block(self.of.get(value_id), "read by Python")
        for slot, other in self._clashes:
            for labels in (slot.out, slot.inputs, other.out, other.inputs):
                self.labels.block(labels, "shared parameter")
        for name, slots in self._by_param.items():
            if name in self.vectors:
                self.labels.block(self.vectors[name].labels, "shared parameter")
                for slot in slots:
                    self.labels.block(slot.out, "shared parameter")
                    self.labels.block(slot.inputs, "shared parameter")
        return self

    def _refuse_aliases(self) -> None:
        """Values read through an alias of what was written in place have no labels; block what was written there."""
        graph = self.graph
        roots: dict[int, int] = {}
        for call in graph.calls:
            first = next(call.refs(), None)
            for out in call.outputs:
                same = first is not None and (call.inplace or call.op in LAYOUT)
                roots[out] = roots.get(first.value, first.value) if same and first is not None else out
        bad: set[int] = set()
        for value in graph.values:
            if value.aliased and value.call is not None:
                bad.update(roots.get(out, out) for out in graph.calls[value.call].outputs)
        for call in graph.calls:
            if bad and call.inplace and any(roots.get(out, out) in bad for out in call.outputs):
                self._aliased.add(call.index)

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
        try:
            out = call.func(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
            self.block_all(call, call.op)
            return
        leaves = [target] if call.op == "setitem" else [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if [tuple(x.shape) for x in leaves] != [self.graph.values[o].shape for o in call.outputs]:
            self.block_all(call, call.op)
            return
        for position, labels in enumerate(leaves):
            self.put(call, compact(labels.long()), position)

    def _wild(self, ref: Ref) -> bool:
        known = self.of.get(ref.value)
        return known is not None and known.numel() > 0


# -- rules -----------------------------------------------------------------------------------------------------------
Rule = Callable[[Propagation, Call], None]


def _arg(call: Call, position: int, *names: str, default: Any = None) -> Any:
    if position < len(call.args):
        return call.args[position]
    return next((call.kwargs[name] for name in names if name in call.kwargs), default)


def _layout(p: Propagation, call: Call) -> None:
    if call.op == "setitem" and call.index in p._aliased:
        p.block_all(call, "alias")
        return
    if call.op in ("cat", "stack"):
        p.run_layout(call, lambda ref: p.vector(ref, call))
    else:
        p.run_layout(call)


def _setitem(p: Propagation, call: Call) -> None:
    if call.index in p._aliased:
        p.block_all(call, "alias")
        return
    target, where, new = call.args[:3]
    if not isinstance(new, Ref):
        label = WILD if new == 0 else FIXED
        call = _replaced(call, (target, where, label))
        p.forbid(p.get(target), "shift")
    p.run_layout(call)


def _replaced(call: Call, args: tuple[Any, ...]) -> Call:
    return Call(call.index, call.op, call.func, args, call.kwargs, call.outputs, call.module, call.key, call.use)


def _same(p: Propagation, call: Call) -> None:
    """Casts, dropout and the like: the first operand's labels."""
    first = _arg(call, 0, "input", "self")
    labels = p.get(first)
    if labels is None or not p.graph.values[call.outputs[0]].dtype.is_floating_point:
        p.labels.block(labels, call.op)
        return
    if tuple(labels.shape) != p.out_shape(call):
        p.labels.block(labels, call.op)
        return
    p.put(call, labels)


def _zeros(p: Propagation, call: Call) -> None:
    if p.graph.values[call.outputs[0]].dtype.is_floating_point:
        p.put(call, full(WILD, p.out_shape(call)))


def _filled(p: Propagation, call: Call) -> None:
    number = _arg(call, 2 if call.op == "new_full" else 1, "fill_value", "value")
    if call.op in ("fill", "zero"):
        if call.index in p._aliased:
            p.block_all(call, "alias")
        number = 0 if call.op == "zero" else number
    if isinstance(number, (int, float)) and number == 0:
        _zeros(p, call)


def _copy(p: Propagation, call: Call) -> None:
    if call.index in p._aliased:
        p.block_all(call, "alias")
        return
    p.put(call, p.get(_arg(call, 1, "src", "other")))


def _no_labels(p: Propagation, call: Call) -> None:
    """Reads nothing but shape or type."""


def _number(p: Propagation, arg: Any) -> float | None:
    return float(arg) if isinstance(arg, (int, float)) and not isinstance(arg, bool) else None


def _add(p: Propagation, call: Call) -> None:
    a, b = _arg(call, 0, "input", "self"), _arg(call, 1, "other")
    if _arg(call, 2, "alpha", default=1) != 1 or call.op != "add":
        p.forbid(p.get(a), "shift")
        p.forbid(p.get(b), "shift")
    _sum(p, call, a, b)


def _sum(p: Propagation, call: Call, a: Any, b: Any) -> None:
    """Elementwise sum (or choice) of two operands: their labels are joined."""
    if call.inplace and call.index in p._aliased:
        p.block_all(call, "alias")
        return
    sides = []
    for arg, other in ((a, b), (b, a)):
        number = _number(p, arg)
        labels = p.get(arg)
        if number is not None:
            labels = full(WILD, ()) if number == 0 else full(FIXED, ())
        elif labels is None and is_live(p.get(other)) and isinstance(arg, Ref):
            labels = p.vector(arg, call)
        sides.append(full(FIXED, p.shape(arg)) if labels is None else labels)
    first, second = sides
    if not is_live(first) and not is_live(second):
        if not (bool((first == FIXED).any()) or bool((second == FIXED).any())):
            p.put(call, full(WILD, p.out_shape(call)))
        return
    reason = f"{call.op} of a fixed value"
    p.labels.unite(first, second, reason)
    # now that they are joined, positions of a channel share a class: back to one label per channel
    out = p.labels.settled(merged(first, second))
    for side, other in ((first, second), (second, first)):
        if is_live(side) and bool((other != WILD).any()):
            p.forbid(side, "shift")
    p.put(call, out)


def _where(p: Propagation, call: Call) -> None:
    if len(call.args) + len(call.kwargs) < 3:
        p.block_all(call, "where")
        return
    p.block_all(Call(0, "", call.func, call.args[:1], {}, (), "", None), "where")
    _sum(p, call, _arg(call, 1, "input"), _arg(call, 2, "other"))


def _masked_fill(p: Propagation, call: Call) -> None:
    x, number = p.get(call.args[0]), _arg(call, 2, "value")
    mask = p.value(_arg(call, 1, "mask"))
    unused = mask is not None and mask.data is not None and not bool(mask.data.any())
    if _number(p, number) == 0 or unused:
        p.forbid(x, "shift")
        p.put(call, x)
    else:
        p.labels.block(x, "masked_fill")


def _mul(p: Propagation, call: Call) -> None:
    a, b = _arg(call, 0, "input", "self"), _arg(call, 1, "other")
    if call.inplace and call.index in p._aliased:
        p.block_all(call, "alias")
        return
    for x, y in ((a, b), (b, a)):
        number = _number(p, y)
        if number is None:
            continue
        if call.op == "rdiv" or (call.op == "div" and y is a):
            p.block_all(call, call.op)
            return
        labels = p.get(x)
        if number == 0 and call.op == "mul":
            p.put(call, full(WILD, p.out_shape(call)))
            return
        if number != 1:
            p.forbid(labels, "shift")
        p.put(call, labels)
        return
    left, right = p.get(a), p.get(b)
    live_left, live_right = is_live(left), is_live(right)
    if call.op in ("div", "rdiv"):
        over, under = (b, a) if call.op == "rdiv" else (a, b)
        p.labels.block(p.get(under), "div")
        if is_live(p.get(over)):
            _through_product(p, call, over, under)
        return
    if live_left and live_right:
        p.block_all(call, "product")
        return
    for x, y in ((a, b), (b, a)):
        # a parameter that multiplies makes new channels, unless it is a single number
        if torch.Size(p.shape(y)).numel() > 1:
            made = p.affine(y, call)
            if made is not None:
                p.forbid(made, "permute", "rotate")  # the other side stays in its order
                reads = p.affine_inputs(y, call)
                p.forbid(reads, "shift", "permute", "rotate")
                _consume(p, call, x, reads)
                p.put(call, compact(made.expand(p.out_shape(call))))
                return
    if live_left or live_right:
        _through_product(p, call, *((a, b) if live_left else (b, a)))


def _through_product(p: Propagation, call: Call, x: Any, y: Any) -> None:
    """A labelled side times a side whose values stay as they are."""
    labels = p.get(x)
    if isinstance(y, Ref) and y.value in p.active:
        p.tag(labels, "gate")
    elif torch.Size(p.shape(y)).numel() > 1:
        p.forbid(labels, "shift", "permute", "rotate")
    else:
        p.forbid(labels, "shift")
    assert labels is not None
    p.put(call, compact(labels.expand(p.out_shape(call))) if labels.dim() == len(p.out_shape(call)) else labels)


def _neg(p: Propagation, call: Call) -> None:
    p.forbid(p.get(call.args[0]), "shift")
    _same(p, call)


def _relu(p: Propagation, call: Call) -> None:
    x = _arg(call, 0, "input", "self")
    if call.inplace and call.index in p._aliased:
        p.block_all(call, "alias")
        return
    p.tag(p.get(x), "relu")
    _same(p, call)


def _bounded(p: Propagation, call: Call) -> None:
    """ReLU6 and its kin: with a lower bound of 0 they pass a positive scale but for the upper one."""
    low, high = (0.0, 6.0) if call.op == "relu6" else (_arg(call, 1, "min_val", "min"), _arg(call, 2, "max_val", "max"))
    if call.op == "hardtanh":
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    x = _arg(call, 0, "input", "self")
    if _number(p, low) != 0 or isinstance(high, Ref):
        p.block_all(call, call.op)
        return
    if high is not None:
        p.labels.block(p.get(x), call.op)
    _relu(p, call)


def _positional(p: Propagation, call: Call) -> None:
    """Ops over positions of one channel: pooling, resizing, region alignment."""
    x = _arg(call, 0, "input", "self")
    labels = p.get(x)
    if not is_live(labels):
        if labels is not None and call.op != "roi_align":
            p.put(call, full(WILD, p.out_shape(call)) if bool((labels == WILD).all()) else None)
        return
    assert labels is not None
    out = p.out_shape(call)
    spatial = 2 if call.op == "roi_align" else labels.dim() - 2 if call.op == "interpolate" else int(call.op[-2])
    p.tag(labels, "pool")
    dims = range(labels.dim() - spatial, labels.dim())
    kept = p.labels.along(labels, dims, call.op)
    if call.op == "roi_align":
        kept = p.labels.along(kept, [0], call.op)
    p.put(call, compact(kept.expand(out)))


def _reduced(p: Propagation, call: Call) -> None:
    """mean, sum and amax over some dimensions."""
    x = _arg(call, 0, "input", "self")
    labels = p.get(x)
    if labels is None or not labels.numel():
        return
    dims = _arg(call, 1, "dim", "axis")
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        dims = tuple(range(labels.dim()))
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    dims = tuple(dim % labels.dim() for dim in dims)
    if call.op == "amax":
        p.tag(labels, "pool")
    elif call.op == "sum":
        p.forbid(labels, "shift")
    kept = p.labels.along(labels, dims, call.op)
    out = p.out_shape(call)
    if len(out) != labels.dim():
        for dim in sorted(dims, reverse=True):
            kept = kept.squeeze(dim)
    p.put(call, kept.expand(out))


def _pad(p: Propagation, call: Call) -> None:
    labels = p.get(_arg(call, 0, "input"))
    if labels is None:
        return
    widths, mode = _arg(call, 1, "pad"), _arg(call, 2, "mode", default="constant")
    number = _arg(call, 3, "value", default=None)
    if mode == "constant":
        out = F.pad(labels, list(widths), value=WILD if not number else FIXED)
        p.forbid(labels, "shift")
    else:
        out = F.pad(labels.double(), list(widths), mode=mode).long()
    p.put(call, compact(out))


def _matmul(p: Propagation, call: Call) -> None:
    a, b = call.bound.get("lhs"), call.bound.get("rhs")
    if not isinstance(a, Ref) or not isinstance(b, Ref):
        p.block_all(call, call.op)
        return
    out = _product(p, call, a, b)
    if call.op == "baddbmm":
        bias = p.get(call.bound.get("bias"))
        if is_live(out) or is_live(bias):
            p.labels.block(out, "baddbmm")
            p.labels.block(bias, "baddbmm")
        return
    p.put(call, out)


def _product(p: Propagation, call: Call, a: Ref, b: Ref) -> Tensor | None:
    """Labels of the product of two values, or of a value and a parameter."""
    for weight, x, on_right in ((b, a, True), (a, b, False)):
        if p.root(weight) is not None and len(p.shape(weight)) >= 2 and x.value in p.active:
            return _by_weight(p, call, x, weight, on_right)
    left, right, shape = p.get(a), p.get(b), p.out_shape(call)
    live_left, live_right = is_live(left), is_live(right)
    if not (live_left or live_right):
        return None
    if len(p.shape(a)) < 2 or len(p.shape(b)) < 2:
        p.block_all(call, "matmul with a vector")
        return None
    if live_left and live_right:
        assert left is not None and right is not None
        rows = p.labels.along(left, [left.dim() - 2], "query_key").squeeze(-2)
        columns = p.labels.along(right, [right.dim() - 1], "query_key").squeeze(-1)
        rows, columns = torch.broadcast_tensors(rows, columns)
        if call.key is not None:
            p.pairs.append((rows.reshape(-1), columns.reshape(-1), call.key))
        p.block_all(call, "query_key")
        return None
    # One side's values stay as they are: the product is linear in the other.
    labels, contracted, other = (right, -2, a) if live_right else (left, -1, b)
    assert labels is not None
    p.tag(labels, "attention")
    if not (live_right and _sums_to_one(p, other)):
        p.forbid(labels, "shift")
    kept = p.labels.along(labels, [labels.dim() + contracted], call.op)
    return compact(kept.expand(shape))


def _sums_to_one(p: Propagation, arg: Ref) -> bool:
    """Whether a value's rows are softmax probabilities, nothing masked out afterwards."""
    through = CASTS | IDENTITY | {"view", "reshape", "masked_fill"}
    value_id = arg.value
    while True:
        index = p.graph.values[value_id].call
        if index is None:
            return False
        call = p.graph.calls[index]
        if call.op == "softmax":
            dim = _arg(call, 1, "dim")
            return isinstance(dim, int) and dim % len(p.out_shape(call)) == len(p.out_shape(call)) - 1
        if call.op not in through:
            return False
        if call.op == "masked_fill":
            mask = p.value(_arg(call, 1, "mask"))
            if mask is None or mask.data is None or bool(mask.data.any()):
                return False
        if call.op in ("view", "reshape") and p.shape(call.args[0])[-1:] != p.out_shape(call)[-1:]:
            return False
        value_id = next(call.refs()).value


def _consume(p: Propagation, call: Call, x: Any, columns: Tensor) -> None:
    """Join a weight's input columns (broadcastable to the input) with the labels of the value it reads."""
    labels = p.get(x)
    if labels is None:
        p.labels.block(columns, "fixed input")
        return
    p.labels.unite(labels, columns, "fixed input")
    if bool((labels == WILD).any()):
        p.forbid(labels, "shift")  # zeros stay zeros


def _by_weight(p: Propagation, call: Call, x: Ref, weight: Ref, on_right: bool) -> Tensor | None:
    """x @ W (rows of W are inputs) or W @ x; W may be a stack of matrices."""
    shape, out = p.shape(weight), p.out_shape(call)
    stack, (rows, columns) = shape[:-2], shape[-2:]
    ins, outs = (rows, columns) if on_right else (columns, rows)
    layout = ("io" if on_right else "oi") if not stack else ("expert_io" if on_right else "expert_oi")
    count = torch.Size(stack).numel()
    slot = p.slot(call, weight, layout, outs, ins, stack=count)
    if slot is None or slot.inputs is None:
        p.block_all(call, "computed weight")
        return None
    axis = -2 if on_right else -1
    _consume(p, call, x, slot.inputs.view(*stack, ins).unsqueeze(axis))
    if stack:
        p.forbid(slot.inputs, "permute", "rotate", "shift")
        p.forbid(slot.out, "permute", "rotate")
    return compact(slot.out.view(*stack, outs).unsqueeze(axis).expand(out))


def _addmm(p: Propagation, call: Call) -> None:
    x, weight, bias = (call.bound.get(name) for name in ("input", "weight", "bias"))
    if not isinstance(weight, Ref) or not isinstance(x, Ref) or p.root(weight) is None:
        p.block_all(call, call.op)
        return
    out = _by_weight(p, call, x, weight, True)
    if out is None:
        return
    slot = next(s for s in p._by_param[p.param_name(p.root(weight))] if call.key in s.calls)  # type: ignore[arg-type]
    p.bias(call, bias, slot, slot.out)
    p.put(call, out)


def _linear(p: Propagation, call: Call) -> None:
    x, weight, bias = (call.bound.get(name) for name in ("input", "weight", "bias"))
    if not isinstance(weight, Ref) or len(p.shape(weight)) != 2:
        p.block_all(call, call.op)
        return
    outs, ins = p.shape(weight)
    slot = p.slot(call, weight, "oi", outs, ins)
    if slot is None or slot.inputs is None:
        p.block_all(call, "computed weight")
        return
    _consume(p, call, x, slot.inputs)
    p.bias(call, bias, slot, slot.out)
    p.put(call, slot.out.expand(p.out_shape(call)))


def _conv(p: Propagation, call: Call) -> None:
    x, weight, bias = (call.bound.get(name) for name in ("input", "weight", "bias"))
    spatial = int(call.op[-2])
    groups = int(_arg(call, 6, "groups", default=1))
    if not isinstance(weight, Ref) or not isinstance(x, Ref):
        p.block_all(call, call.op)
        return
    shape = p.shape(weight)
    transposed = call.op.startswith("conv_transpose")
    outs, ins = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    slot = p.slot(call, weight, "io_conv" if transposed else "oi", outs, ins, groups)
    if slot is None or slot.inputs is None:
        p.block_all(call, "computed weight")
        return
    padding = _arg(call, 4, "padding", default=0)
    slot.padded = (
        slot.padded or transposed or (padding if isinstance(padding, str) else _any(padding)) not in (False, "valid")
    )
    if slot.padded:
        p.forbid(slot.inputs, "shift")
    if groups > 1:
        p.forbid(slot.inputs, "permute", "rotate")
        p.forbid(slot.out, "permute", "rotate")
    _consume(p, call, x, slot.inputs.view(-1, *[1] * spatial))
    p.bias(call, bias, slot, slot.out)
    p.put(call, slot.out.view(-1, *[1] * spatial).expand(p.out_shape(call)))


def _any(padding: Any) -> bool:
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def _grouped_mm(p: Propagation, call: Call) -> None:
    """x [tokens, in] times a stack of matrices [experts, in, out], the rows of x belonging to experts by offsets."""
    x, weight = call.bound.get("lhs"), call.bound.get("rhs")
    ends = p.value(_arg(call, 2, "offs"))
    if (
        not isinstance(x, Ref)
        or not isinstance(weight, Ref)
        or ends is None
        or ends.data is None
        or len(p.shape(weight)) != 3
    ):
        p.block_all(call, call.op)
        return
    experts, ins, outs = p.shape(weight)
    slot = p.slot(call, weight, "expert_io", outs, ins, stack=experts)
    if slot is None or slot.inputs is None or len(p.shape(x)) != 2:
        p.block_all(call, "computed weight")
        return
    which = torch.bucketize(torch.arange(p.shape(x)[0]), ends.data.long().cpu(), right=True).clamp(max=experts - 1)
    slot.touched.update(which.tolist())
    p.forbid(slot.inputs, "permute", "rotate", "shift")
    p.forbid(slot.out, "permute", "rotate", "shift")
    _consume(p, call, x, slot.inputs.view(experts, ins)[which])
    p.put(call, compact(slot.out.view(experts, outs)[which]))


def _embedding(p: Propagation, call: Call) -> None:
    weight = call.bound.get("weight")
    if not isinstance(weight, Ref):
        return
    width = p.shape(weight)[1]
    slot = p.slot(call, weight, "io", width, 0)
    if slot is not None:
        p.put(call, slot.out.expand(p.out_shape(call)))


def _norm(p: Propagation, call: Call) -> None:
    p.labels.block(p.get(call.bound.get("input")), call.op)
    weight, bias = call.bound.get("weight"), call.bound.get("bias")
    out = p.out_shape(call)
    labels = p.affine(weight, call)
    if labels is None:
        return
    p.forbid(labels, "permute", "rotate")
    root = p.root(weight)
    vector = p.vectors.get(p.param_name(root)) if root is not None else None
    if isinstance(bias, Ref):
        shift = p.vector(bias, call)
        if shift is None:
            p.labels.block(labels, "computed bias")
        else:
            p.labels.unite(labels, shift, "bias")
            bias_root = p.root(bias)
            if vector is not None and bias_root is not None:
                vector.bias = p.param_name(bias_root)
    if call.op not in ("layer_norm", "rms_norm"):
        labels = labels.view(-1, *[1] * (len(out) - 2))
    p.put(call, compact(labels.expand(out)))


def _index_add(p: Propagation, call: Call) -> None:
    x, dim, index, source = (_arg(call, i, n) for i, n in enumerate(("input", "dim", "index", "source")))
    into, added, at = p.get(x), p.get(source), p.value(index)
    if not is_live(into) and not is_live(added):
        return
    if at is None or at.data is None or call.index in p._aliased:
        p.block_all(call, call.op)
        return
    into = full(FIXED, p.shape(x)) if into is None else into
    added = full(FIXED, p.shape(source)) if added is None else added
    p.forbid(into, "shift")
    p.forbid(added, "shift")
    out = into.clone(memory_format=torch.contiguous_format)
    rows = out.index_select(dim, at.data)
    out.index_copy_(dim, at.data, torch.where(rows == WILD, added, rows))
    p.labels.unite(out.index_select(dim, at.data), added, call.op)
    p.labels.unite(out.index_select(dim, at.data), rows, call.op)
    p.put(call, compact(out))


_SHAPE_ONLY = (
    "arange",
    "ones",
    "ones_like",
    "new_ones",
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "tensor",
    "as_tensor",
    "one_hot",
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(LAYOUT - CASTS, _layout),
    **dict.fromkeys(("cat", "stack", "index_select", "gather", "take_along_dim", "unfold", "contiguous"), _layout),
    **dict.fromkeys((CASTS - {"contiguous"}) | IDENTITY, _same),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"), _zeros),
    **dict.fromkeys(("full", "full_like", "new_full", "fill", "zero"), _filled),
    **dict.fromkeys(_SHAPE_ONLY, _no_labels),
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    **dict.fromkeys(("mul", "div", "rdiv"), _mul),
    **dict.fromkeys(("relu", "leaky_relu", "prelu"), _relu),
    **dict.fromkeys(REPLACEABLE, _bounded),
    **{f"{kind}_pool{n}d": _positional for n in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")},
    **dict.fromkeys(("interpolate", "roi_align"), _positional),
    **dict.fromkeys(("mean", "sum", "amax"), _reduced),
    **{f"conv{kind}{n}d": _conv for n in (1, 2, 3) for kind in ("", "_transpose")},
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"), _norm),
    **dict.fromkeys(("matmul", "baddbmm"), _matmul),
    "setitem": _setitem,
    "copy": _copy,
    "where": _where,
    "masked_fill": _masked_fill,
    "neg": _neg,
    "pad": _pad,
    "addmm": _addmm,
    "linear": _linear,
    "grouped_mm": _grouped_mm,
    "embedding": _embedding,
    "index_add": _index_add,
}


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


def propagate(graph: Graph) -> Propagation:
    """Labels of a recorded forward."""
    return Propagation(graph).run()


__all__ = ["FIRST", "Propagation", "Slot", "Vector", "propagate"]
