"""What is known of a value's distribution without data, and what batch norms say of the values that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.graph import operands
from fewbits.graph.propagation import argument
from fewbits.graph.types import Call, Graph, Ref

#: Layers in a row without a norm that are guessed through: squeeze and excitation has two, a classifier up to three.
MOST_GUESSES = 3
#: Mean and standard deviation per channel, float64 [C], of a value that a norm made.
NormStatistics = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Moments:
    """A value's distribution over inputs, element by element: float64 tensors that broadcast to the value's shape.

    `low` and `high` are the ends between which its elements are taken to lie. `guesses`: how many layers without a norm
    lie between the value and the nearest norm before it; each took its inputs as independent.
    """

    mean: Tensor
    var: Tensor
    low: Tensor
    high: Tensor
    guesses: int = 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Moments:
        """The same function of all four."""
        fields = (self.mean, self.var, self.low, self.high)
        return Moments.of([compact(function(x)) for x in fields], self.guesses)

    @classmethod
    def of(cls, parts: Sequence[Tensor], guesses: int) -> Moments:
        """From mean, variance, low and high end, in this order."""
        mean, var, low, high = parts
        return cls(mean, var, low, high, guesses)


def normal(mean: Tensor, std: Tensor, sigmas: float, guesses: int = 0) -> Moments:
    """Normal elements, taken to lie within `sigmas` standard deviations."""
    mean, std = mean.double(), std.double().abs()
    return Moments(mean, std.square(), mean - sigmas * std, mean + sigmas * std, guesses)


def between(low: Tensor, high: Tensor) -> Moments:
    """Elements of which the ends are known: normalised (mean 0, variance 1) if zero lies inside, else uniform.

    Neighbours in an image are no independent inputs, so nothing is guessed from them.
    """
    inside = (low < 0) & (high > 0)
    mean = torch.where(inside, torch.zeros_like(low), (low + high) / 2)
    var = torch.where(inside, torch.ones_like(low), (high - low).square() / 12)
    return Moments(mean, var, low, high, MOST_GUESSES + 1)


def norm_statistics(graph: Graph, model: nn.Module) -> dict[int, NormStatistics]:
    """(beta, |gamma|) of every value that a batch or instance norm makes, from the model's parameters as they are."""
    found: dict[int, NormStatistics] = {}
    for call in graph.calls:
        if call.op not in ("batch_norm", "instance_norm"):
            continue
        running = call.bound.get("running_mean")
        if call.op == "batch_norm" and not isinstance(running, Ref):
            continue
        channels = graph.values[call.outputs[0]].shape[1]
        held = [stored(graph, model, call.bound.get(slot)) for slot in ("bias", "weight")]
        beta = torch.zeros(channels, dtype=torch.float64) if held[0] is None else held[0].double().cpu()
        gamma = torch.ones(channels, dtype=torch.float64) if held[1] is None else held[1].double().cpu()
        if beta.shape == gamma.shape == (channels,):
            found[call.outputs[0]] = (beta, gamma.abs())
    return found


class State:
    """What the rules of `rules_moments` work on: moments by value id so far."""

    def __init__(
        self,
        graph: Graph,
        model: nn.Module,
        norms: Mapping[int, NormStatistics],
        of: dict[int, Moments],
        sigmas: float,
    ) -> None:
        self.graph = graph
        self.model = model
        self.norms = norms
        self.of = of
        self.sigmas = sigmas

    def get(self, arg: Any) -> Moments | None:
        """Moments of an operand: of an activation, or of a number or parameter, which do not vary."""
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            held: Tensor | None = torch.tensor(float(arg), dtype=torch.float64)
        elif isinstance(arg, Ref):
            if arg.value in self.of:
                return self.of[arg.value]
            held = stored(self.graph, self.model, arg)
        else:
            return None
        if held is None or not held.is_floating_point():
            return None
        held = held.double().cpu()
        return Moments(held, torch.zeros_like(held), held, held)

    def put(self, call: Call, made: Moments | None, output: int = 0) -> None:
        if made is not None:
            self.of[call.outputs[output]] = made.map(lambda x: x)

    def shape(self, arg: Any) -> tuple[int, ...]:
        return self.graph.values[arg.value].shape

    def first(self, call: Call) -> Moments | None:
        """Moments of the first operand, if that is an activation of which they are known."""
        arg = argument(call, 0, "input", "self")
        return self.of.get(arg.value) if isinstance(arg, Ref) else None


def stored(graph: Graph, model: nn.Module, arg: Any) -> Tensor | None:
    """The parameter, buffer or constant behind an operand, laid out as the call reads it."""
    if not isinstance(arg, Ref):
        return None
    value = graph.values[arg.value]
    if value.param is not None:
        return graph.replay(arg.value, operands.parameter(model, value.param).detach())
    return value.data


def compact(x: Tensor) -> Tensor:
    """Equal values, with size 1 along every dimension in which they do not vary."""
    for dim in range(x.dim()):
        if x.shape[dim] > 1:
            first = x.narrow(dim, 0, 1)
            if x.stride(dim) == 0 or bool((x == first).all()):
                x = first
    return x.contiguous()
