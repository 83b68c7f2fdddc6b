"""What a recorded forward is made of: values, calls, sites, units, relations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fewbits.graph.flow import Flow

#: (module path, canonical op, ordinal within this call of that module): the run-time address of an op.
CallKey = tuple[str, str, int]
#: Strided placement of an operand within its contiguous parameter: size, stride, offset.
View = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor inside a recorded call's arguments."""

    value: int


@dataclass
class Value:
    """One tensor that flowed through the forward.

    `param` names the parameter or buffer this value is, or is laid out from (views, chunks, casts). `data` keeps the
    contents of integer and boolean tensors that do not come from the model's inputs (index tables), for re-running
    layout ops.
    """

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    call: int | None = None  # index of the producing call; None for inputs, parameters and constants
    kind: str = "call"  # "call" | "input" | "parameter" | "buffer" | "constant"
    param: str | None = None
    aliased: bool = False  # a view whose base was written through another alias
    data: torch.Tensor | None = None


@dataclass
class Call:
    """One overridable torch call: the function, its arguments with `Ref` in place of tensors, and where it ran."""

    index: int
    op: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]  # value ids in flattening order
    module: str  # innermost module path
    key: CallKey | None  # None for ops outside the op table
    use: int = 0  # which call of that module within the forward (modules called several times)
    bound: dict[str, Any] = field(default_factory=dict)  # slot -> Ref or plain argument, known ops only
    inplace: bool = False
    opened: bool = False  # part of a composite call (attention) that runs as one kernel where nothing inside is wanted

    def refs(self) -> Iterator[Ref]:
        """Every tensor argument, in flattening order."""
        leaves = torch.utils._pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda x: isinstance(x, Ref))
        return (leaf for leaf in leaves if isinstance(leaf, Ref))


@dataclass
class Site:
    """One tensor at one place in the forward that can be quantized.

    `name` is stable over runs; `role` is the operand (`weight`, `input`, `lhs`, `rhs`, `output`), `slot` the place in
    the call it is passed at; `tags` come from data flow. For weight sites `param` is the parameter's name, `layout`
    tells how the operand relates to (out, in) (see `operands.canonical`), and `view` is the (size, stride, offset) of
    the operand within a contiguous parameter, None where the forward copies the parameter first. `call` is the first
    call's index. `source` names the tensor, "" where it is not known: sites of one source hold one and the same
    tensor; it is the path of the module whose own last op made it, or a `#` and a number.
    """

    name: str
    key: CallKey
    op: str
    role: str
    slot: str
    call: int
    value: int
    shape: tuple[int, ...]
    tags: frozenset[str] = frozenset()
    param: str | None = None
    layout: str = "oi"
    groups: int = 1
    view: View | None = None
    sliced: bool = False  # the operand is a part of the parameter (expert slice, chunk)
    uses: int = 1
    used_by: tuple[str, ...] = ()  # other places where the same parameter is read
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, enough to attach a quantizer to a rebuilt model without recording it again."""
        data = {
            name: getattr(self, name) for name in ("name", "op", "role", "slot", "param", "layout", "groups", "sliced")
        }
        return {
            **data,
            "key": list(self.key),
            "shape": list(self.shape),
            "tags": sorted(self.tags),
            "view": self.view,
            "used_by": self.used_by,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        path, op, ordinal = data["key"]
        view = None
        if data["view"] is not None:
            size, stride, offset = data["view"]
            view = (tuple(size), tuple(stride), int(offset))
        return cls(
            name=data["name"],
            key=(path, op, int(ordinal)),
            op=data["op"],
            role=data["role"],
            slot=data["slot"],
            call=-1,
            value=-1,
            shape=tuple(data["shape"]),
            tags=frozenset(data["tags"]),
            param=data["param"],
            layout=data["layout"],
            groups=int(data["groups"]),
            view=view,
            sliced=bool(data["sliced"]),
            used_by=tuple(data["used_by"]),
            source=data.get("source", ""),  # older checkpoints have none
        )

    @property
    def module(self) -> str:
        return self.key[0]


@dataclass
class ModuleCall:
    """One call of one module: which recorded calls ran inside it and which values came in and went out.

    `objects_in` and `objects_out` say where something else than plain containers, numbers and tensors was passed
    (`past_key_values: DynamicCache`); `held_in` and `held_out` are the values found inside such objects.
    """

    path: str
    use: int
    start: int  # index of the first recorded call inside
    stop: int  # one past the last
    inputs: tuple[int, ...] = ()  # value ids in the order of (args, kwargs)
    outputs: tuple[int, ...] = ()
    objects_in: tuple[str, ...] = ()
    objects_out: tuple[str, ...] = ()
    held_in: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()


@dataclass
class Unit:
    """What is processed at once: a module that can be run again from its recorded inputs, and its call indices."""

    name: str
    kind: str  # "block" (repeated in series) | "module" | "op" (one weighted op)
    calls: tuple[int, ...]
    uses: int = 1

    def contains(self, path: str) -> bool:
        """Whether a module path or a site's module lies in this unit."""
        return path == self.name or path.startswith(self.name + ".") or self.name == ""


@dataclass
class Graph:
    """A recorded forward of one model."""

    model_class: str
    calls: list[Call]
    values: list[Value]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    module_classes: dict[str, str]
    module_calls: dict[str, int]
    sites: dict[str, Site] = field(default_factory=dict)
    escaped: tuple[int, ...] = ()  # values whose contents Python read (`item`, `tolist`, a condition)
    opaque: list[str] = field(default_factory=list)  # composite calls nothing opens, by place
    tied: dict[str, str] = field(default_factory=dict)  # every name of a shared parameter -> its first name
    module_io: list[ModuleCall] = field(default_factory=list)  # in the order in which the calls started
    containers: frozenset[str] = frozenset()  # Sequential, ModuleList and ModuleDict modules, subclasses included
    plain_containers: frozenset[str] = frozenset()  # those of them without a forward of their own
    unowned: list[str] = field(default_factory=list)  # weighted calls in no unit; filled by `units`
    opened: dict[str, str] = field(default_factory=dict)  # module -> why it could not be a unit; filled by `units`

    @cached_property
    def flow(self) -> Flow:
        from fewbits.graph.flow import Flow

        return Flow(self)

    @cached_property
    def units(self) -> list[Unit]:
        from fewbits.graph.units import find_units

        return find_units(self)

    @cached_property
    def relations(self) -> list[Any]:
        from fewbits.graph.relations import find_relations

        return find_relations(self)

    @cached_property
    def consumers(self) -> dict[int, list[int]]:
        """Value id -> indices of the calls that read it."""
        out: dict[int, list[int]] = {}
        for call in self.calls:
            for ref in call.refs():
                out.setdefault(ref.value, []).append(call.index)
        return out

    def forget(self, *names: str) -> None:
        """Work out the named cached properties anew when they are next asked for: a recorded call was changed."""
        for name in names:
            self.__dict__.pop(name, None)

    def sites_of(self, unit: Unit) -> list[Site]:
        """The unit's sites in call order."""
        return [site for site in self.sites.values() if unit.contains(site.module)]

    def stored_in(self, call: Call, slot: str) -> str | None:
        """Name of the parameter or buffer in a call's slot; None where another tensor, or nothing, is passed there."""
        ref = call.bound.get(slot)
        return self.values[ref.value].param if isinstance(ref, Ref) else None

    def replay(self, value_id: int, source: torch.Tensor) -> torch.Tensor:
        """The value a recorded parameter-derived value has when its parameter is `source`, of the parameter's shape.

        The layout ops between the parameter and the value are run on `source` itself: the result is a view of it
        wherever torch makes one, so slices, chunks and transposes need no rules of their own. Casts are skipped.
        """
        value = self.values[value_id]
        if value.call is None:
            return source
        call = self.calls[value.call]

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            held = self.values[leaf.value]
            return self.replay(leaf.value, source) if held.param == value.param else held.data

        if call.op in CASTS:
            return self.replay(next(call.refs()).value, source)
        args, kwargs = torch.utils._pytree.tree_map(
            fill, (call.args, call.kwargs), is_leaf=lambda x: isinstance(x, Ref)
        )
        out = call.func(*args, **kwargs)
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return leaves[call.outputs.index(value_id)]

    def index_of(self, value_id: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Indices (int64, the value's shape) into a parameter of the given shape of the elements a value is made of."""
        return self.replay(value_id, torch.arange(torch.Size(shape).numel()).view(shape))

    def view_of(self, value_id: int, shape: tuple[int, ...]) -> View | None:
        """Where a value lies within its contiguous parameter of the given shape; None where the forward copies."""
        source = torch.empty(shape, device="meta")
        try:
            value = self.replay(value_id, source)
        except (RuntimeError, TypeError, IndexError, NotImplementedError):
            return None
        if value is not source and not value._is_view():
            return None
        return tuple(value.shape), tuple(value.stride()), int(value.storage_offset())

    def __deepcopy__(self, memo: Any) -> Graph:
        return self  # a record of the past: copies of a model share it


CASTS = frozenset(
    "to float half bfloat16 double type type_as detach clone data cuda cpu requires_grad_ contiguous".split()
)
