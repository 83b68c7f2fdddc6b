"""Bias correction: the mean output of every quantized layer made what it was, by statistics or by data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.correction.bias import corrected_bias
from fewbits.engine.context import UnitContext
from fewbits.engine.layers import channel_axis
from fewbits.engine.statistics import ChannelMean
from fewbits.errors import FewbitsError
from fewbits.graph.rules_moments import layer_mean
from fewbits.graph.types import Site
from fewbits.graph.weights import add_to_bias
from fewbits.recipe import Step


@dataclass(frozen=True)
class CorrectBiasByMoments(Step):
    """Analytic: b - (W~ - W) E[x], with E[x] from the moments of the layer's input (`PropagateMoments` before).

    Layers that no statistics reach, which that step names, keep their bias; all do where the rounding `fits_outputs`.
    """

    part: ClassVar[str] = "correction"
    stage: ClassVar[int] = 60
    activations: ClassVar[bool | None] = None

    def apply(self, unit: UnitContext) -> None:
        if _fitted(unit):
            return
        graph, before = unit.graph, unit.run.mean_outputs
        for site in _layers(unit):
            now, reference, count = torch.zeros(()), torch.zeros(()), 0
            for call in graph.calls:  # a layer that runs several times: over all that it puts out
                if call.key != site.key:
                    continue
                mean = layer_mean(graph, unit.model, call, unit.run.moments)
                if mean is None:
                    count = 0
                    break
                weight = torch.Size(graph.values[call.outputs[0]].shape).numel()
                now, reference, count = now + weight * mean, reference + weight * before[call.index], count + weight
            if count:
                _correct(unit, site, now / count, reference / count)


@dataclass(frozen=True)
class CorrectBiasByData(Step):
    """Empirical: layer by layer, minus the mean error of its output behind all that is quantized and corrected before.

    A sweep of its own once everything is quantized: one forward of a unit for each of its layers. Nothing is corrected
    where the rounding `fits_outputs`.
    """

    part: ClassVar[str] = "correction"
    stage: ClassVar[int] = 60
    new_sweep: ClassVar[bool] = True
    streams: ClassVar[frozenset[str]] = frozenset({"float", "quantized"})

    def apply(self, unit: UnitContext) -> None:
        if _fitted(unit):
            return
        layers = _layers(unit)
        outputs = {site.name: site.name.removesuffix("weight") + "output" for site in layers}
        axes = {site.name: channel_axis(unit.graph, unit.graph.calls[site.call].outputs[0]) for site in layers}
        reference = {name: ChannelMean(axis) for name, axis in axes.items()}
        with unit.original_weights():
            unit.gather({outputs[name]: [mean] for name, mean in reference.items()}, "float")
        for site in layers:
            now = ChannelMean(axes[site.name])
            unit.gather({outputs[site.name]: [now]}, "quantized")
            if not now.seen or not reference[site.name].seen:
                unit.note(f"{site.name}: no calibration data reached it, bias not corrected")
                continue
            _correct(unit, site, now.value(), reference[site.name].value())


def _fitted(unit: UnitContext) -> bool:
    """Whether the weights were rounded together for the unit's output, which the mean is a part of.

    Bringing each layer's mean back then undoes what they do for each other (in small networks it costs more than it
    gives, the more the fewer bits there are).
    """
    names = [type(step).__name__ for step in unit.recipe.steps if step.fits_outputs]
    if names:
        unit.note(f"no bias is corrected: {names[0]} rounded the weights for what their units put out, means included")
    return bool(names)


def _layers(unit: UnitContext) -> list[Site]:
    """The unit's weights in call order, without those that are read elsewhere too, which are named in a note."""
    found: list[Site] = []
    for site in sorted(unit.weights(), key=lambda s: s.call):
        if site.used_by:
            unit.note(f"{site.name}: shared with {site.used_by[0]}, bias not corrected")
        elif unit.graph.calls[site.call].op != "embedding" and site.uses:
            found.append(site)
    return found


def _correct(unit: UnitContext, site: Site, now: Tensor, reference: Tensor) -> None:
    """Make the layer's mean output [out] what it was."""
    try:
        add_to_bias(unit.model, unit.graph, site, corrected_bias(torch.zeros_like(now), now, reference))
    except FewbitsError as problem:
        unit.note(f"{problem}; bias not corrected")
