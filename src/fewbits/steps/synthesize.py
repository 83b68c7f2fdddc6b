"""Calibration data out of the model's own batch norms, where none was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewbits.datagen import (
    InputMatching,
    Objective,
    Pixels,
    Plateau,
    StatisticsMatching,
    integer_noise,
    optimise_images,
    stored_statistics,
)
from fewbits.datagen.matching import Per
from fewbits.engine.context import ModelContext
from fewbits.engine.tree import Batch, as_call
from fewbits.errors import FewbitsError
from fewbits.graph import operands
from fewbits.recipe import Step

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class MatchBatchNorms(Step):
    """Images whose features have the means and standard deviations that the batch norms remember (ZeroQ section 3.1).

    `images` of the shape of the model's example input, `at_once` optimised together, Adam with `lr` falling on a
    plateau. `per`: every image matches by itself ("sample") or all of them together ("batch"). Features are taken at
    the inputs of the batch-norm calls of the recorded forward. Does nothing where calibration data was given or no step
    reads any. Raises `FewbitsError` for a model without batch norms or with an input that is not one tensor.
    """

    images: int = 32
    iterations: int = 500
    lr: float = 0.5
    patience: int = 100
    per: Per = "sample"
    at_once: int = 32

    part: ClassVar[str] = "datagen"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = -10
    makes_data: ClassVar[bool] = True
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.images, self.iterations, self.at_once) < 1 or not self.lr > 0:
            raise FewbitsError(
                f"synthetic images: images={self.images}, iterations={self.iterations}, at_once={self.at_once} and "
                f"lr={self.lr} must be positive"
            )

    def apply(self, unit: ModelContext) -> None:
        if unit.run.batches:
            unit.note("calibration data was given: no images were synthesized")
            return
        if not any(step.streams for step in unit.recipe.steps):
            return
        targets = batch_norm_statistics(unit)
        template = _Template(unit.run.example)
        kept = unit.remembered("synthetic-images", lambda: self._make(unit, targets, template))
        for first, last in kept["loss"].tolist():
            unit.note(f"synthesized images: matching loss {first:.4g} at the start, {last:.4g} at the end")
        size = unit.recipe.calibration.batch_size
        unit.set_batches([template.batch(images) for images in kept["images"].split(size)])

    def _make(
        self, unit: ModelContext, targets: dict[str, tuple[Tensor, Tensor]], template: _Template
    ) -> dict[str, Tensor]:
        unit.run.progress.working("synthesizing images")
        objectives: list[Objective] = [StatisticsMatching(targets, self.per), InputMatching(per=self.per)]
        generator = unit.generator("synthetic images")
        made, losses = [], []
        sizes = [len(part) for part in torch.arange(self.images).split(self.at_once)]
        for number, size in enumerate(sizes):
            start = integer_noise((size, *template.shape), generator).to(unit.device)

            def report(step: int, loss: Tensor, number: int = number) -> None:
                unit.run.progress.part((number + (step + 1) / self.iterations) / len(sizes))

            images, history = optimise_images(
                Pixels(start),
                lambda x: look(unit, template.batch(x), list(targets)),
                objectives,
                iterations=self.iterations,
                lr=self.lr,
                schedule=Plateau(self.lr, patience=self.patience),
                callbacks=[report],
            )
            made.append(images.to("cpu", template.dtype))
            losses.append(history[[0, -1]].cpu())
        return {"images": torch.cat(made), "loss": torch.stack(losses)}


def look(unit: ModelContext, batch: Batch, places: Sequence[str]) -> Mapping[str, Sequence[Tensor]]:
    """Run the float model on a batch, with gradients to it; the tensors at the named sites, one per use."""
    seen: dict[str, list[Tensor]] = {name: [] for name in places}
    with unit.attachment.disabled(), unit.attachment.observing({name: [seen[name].append] for name in places}):
        args, kwargs = as_call(batch)
        unit.model(*args, **kwargs)
    return seen


def batch_norm_statistics(unit: ModelContext) -> dict[str, tuple[Tensor, Tensor]]:
    """Input site of every batch norm that normalises with stored statistics -> (mean, standard deviation).

    Raises `FewbitsError` where there is none. One that stores nothing, or that was folded, is noted.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for call in unit.graph.calls:
        if call.op != "batch_norm" or call.key is None:
            continue
        names = [unit.graph.stored_in(call, slot) for slot in _STATISTICS]
        site = next((s for s in unit.graph.sites.values() if s.key == call.key and s.role == "input"), None)
        training = call.kwargs.get("training", call.args[5] if len(call.args) > 5 else False)
        if site is None or None in names or training:
            unit.note(f"{call.module or 'the model'}: this batch norm remembers no statistics and is not matched")
            continue
        mean, var = (operands.parameter(unit.model, name).to(unit.device) for name in names if name is not None)
        found[site.name] = stored_statistics(mean, var)
    if not found:
        raise FewbitsError(
            f"{unit.recipe.name}: this model has no batch norm whose statistics images could be made from (norms of "
            "another kind remember none, and folded ones have lost them); give calibration data (--calib)"
        )
    return found


class _Template:
    """The model's example input with its one image tensor taken out."""

    def __init__(self, example: Any) -> None:
        self.leaves, self.spec = pytree.tree_flatten(example)
        places = [place for place, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        if len(places) != 1 or not self.leaves[places[0]].is_floating_point() or self.leaves[places[0]].dim() < 2:
            shapes = [f"{tuple(self.leaves[place].shape)} {self.leaves[place].dtype}" for place in places]
            raise FewbitsError(
                "images can be synthesized for a model whose only input tensor is a batch of images; "
                f"this one takes {', '.join(shapes) or 'none'}: give calibration data (--calib)"
            )
        self.place = places[0]
        self.shape = tuple(self.leaves[self.place].shape[1:])
        self.dtype = self.leaves[self.place].dtype

    def batch(self, images: Tensor) -> Batch:
        leaves = list(self.leaves)
        leaves[self.place] = images.to(self.dtype)
        return pytree.tree_unflatten(leaves, self.spec)
