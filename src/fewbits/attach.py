"""The run-time mode: quantizers at sites of any eager model, without swapping a module.

An attached model keeps its class, its `state_dict` keys and its `generate`. Quantizers live beside it, keyed by site
name; a ledger compares the sites that ran with the sites that were recorded, so nothing runs silently unquantized.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.graph.operands import canonical, restore
from fewbits.graph.ops import MATMUL, SLOTS, WEIGHTED, bind, rebind
from fewbits.graph.trace import Frame, Tracer, in_flight
from fewbits.graph.types import CallKey, Site
from fewbits.outliers.parts import Part
from fewbits.quantizer import Quantizer
from fewbits.rounding.column_grids import decode_columns

ATTRIBUTE = "_fewbits"
Observer = Callable[[Tensor], None]
#: Stands for the quantizer of a site, given the tensor there.
Emitter = Callable[[Site, Tensor], Tensor]
#: What a recorded elementwise call may be replaced by.
REPLACEMENTS: dict[str, Callable[..., Tensor]] = {"relu": F.relu, "identity": lambda x: x}


@dataclass
class _Plan:
    """What happens at one call: a factor, observers and a quantizer per slot (`output` included), another op."""

    quantizers: dict[str, tuple[Quantizer, Site]] = field(default_factory=dict)
    observers: dict[str, list[Observer]] = field(default_factory=dict)
    factors: dict[str, str] = field(default_factory=dict)  # slot -> site
    replacement: str | None = None

    def acts(self) -> bool:
        """Whether the call must happen for the model to be what it is meant to be."""
        return bool(self.quantizers or self.factors or self.replacement)


class Attachment(Tracer):
    """Quantizers at the sites of one model, applied in its forward.

    `quantizers` maps site names (with `.` written `/`, as `nn.ModuleDict` demands) to `Quantizer`s. `codes` are the
    integer codes of committed weights: what they decode to is what runs. A committed weight whose decoded values
    already sit in the parameter is *frozen*: it is listed in `frozen` and costs nothing at run time; any other is put
    in place of the parameter in the forward. `parts` are laid over what the codes decode to. `known` are the calls seen
    when the model was recorded; another weighted one running is an error. `skipped` are modules whose forward the
    engine replays.

    Two run-time rewrites belong to the float function and act even while quantizers are disabled: `factors` multiply
    the tensor at an activation site channel by channel, `replacements` run another op in place of a recorded one.

    A copy of the model (`copy.deepcopy`) has its own attachment. Quantizers follow the tensors they meet to another
    device.
    """

    def __init__(self, model: nn.Module, sites: dict[str, Site], known: set[CallKey]) -> None:
        super().__init__()
        if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
            raise FewbitsError("the model already has quantizers attached; detach it first")
        self.sites = sites
        self.known = known | {site.key for site in sites.values()}
        self.model = model
        self.quantizers = nn.ModuleDict()
        self.frozen: set[str] = set()
        self.codes: dict[str, Tensor] = {}  # integer codes (out, columns) of committed weights
        self.group_index: dict[str, Tensor] = {}  # column -> group, where groups are not contiguous
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.factors: dict[str, tuple[Tensor, int]] = {}  # activation site -> (factor per channel, axis)
        self.replacements: dict[CallKey, str] = {}
        self._hidden: set[str | CallKey] = set()
        self.activations = True
        self.enabled = True
        self.calibrating: set[str] = set()
        self.emitter: Emitter | None = None
        self.skipped: set[str] = set()
        self._sites_at: dict[CallKey, list[Site]] = {}
        for site in sites.values():
            self._sites_at.setdefault(site.key, []).append(site)
        self._known_paths = {key[0] for key in self.known}
        self._watching: list[dict[str, list[Observer]]] = []
        self._plans: dict[CallKey, _Plan] = {}
        self._due: dict[str, list[CallKey]] = {}  # module -> its planned calls
        model.__dict__[ATTRIBUTE] = self
        self.install(model)

    def detach(self) -> None:
        """Take the hooks off the model again; weights stay as they are."""
        self.remove()
        if self.model.__dict__.get(ATTRIBUTE) is self:
            del self.model.__dict__[ATTRIBUTE]

    # -- quantizers --------------------------------------------------------------------------------------------------
    def quantizer(self, site: str) -> Quantizer | None:
        key = site.replace(".", "/")
        held = self.quantizers
        return held[key] if key in held else None  # type: ignore[return-value]  # noqa: SIM401 (has no get)

    def set_quantizer(self, site: str, quantizer: Quantizer | None) -> None:
        """Put a quantizer at a site, or take it away. Codes committed on the quantizer before are forgotten.

        Raises `FewbitsError` for an unknown site.
        """
        place = self._site(site)
        key = site.replace(".", "/")
        if quantizer is None:
            if key in self.quantizers:
                del self.quantizers[key]
        else:
            self.quantizers[key] = quantizer
        self.frozen.discard(site)
        for held in (self.codes, self.group_index, self.parts):
            held.pop(site, None)
        self._plan(place.key)

    def decoded(self, site: str) -> Tensor:
        """The float32 weight matrix (out, columns) that a committed weight's codes stand for."""
        quantizer = self.quantizer(site)
        if quantizer is None or site not in self.codes:
            raise FewbitsError(f"{site} holds no committed codes")
        codes = self.codes[site].to(_device(quantizer))
        index = self.group_index.get(site)
        if index is None:
            weight = quantizer.decode(codes)
        else:
            weight = decode_columns(quantizer.spec.format, codes, quantizer.params, index.to(codes.device))
        for part in self.parts.get(site, ()):
            weight = part.apply(weight)
        return weight

    def items(self) -> Iterator[tuple[Site, Quantizer]]:
        for site in self.sites.values():
            found = self.quantizer(site.name)
            if found is not None:
                yield site, found

    def freeze(self, site: str) -> None:
        """Say that a weight site's quantized values are in the parameter now."""
        place = self._site(site)
        self.frozen.add(site)
        self._plan(place.key)

    def forget_codes(self, sites: Iterable[str]) -> None:
        """Drop committed codes that are safe on disk.

        The decoded weights stay in effect; codes that the forward itself decodes are kept.
        """
        for site in self.frozen.intersection(sites):
            for held in (self.codes, self.group_index, self.parts):
                held.pop(site, None)

    def move(self, sites: Iterable[str], device: torch.device, quantizers: bool) -> None:
        """Bring committed codes, and with `quantizers` these too, to a device."""
        for site in sites:
            if site in self.codes:
                self.codes[site] = self.codes[site].to(device)
            held = self.quantizer(site) if quantizers else None
            if held is not None:
                held.to(device)

    def thaw(self, site: str) -> None:
        """Say that the parameter does not hold the quantized values.

        The forward makes them, from the codes where some are committed.
        """
        place = self._site(site)
        self.frozen.discard(site)
        self._plan(place.key)

    def add_sites(self, sites: Iterable[Site]) -> None:
        """Make further sites known, to be observed: a checkpoint lists only those that carry something."""
        for site in sites:
            if site.name not in self.sites:
                self.sites[site.name] = site
                self._sites_at.setdefault(site.key, []).append(site)
                self.known.add(site.key)
                self._known_paths.add(site.key[0])

    def _site(self, name: str) -> Site:
        if name not in self.sites:
            raise FewbitsError(f"no site named {name!r}; `fewbits inspect` lists them")
        return self.sites[name]

    # -- rewrites ----------------------------------------------------------------------------------------------------
    def set_factor(self, site: str, factor: Tensor | None, axis: int = -1) -> None:
        """Multiply the tensor at an activation site by `factor` [channels] along `axis`, before its quantizer."""
        place = self._site(site)
        if factor is None:
            self.factors.pop(site, None)
        else:
            if place.role == "weight" or factor.dim() != 1:
                raise FewbitsError(f"{site}: a factor is a vector at an activation site")
            self.factors[site] = (factor.detach().float(), axis)
        self._plan(place.key)

    def set_replacement(self, key: CallKey, op: str | None) -> None:
        """Run `op` of the same first operand in place of a recorded elementwise call."""
        if op is None:
            self.replacements.pop(key, None)
        else:
            if op not in REPLACEMENTS:
                raise FewbitsError(
                    f"{'.'.join(map(str, key))}: cannot run {op!r} there, only {', '.join(REPLACEMENTS)}"
                )
            self.replacements[key] = op
        self._plan(key)

    def rewrites(self) -> set[str | CallKey]:
        """Sites with a factor and calls with a replacement."""
        return {*self.factors, *self.replacements}

    @contextmanager
    def hiding(self, rewrites: set[str | CallKey]) -> Iterator[None]:
        """Without these factors and replacements while the context lasts."""
        before, self._hidden = self._hidden, self._hidden | rewrites
        if rewrites:
            self._replan()
        try:
            yield
        finally:
            self._hidden = before
            if rewrites:
                self._replan()

    # -- observing ---------------------------------------------------------------------------------------------------
    @contextmanager
    def observing(self, observers: dict[str, list[Observer]]) -> Iterator[None]:
        """Call each observer with the tensor at its site (before that site's own quantizer) while the context lasts."""
        for name in observers:
            self._site(name)
        self._watching.append(observers)
        self._replan()
        try:
            yield
        finally:
            self._watching.remove(observers)
            self._replan()

    def set_activations(self, active: bool) -> None:
        """Let activation quantizers act or not."""
        if active != self.activations:
            self.activations = active
            self._replan()

    @contextmanager
    def without_activations(self) -> Iterator[None]:
        """Only weights are quantized while the context lasts."""
        before = self.activations
        self.set_activations(False)
        try:
            yield
        finally:
            self.set_activations(before)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The float model: no quantizer acts while the context lasts (observers do)."""
        before, self.enabled = self.enabled, False
        self._replan()
        try:
            yield
        finally:
            self.enabled = before
            self._replan()

    @contextmanager
    def emitting(self, emitter: Emitter) -> Iterator[None]:
        """Call `emitter` in place of every enabled quantizer while the context lasts, of frozen weights too.

        For exports: what it returns goes on through the forward.
        """
        self.emitter = emitter
        self._replan()
        try:
            yield
        finally:
            self.emitter = None
            self._replan()

    def _replan(self) -> None:
        """Work out anew what happens at every call."""
        self._plans = {}
        self._due = {}
        keys = {site.key: None for site, _ in self.items()} if self.enabled else {}
        keys |= {self.sites[name].key: None for observers in self._watching for name in observers}
        keys |= {self.sites[name].key: None for name in self.factors}
        keys |= dict.fromkeys(self.replacements)
        for key in keys:
            self._plan(key)

    def _plan(self, key: CallKey) -> None:
        """Work out anew what happens at one call."""
        plan = _Plan()
        if key in self.replacements and key not in self._hidden:
            plan.replacement = self.replacements[key]
        for site in self._sites_at.get(key, ()):
            if site.name in self.factors and site.name not in self._hidden:
                plan.factors[site.slot] = site.name
            quantizer = self.quantizer(site.name) if self.enabled else None
            if (
                quantizer is not None
                and quantizer.enabled
                and (site.name not in self.frozen or self.emitter is not None)
                and (self.activations or site.role == "weight")
            ):
                plan.quantizers[site.slot] = (quantizer, site)
            for observers in self._watching:
                if site.name in observers:
                    plan.observers.setdefault(site.slot, []).extend(observers[site.name])
        due = self._due.get(key[0], [])
        if plan.acts() or plan.observers:
            if key not in self._plans:
                self._due[key[0]] = [*due, key]
            self._plans[key] = plan
        elif self._plans.pop(key, None) is not None:
            left = [other for other in due if other != key]
            if left:
                self._due[key[0]] = left
            else:
                del self._due[key[0]]

    # -- the forward -------------------------------------------------------------------------------------------------
    def opens(self, op: str) -> bool:
        stack = self.stack
        return bool(stack) and stack[-1].path in self._due

    def handle(
        self, op: str, key: CallKey | None, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        plan = self._plans.get(key) if key is not None else None
        if plan is None:
            if self._unrecorded(op, key, args, kwargs):
                where = ".".join(map(str, key)) if key is not None else f"{self.stack[-1].path}.{op}"
                raise FewbitsError(f"{where} ran but was not recorded; record the model with inputs that exercise it")
            return func(*args, **kwargs)
        bound = bind(op, args, kwargs)
        for slot in (*plan.observers, *plan.quantizers, *plan.factors):
            if slot != "output" and not isinstance(bound.get(slot), Tensor):
                raise FewbitsError(
                    f"{'.'.join(map(str, key or ()))}: this call passes no tensor as {slot}, the recorded one did"
                )
        changed: dict[str, Any] = {}
        for slot, name in plan.factors.items():
            if slot != "output":
                changed[slot] = self._multiply(name, bound[slot])
        for slot, functions in plan.observers.items():
            if slot != "output":
                for function in functions:
                    function(changed.get(slot, bound[slot]))
        for slot, (quantizer, site) in plan.quantizers.items():
            if slot != "output":
                changed[slot] = self._quantize(quantizer, site, changed.get(slot, bound[slot]))
        target = None
        if plan.acts() and _writes_in_place(func, args, kwargs) and SLOTS[op][0][1] == 0:
            # The op works on a copy and the tensor it was called with gets the final values: others hold that tensor.
            slot = SLOTS[op][0][0]
            target = bound[slot]
            if changed.get(slot, target) is target:
                changed[slot] = target.clone()
        if changed:
            args, kwargs = rebind(op, args, kwargs, changed)
        if plan.replacement is not None:
            slot = SLOTS[op][0][0]
            output = REPLACEMENTS[plan.replacement](changed.get(slot, bound[slot]))
        else:
            output = func(*args, **kwargs)
        if "output" in plan.factors:
            output = self._multiply(plan.factors["output"], output)
        if "output" in plan.observers:
            for function in plan.observers["output"]:
                function(output)
        if "output" in plan.quantizers:
            quantizer, site = plan.quantizers["output"]
            output = self._quantize(quantizer, site, output)
        return output if target is None else target.copy_(output)

    def _unrecorded(self, op: str, key: CallKey | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call multiplies by a parameter and was not seen when the model was recorded."""
        if not self.enabled or not len(self.quantizers):
            return False
        if key is None:
            return (
                op == "multi_head_attention_forward"
                and bool(self.stack)
                and self.stack[-1].path not in self._known_paths
            )
        if key in self.known:
            return False
        return op in WEIGHTED or (
            op in MATMUL and any(_is_parameter(value) for value in bind(op, args, kwargs).values())
        )

    def _multiply(self, site: str, x: Tensor) -> Tensor:
        factor, axis = self.factors[site]
        if factor.device != x.device and not x.is_meta:
            factor = factor.to(x.device)
            self.factors[site] = (factor, axis)
        shape = [1] * x.dim()
        shape[axis] = -1
        return x * factor.to(x.dtype).view(shape)

    def _quantize(self, quantizer: Quantizer, site: Site, x: Tensor) -> Tensor:
        if self.emitter is not None:
            return self.emitter(site, x)
        _follow(quantizer, x)
        if site.role == "weight":
            weight = canonical(x, site.layout, site.groups)
            if site.name in self.codes:
                made = self._committed(quantizer, site, x)
            else:
                made = quantizer(weight.flatten(1))
            made = restore(made.view(weight.shape), site.layout, tuple(x.shape), site.groups)
            # laid out as the parameter is, so that the same kernel multiplies
            return made.contiguous() if x.is_contiguous() else made
        if site.name in self.calibrating:
            self.calibrating.discard(site.name)
            quantizer.calibrate(x.detach())
        return quantizer(x)

    def _committed(self, quantizer: Quantizer, site: Site, x: Tensor) -> Tensor:
        """A committed weight's values in the type of `x`; its codes are kept where they are used."""
        for held in (self.codes, self.group_index):
            if site.name in held and held[site.name].device != x.device and not x.is_meta:
                held[site.name] = held[site.name].to(x.device)
        return self.decoded(site.name).to(x.dtype)

    def left(self, frame: Frame) -> None:
        """The ledger: every planned call of this module must have happened."""
        due = self._due.get(frame.path)
        if not due or frame.path in self.skipped or in_flight() is not frame.raised:
            return
        for key in due:
            plan = self._plans[key]
            _, op, ordinal = key
            if not plan.acts() or frame.counts.get(op, 0) > ordinal or ("@" in op and not _part_ran(frame, op)):
                continue
            raise FewbitsError(
                f"{frame.path or 'the model'}: the quantized op {op} (number {ordinal}) did not run in this forward, "
                "so its site would be silently skipped; record the model with inputs of this kind"
            )


def _part_ran(frame: Frame, op: str) -> bool:
    """Whether anything ran on the slice of a parameter stack that `op` works on.

    An expert that got no token runs nothing.
    """
    part = _part(op)
    return any("@" in other and _part(other) == part for other in frame.counts)


def _part(op: str) -> str:
    return op.rpartition("@")[2].rpartition(".")[2]


def _writes_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes its first tensor: `x.add_(y)`, `x += y`, `F.relu(x, inplace=True)`."""
    place = _inplace_at(func)
    return (
        place == -1 or bool(kwargs.get("inplace")) or (place is not None and place < len(args) and args[place] is True)
    )


def _inplace_at(func: Callable[..., Any]) -> int | None:
    """Position of a function's `inplace` argument: -1 where it always writes in place, None where it has none."""
    name = getattr(func, "__name__", "")
    if name.startswith("__i") or (name.endswith("_") and not name.endswith("__")):
        return -1
    return _INPLACE_AT.get(name)


# as `ops.canonical`
_inplace_at._dynamo_marked_constant = True  # type: ignore[attr-defined]

#: Where functions that `torch.nn` calls without keywords take `inplace`.
_INPLACE_AT = {
    name: list(inspect.signature(function).parameters).index("inplace")
    for name, function in vars(F).items()
    if inspect.isfunction(function) and "inplace" in inspect.signature(function).parameters
}


def _is_parameter(value: Any) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(value, Tensor) and (isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter))


def _device(quantizer: Quantizer) -> torch.device:
    return next((value.device for value in quantizer.params.values()), torch.device("cpu"))


def _follow(quantizer: nn.Module, x: Tensor) -> None:
    """Bring a quantizer's parameters to the device of the tensor that it meets."""
    if x.is_meta:
        return
    for held in (quantizer._buffers, quantizer._parameters):
        for value in held.values():
            if value is not None and value.device != x.device:
                quantizer.to(x.device)
                return


def attachment_of(model: nn.Module) -> Attachment | None:
    """The quantizers attached to a model, or to the model inside a wrapper (DDP, compile), if any."""
    found = (module.__dict__.get(ATTRIBUTE) for module in model.modules())
    return next((held for held in found if isinstance(held, Attachment)), None)
