"""Optimisation steps taken one by one, and how a loss says what changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError

#: (step from 0, sample indices) -> scalar.
LossFunction = Callable[[int, Tensor], Tensor]
Decay = Literal["cosine"] | Callable[[float], float] | None
#: What a steady loss is given beside the sample indices: see there.
Number = float | Tensor | None


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    lr: Adam's. schedule: None keeps it, "cosine" lets it fall to 0 over the run (closed form), a function maps progress
    in [0, 1) to a factor on lr. betas: Adam's moments.
    """

    parameters: Sequence[nn.Parameter]
    lr: float = 1e-3
    schedule: Decay = None
    betas: tuple[float, float] = (0.9, 0.999)

    def lr_at(self, progress: float) -> float:
        if self.schedule is None:
            return self.lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * self.schedule(progress)


@dataclass(frozen=True)
class Steady:
    """A loss that does the same device work at every step: what changes is which samples it takes, and one number.

    function: (sample indices, number) -> scalar. The number is a float where the parameters lie on a CPU and a float32
    tensor without axes, on their device, where they lie on a GPU. It is None at steps that have none.
    course: the number of every step, None for a step without one (its work may differ from the other steps'); an empty
    course gives none to any step.
    generators: those on a GPU that the function draws random numbers from.
    samples: the device of the data that is indexed; the indices are given there. None: that of the parameters.

    The function may keep no state in Python from one call to the next: where its work is recorded it is not called at
    every step.
    """

    function: Callable[[Tensor, Number], Tensor]
    course: Sequence[float | None] = ()
    generators: Sequence[torch.Generator] = ()
    samples: torch.device | None = None

    def at(self, step: int) -> float | None:
        """The number of a step."""
        return self.course[step] if len(self.course) else None

    def __call__(self, step: int, index: Tensor) -> Tensor:
        return self.function(index, self.at(step))


class Optimiser(Protocol):
    """What steps need of an optimiser: `params` and `lr` of every group, and torch's two calls."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


class Steps:
    """Adam steps, one by one.

    optimiser, history (float32 [iterations], zero for steps not taken), reached: numbers of the parameters that any
    loss so far depended on.
    """

    def __init__(self, loss_fn: LossFunction, groups: Sequence[Group], iterations: int) -> None:
        self.loss_fn = loss_fn
        self.groups = groups
        self.iterations = iterations
        self.flat = [parameter for group in groups for parameter in group.parameters]
        self.optimiser = self._adam([{"params": list(g.parameters), "lr": g.lr, "betas": g.betas} for g in groups])
        self.history = torch.zeros(iterations, device=self.flat[0].device)
        self.reached: set[int] = set()

    def indices(self, sampler: Iterable[Tensor]) -> Iterator[Tensor]:
        """The sample indices of the steps."""
        return islice(sampler, self.iterations)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around all steps of a run."""
        yield

    def take(self, step: int, index: Tensor) -> Tensor:
        """One step; returns its loss, detached."""
        for group, settings in zip(self.groups, self.optimiser.param_groups, strict=True):
            settings["lr"] = group.lr_at(step / self.iterations)
        loss = self._descend(self.loss_fn(step, index))
        self.history[step] = loss
        return loss

    def _adam(self, groups: list[dict[str, Any]]) -> Optimiser:
        return torch.optim.Adam(groups)

    def _descend(self, loss: Tensor) -> Tensor:
        for place, (parameter, gradient) in enumerate(zip(self.flat, _gradients(loss, self.flat), strict=True)):
            parameter.grad = gradient
            if gradient is not None:
                self.reached.add(place)
        self.optimiser.step()
        return loss.detach()


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        raise FewbitsError("minimise: the loss does not depend on any of the parameters to optimise")
    return torch.autograd.grad(loss, parameters, allow_unused=True)
