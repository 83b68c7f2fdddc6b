"""What integer-only inference asks of a simulation: grids where bytes are made, shared ones, and integer biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.engine.context import ModelContext, UnitContext
from fewbits.engine.statistics import Bounds, MovingBounds
from fewbits.engine.tree import as_call, batch_size, to
from fewbits.errors import FewbitsError
from fewbits.formats import Uniform
from fewbits.graph.constants import layer_constants
from fewbits.graph.requantize import Placement, find_placement, tag_requantized
from fewbits.graph.types import Graph, Site, Unit
from fewbits.graph.weights import add_to_bias
from fewbits.kernels.fixed_point import quantize_bias
from fewbits.quantizer import Quantizer
from fewbits.ranges import AbsMax, Fixed, MinMax
from fewbits.recipe import Step


@dataclass(frozen=True)
class CalibrateShared(Step):
    """Activation ranges of the whole float model in one pass, with one grid for sites that must share it.

    Tags sites as `graph.requantize` says, for the scheme to name. Sites that a concatenation or an average ties
    together get the union of their ranges. With `smoothing` above 0 the ends are exponential moving averages over the
    batches, as in the paper's training; otherwise they are the smallest and largest of all.
    """

    smoothing: float = 0.0

    part: ClassVar[str] = "activations"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 7
    streams: ClassVar[frozenset[str]] = frozenset({"float"})

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise FewbitsError(f"smoothing={self.smoothing}: choose 0 (all data alike) to below 1")

    def prepare(self, graph: Graph, units: list[Unit]) -> None:
        tag_requantized(graph, graph.sites)

    def apply(self, unit: ModelContext) -> None:
        if not unit.run.batches:
            raise FewbitsError(f"{unit.recipe.name} needs calibration data for its activation ranges")
        sites = unit.activations()
        bounds: dict[str, Bounds] = {}
        for site in sites:
            spec = unit.spec(site)
            assert spec is not None
            if not isinstance(spec.range, (MinMax, AbsMax, Fixed)):
                raise FewbitsError(f"{site.name}: range {spec.range.kind!r} needs more than minimum and maximum here")
            if not spec.dynamic:
                bounds[site.name] = (
                    MovingBounds(spec.granularity, self.smoothing) if self.smoothing else Bounds(spec.granularity)
                )
        _observe(unit, bounds)
        ends = self._ends(unit, bounds)
        for site in sites:
            spec = unit.spec(site)
            assert spec is not None
            quantizer = Quantizer(spec, site.name)
            if not spec.dynamic:
                if site.name not in ends:
                    unit.note(f"{site.name}: no calibration data reaches it, so it stays floating point")
                    unit.override(site, None)
                    continue
                quantizer.set_params(spec.range.fit_bounds(*ends[site.name], spec.format))
            unit.set_quantizer(site, quantizer)

    def _ends(self, unit: ModelContext, bounds: dict[str, Bounds]) -> dict[str, tuple[Tensor, Tensor]]:
        """Ends of the range of every site that data reached, united where a grid is shared."""
        ends = {name: held.value() for name, held in bounds.items() if held.seen}
        for name, (lo, hi) in ends.items():
            if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
                raise FewbitsError(f"{name}: NaN or infinity in the calibration data's forward; check the model")
        for group in find_placement(unit.graph).shared:
            names = [name for name in group if name in ends]
            if len({ends[name][0].shape for name in names}) > 1:
                raise FewbitsError(f"{names[0]} and {names[1]} need one grid but have ranges of other granularity")
            if names:
                lo = torch.stack([ends[name][0] for name in names]).amin(0)
                hi = torch.stack([ends[name][1] for name in names]).amax(0)
                ends.update(dict.fromkeys(names, (lo, hi)))
        return ends


def _observe(unit: ModelContext, bounds: dict[str, Bounds]) -> None:
    """One forward of the floating-point model over the calibration data."""
    size = [0]

    def update(held: Bounds, x: Tensor) -> None:
        if x.numel():
            held.update(x, size[0])

    observers = {name: [lambda x, held=held: update(held, x)] for name, held in bounds.items()}
    with unit.attachment.disabled(), unit.attachment.observing(observers), torch.no_grad():  # type: ignore[arg-type]
        for batch in unit.run.batches:
            size[0] = batch_size(batch)
            args, kwargs = as_call(to(batch, unit.device))
            unit.model(*args, **kwargs)


@dataclass(frozen=True)
class RoundBias(Step):
    """Bring what a layer adds to its output to whole steps of the accumulator, as an int32 bias holds it.

    The step is input scale times weight scale. What a folded batch norm adds counts as part of the bias. Biases of
    layers whose input or weight is not quantized stay; values beyond 32 bits saturate and are reported.
    """

    part: ClassVar[str] = "correction"
    stage: ClassVar[int] = 70

    def apply(self, unit: UnitContext) -> None:
        placement = find_placement(unit.graph)
        for site in unit.weights():
            step = _accumulator_scale(unit, site, placement)
            if step is None:
                continue
            rows = len(unit.weight(site))
            gain, constant = layer_constants(unit.model, unit.graph, unit.graph.calls[site.call], rows)
            if not bool((gain == 1).all()):
                unit.note(f"{site.name}: its batch norm still scales, so what is added stays in floating point")
                continue
            if not bool(constant.any()):
                continue
            codes, saturated = quantize_bias(constant, step)
            if saturated:
                unit.note(f"{site.name}: {saturated} biases leave 32 bits at the accumulator's step and saturate")
            add_to_bias(unit.model, unit.graph, site, codes.double() * step.double() - constant)


def _accumulator_scale(context: ModelContext, site: Site, placement: Placement) -> Tensor | None:
    """The step of a layer's accumulator, float32 () or [out] on the CPU; None where its input or weight is on no
    uniform grid, or finer than one per tensor and one per output."""
    weight = context.quantizer(site)
    reads = context.graph.flow.operands(context.graph.calls[site.call]).get("input")
    if weight is None or reads is None:
        return None
    made = placement.carried.get(reads.value)
    acting = context.quantizer(context.input_of(site)) or (None if made is None else context.quantizer(made))
    rows = len(context.weight(site))
    for quantizer, most in ((weight, rows), (acting, 1)):
        if quantizer is None or quantizer.spec.dynamic or not isinstance(quantizer.spec.format, Uniform):
            return None
        if quantizer.params["scale"].numel() not in (1, most):
            return None
    assert acting is not None
    scales = (quantizer.params["scale"].detach().float().cpu().reshape(-1) for quantizer in (weight, acting))
    return torch.mul(*scales).squeeze()
