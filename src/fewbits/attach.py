"""The run-time mode: quantizers at sites of any eager model, without swapping a module.

An attached model keeps its class, its `state_dict` keys and its `generate`. Quantizers live beside it, keyed by site name; a ledger
compares the sites that ran with the sites that were recorded, so nothing runs silently unquantized.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.graph.operands import canonical, restore
from fewbits.graph.ops import WEIGHTED, bind, rebind
from fewbits.graph.trace import Frame, Tracer
from fewbits.graph.types import CallKey, Site
from fewbits.quantizer import Quantizer
from fewbits.rounding.gptq import decode_columns

ATTRIBUTE = "_fewbits"
Observer = Callable[[Tensor], None]


@dataclass
class _Plan:
    """What happens at one call: a quantizer and observers per slot (`output` included)."""

    quantizers: dict[str, tuple[Quantizer, Site]] = field(default_factory=dict)
    observers: dict[str, list[Observer]] = field(default_factory=dict)


class Attachment(Tracer):
    """Quantizers at the sites of one model, applied in its forward.

    `quantizers` maps site names (with `.` written `/`, as `nn.ModuleDict` demands) to `Quantizer`s. A weight whose quantized values
    already sit in the parameter is *frozen*: it is listed in `frozen` and costs nothing at run time. `known` are the weighted calls
    seen when the model was recorded; another one running is an error. `skipped` are modules whose forward the engine replays.
    """

    def __init__(self, model: nn.Module, sites: dict[str, Site], known: set[CallKey]) -> None:
        super().__init__()
        if ATTRIBUTE in model.__dict__:
            raise FewbitsError("the model already has quantizers attached; detach it first")
        self.sites = sites
        self.known = known
        self.model = model
        self.quantizers = nn.ModuleDict()
        self.frozen: set[str] = set()
        self.codes: dict[str, Tensor] = {}  # integer codes (out, columns) of committed weights
        self.group_index: dict[str, Tensor] = {}  # column -> group, where groups are not contiguous
        self.activations = True
        self.enabled = True
        self.calibrating: set[str] = set()
        self.skipped: set[str] = set()
        self._plans: dict[CallKey, _Plan] = {}
        self._open_paths: set[str] = set()
        self._due: dict[str, list[CallKey]] = {}
        model.__dict__[ATTRIBUTE] = self
        self.install(model)

    def detach(self) -> None:
        """Take the hooks off the model again; weights stay as they are."""
        self.remove()
        self.model.__dict__.pop(ATTRIBUTE, None)

    # -- quantizers --------------------------------------------------------------------------------------------------
    def quantizer(self, site: str) -> Quantizer | None:
        key = site.replace(".", "/")
        return self.quantizers[key] if key in self.quantizers else None  # type: ignore[return-value]

    def set_quantizer(self, site: str, quantizer: Quantizer | None) -> None:
        """Put a quantizer at a site, or take it away. Raises `FewbitsError` for an unknown site."""
        if site not in self.sites:
            raise FewbitsError(f"no site named {site!r}; `fewbits inspect` lists them")
        key = site.replace(".", "/")
        if quantizer is None:
            if key in self.quantizers:
                del self.quantizers[key]
            self.frozen.discard(site)
            self.codes.pop(site, None)
            self.group_index.pop(site, None)
        else:
            self.quantizers[key] = quantizer
        self._replan()

    def decoded(self, site: str) -> Tensor:
        """The float32 weight matrix (out, columns) that a committed weight's codes stand for."""
        quantizer = self.quantizer(site)
        if quantizer is None or site not in self.codes:
            raise FewbitsError(f"{site} holds no committed codes")
        codes = self.codes[site].to(_device(quantizer))
        index = self.group_index.get(site)
        if index is None:
            return quantizer.decode(codes)
        return decode_columns(quantizer.spec.format, codes, quantizer.params, index.to(codes.device))

    def items(self) -> Iterator[tuple[Site, Quantizer]]:
        for site in self.sites.values():
            found = self.quantizer(site.name)
            if found is not None:
                yield site, found

    def freeze(self, site: str) -> None:
        """Say that a weight site's quantized values are in the parameter now."""
        self.frozen.add(site)
        self._replan()

    def thaw(self, site: str) -> None:
        self.frozen.discard(site)
        self._replan()

    # -- observing ---------------------------------------------------------------------------------------------------
    @contextmanager
    def observing(self, observers: dict[str, list[Observer]]) -> Iterator[None]:
        """Call each observer with the tensor at its site (before that site's own quantizer) while the context lasts."""
        for name, functions in observers.items():
            site = self.sites[name]
            plan = self._plans.setdefault(site.key, _Plan())
            plan.observers.setdefault(site.slot, []).extend(functions)
            self._open_paths.add(site.module)
        try:
            yield
        finally:
            self._replan()

    @contextmanager
    def without_activations(self) -> Iterator[None]:
        """Only weights are quantized while the context lasts."""
        before, self.activations = self.activations, False
        self._replan()
        try:
            yield
        finally:
            self.activations = before
            self._replan()

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

    def _replan(self) -> None:
        self._plans = {}
        self._due = {}
        if self.enabled:
            for site, quantizer in self.items():
                if site.name in self.frozen or not quantizer.enabled or not (self.activations or site.role == "weight"):
                    continue
                self._plans.setdefault(site.key, _Plan()).quantizers[site.slot] = (quantizer, site)
        for key in self._plans:
            self._due.setdefault(key[0], []).append(key)
        self._open_paths = {key[0] for key in self._plans}

    # -- the forward -------------------------------------------------------------------------------------------------
    def opens(self, op: str) -> bool:
        stack = self.stack
        return bool(stack) and stack[-1].path in self._open_paths

    def handle(
        self, op: str, key: CallKey | None, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        plan = self._plans.get(key) if key is not None else None
        if plan is None:
            if key is not None and self.enabled and op in WEIGHTED and self._plans and key not in self.known:
                raise FewbitsError(f"{'.'.join(map(str, key))} ran but was not recorded; record the model with inputs that exercise it")
            return func(*args, **kwargs)
        bound = bind(op, args, kwargs)
        changed: dict[str, Any] = {}
        for slot, functions in plan.observers.items():
            if slot != "output":
                for function in functions:
                    function(bound[slot])
        for slot, (quantizer, site) in plan.quantizers.items():
            if slot != "output":
                changed[slot] = self._quantize(quantizer, site, bound[slot])
        if changed:
            args, kwargs = rebind(op, args, kwargs, changed)
        output = func(*args, **kwargs)
        if "output" in plan.observers:
            for function in plan.observers["output"]:
                function(output)
        if "output" in plan.quantizers:
            quantizer, site = plan.quantizers["output"]
            output = self._quantize(quantizer, site, output)
        return output

    def _quantize(self, quantizer: Quantizer, site: Site, x: Tensor) -> Tensor:
        if site.role == "weight":
            weight = canonical(x, site.layout, site.groups)
            return restore(quantizer(weight.flatten(1)).view(weight.shape), site.layout, tuple(x.shape), site.groups)
        if site.name in self.calibrating:
            self.calibrating.discard(site.name)
            quantizer.calibrate(x.detach())
        return quantizer(x)

    def left(self, frame: Frame) -> None:
        """The ledger: every planned call of this module must have happened."""
        due = self._due.get(frame.path)
        if not due or frame.path in self.skipped or sys.exc_info()[0] is not None:
            return
        for _, op, ordinal in due:
            if frame.counts.get(op, 0) <= ordinal:
                raise FewbitsError(
                    f"{frame.path or 'the model'}: the quantized op {op} (number {ordinal}) did not run in this forward, so its site "
                    "would be silently skipped; record the model with inputs of this kind"
                )


def _device(quantizer: Quantizer) -> torch.device:
    return next((value.device for value in quantizer.params.values()), torch.device("cpu"))


def attachment_of(model: nn.Module) -> Attachment | None:
    """The quantizers attached to a model, if any."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Attachment) else None
