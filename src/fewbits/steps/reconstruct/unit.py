"""BRECQ's reconstruction: all weights of a unit together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.recipe import Step
from fewbits.reconstruction.fisher import fisher_weight
from fewbits.reconstruction.losses import FULL_SCALE, fisher_diagonal_loss, fisher_full_loss
from fewbits.reconstruction.sampling import without_replacement
from fewbits.reconstruction.steps import Group
from fewbits.steps.reconstruct.arithmetic import Arithmetic, check, gradient_scale, narrowed, running
from fewbits.steps.reconstruct.comparison import Comparison, home, optimise
from fewbits.steps.reconstruct.device import gathered, rows
from fewbits.steps.reconstruct.norms import cheap_norms
from fewbits.steps.reconstruct.weights import Annealing, LearnedWeight, commit, soften, start_unit, with_penalty


@dataclass(frozen=True)
class ReconstructUnit(Step):
    """BRECQ: all weights of a unit together, against the float unit's output, inputs from the quantized prefix.

    `loss`: plain squared error, or weighted by the diagonal or the full (rank-one) Fisher information of the task loss
    at the unit's output; `fisher_damping` is added to the absolute gradients. A unit of one layer is compared past its
    activation. `arithmetic`: what the unit runs in while it is learned (`reconstruct.arithmetic`).
    """

    iterations: int = 20_000
    batch: int = 32
    lr: float = 1e-3
    loss: Literal["mse", "fisher_diag", "fisher_full"] = "mse"
    fisher_damping: float = 1.0
    skip_first: bool = True
    annealing: Annealing = field(default_factory=Annealing)
    arithmetic: Arithmetic = "float32"

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40
    streams: ClassVar[frozenset[str]] = frozenset({"float", "prefix"})
    activations: ClassVar[bool] = False
    gradients: ClassVar[bool] = True
    fits_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.arithmetic)

    @property
    def logits(self) -> bool:
        """Whether the float network's outputs are needed."""
        return self.loss != "mse"

    def apply(self, unit: UnitContext) -> None:
        weights = start_unit(unit, skip_first=self.skip_first)
        if not weights:
            return
        with unit.float_activations():
            self._learn(unit, weights)
        commit(unit, weights)

    def _learn(self, unit: UnitContext, weights: list[LearnedWeight]) -> None:
        inputs, targets = gathered(unit, None)
        comparison = Comparison(unit)
        batch = min(self.batch, inputs.count)
        positions = comparison.positions(unit, targets, batch)
        arithmetic = narrowed(unit, self.arithmetic, inputs, targets)
        gradient = None
        if self.loss != "mse" and unit.unit.uses > 1:
            unit.note(f"{unit.name} runs {unit.unit.uses} times in a forward: squared error there, no Fisher weights")
        elif self.loss != "mse":
            for weight in weights:
                unit.set_quantizer(weight.site, weight.quantizer)
            gradient = fisher_weight(unit.output_gradients(), damping=self.fisher_damping).to(home(inputs, targets))
        soften(unit, weights)

        def loss(index: Tensor) -> Tensor:
            args, kwargs = rows(unit, inputs, index)
            with running(arithmetic, unit.device):
                output = comparison.values(unit.forward(args, kwargs))
                target = comparison.values(rows(unit, targets, index))
            if gradient is None:
                return comparison.error(output, target)
            g = rows(unit, gradient, index)
            if self.loss == "fisher_diag":
                return fisher_diagonal_loss(output[0], target[0], g, channel_axis=comparison.axes[0])
            return fisher_full_loss(output[0], target[0], g)

        with cheap_norms(unit):
            optimise(
                unit,
                with_penalty(loss, self.annealing.over(weights, self.iterations), home(inputs, targets, gradient)),
                [Group([weight.rounding.alpha for weight in weights], self.lr)],
                iterations=self.iterations,
                sampler=without_replacement(inputs.count, batch, unit.generator("rounding")),
                scale=gradient_scale(arithmetic, positions, self._weight(gradient, positions / batch)),
            )

    def _weight(self, gradient: Tensor | None, positions: float) -> float:
        """About how many times larger the loss's gradient is than the squared error's. positions: of a sample."""
        if gradient is None:
            return 1.0
        squared = float(gradient.square().mean())
        return squared if self.loss == "fisher_diag" else FULL_SCALE * squared * positions
