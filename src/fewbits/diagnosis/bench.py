"""Running a network many times with some sites changed, from the first changed site on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.attach import Attachment
from fewbits.diagnosis.measures import Noise, OutputError, excerpt
from fewbits.diagnosis.switchboard import Switchboard
from fewbits.engine.gradients import first_output
from fewbits.engine.replay import Replay
from fewbits.engine.store import ActivationStore, Budget
from fewbits.engine.tree import to
from fewbits.errors import FewbitsError
from fewbits.graph.types import Graph, Site
from fewbits.hub.data import Batch
from fewbits.quantizer import Quantizer
from fewbits.tasks.registry import Task

Observer = Callable[[Tensor], None]
#: The two runs that others start from: no site quantized, and all.
FLOAT, QUANTIZED = "float", "quantized"


@dataclass
class Subject:
    """A quantized model to be diagnosed.

    Attributes:
        model, attachment: the quantized model; every recorded site is known to the attachment.
        graph: its recorded forward. floats: see `Switchboard`.
        batches: what it is run on. outputs: of the original float model on them, on the CPU.
        kind: how outputs are compared (`OutputError`). task: what the metric is, None where there are no labels.
        report: of the quantization. notes: what the reader should know.
    """

    model: nn.Module
    attachment: Attachment
    graph: Graph
    floats: Mapping[str, Tensor]
    batches: list[Batch]
    outputs: list[Tensor]
    kind: str
    task: type[Task] | None
    report: dict[str, Any]
    data: dict[str, Any]
    device: torch.device
    notes: list[str] = field(default_factory=list)


@dataclass
class Trial:
    """One way to run the network: which sites are quantized, which on another grid; and what came out.

    `stream` is the run whose outputs are taken over up to the first site that differs from it. `watch` is a site whose
    tensor is compared with the float run's. `errors` are the output's, by sample, and `error` their mean; `metric` is
    None without labels.
    """

    stream: str
    quantized: Collection[str]
    changed: Mapping[str, Quantizer | None] = field(default_factory=dict)
    differs: Collection[str] = ()
    watch: str | None = None
    errors: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    metric: float | None = None
    noise: float | None = None

    @property
    def error(self) -> float:
        return float(self.errors.mean()) if len(self.errors) else 0.0


class Bench:
    """Runs trials of one subject. Outputs of its units are kept for one batch at a time."""

    def __init__(self, subject: Subject, advance: Callable[[], None]) -> None:
        self.subject = subject
        self.advance = advance
        self.board = Switchboard(subject.model, subject.attachment, subject.floats, subject.device)
        self.store = ActivationStore(Budget(), subject.device)
        self.replay = Replay(subject.model, subject.attachment, subject.graph, subject.graph.units, self.store)

    @property
    def sites(self) -> dict[str, Site]:
        """The quantized sites in call order."""
        return self.board.sites

    def close(self) -> None:
        """Leave the model quantized as it was and drop what is kept."""
        self.board.use(self.sites)
        self.store.close()

    def run(
        self,
        trials: list[Trial],
        observers: Mapping[str, Mapping[str, list[Observer]]] | None = None,
        after_batch: Callable[[], None] | None = None,
    ) -> None:
        """Fill in the trials' results. `observers` watch the two runs that trials start from, by site."""
        observers = observers or {}
        watched = sorted({trial.watch for trial in trials if trial.watch})
        streams = sorted({trial.stream for trial in trials} | set(observers) | ({FLOAT} if watched else set()))
        errors = [OutputError(self.subject.kind) for _ in trials]  # type: ignore[arg-type]
        tasks = [self._task() for _ in trials]
        noises = [Noise() for _ in trials]
        for number, batch in enumerate(self.subject.batches):
            inputs = to(batch.inputs, self.subject.device)
            reference = OutputError.reference(self.subject.kind, self.subject.outputs[number].to(self.subject.device))
            exact: dict[str, list[Tensor]] = {name: [] for name in watched}
            for stream in streams:
                self.board.use(self.sites if stream == QUANTIZED else ())
                watching = {name: list(found) for name, found in observers.get(stream, {}).items()}
                if stream == FLOAT:
                    for name in watched:
                        watching.setdefault(name, []).append(_keeping(exact[name]))
                with self.subject.attachment.observing(watching):
                    self.replay.record(stream, inputs, number)
                self.advance()
            for place, trial in enumerate(trials):
                self.board.use(trial.quantized, trial.changed)
                seen: list[Tensor] = []
                watching = {trial.watch: [_keeping(seen)]} if trial.watch else {}
                with self.subject.attachment.observing(watching):
                    output = self.replay.rerun(trial.stream, self._finished(trial), inputs, number)
                errors[place].update(reference, first_output(output).detach())
                tasks[place] = _updated(tasks[place], output, batch.targets)
                if trial.watch:
                    for before, now in zip(exact[trial.watch], seen, strict=True):
                        noises[place].update(before, now)
                self.advance()
            for stream in streams:
                self.store.drop_where(stream)
            if after_batch is not None:
                after_batch()
        for trial, error, task, noise in zip(trials, errors, tasks, noises, strict=True):
            trial.errors = error.samples()
            trial.metric = None if task is None else task.result()[task.metric]
            trial.noise = noise.decibels()

    def runs(self, trials: list[Trial], streams: int) -> int:
        """How often `advance` is called for so many trials and streams."""
        return (len(trials) + streams) * len(self.subject.batches)

    def _finished(self, trial: Trial) -> set[str]:
        """Units that end before the first site that differs from the trial's stream begins."""
        calls = [self.subject.graph.sites[name].call for name in trial.differs]
        if not calls:
            return set()
        units = self.subject.graph.units
        return {unit.name for unit in units if unit.uses == 1 and unit.calls and max(unit.calls) < min(calls)}

    def _task(self) -> Task | None:
        return None if self.subject.task is None else self.subject.task()


def _keeping(held: list[Tensor]) -> Observer:
    return lambda x: held.append(excerpt(x))


def _updated(task: Task | None, output: Any, targets: Tensor | None) -> Task | None:
    """The task with a batch taken in; None once an output was no output to measure (NaN)."""
    if task is None or targets is None:
        return None
    try:
        task.update(output, targets.to(first_output(output).device))
    except FewbitsError:
        return None
    return task
