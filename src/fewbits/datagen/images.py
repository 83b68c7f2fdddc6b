"""The one loop that optimises images: any source of images, any objectives, Adam."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from fewbits.datagen.matching import Objective
from fewbits.reconstruction.loop import Callback, Decay, Group, minimise

#: Images (N, channels, ...) -> what the network did with them: place -> the tensors seen there.
Look = Callable[[Tensor], Mapping[str, Sequence[Tensor]]]


class Pixels(nn.Module):
    """Images that are optimised themselves. Other sources (a generator and its latents) are modules of this form."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.images = nn.Parameter(start.detach().float().clone())

    def forward(self) -> Tensor:
        return self.images


class Plateau:
    """A learning rate that drops to a tenth after `patience` steps without a lower loss, down to `minimum`.

    Used as the schedule of the loop and as one of its callbacks. It reads the loss at every step.
    """

    def __init__(self, lr: float, *, patience: int = 100, minimum: float = 1e-4) -> None:
        self.lr = lr
        self._rate = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        self._watch = torch.optim.lr_scheduler.ReduceLROnPlateau(self._rate, patience=patience, min_lr=minimum)

    def __call__(self, progress: float) -> float:
        """The factor on the learning rate now."""
        return float(self._rate.param_groups[0]["lr"]) / self.lr

    def seen(self, step: int, loss: Tensor) -> None:
        self._watch.step(float(loss))


def integer_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """ZeroQ's start, float32: whole numbers from 0 to 254 less 127.5, over 5418.75 = 127.5^2 / 3; nearly zero.

    The divisor is the variance where the standard deviation was meant; the start is kept as released.
    """
    return (torch.randint(0, 255, tuple(shape), generator=generator).float() - 127.5) / 5418.75


def optimise_images(
    source: nn.Module,
    look: Look,
    objectives: Sequence[Objective],
    *,
    iterations: int,
    lr: float,
    schedule: Decay | Plateau = None,
    betas: tuple[float, float] = (0.9, 0.999),
    augment: Callable[[int, Tensor], Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Tensor, Tensor]:
    """Adam on what `source` makes its images of; returns (images detached, loss before every step).

    source: a module whose call without arguments gives the images. look: runs the network on images and returns what
    was seen inside; gradients flow through it. objectives: summed. augment: changes the images before the network and
    the objectives see them. Nothing is clamped; a callback may change the source's parameters after a step.
    Same source, network and objectives: same bits. Raises FewbitsError where the loss becomes NaN or infinite.
    """

    def loss(step: int, index: Tensor) -> Tensor:
        images = source()
        if augment is not None:
            images = augment(step, images)
        # a copy: a network may work in place on what it is given
        seen = look(images.clone())
        return torch.stack([objective(step, images, seen) for objective in objectives]).sum()

    if isinstance(schedule, Plateau):
        callbacks = (*callbacks, schedule.seen)
    history = minimise(
        loss,
        [Group(list(source.parameters()), lr, schedule, betas)],
        iterations=iterations,
        sampler=repeat(torch.empty(0, dtype=torch.int64)),
        callbacks=callbacks,
    )
    with torch.no_grad():
        return source().detach().clone(), history
