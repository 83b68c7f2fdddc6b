"""How a unit's output is compared with the float unit's, and the loop that makes them agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.engine.layers import channel_axis, tail
from fewbits.engine.tree import Samples, Tree, tensors
from fewbits.graph.positions import following_activation
from fewbits.graph.types import Site
from fewbits.reconstruction.loop import Callback, minimise
from fewbits.reconstruction.losses import power_loss
from fewbits.reconstruction.steps import Group, Steady
from fewbits.steps.reconstruct.arithmetic import magnified
from fewbits.steps.reconstruct.device import rows


class Comparison:
    """A unit's floating-point output tensors. A unit of one layer is compared past the activation that follows it.

    axes: the channel axis of each output. behind: the activation site past which a unit of one layer is compared, where
    the scheme quantizes it and it belongs to no unit.
    """

    def __init__(self, unit: UnitContext) -> None:
        graph = unit.graph
        notes = [note for note in graph.module_io if note.path == unit.name]
        outputs = [v for v in notes[0].outputs if graph.values[v].dtype.is_floating_point] if notes else []
        self.axes = [channel_axis(graph, value) for value in outputs]
        self.after: Callable[[Tensor], Tensor] = lambda y: y
        self.behind: Site | None = None
        layers = [graph.calls[site.call] for site in unit.weights()]
        if len(layers) == 1 and outputs and layers[0].outputs[0] == outputs[0]:
            self.after = tail(unit.model, graph, layers[0])
            chain = following_activation(graph, layers[0])
            self.behind = next((site for site in unit.sites_behind() if chain and site.call == chain[-1].index), None)

    def values(self, tree: Tree, past: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """The tensors to compare; `past` is applied to each."""
        found = [self.after(t) for t in tensors(tree) if t.is_floating_point()]
        return found if past is None else [past(t) for t in found]

    @torch.no_grad()
    def positions(self, unit: UnitContext, targets: Samples, batch: int) -> int:
        """Positions of a batch's largest output: what a loss averages over."""
        values = self.values(rows(unit, targets, torch.zeros(1, dtype=torch.int64)))
        found = [value.numel() // value.shape[axis] for value, axis in zip(values, self.axes, strict=True)]
        return batch * max(found, default=1)

    def error(self, output: Sequence[Tensor], target: Sequence[Tensor], p: float = 2.0) -> Tensor:
        """Sum over the output tensors of `power_loss`."""
        terms = [power_loss(a, b, channel_axis=axis, p=p) for a, b, axis in zip(output, target, self.axes, strict=True)]
        return torch.stack(terms).sum()


def optimise(
    unit: UnitContext,
    loss: Steady,
    groups: Sequence[Group],
    *,
    iterations: int,
    sampler: Iterable[Tensor],
    callbacks: Sequence[Callback] = (),
    scale: float = 1.0,
    done: int = 0,
    of: int = 1,
) -> Tensor:
    """`minimise`, with the progress bar moved every few steps: this is the `done`-th of `of` runs for the unit.

    scale: of the gradients inside the unit (`arithmetic.gradient_scale`). A note says where steps on a GPU could not be
    recorded.
    """

    def report(step: int, loss: Tensor) -> None:
        if step % 50 == 0:
            unit.run.progress.part((done + step / iterations) / of)

    with warnings.catch_warnings(), magnified(loss, groups, scale) as scaled:
        warnings.simplefilter("ignore", UserWarning)  # an expert that no sample reached stays as it is
        return minimise(
            scaled,
            groups,
            iterations=iterations,
            sampler=sampler,
            callbacks=[*callbacks, report],
            note=lambda reason: unit.note(f"{unit.name}: {reason}"),
        )


def home(*data: Samples | Tensor | None) -> torch.device:
    """Where data lies that is indexed by sample: its device, or the CPU where it lies on several."""
    leaves = [leaf for part in data for leaf in (part.leaves if isinstance(part, Samples) else [part])]
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")
