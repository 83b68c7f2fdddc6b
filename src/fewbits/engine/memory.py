"""Peak memory, predicted from the recorded forward before any work starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fewbits.graph.types import Graph, Site, Unit
from fewbits.recipe import Recipe


@dataclass(frozen=True)
class Forecast:
    """Bytes expected at the worst unit: resident parameters, the unit's working set, cached activations, statistics.

    On a GPU they are bytes of its memory, and `host` are those of activations kept in host memory.
    """

    resident: int
    unit: int
    activations: int
    statistics: int
    spilled: int
    host: int = 0

    @property
    def peak(self) -> int:
        return self.resident + self.unit + self.activations + self.statistics

    def __str__(self) -> str:
        text = (
            f"expected peak {_size(self.peak)}: weights {_size(self.resident)}, largest unit {_size(self.unit)}, "
            f"activations {_size(self.activations)}, statistics {_size(self.statistics)}"
        )
        if self.host:
            text += f"; {_size(self.host)} of activations in host memory"
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
    lent: int,
    device: torch.device,
    limits: tuple[int, int],
    unread: Unit | None,
) -> Forecast:
    """Predict the peak of a run over `samples` calibration samples in batches of `batch`.

    `parameter_bytes` maps parameter names to bytes; `recorded_batch` is the batch size of the recorded forward, from
    which activation sizes are scaled. With `streamed` only parameters outside the units are resident, but for `lent`
    bytes that come while a unit's inputs are captured. `limits` are the bytes of activations allowed on the device and
    in host memory; `unread` is the unit whose outputs nobody reads.
    """
    # only where there is a grid matters here; whether a target holds it is checked later, with better words
    recipe = dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, target=""))
    owned: dict[str, int] = {unit.name: 0 for unit in units}
    glue = 0
    for name, size in parameter_bytes.items():
        unit = next((unit for unit in units if unit.contains(name.rpartition(".")[0])), None)
        if unit is None:
            glue += size
        else:
            owned[unit.name] += size
    copies = 1 if streamed and device.type == "cuda" else 2  # what is read from files lies in host memory first
    sweeps = recipe.sweeps()
    streams = max((len({s for step in sweep for s in step.streams}) for sweep in sweeps), default=0)
    boundary = 0.0  # bytes per sample
    worst = (0, 0)
    for unit in units:
        io = [note for note in graph.module_io if note.path == unit.name]
        idle = unit is unread and not any(recipe.scheme.spec(site) is not None for site in graph.sites_of(unit))
        passed = {value for note in io for value in (note.inputs if unit is unread else (*note.inputs, *note.outputs))}
        boundary = max(boundary, sum(_bytes(graph, value, recorded_batch) for value in passed))
        wanted = {site.module for site in graph.sites_of(unit) if _acts(site, recipe)}
        calls = [] if idle else [graph.calls[index] for index in unit.calls]
        # A fused attention keeps its scores to itself, but where they are quantized.
        made = [value for call in calls if not call.opened or call.module in wanted for value in call.outputs]
        # Without gradients torch frees an intermediate when its last reader is done; a handful are alive at once.
        inside = 4 * max((_bytes(graph, value, recorded_batch) for value in made), default=0)
        working = copies * owned[unit.name] + int(inside * batch)
        statistics = 0 if idle else max((step.statistics_bytes(graph, unit) for step in recipe.steps), default=0)
        worst = max(worst, (working, statistics), (copies * owned[unit.name] + lent, 0), key=sum)
    cached = int(boundary * samples * streams)
    on_device = min(cached, limits[0]) if device.type == "cuda" else min(cached, sum(limits))
    in_host = min(cached, sum(limits)) - on_device
    resident = glue - lent if streamed else sum(parameter_bytes.values())
    return Forecast(resident, worst[0], on_device, worst[1], max(0, cached - sum(limits)), in_host)


def _acts(site: Site, recipe: Recipe) -> bool:
    """Whether the scheme quantizes an activation there."""
    return site.role != "weight" and recipe.scheme.spec(site) is not None


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
