"""Statistics without data: what batch norms say about every value of the model, and activation ranges from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.engine.context import ModelContext
from fewbits.engine.statistics import Bounds
from fewbits.engine.tree import as_call, batch_size, to
from fewbits.errors import FewbitsError
from fewbits.graph.moments import MOST_GUESSES, Moments, between
from fewbits.graph.rules_moments import layer_mean, propagate_moments
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.ranges import AbsMax, MinMax
from fewbits.recipe import QSpec, Step


@dataclass(frozen=True)
class PropagateMoments(Step):
    """Work out the moments of all values (`graph.moments`) of the model as the transforms left it.

    They are kept in the run (`moments`), and with them what each layer puts out on average (`mean_outputs`), for steps
    that use them once weights are no longer what they were. `sigmas`: how far from its mean a normal element is taken
    to reach. `input_range`: smallest and largest element of the model's
    inputs; by default what the run was told of them, if anything.
    """

    sigmas: float = 6.0
    input_range: tuple[float, float] | None = None

    part: ClassVar[str] = "transform"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 6

    def apply(self, unit: ModelContext) -> None:
        ends = unit.run.input_range
        if self.input_range is not None:
            low, high = (torch.tensor(end, dtype=torch.float64) for end in self.input_range)
            ends = (low, high)
        inputs: dict[int, Moments] = {}
        for value in unit.graph.inputs if ends is not None else ():
            held = unit.graph.values[value]
            if held.dtype.is_floating_point and len(held.shape) == 4:
                assert ends is not None
                inputs[value] = between(*(end.double().view(1, -1, 1, 1) for end in ends))
        unit.run.moments = propagate_moments(unit.graph, unit.model, unit.run.norms, inputs, self.sigmas)
        layers = {site.key: site.name for site in unit.weights() if site.op != "embedding"}
        for call in unit.graph.calls:
            mean = layer_mean(unit.graph, unit.model, call, unit.run.moments) if call.key in layers else None
            if mean is not None:
                unit.run.mean_outputs[call.index] = mean
        reached = {unit.graph.calls[index].key for index in unit.run.mean_outputs}
        without = [name for key, name in layers.items() if key not in reached]
        if without:
            unit.note(
                f"batch-norm statistics reach {len(layers) - len(without)} of {len(layers)} layers; nothing follows "
                f"from them for {_few(without)}"
            )


@dataclass(frozen=True)
class RangesFromMoments(Step):
    """Activation quantizers whose ranges come from the moments of the values at their sites: their ends, as min/max.

    Where no statistics reach, `unknown` says what happens: "data" takes the ends seen in a forward of the calibration
    data and is an error without any; "dynamic" fits on every call.
    """

    unknown: Literal["data", "dynamic"] = "data"

    part: ClassVar[str] = "activations"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 7

    def apply(self, unit: ModelContext) -> None:
        unreached: list[tuple[Site, QSpec]] = []
        guessed: list[str] = []
        for site in unit.activations():
            spec = unit.spec(site)
            assert spec is not None
            if spec.dynamic:
                unit.set_quantizer(site, Quantizer(spec, site.name))
                continue
            found = _moments_at(unit, site)
            if not found:
                unreached.append((site, spec))
                continue
            if any(0 < moments.guesses <= MOST_GUESSES for moments in found):
                guessed.append(site.name)
            ends = [
                (spec.granularity.reduce(m.low.expand(site.shape).float(), lambda block: block.amin(1)),
                 spec.granularity.reduce(m.high.expand(site.shape).float(), lambda block: block.amax(1)))
                for m in found
            ]  # fmt: skip
            low, high = torch.stack([e[0] for e in ends]).amin(0), torch.stack([e[1] for e in ends]).amax(0)
            self._put(unit, site, spec, low, high)
        if guessed:
            unit.note(f"ranges behind layers without a norm rest on independent inputs: {_few(guessed)}")
        if unreached:
            self._otherwise(unit, unreached)

    def _otherwise(self, unit: ModelContext, unreached: list[tuple[Site, QSpec]]) -> None:
        names = _few([site.name for site, _ in unreached])
        if self.unknown == "dynamic":
            for site, spec in unreached:
                unit.set_quantizer(site, Quantizer(dataclasses.replace(spec, dynamic=True), site.name))
            unit.note(f"no batch-norm statistics reach {names}: ranges are fitted on every call")
            return
        if not unit.run.batches:
            raise FewbitsError(
                f"no batch-norm statistics reach {names}: give calibration data for their ranges, or the option "
                "unknown=dynamic to fit them on every call; for the model's input, input_range=LOW,HIGH"
            )
        bounds = {site.name: Bounds(spec.granularity) for site, spec in unreached}
        _observe(unit, bounds)
        lost: list[str] = []
        for site, spec in unreached:
            if not bounds[site.name].seen:
                unit.override(site, None)
                lost.append(site.name)
                continue
            self._put(unit, site, spec, *bounds[site.name].value())
        unit.note(f"no batch-norm statistics reach {names}: ranges from the calibration data")
        if lost:
            unit.note(f"neither statistics nor data reach {_few(lost)}: floating point")

    @staticmethod
    def _put(unit: ModelContext, site: Site, spec: QSpec, low: Tensor, high: Tensor) -> None:
        if not isinstance(spec.range, (MinMax, AbsMax)):  # it would need the values
            spec = dataclasses.replace(spec, range=MinMax())
        quantizer = Quantizer(spec, site.name)
        quantizer.set_params(spec.range.fit_bounds(low, high, spec.format))
        unit.set_quantizer(site, quantizer)


def _moments_at(unit: ModelContext, site: Site) -> list[Moments]:
    """Moments of every value that passes the site; none where one of them is unknown."""
    values: list[int] = []
    for call in unit.graph.calls:
        operand = unit.graph.flow.operands(call).get(site.role) if call.key == site.key else None
        if call.key == site.key and site.role == "output":
            values.append(call.outputs[0])
        elif operand is not None:
            values.append(operand.value)
    found = [unit.run.moments[value] for value in values or [site.value] if value in unit.run.moments]
    return found if len(found) == max(len(values), 1) else []


def _observe(unit: ModelContext, bounds: dict[str, Bounds]) -> None:
    """One forward of the floating-point model over the calibration data."""
    size = [0]
    observers = {name: [lambda x, b=b: b.update(x, size[0])] for name, b in bounds.items()}
    with unit.attachment.disabled(), unit.attachment.observing(observers), torch.no_grad():  # type: ignore[arg-type]
        for batch in unit.run.batches:
            size[0] = batch_size(batch)
            args, kwargs = as_call(to(batch, unit.device))
            unit.model(*args, **kwargs)


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
