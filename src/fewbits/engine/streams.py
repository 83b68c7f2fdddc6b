"""The streams of a sweep, "float" and "quantized": what every unit is called with on each calibration batch.

The inputs of a unit are captured in a forward of the model (`engine.replay`). Where the recorded data flow says that
they are nothing but what the unit before got and put out, that is done on the first batch alone: on the others they are
put together from these, and no forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fewbits.attach import Attachment
from fewbits.engine.replay import Replay
from fewbits.engine.store import Key
from fewbits.engine.tree import Batch, same, share, to
from fewbits.graph.types import Unit

#: For each leaf of a unit's inputs, whether it is an output of the unit before (else one of that unit's inputs) and its
#: place there; None for what is no tensor.
Route = list[tuple[bool, int] | None]


class Streams:
    """Inputs of one unit at a time, in the store of `replay` under ("input", stream, batch, use).

    For every unit in order: `capture`, then `advance` once its outputs are kept; after the last one `end`.
    """

    def __init__(self, replay: Replay, attachment: Attachment, device: torch.device) -> None:
        self.replay = replay
        self.store = replay.store
        self.attachment = attachment
        self.device = device
        self._uses: dict[tuple[str, int], int] = {}

    def uses(self, unit: Unit, batch: int) -> int:
        """How often the unit is called in the forward of a batch."""
        return self._uses[(unit.name, batch)]

    def capture(self, stream: str, unit: Unit, batches: Sequence[Batch]) -> None:
        """Cache what the unit is called with on every batch."""
        first: dict[int, Any] = {}
        route: Route | None = None
        for number, batch in enumerate(batches):
            if route is None or not self._carry(stream, unit, number, route):
                self._run(stream, unit, number, batch, first)
            if number == 0:
                route = self._route(stream, unit)
        self.store.drop_where("before", stream)

    def advance(self, stream: str, unit: Unit) -> None:
        """Leave the unit behind: its inputs become those of the unit before, outputs nobody reads any more go."""
        self.store.rename(("input", stream), ("before", stream))
        self.replay.release(stream, unit)

    def end(self, stream: str) -> None:
        """Drop all that is cached of a stream."""
        self.store.drop_where("before", stream)
        self.replay.forget(stream)

    def _run(self, stream: str, unit: Unit, number: int, batch: Batch, first: dict[int, Any]) -> None:
        """Cache the unit's calls in a forward of the model; what is the same as on the `first` batch is kept once."""
        with self.attachment.disabled() if stream == "float" else nullcontext():
            calls = self.replay.capture(stream, unit, to(batch, self.device), number)
        self._uses[(unit.name, number)] = len(calls)
        for use, call in enumerate(calls):
            call = share(call, first.setdefault(use, call))
            self.store.put(("input", stream, number, use), call)

    def _neighbours(self, stream: str, unit: Unit, number: int) -> tuple[Key, Key]:
        """Where the inputs and the outputs of the unit before lie, for a batch."""
        position = self.replay.order[unit.name]
        return ("before", stream, number, 0), (stream, self.replay.units[position - 1].name, number, 0)

    def _route(self, stream: str, unit: Unit) -> Route | None:
        """How the inputs of the unit are put together from those of the unit before and its outputs.

        The recorded data flow says that nothing else goes in; which is which, the first batch tells, which went through
        the model's forward. None where the inputs must be captured.
        """
        if unit.name not in self.replay.passing or self.uses(unit, 0) != 1:
            return None
        keys = self._neighbours(stream, unit, 0)
        if any(key not in self.store for key in keys):
            return None
        wanted, given, made = (tree_leaves(self.store.get(key)) for key in (("input", stream, 0, 0), *keys))
        route: Route = []
        for place, leaf in enumerate(wanted):
            if not isinstance(leaf, Tensor):
                route.append(None)
                continue
            if place < len(given) and same(leaf, given[place]):
                route.append((False, place))
                continue
            found = next((number for number, output in enumerate(made) if same(leaf, output)), None)
            if found is None:
                return None
            route.append((True, found))
        return route

    def _carry(self, stream: str, unit: Unit, number: int, route: Route) -> bool:
        """Put the unit's inputs on a batch together, where the unit before was called as on the first batch but for the
        values of its tensors; whether that was so."""
        keys, first = self._neighbours(stream, unit, number), self._neighbours(stream, unit, 0)
        if any(key not in self.store for key in keys) or not all(map(self.store.alike, keys, first)):
            return False
        sources = [None if source is None else (keys[source[0]], source[1]) for source in route]
        carried = self.store.compose(("input", stream, number, 0), ("input", stream, 0, 0), sources)
        if carried:
            self._uses[(unit.name, number)] = 1
        return carried
