"""Optimisation steps recorded as a CUDA graph and replayed: the device repeats them, Python no longer takes part.

A step of a small unit is a hundred kernels of a few microseconds each; launching them from Python takes ten times as
long as running them. So whatever changes from step to step is read from tables on the device, at a place that the step
itself moves on: sample indices, learning rates, the number that a `Steady` loss is given. A step is then always the
same work and can be recorded.

The first steps of a run, and those after the loss's number comes or goes, are taken one by one, because libraries
set themselves up then. They do exactly what the recording does, with the same kernels, so which steps were replayed
cannot be seen in the result.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels.available import has_triton
from fewbits.reconstruction.steps import Group, Optimiser, Steady, Steps

WARM = 2  # steps taken one by one before a recording; the last of them is watched for work that cannot be recorded
AHEAD = 1024  # steps that sample indices are drawn ahead for
SYNCHRONISING = "called a synchronizing CUDA operation"  # torch's message in its synchronisation debug mode


class RecordedSteps(Steps):
    """Adam steps of a steady loss on one GPU.

    reason: why steps are taken one by one, None while they are recorded; `note` is told when it is found.
    replayed: how many steps were replayed.
    """

    def __init__(
        self, loss: Steady, groups: Sequence[Group], iterations: int, note: Callable[[str], None] = lambda reason: None
    ) -> None:
        super().__init__(loss, groups, iterations)
        self.loss = loss
        self.note = note
        self.device = self.flat[0].device
        self.samples = loss.samples or self.device
        self.replayed = 0
        self.reason: str | None = None
        numbers = [
            [*(group.lr_at(step / iterations) for group in groups), loss.at(step) or 0.0] for step in range(iterations)
        ]
        self._table = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        self._now = torch.empty_like(self._table[:1])
        self._place = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._rows: Tensor | None = None  # sample indices of every step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._numbered: bool | None = None  # whether the steps now being taken have a number
        self._warm = 0
        for number, settings in enumerate(self.optimiser.param_groups):
            settings["lr"] = self._now[0, number]
        found = why_not(loss, self.flat)
        if found is not None:
            self._give_up(found)

    def indices(self, sampler: Iterable[Tensor]) -> Iterator[Tensor]:
        """The sample indices of the steps, drawn ahead and put where the data is."""
        rest, done = islice(sampler, self.iterations), 0
        while chunk := list(islice(rest, AHEAD)):
            if self.reason is None and any(row.shape != chunk[0].shape for row in chunk):
                self._give_up("the sampler's batches differ in size")
            if self.reason is None:
                self._upload(chunk, done)
            yield from chunk
            done += len(chunk)

    @contextmanager
    def running(self) -> Iterator[None]:
        """On a stream of its own: nothing can be recorded on the default one."""
        stream, outer = _stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(outer)
        try:
            with torch.cuda.stream(stream), _repeatable_convolutions():
                yield
        finally:
            self._graph = None
            outer.wait_stream(stream)

    def take(self, step: int, index: Tensor) -> Tensor:
        numbered = self.loss.at(step) is not None
        if numbered != self._numbered:
            self._numbered, self._graph, self._warm = numbered, None, 0
        if self._warm == WARM and self._graph is None and self.reason is None:
            self._graph = self._record(index)
        if self._graph is not None:
            self._graph.replay()
            self.replayed += 1
        elif self._warm == WARM - 1 and self.reason is None:
            self._watched(index)
        else:
            self._work(index)
        self._warm = min(self._warm + 1, WARM)
        return self.history[step]

    def _adam(self, groups: list[dict[str, Any]]) -> Optimiser:
        # counts of steps and learning rates are read on the device
        if not has_triton() or any(p.dtype != torch.float32 or not p.is_contiguous() for p in self.flat):
            return torch.optim.Adam(groups, fused=True, capturable=True)
        from fewbits.kernels.triton_adam import Adam

        return Adam(groups)

    def _work(self, index: Tensor) -> None:
        """One step. `index` is read only where the steps are not in a table on the device."""
        torch.index_select(self._table, 0, self._place, out=self._now)
        if self._rows is not None:
            index = self._rows.index_select(0, self._place)[0]
        else:
            index = index.to(self.samples)
        loss = self._descend(self.loss.function(index, self._now[0, -1] if self._numbered else None))
        self.history.index_copy_(0, self._place, loss.to(self.history.dtype).view(1))
        self._place.add_(1)

    def _watched(self, index: Tensor) -> None:
        """One step, in which any wait for the device is noticed; that step is then begun again."""
        before = [generator.get_state() for generator in self.loss.generators]
        try:
            with _refusing_waits():
                self._work(index)
        except RuntimeError as error:
            if SYNCHRONISING not in str(error):
                raise
            for generator, state in zip(self.loss.generators, before, strict=True):
                generator.set_state(state)
            self._give_up("the loss waits for the device")
            self._work(index)

    def _record(self, index: Tensor) -> torch.cuda.CUDAGraph | None:
        """A recording of one step, which runs nothing; None, and everything as it was, where that cannot be done."""
        generators = [torch.cuda.default_generators[self.device.index], *self.loss.generators]
        states = [generator.clone_state() for generator in generators]
        graph = torch.cuda.CUDAGraph()
        for generator in self.loss.generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=_stream(self.device), capture_error_mode="thread_local"):
                self._work(index)
        except RuntimeError as error:
            # whatever it is, it shows in the next step too unless recording is to blame
            for generator, state in zip(generators, states, strict=True):
                generator.graphsafe_set_state(state)
            self._give_up(f"a step cannot be recorded ({_first_line(error.__context__ or error)})")
            return None
        return graph

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._graph = None
        self.note(f"optimisation steps run one by one, not recorded: {reason}")

    def _upload(self, chunk: list[Tensor], start: int) -> None:
        rows = torch.stack(chunk)
        if self._rows is None:
            self._rows = rows.new_empty((self.iterations, *rows.shape[1:]), device=self.device)
        elif self._rows.shape[1:] != rows.shape[1:]:
            self._rows = None
            self._give_up("the sampler's batches differ in size")
            return
        self._rows[start : start + len(chunk)].copy_(rows if rows.is_cuda else rows.pin_memory(), non_blocking=True)


def why_not(loss: Steady, parameters: Sequence[Tensor]) -> str | None:
    """What, known beforehand, keeps the steps of a loss from being recorded; None for nothing."""
    devices = {str(parameter.device) for parameter in parameters}
    if len(devices) > 1:
        return f"the parameters lie on {len(devices)} devices"
    if loss.samples is not None and str(loss.samples) not in devices:
        return f"the samples lie on {loss.samples}"
    if any(generator.device.type != "cuda" for generator in loss.generators):
        return "random numbers are drawn on the CPU"
    return None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # one for all runs: cuBLAS keeps a workspace for every stream it meets
    return torch.cuda.Stream(device)


@contextmanager
def _repeatable_convolutions() -> Iterator[None]:
    """Inside, cuDNN takes no algorithm whose sums come in another order every time."""
    switch = torch.backends.cudnn
    before = switch.deterministic
    switch.deterministic = True
    try:
        yield
    finally:
        switch.deterministic = before


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """Inside, what waits for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
