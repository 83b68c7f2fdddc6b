"""BRECQ's second stage: step sizes of activation quantizers behind final weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.errors import FewbitsError
from fewbits.formats import ChannelBits, Uniform
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.recipe import Step
from fewbits.reconstruction.sampling import without_replacement
from fewbits.reconstruction.steps import Group, Number, Steady
from fewbits.steps.reconstruct.arithmetic import Arithmetic, check, gradient_scale, narrowed, running
from fewbits.steps.reconstruct.comparison import Comparison, home, optimise
from fewbits.steps.reconstruct.device import gathered, rows
from fewbits.steps.reconstruct.norms import cheap_norms


def learnable(unit: UnitContext, sites: Sequence[Site]) -> list[Quantizer]:
    """The static quantizers at activation sites whose step can be learned; others on a grid of their own are noted."""
    found: list[Quantizer] = []
    for site in sites:
        quantizer = unit.quantizer(site)
        if quantizer is None or quantizer.spec.dynamic:
            continue
        if isinstance(quantizer.spec.format, (Uniform, ChannelBits)):
            found.append(quantizer)
        else:
            unit.note(f"{site.name}: the {quantizer.spec.format.kind} grid keeps its calibrated parameters")
    return found


@dataclass(frozen=True)
class LearnSteps(Step):
    """Tune the step sizes of a unit's static activation quantizers, weights final (BRECQ's second stage).

    `stream`: "float" feeds the unit the float prefix, as BRECQ's released code does; "quantized" what really arrives.
    No scale falls below `floor` times where it started (our choice; the released code has no bound). `arithmetic`: what
    the unit runs in meanwhile (`reconstruct.arithmetic`); quantizers work in float32 on what it gives them.
    """

    iterations: int = 5_000
    batch: int = 32
    lr: float = 4e-4
    p: float = 2.4
    stream: Literal["float", "quantized"] = "float"
    floor: float = 0.1
    arithmetic: Arithmetic = "float32"

    part: ClassVar[str] = "tuning"
    stage: ClassVar[int] = 50
    new_sweep: ClassVar[bool] = True
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.arithmetic)

    @property
    def streams(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"float", self.stream})

    def apply(self, unit: UnitContext) -> None:
        learned = learnable(unit, unit.activations())
        if not learned:
            return
        inputs, targets = gathered(unit, self.stream)
        parameters = [parameter for quantizer in learned for parameter in quantizer.learn(("scale",))]
        # Adam's first steps are as long as the learning rate, whatever the size of a scale: small scales must not
        # cross zero.
        floors = [parameter.detach() * self.floor for parameter in parameters]

        def stay_positive(step: int, loss: Tensor) -> None:
            with torch.no_grad():
                for parameter, floor in zip(parameters, floors, strict=True):
                    torch.maximum(parameter, floor, out=parameter.data)

        comparison = Comparison(unit)
        batch = min(self.batch, inputs.count)
        positions = comparison.positions(unit, targets, batch)
        arithmetic = narrowed(unit, self.arithmetic, inputs, targets)

        def loss(index: Tensor, number: Number) -> Tensor:
            args, kwargs = rows(unit, inputs, index)
            with running(arithmetic, unit.device):
                output = comparison.values(unit.forward(args, kwargs))
                target = comparison.values(rows(unit, targets, index))
            return comparison.error(output, target, self.p)

        try:
            with cheap_norms(unit):
                optimise(
                    unit,
                    Steady(loss, samples=home(inputs, targets)),
                    [Group(parameters, lr=self.lr, schedule="cosine")],
                    iterations=self.iterations,
                    sampler=without_replacement(inputs.count, batch, unit.generator("steps")),
                    callbacks=[stay_positive],
                    scale=gradient_scale(arithmetic, positions),
                )
        except FewbitsError as error:
            if "does not depend" not in str(error):
                raise
            # The unit's quantizers sit after its output (glue of the model): nothing inside to tune.
        finally:
            for quantizer in learned:
                quantizer.freeze_learned()
