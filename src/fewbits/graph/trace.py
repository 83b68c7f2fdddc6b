"""Watching a running model: which module is executing, which op of it this is, and a mode that sees every torch call.

`Tracer` hooks every module so that the innermost running module is known, and enters a `TorchFunctionMode` whenever
the outermost hooked module starts. Recording and simulation are subclasses that differ only in `handle`. Because the
mode is entered by whichever hooked module runs first, a unit run alone, a checkpoint's recomputation and another
thread are all covered.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fewbits.graph import decompose
from fewbits.graph.ops import BINARY, SLOTS, bind, canonical
from fewbits.graph.types import CallKey

WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def clean(path: str) -> str:
    """A module path without the prefixes that wrappers (DDP, compile) put in front."""
    for prefix in WRAPPER_PREFIXES:
        while path.startswith(prefix):
            path = path[len(prefix) :]
    return "" if path in ("module", "_orig_mod") else path


class Frame:
    """One running call of a module: its path and how often each op was seen in it.

    `part` is the slice of a parameter stack (an expert) that the module is working on, None outside of such loops.
    `raised` is the exception that was being handled when the call started.
    """

    __slots__ = ("counts", "module", "part", "path", "raised", "use")

    def __init__(self, path: str, module: nn.Module, use: int = 0) -> None:
        self.path = path
        self.module = module
        self.counts: dict[str, int] = {}
        self.use = use
        self.part: int | None = None
        self.raised = in_flight()


def in_flight() -> BaseException | None:
    """The exception being handled here, or None; inside a compiled forward always None, as none ever leaves it."""
    return None if torch.compiler.is_compiling() else sys.exc_info()[1]


class _Threads(threading.local):
    """Per-thread state of all tracers, kept outside the model so that models stay copyable."""

    def __init__(self) -> None:
        self.stacks: dict[int, list[Frame]] = {}
        self.modes: dict[int, TorchFunctionMode] = {}


_threads = _Threads()
_tokens = itertools.count()


class _Enter:
    """Forward pre-hook of one module."""

    def __init__(self, tracer: Tracer, path: str) -> None:
        self.tracer = tracer
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.tracer.enter(self.path, module)


class _Leave:
    """Forward hook of one module, called even when the forward raises."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.tracer.leave(module)


#: What compiles the frames that run now: None inside a compiled graph, and where nothing is compiled at all.
_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)


class _Mode(TorchFunctionMode):
    """Hands every torch call to the tracer.

    torch.compile may compile a model's hooks and its forward one by one: the mode then stays entered while the
    forward's finished graph runs, whose calls went through it when the graph was made and must not go through it again.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.compiled = torch.compiler.is_compiling()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.compiled and not torch.compiler.is_compiling() and _compiler() is None:
            return func(*args, **(kwargs or {}))
        return self.tracer.dispatch(self, func, args, kwargs or {})


class Tracer:
    """Hooks on every module of a model, and the mode they enter."""

    #: Whether composites are opened so that the sites inside them are seen.
    opens_composites = True
    #: How many composites are open around the call that runs now.
    opening = 0

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._token = next(_tokens)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._token = next(_tokens)  # a copy runs on its own

    # -- attaching ---------------------------------------------------------------------------------------------------
    def install(self, model: nn.Module) -> None:
        """Hook every module but wrappers around the model. Scripted modules refuse hooks; the caller reports them."""
        named = list(model.named_modules())
        innermost = {clean(path): path for path, _ in named}
        for path, module in named:
            if innermost[clean(path)] != path:
                continue  # two modules of one name would be taken for one
            self._handles.append(module.register_forward_pre_hook(_Enter(self, clean(path)), prepend=True))
            self._handles.append(module.register_forward_hook(_Leave(self), always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- the module stack --------------------------------------------------------------------------------------------
    @property
    def stack(self) -> list[Frame]:
        return _threads.stacks.setdefault(self._token, [])

    def enter(self, path: str, module: nn.Module) -> None:
        stack = self.stack
        if stack and stack[0].module is module and not _runs_twice(module):
            self._unwind()  # an interrupt (not an Exception) ended the last forward, and no hook was told
            stack = self.stack
        if not stack:
            mode = _Mode(self)
            _threads.modes[self._token] = mode
            mode.__enter__()
            self.started()
        stack.append(Frame(path, module))
        self.entered(stack[-1])

    def leave(self, module: nn.Module) -> None:
        stack = self.stack
        if not stack or stack[-1].module is not module:
            return  # the forward raised before our pre-hook ran
        frame = stack.pop()
        try:
            self.left(frame)
        finally:
            if not stack:
                self._unwind()

    def _unwind(self) -> None:
        """Out of every module on this thread."""
        _threads.stacks.pop(self._token, None)
        _threads.modes.pop(self._token).__exit__(None, None, None)

    def started(self) -> None:
        """The outermost hooked module starts."""

    def entered(self, frame: Frame) -> None:
        """A module starts."""

    def left(self, frame: Frame) -> None:
        """A module ends (also by an exception)."""

    # -- calls -------------------------------------------------------------------------------------------------------
    def dispatch(
        self, mode: TorchFunctionMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        op = canonical(func)
        if op in decompose.RULES and self.opens(op):
            if decompose.can_open(op, args, kwargs):
                opened = decompose.RULES[op]
                self.opening += 1
                try:
                    with mode:
                        return opened(*args, **kwargs)
                finally:
                    self.opening -= 1
            self.closed(op)
        key: CallKey | None = None
        stack = self.stack
        if stack and op in SLOTS and (op not in BINARY or _both_floating(args, kwargs)):
            frame = stack[-1]
            name = op
            if op in _SLICED:
                found = _stack_slice(frame.module, op, args, kwargs)
                if found is not None:
                    frame.part = found[1]
                    name = f"{op}@{found[0]}.{found[1]}"
            if name is op and frame.part is not None:
                name = f"{op}@{frame.part}"
            ordinal = frame.counts.get(name, 0)
            frame.counts[name] = ordinal + 1
            key = (frame.path, name, ordinal)
        return self.handle(op, key, func, args, kwargs)

    def opens(self, op: str) -> bool:
        """Whether this composite call is decomposed now."""
        return self.opens_composites

    def closed(self, op: str) -> None:
        """A composite call that should be opened uses options that cannot be; it runs as it is."""

    def handle(
        self, op: str, key: CallKey | None, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the call. `key` is None for ops outside the op table; the mode is off while this runs."""
        return func(*args, **kwargs)


def _runs_twice(module: nn.Module) -> bool:
    """Whether a module is running inside itself (seen from one of its hooks)."""
    count = 0
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count > 1


_CALL = nn.Module._call_impl.__code__


def _both_floating(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether both operands are floating-point tensors: index arithmetic must not shift the numbering."""
    operands = [*args[:2], *(kwargs[k] for k in ("input", "other") if k in kwargs)]
    return len(operands) >= 2 and all(
        isinstance(x, torch.Tensor) and x.dim() > 0 and x.is_floating_point() for x in operands[:2]
    )


#: Ops that may read one slice of a parameter stack, and the slots to look at.
_SLICED = {"linear": ("weight",), "addmm": ("weight",), "matmul": ("rhs", "lhs")}


def _stack_slice(module: nn.Module, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, int] | None:
    """(parameter, index) where a call reads one matrix out of a 3-D parameter of the running module.

    Which slices run, and in which order, depends on the data (routing), so such calls are numbered by slice. The
    slice is found by its place in the parameter's storage, whatever views lie between.
    """
    for name, param in module._parameters.items():
        if param is None or param.dim() != 3:
            continue
        bound = bind(op, args, kwargs)
        for slot in _SLICED[op]:
            weight = bound.get(slot)
            if (
                not isinstance(weight, torch.Tensor)
                or weight.dim() != 2
                or weight.numel() * param.shape[0] != param.numel()
            ):
                continue
            if weight.untyped_storage()._cdata == param.untyped_storage()._cdata:
                return name, (weight.storage_offset() - param.storage_offset()) // param.stride(0)
    return None
