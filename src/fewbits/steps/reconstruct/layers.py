"""AdaRound's reconstruction: layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.engine.layers import channel_axis, layer_with_activation
from fewbits.engine.statistics import Values
from fewbits.errors import FewbitsError
from fewbits.graph.types import Site
from fewbits.recipe import Step
from fewbits.reconstruction.losses import power_loss
from fewbits.reconstruction.sampling import without_replacement
from fewbits.reconstruction.steps import Group
from fewbits.steps.nearest import round_nearest
from fewbits.steps.reconstruct.arithmetic import Arithmetic, check, gradient_scale, narrowed_tensors, running
from fewbits.steps.reconstruct.comparison import home, optimise
from fewbits.steps.reconstruct.device import innermost
from fewbits.steps.reconstruct.norms import cheap_norms
from fewbits.steps.reconstruct.weights import Annealing, start_rounding, with_penalty

EVERYTHING = 1 << 62


@dataclass(frozen=True)
class ReconstructLayers(Step):
    """AdaRound: layer by layer in forward order, float target past the activation, input from the quantized prefix.

    `arithmetic`: what a layer runs in while it is learned (`reconstruct.arithmetic`).
    """

    iterations: int = 10_000
    batch: int = 32
    lr: float = 1e-3
    annealing: Annealing = field(default_factory=lambda: Annealing(schedule="cosine", first_count=0))
    arithmetic: Arithmetic = "float32"

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40
    streams: ClassVar[frozenset[str]] = frozenset({"float", "prefix"})
    activations: ClassVar[bool] = False
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.arithmetic)

    def apply(self, unit: UnitContext) -> None:
        sites = unit.weights()
        layers = [site for site in sites if unit.graph.calls[site.call].op != "embedding"]
        # Targets come from the float model: its inputs are taken before the first weight of the unit is replaced.
        float_inputs = {unit.input_of(site).name: Values(EVERYTHING) for site in layers}
        unit.gather({name: [values] for name, values in float_inputs.items()}, "float", quantized=False)
        for number, site in enumerate(sites):
            if site not in layers:
                round_nearest(unit, site)
                continue
            with unit.float_activations():
                self._layer(unit, site, float_inputs[unit.input_of(site).name], number, len(sites))

    def _layer(self, unit: UnitContext, site: Site, float_in: Values, number: int, of: int) -> None:
        quantized_in = Values(EVERYTHING)
        unit.gather({unit.input_of(site).name: [quantized_in]})
        started = start_rounding(unit, site)
        if started is None:
            return
        layer = layer_with_activation(unit.model, unit.graph, site)
        count = sum(unit.run.sizes)
        x_float, x = (_by_sample(_laid_out(unit, site, seen.value()), count) for seen in (float_in, quantized_in))
        weight = unit.weight(site)
        with torch.no_grad():
            y = torch.cat(
                [_by_sample(layer(part.flatten(0, 1), weight), len(part)) for part in x_float.split(self.batch)]
            )
        del x_float
        axis = channel_axis(unit.graph, unit.graph.calls[site.call].outputs[0])
        batch = min(self.batch, count)
        positions = batch * y[0].numel() // y.flatten(0, 1).shape[axis]
        arithmetic, (x, y) = narrowed_tensors(unit, self.arithmetic, x, y)

        def loss(index: Tensor) -> Tensor:
            with running(arithmetic, unit.device):
                output = layer(x[index].flatten(0, 1), started.rounding())
            return power_loss(output, y[index].flatten(0, 1), channel_axis=axis)

        with cheap_norms(unit):
            optimise(
                unit,
                with_penalty(loss, self.annealing.over([started], self.iterations), home(x, y)),
                [Group([started.rounding.alpha], self.lr)],
                iterations=self.iterations,
                sampler=without_replacement(count, batch, unit.generator(site.name)),
                scale=gradient_scale(arithmetic, positions),
                done=number,
                of=of,
            )
        unit.quantize_weight(site, started.rounding.codes(), started.quantizer.params)


def _laid_out(unit: UnitContext, site: Site, x: Tensor) -> Tensor:
    """A layer's input as its device reads it best."""
    return innermost(x) if x.is_cuda and unit.graph.calls[site.call].op == "conv2d" else x


def _by_sample(x: Tensor, count: int) -> Tensor:
    """(samples, rows per sample, ...) of a tensor whose first axis is a multiple of the samples."""
    if x.shape[0] % count:
        raise FewbitsError(f"a tensor of {x.shape[0]} rows cannot be divided among {count} samples")
    return x.unflatten(0, (count, x.shape[0] // count))
