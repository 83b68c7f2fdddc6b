"""The one optimisation loop behind every reconstruction method.

What is learned, what is mixed into inputs and what is compared is all in the loss function; the loop draws samples,
steps Adam and keeps the history. It never waits for the device inside. On a GPU the steps of a `Steady` loss are
recorded once and replayed (`fewbits.reconstruction.recorded`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.reconstruction.recorded import RecordedSteps
from fewbits.reconstruction.steps import Decay, Group, LossFunction, Steady, Steps

Callback = Callable[[int, Tensor], bool | None]

__all__ = ["Callback", "Decay", "Group", "LossFunction", "Steady", "minimise"]


def minimise(
    loss_fn: LossFunction | Steady,
    parameters: Iterable[nn.Parameter] | Sequence[Group],
    *,
    iterations: int,
    sampler: Iterable[Tensor],
    lr: float = 1e-3,
    schedule: Decay = None,
    callbacks: Sequence[Callback] = (),
    note: Callable[[str], None] = lambda reason: None,
) -> Tensor:
    """Adam on `parameters` for `iterations` steps; returns the loss of every step, float32 [steps done], on their
    device.

    loss_fn: (step from 0, sample indices) -> scalar, or a `Steady` loss, whose steps are recorded and replayed where
    the parameters lie on a GPU; the values are the same to the bit as without. parameters: parameters (with `lr`,
    `schedule`) or `Group`s, each with its own.
    sampler: index tensors, one per step: a given sequence, or an iterator of `fewbits.reconstruction.sampling`. It may
    be drawn from ahead of the steps.
    callbacks: called after each step with (step, detached loss); one that returns True ends the run. They must not read
    the loss every step, or the device stalls.
    note: told, in words, why the steps of a `Steady` loss on a GPU run one by one after all.

    Gradients are taken of the given parameters only: no `.grad` of anything else in the model is touched, theirs are
    None afterwards. Same parameters, loss and sampler: same bits (the loop draws no random number itself).
    Raises FewbitsError where there is nothing to optimise, the sampler ends early, the loss reaches none of the
    parameters, or the loss became NaN or infinite (checked once, at the end).
    """
    groups = _groups(parameters, lr, schedule)
    flat = [parameter for group in groups for parameter in group.parameters]
    if not flat or iterations < 1:
        raise FewbitsError(f"minimise: {len(flat)} parameters, {iterations} iterations; need at least one of each")
    done = 0
    with torch.inference_mode(False), torch.enable_grad():
        steps: Steps
        if isinstance(loss_fn, Steady) and flat[0].is_cuda:
            steps = RecordedSteps(loss_fn, groups, iterations, note)
        else:
            steps = Steps(loss_fn, groups, iterations)
        with steps.running():
            for step, index in enumerate(steps.indices(sampler)):
                loss = steps.take(step, index)
                done = step + 1
                answers = [callback(step, loss) for callback in callbacks]  # all of them run, whichever says stop
                if any(answers):
                    break
            else:
                if done < iterations:
                    raise FewbitsError(
                        f"minimise: the sampler ended after {done} of {iterations} steps; give one batch per step"
                    )
    steps.optimiser.zero_grad(set_to_none=True)
    history = steps.history[:done]
    finite = history.isfinite()
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise FewbitsError(
            f"minimise: the loss became NaN or infinite at step {step}; lower the learning rate or check the input"
        )
    if len(steps.reached) < len(flat):
        # legitimate for an expert that no calibration sample is routed to, worth knowing in any case
        warnings.warn(
            f"minimise: {len(flat) - len(steps.reached)} of {len(flat)} parameters never took part in the loss",
            stacklevel=2,
        )
    return history


def _groups(parameters: Iterable[nn.Parameter] | Sequence[Group], lr: float, schedule: Decay) -> list[Group]:
    given = list(parameters)
    groups = [entry for entry in given if isinstance(entry, Group)]
    loose = [entry for entry in given if isinstance(entry, nn.Parameter)]
    if groups and loose:
        raise FewbitsError("minimise: give either parameters or groups, not both")
    return groups if groups else [Group(loose, lr, schedule)] if loose else []
