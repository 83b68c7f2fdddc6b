"""The one optimisation loop behind every reconstruction method.

What is learned, what is mixed into inputs and what is compared is all in the loss function; the loop draws samples,
steps Adam and keeps the history. It never waits for the device inside.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError

LossFunction = Callable[[int, Tensor], Tensor]
Callback = Callable[[int, Tensor], bool | None]
Decay = Literal["cosine"] | Callable[[float], float] | None


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


def minimise(
    loss_fn: LossFunction,
    parameters: Iterable[nn.Parameter] | Sequence[Group],
    *,
    iterations: int,
    sampler: Iterable[Tensor],
    lr: float = 1e-3,
    schedule: Decay = None,
    callbacks: Sequence[Callback] = (),
) -> Tensor:
    """Adam on `parameters` for `iterations` steps; returns the loss of every step, float32 [steps done], on their
    device.

    loss_fn: (step from 0, sample indices) -> scalar. parameters: parameters (with `lr`, `schedule`) or `Group`s, each
    with its own.
    sampler: index tensors, one per step: a given sequence, or an iterator of `fewbits.reconstruction.sampling`.
    callbacks: called after each step with (step, detached loss); one that returns True ends the run. They must not read
    the loss every step, or the device stalls.

    Gradients are taken of the given parameters only: no `.grad` of anything else in the model is touched, theirs are
    None afterwards. Same parameters, loss and sampler: same bits (the loop draws no random number itself).
    Raises FewbitsError where there is nothing to optimise, the sampler ends early, the loss reaches none of the
    parameters, or the loss became NaN or infinite (checked once, at the end).
    """
    groups = _groups(parameters, lr, schedule)
    flat = [parameter for group in groups for parameter in group.parameters]
    if not flat or iterations < 1:
        raise FewbitsError(f"minimise: {len(flat)} parameters, {iterations} iterations; need at least one of each")
    optimiser = torch.optim.Adam([{"params": list(g.parameters), "lr": g.lr, "betas": g.betas} for g in groups])
    history = torch.zeros(iterations, device=flat[0].device)
    reached: set[int] = set()
    done = 0
    with torch.inference_mode(False), torch.enable_grad():
        for step, index in enumerate(islice(sampler, iterations)):
            for group, settings in zip(groups, optimiser.param_groups, strict=True):
                settings["lr"] = group.lr_at(step / iterations)
            loss = loss_fn(step, index)
            gradients = _gradients(loss, flat)
            for place, (parameter, gradient) in enumerate(zip(flat, gradients, strict=True)):
                parameter.grad = gradient
                if gradient is not None:
                    reached.add(place)
            optimiser.step()
            loss = loss.detach()
            history[step] = loss
            done = step + 1
            answers = [callback(step, loss) for callback in callbacks]  # all of them run, whichever says stop
            if any(answers):
                break
        else:
            if done < iterations:
                raise FewbitsError(
                    f"minimise: the sampler ended after {done} of {iterations} steps; give one batch per step"
                )
    optimiser.zero_grad(set_to_none=True)
    history = history[:done]
    finite = history.isfinite()
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise FewbitsError(
            f"minimise: the loss became NaN or infinite at step {step}; lower the learning rate or check the input"
        )
    if len(reached) < len(flat):
        # legitimate for an expert that no calibration sample is routed to, worth knowing in any case
        warnings.warn(
            f"minimise: {len(flat) - len(reached)} of {len(flat)} parameters never took part in the loss", stacklevel=2
        )
    return history


def _groups(parameters: Iterable[nn.Parameter] | Sequence[Group], lr: float, schedule: Decay) -> list[Group]:
    given = list(parameters)
    groups = [entry for entry in given if isinstance(entry, Group)]
    loose = [entry for entry in given if isinstance(entry, nn.Parameter)]
    if groups and loose:
        raise FewbitsError("minimise: give either parameters or groups, not both")
    return groups if groups else [Group(loose, lr, schedule)] if loose else []


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        raise FewbitsError("minimise: the loss does not depend on any of the parameters to optimise")
    return torch.autograd.grad(loss, parameters, allow_unused=True)
