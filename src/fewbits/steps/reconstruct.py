"""Learned rounding: choose up or down for every weight so that a layer's or a unit's output stays what it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.engine.context import UnitContext
from fewbits.engine.layers import channel_axis, layer_with_activation, tail
from fewbits.engine.statistics import Values
from fewbits.engine.tree import tensors
from fewbits.errors import FewbitsError
from fewbits.formats import Uniform
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.recipe import QSpec, Step
from fewbits.reconstruction.fisher import fisher_weight
from fewbits.reconstruction.loop import Group, minimise
from fewbits.reconstruction.losses import fisher_diagonal_loss, fisher_full_loss, power_loss
from fewbits.reconstruction.sampling import without_replacement
from fewbits.rounding.adaround import LearnedRounding, RoundingRegulariser
from fewbits.steps.nearest import round_nearest

Everything = 1 << 62


class SoftWeight(nn.Module):
    """Stands at a weight site while its rounding is learned: whatever weight comes in, the learned one goes out."""

    def __init__(self, spec: QSpec, rounding: LearnedRounding) -> None:
        super().__init__()
        self.spec = spec
        self.rounding = rounding
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        return self.rounding().to(weight.dtype)


@dataclass(frozen=True)
class Annealing:
    """Of the rounding regulariser: lambda, share of steps without it, exponent from and to, and its course."""

    weight: float = 0.01
    warm_start: float = 0.2
    start: float = 20.0
    end: float = 2.0
    schedule: Literal["linear", "cosine"] = "linear"
    first_count: int = 1

    def over(self, roundings: list[LearnedRounding], iterations: int) -> RoundingRegulariser:
        return RoundingRegulariser(
            roundings,
            iterations=iterations,
            weight=self.weight,
            warm_start=self.warm_start,
            start=self.start,
            end=self.end,
            schedule=self.schedule,
            first_count=self.first_count,
        )

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def start_rounding(unit: UnitContext, site: Site) -> tuple[QSpec, Quantizer, LearnedRounding] | None:
    """A learned rounding on the scheme's grid for a weight; None, and nearest rounding, where that is not uniform."""
    spec = unit.spec(site)
    assert spec is not None
    if not isinstance(spec.format, Uniform):
        unit.note(f"{site.name}: {spec.format.kind} has no up and down to learn, rounded to nearest")
        round_nearest(unit, site)
        return None
    weight = unit.weight(site)
    quantizer = Quantizer(spec, site.name)
    quantizer.calibrate(weight)
    return spec, quantizer, LearnedRounding(weight, spec.format, quantizer.params, spec.granularity).to(unit.device)


def with_penalty(loss: Callable[[Tensor], Tensor], penalty: RoundingRegulariser) -> Callable[[int, Tensor], Tensor]:
    def total(step: int, index: Tensor) -> Tensor:
        extra = penalty(step)
        data = loss(index)
        return data if extra is None else data + extra

    return total


def report_part(unit: UnitContext, iterations: int, done: int = 0, of: int = 1) -> Callable[[int, Tensor], None]:
    """A callback that moves the progress bar every few steps, without reading the loss."""

    def callback(step: int, loss: Tensor) -> None:
        if step % 50 == 0:
            unit.run.progress.part((done + step / iterations) / of)

    return callback


@dataclass(frozen=True)
class ReconstructLayers(Step):
    """AdaRound: layer by layer in forward order, float target past the activation, input from the quantized prefix."""

    iterations: int = 10_000
    batch: int = 32
    lr: float = 1e-3
    annealing: Annealing = Annealing(schedule="cosine", first_count=0)

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40
    streams: ClassVar[frozenset[str]] = frozenset({"float", "prefix"})
    activations: ClassVar[bool] = False

    def apply(self, unit: UnitContext) -> None:
        sites = unit.weights()
        layers = [site for site in sites if unit.graph.calls[site.call].op != "embedding"]
        # Targets come from the float model: its inputs are taken before the first weight of the unit is replaced.
        float_inputs = {unit.input_of(site).name: Values(Everything) for site in layers}
        unit.gather({name: [values] for name, values in float_inputs.items()}, "float", quantized=False)
        for number, site in enumerate(sites):
            if site not in layers:
                round_nearest(unit, site)
                continue
            with unit.float_activations():
                self._layer(unit, site, float_inputs[unit.input_of(site).name], number, len(sites))

    def _layer(self, unit: UnitContext, site: Site, float_in: Values, number: int, of: int) -> None:
        quantized_in = Values(Everything)
        unit.gather({unit.input_of(site).name: [quantized_in]})
        started = start_rounding(unit, site)
        if started is None:
            return
        _, quantizer, rounding = started
        layer = layer_with_activation(unit.model, unit.graph, site)
        count = sum(unit.run.sizes)
        x_float, x = _by_sample(float_in.value(), count), _by_sample(quantized_in.value(), count)
        weight = unit.weight(site)
        with torch.no_grad():
            y = torch.cat(
                [_by_sample(layer(part.flatten(0, 1), weight), len(part)) for part in x_float.split(self.batch)]
            )
        del x_float
        axis = channel_axis(unit.graph, unit.graph.calls[site.call].outputs[0])

        def loss(index: Tensor) -> Tensor:
            index = index.to(x.device)
            return power_loss(layer(x[index].flatten(0, 1), rounding()), y[index].flatten(0, 1), channel_axis=axis)

        penalty = self.annealing.over([rounding], self.iterations)
        sampler = without_replacement(count, min(self.batch, count), unit.generator(site.name))
        minimise(
            with_penalty(loss, penalty), [rounding.alpha], iterations=self.iterations, lr=self.lr, sampler=sampler,
            callbacks=[report_part(unit, self.iterations, number, of)],
        )  # fmt: skip
        unit.quantize_weight(site, rounding.codes(), quantizer.params)


@dataclass(frozen=True)
class ReconstructUnit(Step):
    """BRECQ: all weights of a unit together, against the float unit's output, inputs from the quantized prefix.

    `loss`: plain squared error, or weighted by the diagonal or the full (rank-one) Fisher information of the task loss
    at the unit's output; `fisher_damping` is added to the absolute gradients. A unit of one layer is compared past its
    activation.
    """

    iterations: int = 20_000
    batch: int = 32
    lr: float = 1e-3
    loss: Literal["mse", "fisher_diag", "fisher_full"] = "mse"
    fisher_damping: float = 1.0
    skip_first: bool = True
    annealing: Annealing = Annealing()

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40
    streams: ClassVar[frozenset[str]] = frozenset({"float", "prefix"})
    activations: ClassVar[bool] = False

    @property
    def logits(self) -> bool:
        """Whether the float network's outputs are needed."""
        return self.loss != "mse"

    def apply(self, unit: UnitContext) -> None:
        live: list[tuple[Site, Quantizer, LearnedRounding]] = []
        for site in unit.weights():
            if unit.graph.calls[site.call].op == "embedding" or (self.skip_first and "first_layer" in site.tags):
                round_nearest(unit, site)
                continue
            started = start_rounding(unit, site)
            if started is not None:
                live.append((site, started[1], started[2]))
        if not live:
            return
        with unit.float_activations():
            self._learn(unit, live)
        for site, quantizer, rounding in live:
            unit.attachment.set_quantizer(site.name, None)
            unit.quantize_weight(site, rounding.codes(), quantizer.params)

    def _learn(self, unit: UnitContext, live: list[tuple[Site, Quantizer, LearnedRounding]]) -> None:
        inputs, targets = unit.inputs(), unit.targets()
        roundings = [rounding for _, _, rounding in live]
        after, axes = _ending(unit)
        gradient = None
        if self.loss != "mse" and unit.unit.uses > 1:
            unit.note(f"{unit.name} runs {unit.unit.uses} times in a forward: squared error there, no Fisher weights")
        elif self.loss != "mse":
            for site, quantizer, _ in live:
                unit.set_quantizer(site, quantizer)
            gradient = fisher_weight(unit.output_gradients(), damping=self.fisher_damping)
        for site, _, rounding in live:
            spec = unit.spec(site)
            assert spec is not None
            unit.attachment.set_quantizer(site.name, SoftWeight(spec, rounding))  # type: ignore[arg-type]

        def loss(index: Tensor) -> Tensor:
            args, kwargs = inputs.rows(index)
            out = [after(t) for t in tensors(unit.forward(args, kwargs)) if t.is_floating_point()]
            target = [after(t) for t in tensors(targets.rows(index)) if t.is_floating_point()]
            if gradient is None:
                terms = [power_loss(a, b, channel_axis=axis) for a, b, axis in zip(out, target, axes, strict=True)]
                return torch.stack(terms).sum()
            g = gradient[index.to(gradient.device)]
            if self.loss == "fisher_diag":
                return fisher_diagonal_loss(out[0], target[0], g, channel_axis=axes[0])
            return fisher_full_loss(out[0], target[0], g)

        penalty = self.annealing.over(roundings, self.iterations)
        sampler = without_replacement(inputs.count, min(self.batch, inputs.count), unit.generator("rounding"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an expert no sample reached keeps nearest rounding
            minimise(
                with_penalty(loss, penalty),
                [rounding.alpha for rounding in roundings],
                iterations=self.iterations,
                lr=self.lr,
                sampler=sampler,
                callbacks=[report_part(unit, self.iterations)],
            )


@dataclass(frozen=True)
class LearnSteps(Step):
    """Tune the step sizes of a unit's static activation quantizers, weights final (BRECQ's second stage).

    `stream`: "float" feeds the unit the float prefix, as BRECQ's released code does; "quantized" what really arrives.
    No scale falls below `floor` times where it started (our choice; the released code has no bound).
    """

    iterations: int = 5_000
    batch: int = 32
    lr: float = 4e-4
    p: float = 2.4
    stream: Literal["float", "quantized"] = "float"
    floor: float = 0.1

    part: ClassVar[str] = "tuning"
    stage: ClassVar[int] = 50
    new_sweep: ClassVar[bool] = True

    @property
    def streams(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"float", self.stream})

    def apply(self, unit: UnitContext) -> None:
        learned: list[Quantizer] = []
        for site in unit.activations():
            quantizer = unit.quantizer(site)
            if quantizer is None or quantizer.spec.dynamic:
                continue
            if not isinstance(quantizer.spec.format, Uniform):
                unit.note(f"{site.name}: the {quantizer.spec.format.kind} grid keeps its calibrated parameters")
                continue
            learned.append(quantizer)
        if not learned:
            return
        inputs, targets = unit.inputs(self.stream), unit.targets()
        parameters = [parameter for quantizer in learned for parameter in quantizer.learn(("scale",))]
        # Adam's first steps are as long as the learning rate, whatever the size of a scale: small scales must not
        # cross zero.
        floors = [parameter.detach() * self.floor for parameter in parameters]

        def stay_positive(step: int, loss: Tensor) -> None:
            with torch.no_grad():
                for parameter, floor in zip(parameters, floors, strict=True):
                    torch.maximum(parameter, floor, out=parameter.data)

        after, axes = _ending(unit)

        def loss(step: int, index: Tensor) -> Tensor:
            args, kwargs = inputs.rows(index)
            out = [after(t) for t in tensors(unit.forward(args, kwargs)) if t.is_floating_point()]
            target = [after(t) for t in tensors(targets.rows(index)) if t.is_floating_point()]
            terms = [
                power_loss(a, b, channel_axis=axis, p=self.p) for a, b, axis in zip(out, target, axes, strict=True)
            ]
            return torch.stack(terms).sum()

        sampler = without_replacement(inputs.count, min(self.batch, inputs.count), unit.generator("steps"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                minimise(
                    loss,
                    [Group(parameters, lr=self.lr, schedule="cosine")],
                    iterations=self.iterations,
                    sampler=sampler,
                    callbacks=[stay_positive, report_part(unit, self.iterations)],
                )
        except FewbitsError as error:
            if "does not depend" not in str(error):
                raise
            # The unit's quantizers sit after its output (glue of the model): nothing inside to tune.
        finally:
            for quantizer in learned:
                quantizer.freeze_learned()


def _by_sample(x: Tensor, count: int) -> Tensor:
    """(samples, rows per sample, ...) of a tensor whose first axis is a multiple of the samples."""
    if x.shape[0] % count:
        raise FewbitsError(f"a tensor of {x.shape[0]} rows cannot be divided among {count} samples")
    return x.unflatten(0, (count, x.shape[0] // count))


def _ending(unit: UnitContext) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """What follows the unit's output before it is compared, and the channel axis of each output tensor."""
    notes = [note for note in unit.graph.module_io if note.path == unit.name]
    outputs = [v for v in notes[0].outputs if unit.graph.values[v].dtype.is_floating_point] if notes else []
    axes = [channel_axis(unit.graph, value) for value in outputs]
    after: Callable[[Tensor], Tensor] = lambda y: y  # noqa: E731
    layers = [unit.graph.calls[site.call] for site in unit.weights()]
    if len(layers) == 1 and outputs and layers[0].outputs[0] == outputs[0]:
        after = tail(unit.model, unit.graph, layers[0])
    return after, axes
