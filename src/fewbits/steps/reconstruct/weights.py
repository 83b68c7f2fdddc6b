"""The weights of a unit while their rounding is learned: from the scheme's grid to committed codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbits.engine.context import UnitContext
from fewbits.formats import ChannelBits, Uniform
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.recipe import QSpec
from fewbits.reconstruction.steps import Number, Steady
from fewbits.rounding.adaround import LearnedRounding, RoundingRegulariser
from fewbits.steps.nearest import fitted, round_nearest


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
class LearnedWeight:
    """A weight site, its grid and its rounding variables."""

    site: Site
    quantizer: Quantizer
    rounding: LearnedRounding


@dataclass(frozen=True)
class Annealing:
    """Of the rounding regulariser: lambda, share of steps without it, exponent from and to, and its course."""

    weight: float = 0.01
    warm_start: float = 0.2
    start: float = 20.0
    end: float = 2.0
    schedule: Literal["linear", "cosine"] = "linear"
    first_count: int = 1

    def over(self, weights: Iterable[LearnedWeight], iterations: int) -> RoundingRegulariser:
        return RoundingRegulariser(
            [weight.rounding for weight in weights],
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


def start_rounding(unit: UnitContext, site: Site) -> LearnedWeight | None:
    """A learned rounding on the scheme's grid for a weight; None, and nearest rounding, where that is not uniform."""
    spec = unit.spec(site)
    assert spec is not None
    if not isinstance(spec.format, (Uniform, ChannelBits)):
        unit.note(f"{site.name}: {spec.format.kind} has no up and down to learn, rounded to nearest")
        round_nearest(unit, site)
        return None
    quantizer, weight = fitted(unit, site), unit.weight(site)
    rounding = LearnedRounding(weight, spec.format, quantizer.params, spec.granularity)
    return LearnedWeight(site, quantizer, rounding.to(unit.device))


def start_unit(unit: UnitContext, *, skip_first: bool = False) -> list[LearnedWeight]:
    """Learned roundings of all weights of a unit; lookup tables, and with `skip_first` the network's first layer, are
    rounded to nearest."""
    found = []
    for site in unit.weights():
        if unit.graph.calls[site.call].op == "embedding" or (skip_first and "first_layer" in site.tags):
            round_nearest(unit, site)
            continue
        started = start_rounding(unit, site)
        if started is not None:
            found.append(started)
    return found


def soften(unit: UnitContext, weights: Iterable[LearnedWeight]) -> None:
    """Let the unit run with the learned weights."""
    for weight in weights:
        stand_in = SoftWeight(weight.quantizer.spec, weight.rounding)
        unit.attachment.set_quantizer(weight.site.name, stand_in)  # type: ignore[arg-type]


def commit(unit: UnitContext, weights: Iterable[LearnedWeight]) -> None:
    """Take every variable to the side it is on."""
    for weight in weights:
        unit.attachment.set_quantizer(weight.site.name, None)
        unit.quantize_weight(weight.site, weight.rounding.codes(), weight.quantizer.params)


def with_penalty(
    loss: Callable[[Tensor], Tensor],
    penalty: RoundingRegulariser,
    samples: torch.device,
    generators: Sequence[torch.Generator] = (),
) -> Steady:
    """A data loss of sample indices, given on the device `samples`, plus the regulariser of the step.

    generators: those on a GPU that the loss draws from.
    """

    def total(index: Tensor, exponent: Number) -> Tensor:
        extra = penalty.at(exponent)
        data = loss(index)
        return data if extra is None else data + extra

    return Steady(total, penalty.course(), generators, samples)
