"""Recording one eager forward: every torch call with its module, the parameters in its slots and the data flow."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbits.errors import FewbitsError
from fewbits.graph.ops import CREATION, IDENTITY, LAYOUT, OPAQUE, PLAIN_READERS, SLOTS, bind
from fewbits.graph.positions import tag_positions
from fewbits.graph.results import tag_results
from fewbits.graph.sites import find_sites
from fewbits.graph.trace import Frame, Tracer, clean
from fewbits.graph.types import Call, CallKey, Graph, ModuleCall, Ref, Value

#: Integer tensors up to this many elements are kept, so that index tables can be re-applied to labels.
KEEP_ELEMENTS = 1 << 22


def record(model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    """Run `model(*args, **kwargs)` once, in evaluation mode without gradients, and return its `Graph`.

    The batch should be small: every intermediate tensor is held until the forward ends. Raises `FewbitsError` where a
    submodule cannot be watched (a scripted module) or the forward itself fails.
    """
    recorder = _Recorder(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        recorder.install(model)
    except RuntimeError as error:
        recorder.remove()
        scripted = [
            name or "the model itself"
            for name, module in model.named_modules()
            if isinstance(module, torch.jit.ScriptModule)
        ]
        place = (
            f"{type(model).__name__}: {scripted[0]} is scripted"
            if scripted
            else f"{type(model).__name__} has a submodule"
        )
        raise FewbitsError(f"{place} and cannot be watched; load the model unscripted ({error})") from error
    try:
        with torch.no_grad(), _eager():
            recorder.inputs((args, kwargs))
            output = model(*args, **kwargs)
            graph = recorder.finish(output)
    except FewbitsError:
        raise
    except Exception as error:
        raise FewbitsError(
            f"{type(model).__name__} cannot run forward on the given inputs: {type(error).__name__}: {error}"
        ) from error
    finally:
        recorder.remove()
        for module, training in modes.items():
            module.training = training
    graph.tied = _tied_names(model)
    graph.sites = find_sites(
        graph, {clean(name): tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    )
    tag_positions(graph, graph.sites)
    tag_results(graph, graph.sites)
    return graph


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled functions run eagerly, so that their calls are seen (where the compiler is not even loaded there
    are none).
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        flex = sys.modules.get("torch.nn.attention.flex_attention")
        flag = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
        if flex is not None and hasattr(flex, flag):  # it compiles itself, whatever the stance
            stack.callback(setattr, flex, flag, getattr(flex, flag))
            setattr(flex, flag, True)
        yield


class _NoteInputs:
    """Forward pre-hook: what a module call is given, after everybody else's pre-hooks."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.recorder.received(args, kwargs)


class _NoteOutputs:
    """Forward hook: what a module call returns."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.recorder.returned(output)


class _Recorder(Tracer):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self.values: list[Value] = []
        self.opaque: list[str] = []
        self.escaped: list[int] = []
        self.module_calls: dict[str, int] = {}
        self._known: dict[int, tuple[int, int]] = {}  # id(tensor) -> (value id, version)
        self._held: list[Tensor] = []  # keeps ids unique while recording
        self._last_writer: dict[int, int] = {}  # storage address -> call index
        self._names: dict[int, tuple[str, str]] = {}
        self._owned: list[Tensor] = []  # keeps the ids in `_names` unique where offloading replaces parameters
        for name, buffer in model.named_buffers(remove_duplicate=False):
            self._names[id(buffer)] = (clean(name), "buffer")
            self._owned.append(buffer)
        for name, param in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(param), (clean(name), "parameter"))
            self._owned.append(param)
        self._input_ids: list[int] = []
        self.module_io: list[ModuleCall] = []
        self._open: list[ModuleCall] = []

    # -- modules -----------------------------------------------------------------------------------------------------
    def install(self, model: nn.Module) -> None:
        for module in model.modules():  # before the leaving hooks, so that the module still counts as running
            self._handles.append(module.register_forward_hook(_NoteOutputs(self)))
        super().install(model)
        for module in model.modules():
            self._handles.append(module.register_forward_pre_hook(_NoteInputs(self), with_kwargs=True))

    def entered(self, frame: Frame) -> None:
        frame.use = self.module_calls.get(frame.path, 0)
        self.module_calls[frame.path] = frame.use + 1
        note = ModuleCall(frame.path, frame.use, len(self.calls), len(self.calls))
        self.module_io.append(note)
        self._open.append(note)

    def received(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open:
            note = self._open[-1]
            note.inputs, note.objects_in, note.held_in = self._note(dict(enumerate(args)) | kwargs)

    def returned(self, output: Any) -> None:
        if self._open:
            note = self._open[-1]
            note.outputs, note.objects_out, note.held_out = self._note(output)

    def left(self, frame: Frame) -> None:
        if self._open:
            self._open.pop().stop = len(self.calls)

    def _note(self, tree: Any) -> tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]:
        tensors, objects = flatten_plain(tree)
        held = [x for _, thing in objects for x in tensors_inside(thing)]
        return (
            tuple(self._ref(x).value for x in tensors),
            tuple(f"{place}: {type(thing).__name__}" for place, thing in objects),
            tuple(self._ref(x).value for x in held),
        )

    # -- values ------------------------------------------------------------------------------------------------------
    def _new(
        self, tensor: Tensor, kind: str, call: int | None = None, param: str | None = None, aliased: bool = False
    ) -> int:
        data = None
        if (
            not tensor.is_floating_point()
            and not tensor.is_complex()
            and tensor.numel() <= KEEP_ELEMENTS
            and not tensor.is_meta
        ):
            data = tensor.detach()
        value = Value(len(self.values), tuple(tensor.shape), tensor.dtype, call, kind, param, aliased, data)
        self.values.append(value)
        self._held.append(tensor)
        self._known[id(tensor)] = (value.id, _version(tensor))
        return value.id

    def inputs(self, tree: Any) -> None:
        for leaf in _all_tensors(tree):
            if id(leaf) not in self._known and id(leaf) not in self._names:
                self._input_ids.append(self._new(leaf, "input"))

    def _resolve(self, tensor: Tensor) -> tuple[str, str] | None:
        """The parameter's or buffer's name, looked up in the running modules first (offloading replaces parameter
        objects).
        """
        for frame in reversed(self.stack):
            children = ((f"{name}.", child) for name, child in frame.module.named_children())
            for prefix, module in (("", frame.module), *children):  # a module may read its children's parameters itself
                for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
                    for name, held in table.items():
                        if held is tensor:
                            return (f"{frame.path}.{prefix}{name}" if frame.path else prefix + name), kind
        return self._names.get(id(tensor))

    def _ref(self, tensor: Tensor) -> Ref:
        frame = self.stack[-1] if self.stack else None
        if frame is not None:
            for name, param in frame.module._parameters.items():
                # Before `_known`: offloading makes the parameter by calls within this very forward.
                if param is tensor:
                    return Ref(self._new_param(tensor, f"{frame.path}.{name}" if frame.path else name, "parameter"))
        known = self._known.get(id(tensor))
        if known is not None:
            value_id, version = known
            if _version(tensor) == version:
                return Ref(value_id)
            writer = self._last_writer.get(_address(tensor))
            return Ref(self._new(tensor, "call", writer, aliased=True))
        named = self._resolve(tensor)
        if named is not None:
            # Not entered in `_known` by value: a shared parameter is read under each place's own name.
            return Ref(self._new_param(tensor, *named))
        return Ref(self._new(tensor, "constant"))

    def _new_param(self, tensor: Tensor, name: str, kind: str) -> int:
        value_id = self._new(tensor, kind, param=name)
        del self._known[id(tensor)]
        return value_id

    # -- calls -------------------------------------------------------------------------------------------------------
    def handle(self, op: str, key: CallKey | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refs = pytree.tree_map(lambda x: self._ref(x) if isinstance(x, Tensor) else x, (args, kwargs))
        before = {id(x): _version(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        output = func(*args, **kwargs)
        target = args[0] if op == "setitem" else output
        leaves = [x for x in pytree.tree_leaves(target) if isinstance(x, Tensor)]
        if not leaves:
            if op in _READS:  # the number may steer or scale anything from here on
                self.escaped.extend(x.value for x in pytree.tree_leaves(refs, is_leaf=_is_ref) if isinstance(x, Ref))
            return output
        index = len(self.calls)
        frame = self.stack[-1] if self.stack else None
        param = self._laid_out_from(op, refs)
        outputs = tuple(self._new(leaf, "call", index, param) for leaf in leaves)
        inplace = any(id(leaf) in before and _version(leaf) != before[id(leaf)] for leaf in leaves)
        if inplace:
            self._last_writer[_address(leaves[0])] = index
        bound = bind(op, *refs) if op in SLOTS else {}
        if op in OPAQUE or self._hides_weight(op, refs):
            self.closed(op)
        self.calls.append(
            Call(
                index,
                op,
                func,
                refs[0],
                refs[1],
                outputs,
                frame.path if frame else "",
                key,
                frame.use if frame else 0,
                bound,
                inplace,
                self.opening > 0,
            )
        )
        return output

    def closed(self, op: str) -> None:
        path = self.stack[-1].path if self.stack else ""
        place = f"{path}.{op}" if path else op
        if place not in self.opaque:
            self.opaque.append(place)

    def _hides_weight(self, op: str, refs: tuple[Any, Any]) -> bool:
        """Whether a call that nothing here knows multiplies activations by a parameter of two or more dimensions."""
        if op in SLOTS or op in LAYOUT or op in IDENTITY or op in PLAIN_READERS or op in CREATION:
            return False
        values = [self.values[x.value] for x in pytree.tree_leaves(refs, is_leaf=_is_ref) if isinstance(x, Ref)]
        weights = [v for v in values if v.param is not None and v.kind != "buffer" and len(v.shape) >= 2]
        return bool(weights) and any(v.param is None and v.dtype.is_floating_point for v in values)

    def _laid_out_from(self, op: str, refs: tuple[Any, Any]) -> str | None:
        """The parameter an output is laid out from, for layout ops whose only floating operand is one."""
        if op not in LAYOUT and op not in IDENTITY:
            return None
        first = next((x for x in pytree.tree_leaves(refs[0], is_leaf=_is_ref) if isinstance(x, Ref)), None)
        return None if first is None else self.values[first.value].param

    def finish(self, output: Any) -> Graph:
        outputs = tuple(self._ref(x).value for x in _all_tensors(output))
        named = list(self.model.named_modules())
        classes = {clean(name): type(module).__name__ for name, module in named}
        return Graph(
            type(self.model).__name__,
            self.calls,
            self.values,
            outputs,
            tuple(self._input_ids),
            classes,
            self.module_calls,
            opaque=self.opaque,
            escaped=tuple(self.escaped),
            module_io=self.module_io,
            containers=frozenset(clean(name) for name, module in named if isinstance(module, _CONTAINERS)),
            plain_containers=frozenset(clean(name) for name, module in named if _is_plain_container(module)),
        )


#: Ops that hand a tensor's contents to Python.
_READS = frozenset(
    (
        "item",
        "tolist",
        "numpy",
        "__array__",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "is_nonzero",
        "equal",
        "allclose",
    )
)
#: What may stand in a unit's arguments besides tensors and containers.
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    torch.dtype,
    torch.device,
    torch.Size,
    enum.Enum,
    np.generic,
)


def flatten_plain(tree: Any) -> tuple[list[Tensor], list[tuple[str, Any]]]:
    """The tensors in plain containers (list, tuple, dict and their subclasses), and (place, object) of everything
    else.
    """
    tensors: list[Tensor] = []
    objects: list[tuple[str, Any]] = []

    def walk(x: Any, place: str) -> None:
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, _PLAIN):
            return
        elif isinstance(x, dict):
            for key, item in x.items():
                walk(item, f"{place}.{key}" if place else str(key))
        elif isinstance(x, (list, tuple, set, frozenset)):
            for i, item in enumerate(x):
                walk(item, f"{place}.{i}" if place else str(i))
        else:
            objects.append((place or "output", x))

    walk(tree, "")
    return tensors, objects


def _all_tensors(tree: Any) -> list[Tensor]:
    """Every tensor of a tree, those held by objects (caches, detections) included."""
    tensors, objects = flatten_plain(tree)
    return [*tensors, *(x for _, thing in objects for x in tensors_inside(thing))]


def tensors_inside(thing: Any, depth: int = 5) -> list[Tensor]:
    """Tensors held by an object's attributes, a few levels down."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def walk(x: Any, left: int) -> None:
        if isinstance(x, Tensor):
            found.append(x)
            return
        if left < 0 or id(x) in seen or isinstance(x, (*_PLAIN, nn.Module, type)) or callable(x):
            return
        seen.add(id(x))
        if isinstance(x, dict):
            items = list(x.values())
        elif isinstance(x, (list, tuple, set, frozenset)):
            items = list(x)
        else:
            items = list(getattr(x, "__dict__", {}).values())
        for item in items:
            walk(item, left - 1)

    walk(thing, depth)
    return found


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_plain_container(module: nn.Module) -> bool:
    """Whether a module only holds others or runs them one after another."""
    return isinstance(module, _CONTAINERS) and type(module).forward in {kind.forward for kind in _CONTAINERS}


def _tied_names(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {
        clean(name): clean(first.setdefault(id(param), name))
        for name, param in model.named_parameters(remove_duplicate=False)
    }


def _is_ref(x: Any) -> bool:
    return isinstance(x, Ref)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Key-value caches off: a recorded forward must not hold one, and a cached unit could not be run twice."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before:
            config.use_cache = before  # type: ignore[union-attr]
