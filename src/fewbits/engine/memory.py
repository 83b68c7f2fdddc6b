"""Peak memory, predicted from the recorded forward before any work starts."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.engine.store import Budget
from fewbits.graph.types import Graph, Unit
from fewbits.recipe import Recipe


@dataclass(frozen=True)
class Forecast:
    """Bytes expected at the worst unit: resident parameters, the unit's working set, cached activations, statistics."""

    resident: int
    unit: int
    activations: int
    statistics: int
    spilled: int

    @property
    def peak(self) -> int:
        return self.resident + self.unit + self.activations + self.statistics

    def __str__(self) -> str:
        text = (
            f"expected peak {_size(self.peak)}: weights {_size(self.resident)}, largest unit {_size(self.unit)}, "
            f"activations {_size(self.activations)}, statistics {_size(self.statistics)}"
        )
        return f"{text}; {_size(self.spilled)} of activations go to disk" if self.spilled else text


def forecast(
    graph: Graph,
    units: list[Unit],
    recipe: Recipe,
    parameter_bytes: dict[str, int],
    samples: int,
    recorded_batch: int,
    batch: int,
    streamed: bool,
    budget: Budget,
    limits: tuple[int, int],
) -> Forecast:
    """Predict the peak of a run over `samples` calibration samples in batches of `batch`.

    `parameter_bytes` maps parameter names to bytes; `recorded_batch` is the batch size of the recorded forward, from
    which activation sizes are scaled. With `streamed` only parameters outside the units are resident.
    """
    owned: dict[str, int] = {unit.name: 0 for unit in units}
    glue = 0
    for name, size in parameter_bytes.items():
        unit = next((unit for unit in units if unit.contains(name.rpartition(".")[0])), None)
        if unit is None:
            glue += size
        else:
            owned[unit.name] += size
    largest = max(owned.values(), default=0)
    sweeps = recipe.sweeps()
    streams = max((len({s for step in sweep for s in step.streams}) for sweep in sweeps), default=0)
    boundary = inside = 0.0  # bytes per sample
    for unit in units:
        io = [note for note in graph.module_io if note.path == unit.name]
        values = {value for note in io for value in (*note.inputs, *note.outputs)}
        boundary = max(boundary, sum(_bytes(graph, value, recorded_batch) for value in values))
        made = [value for index in unit.calls for value in graph.calls[index].outputs]
        # Without gradients torch frees an intermediate when its last reader is done; a handful are alive at once.
        inside = max(inside, 4 * max((_bytes(graph, value, recorded_batch) for value in made), default=0))
    statistics = max((step.statistics_bytes(graph, unit) for step in recipe.steps for unit in units), default=0)
    cached = int(boundary * samples * streams)
    fits = sum(limits)
    resident = glue if streamed else sum(parameter_bytes.values())
    return Forecast(resident, 2 * largest + int(inside * batch), min(cached, fits), statistics, max(0, cached - fits))


def _bytes(graph: Graph, value: int, recorded_batch: int) -> float:
    """Bytes of a recorded value per sample."""
    held = graph.values[value]
    size = held.dtype.itemsize
    for extent in held.shape:
        size *= extent
    return size / recorded_batch


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
