"""Reaching a unit without running what came before it: finished units give back their cached outputs.

The model's own forward is run, with the `forward` of every finished unit replaced by a replay and the wanted unit's by
a capture that ends the run. Only the glue between units is computed again, so any topology works: skips, branches,
shared masks. Outputs nothing later needs are dropped; should one be read after all it comes back as NaN, and the
capture refuses it.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.attach import Attachment
from fewbits.engine.store import ActivationStore
from fewbits.engine.tree import Batch, Tree, as_call, map_tensors, tensors
from fewbits.errors import FewbitsError
from fewbits.graph.types import Graph, Unit
from fewbits.graph.units import unit_needs

_PLAIN = (Tensor, int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size)


class _Reached(Exception):
    """The wanted unit was entered for the last time in this forward."""


class Replay:
    """Captures of unit inputs for one model and its list of units."""

    def __init__(
        self, model: nn.Module, attachment: Attachment, graph: Graph, units: list[Unit], store: ActivationStore
    ) -> None:
        self.model = model
        self.attachment = attachment
        self.units = units
        self.store = store
        self.order = {unit.name: index for index, unit in enumerate(units)}
        self.last_reader = _last_readers(graph, units)
        self.passing = _passing(graph, units)
        owned = {index for unit in units for index in unit.calls}
        # Glue that writes in place would change cached outputs: it gets copies.
        self.copies = any(call.inplace and call.index not in owned for call in graph.calls)
        self.writes = any(call.inplace for call in graph.calls)
        self._shapes: dict[tuple[str, str, int, int], Tree] = {}

    def capture(
        self, stream: str, target: Unit | None, batch: Batch, number: int
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of each call of `target` in a forward of the `number`-th batch; `FewbitsError` if there is none.

        Without a target the forward runs to its end, every unit replayed, and nothing is captured.
        """
        captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        counts: dict[str, int] = {}
        poisoned: list[str] = []
        goal = len(self.units) if target is None else self.order[target.name]

        def intercept(unit: Unit, original: Any, *args: Any, **kwargs: Any) -> Any:
            use = counts.get(unit.name, 0)
            counts[unit.name] = use + 1
            position = self.order[unit.name]
            if position < goal:
                key = (stream, unit.name, number, use)
                if key in self.store:
                    out = self.store.get(key)
                    return map_tensors(torch.clone, out) if self.copies else out
                if key in self._shapes:
                    poisoned.append(unit.name)
                    return map_tensors(lambda t: _poison(t, self.store.device), self._shapes[key])
                return original(*args, **kwargs)
            if position == goal:
                self._check_plain(unit, (args, kwargs))
                captured.append((args, kwargs))
                if len(captured) >= unit.uses:
                    raise _Reached
            return original(*args, **kwargs)

        args, kwargs = as_call(batch)
        self.attachment.skipped = {unit.name for unit in self.units[:goal]}
        try:
            with torch.no_grad(), self._patched(intercept):
                self.model(*args, **kwargs)
        except _Reached as reached:
            # Frames of the forward refer to each other, and would hold weights and activations for a while.
            traceback.clear_frames(reached.__traceback__)
        finally:
            self.attachment.skipped = set()
        if target is None:
            return captured
        if not captured:
            raise FewbitsError(
                f"unit {target.name!r} did not run on calibration batch {number}; it cannot be calibrated on this data"
            )
        if poisoned and any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in tensors(captured)):
            raise FewbitsError(
                f"{target.name}: the forward read the output of {poisoned[0]}, which the recorded data flow did not "
                "show; please report this model, and give `units` explicitly to go on"
            )
        return captured

    def record(self, stream: str, batch: Batch, number: int) -> Any:
        """What the model returns for the `number`-th batch; every unit's outputs are kept in `stream`."""
        counts: dict[str, int] = {}

        def intercept(unit: Unit, original: Any, *args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            use = counts[unit.name] = counts.get(unit.name, -1) + 1
            self.store.put((stream, unit.name, number, use), map_tensors(torch.clone, out) if self.writes else out)
            return out

        args, kwargs = as_call(batch)
        with torch.no_grad(), self._patched(intercept):
            return self.model(*args, **kwargs)

    def rerun(self, stream: str, finished: Collection[str], batch: Batch, number: int) -> Any:
        """What the model returns for the `number`-th batch, `finished` units giving back what `record` kept."""
        counts: dict[str, int] = {}

        def intercept(unit: Unit, original: Any, *args: Any, **kwargs: Any) -> Any:
            if unit.name not in finished:
                return original(*args, **kwargs)
            use = counts[unit.name] = counts.get(unit.name, -1) + 1
            out = self.store.get((stream, unit.name, number, use))
            return map_tensors(torch.clone, out) if self.writes else out

        args, kwargs = as_call(batch)
        self.attachment.skipped = set(finished)
        try:
            with torch.no_grad(), self._patched(intercept):
                return self.model(*args, **kwargs)
        finally:
            self.attachment.skipped = set()

    def keep(self, stream: str, unit: Unit, number: int, use: int, output: Tree) -> None:
        """Cache a finished unit's output for one batch and call."""
        self.store.put((stream, unit.name, number, use), output)
        self._shapes[(stream, unit.name, number, use)] = map_tensors(lambda t: t.detach().to("meta"), output)

    def release(self, stream: str, reached: Unit) -> None:
        """Drop the outputs that only units up to `reached` read."""
        position = self.order[reached.name]
        for unit in self.units[:position]:
            if self.last_reader[unit.name] <= position:
                self.store.drop_where(stream, unit.name)

    def forget(self, stream: str) -> None:
        self.store.drop_where(stream)
        self._shapes = {key: value for key, value in self._shapes.items() if key[0] != stream}

    @contextmanager
    def _patched(self, intercept: Any) -> Iterator[None]:
        modules = [(unit, self.model.get_submodule(unit.name)) for unit in self.units]
        saved = [module.__dict__.get("forward") for _, module in modules]

        def wrap(unit: Unit, original: Any) -> Any:
            return lambda *args, **kwargs: intercept(unit, original, *args, **kwargs)

        try:
            for unit, module in modules:
                module.__dict__["forward"] = wrap(unit, module.forward)
            yield
        finally:
            for (_, module), before in zip(modules, saved, strict=True):
                if before is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = before

    def _check_plain(self, unit: Unit, tree: Tree) -> None:
        for leaf in torch.utils._pytree.tree_leaves(tree):
            if not isinstance(leaf, _PLAIN):
                raise FewbitsError(
                    f"unit {unit.name!r} receives a {type(leaf).__name__}, which cannot be cached and replayed; "
                    "for a language model pass use_cache=False, else choose other units"
                )


def _poison(shape: Tensor, device: torch.device) -> Tensor:
    value = float("nan") if shape.is_floating_point() else 0
    return torch.full(shape.shape, value, dtype=shape.dtype, device=device)


def _last_readers(graph: Graph, units: list[Unit]) -> dict[str, int]:
    """For each unit, the position of the last unit whose inputs depend on its output (-1: none)."""
    needs = unit_needs(graph, units)
    last = {unit.name: -1 for unit in units}
    for position, unit in enumerate(units):
        for needed in needs.get(unit.name, ()):
            if needed in last:
                last[needed] = max(last[needed], position)
    return last


def _passing(graph: Graph, units: list[Unit]) -> set[str]:
    """Units that get nothing but what the unit before got or put out, untouched on the way."""
    if any(call.inplace for call in graph.calls):
        return set()
    found: set[str] = set()
    for before, unit in pairwise(units):
        given, taken = ([note for note in graph.module_io if note.path == one.name] for one in (before, unit))
        if len(given) != 1 or len(taken) != 1 or any(n.objects_in or n.objects_out for n in (*given, *taken)):
            continue
        if {*taken[0].inputs} <= {*given[0].inputs, *given[0].outputs}:
            found.add(unit.name)
    return found
