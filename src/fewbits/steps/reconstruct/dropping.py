"""QDrop's reconstruction: weights and activation steps together, activation quantization dropped at random."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbits.engine.context import UnitContext
from fewbits.engine.tree import Tree
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.recipe import Step
from fewbits.reconstruction.dropping import Masks, RandomMasks, mixed
from fewbits.reconstruction.lsq import keep_positive, lsq_quantize
from fewbits.reconstruction.sampling import with_replacement
from fewbits.reconstruction.steps import Group
from fewbits.steps.reconstruct.arithmetic import Arithmetic, check, gradient_scale, narrowed, running
from fewbits.steps.reconstruct.comparison import Comparison, home, optimise
from fewbits.steps.reconstruct.device import gathered, rows
from fewbits.steps.reconstruct.norms import cheap_norms
from fewbits.steps.reconstruct.scales import learnable
from fewbits.steps.reconstruct.weights import Annealing, LearnedWeight, commit, soften, start_unit, with_penalty


class DroppedQuantizer(nn.Module):
    """Stands at an activation site while the unit is learned: quantizes the elements that a fresh mask keeps.

    Where the quantizer learns its scale, the scale's gradient is LSQ's.
    """

    def __init__(self, quantizer: Quantizer, masks: Masks) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.masks = masks
        self.spec = quantizer.spec
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        quantizer, spec = self.quantizer, self.spec
        if isinstance(quantizer._parameters.get("scale"), nn.Parameter):
            quantized = lsq_quantize(x, spec.format, spec.granularity, quantizer.params).to(x.dtype)
        else:
            quantized = quantizer(x)
        return mixed(quantized, x, self.masks(x))


@dataclass(frozen=True)
class ReconstructDropping(Step):
    """QDrop: rounding and activation step sizes of a unit, against the float unit's output on the float input.

    The unit is fed its input behind the quantized prefix and behind the float one, mixed element by element: quantized
    with probability `keep`. In the same way every activation quantizer inside the unit, and the one behind it where the
    unit is a layer followed by its activation, keeps an element quantized with probability `keep`: 1 drops nothing,
    0 quantizes nothing. Masks are drawn anew for every element, quantizer and step. Steps of static uniform quantizers
    are learned with `scale_lr` falling to zero on a cosine, zero points stay. `samples`: of the float activations, for
    the range of the quantizer behind the unit. `arithmetic`: what the unit runs in while it is learned
    (`reconstruct.arithmetic`); quantizers work in float32 on what it gives them.
    """

    iterations: int = 20_000
    batch: int = 32
    keep: float = 0.5
    lr: float = 1e-3
    scale_lr: float = 4e-5
    samples: int = 256
    annealing: Annealing = field(default_factory=Annealing)
    arithmetic: Arithmetic = "float32"

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40
    streams: ClassVar[frozenset[str]] = frozenset({"float", "quantized"})
    gradients: ClassVar[bool] = True
    fits_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        RandomMasks(self.keep, torch.Generator())
        check(self.arithmetic)

    def apply(self, unit: UnitContext) -> None:
        weights = start_unit(unit)
        if not weights:
            return
        comparison = Comparison(unit)
        if comparison.behind is not None:
            self._calibrate(unit, comparison, comparison.behind)
        sites = [*unit.activations(), *([comparison.behind] if comparison.behind is not None else [])]
        learned = learnable(unit, sites)
        held = {site.name: quantizer for site in sites if (quantizer := unit.quantizer(site)) is not None}
        scales = [parameter for quantizer in learned for parameter in quantizer.learn(("scale",))]
        dropped = {name: DroppedQuantizer(quantizer, self._masks(unit, name)) for name, quantizer in held.items()}
        soften(unit, weights)
        for name, stand_in in dropped.items():
            unit.attachment.set_quantizer(name, stand_in)  # type: ignore[arg-type]
        past = dropped.get(comparison.behind.name) if comparison.behind is not None else None
        self._learn(unit, comparison, weights, scales, list(dropped.values()), past)
        for quantizer in learned:
            quantizer.freeze_learned()
        for name, quantizer in held.items():
            unit.attachment.set_quantizer(name, quantizer)
        commit(unit, weights)

    def _learn(
        self,
        unit: UnitContext,
        comparison: Comparison,
        weights: list[LearnedWeight],
        scales: list[nn.Parameter],
        dropped: list[DroppedQuantizer],
        past: DroppedQuantizer | None,
    ) -> None:
        quantized, full, targets = gathered(unit, "quantized", "float")
        positions = comparison.positions(unit, targets, self.batch)
        arithmetic = narrowed(unit, self.arithmetic, quantized, full, targets)
        masks = self._masks(unit, "input")

        def loss(index: Tensor) -> Tensor:
            args, kwargs = mixed_trees(rows(unit, quantized, index), rows(unit, full, index), masks)
            with running(arithmetic, unit.device):
                output = comparison.values(unit.forward(args, kwargs), past)
                target = comparison.values(rows(unit, targets, index))
            return comparison.error(output, target)

        keep_positive(scales)
        groups = [Group([weight.rounding.alpha for weight in weights], self.lr)]
        if scales:
            groups.append(Group(scales, self.scale_lr, "cosine"))
        with cheap_norms(unit):
            optimise(
                unit,
                with_penalty(
                    loss,
                    self.annealing.over(weights, self.iterations),
                    home(quantized, full, targets),
                    [m.generator for m in (masks, *(d.masks for d in dropped)) if isinstance(m, RandomMasks)],
                ),
                groups,
                iterations=self.iterations,
                sampler=with_replacement(quantized.count, self.batch, unit.generator("samples")),
                callbacks=[lambda step, loss: keep_positive(scales)],
                scale=gradient_scale(arithmetic, positions),
            )

    def _calibrate(self, unit: UnitContext, comparison: Comparison, site: Site) -> None:
        """The quantizer behind the unit, on what it will meet in the float model."""
        spec = unit.spec(site)
        assert spec is not None
        quantizer = Quantizer(spec, site.name)
        if not spec.dynamic:
            targets = unit.targets()
            with torch.no_grad():
                (value,) = comparison.values(targets.rows(torch.arange(min(self.samples, targets.count))))
            quantizer.calibrate(value)
        unit.set_quantizer(site, quantizer)

    def _masks(self, unit: UnitContext, purpose: str) -> Masks:
        seed = unit.generator(f"keep {purpose}").initial_seed()
        return RandomMasks(self.keep, torch.Generator(unit.device).manual_seed(seed))


def mixed_trees(quantized: Tree, full: Tree, masks: Masks) -> Tree:
    """Two calls of a unit mixed: each floating-point tensor with its own mask, everything else from the first."""
    leaves, spec = pytree.tree_flatten(quantized)
    others = pytree.tree_leaves(full)
    out = [
        mixed(a, b, masks(a)) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a, b in zip(leaves, others, strict=True)
    ]
    return pytree.tree_unflatten(out, spec)
