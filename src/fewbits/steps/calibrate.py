"""Put quantizers at the scheme's activation sites and find their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from fewbits.engine.context import GlueContext, ModelContext, UnitContext
from fewbits.engine.statistics import Bounds, SampleMoments, Statistic, Values
from fewbits.errors import FewbitsError
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.ranges import AbsMax, Analytic, LayerSearch, MinMax
from fewbits.recipe import Step


def calibrate_sites(
    context: ModelContext,
    samples: int,
    gather: Callable[[dict[str, Iterable[Statistic]]], None],
    sites: Iterable[Site] | None = None,
) -> None:
    """Put quantizers at the context's activation sites, or the given ones, fitted to what `gather` sees there.

    Ranges that need only minimum and maximum, or moments, see all the data; others the values of the first `samples`
    samples.
    """
    static: list[tuple[Site, Quantizer, Statistic]] = []
    for site in context.activations() if sites is None else sites:
        spec = context.spec(site)
        assert spec is not None
        quantizer = Quantizer(spec, site.name)
        if spec.dynamic:
            context.set_quantizer(site, quantizer)
        elif isinstance(spec.range, (MinMax, AbsMax, LayerSearch)):
            static.append((site, quantizer, Bounds(spec.granularity)))
        elif isinstance(spec.range, Analytic):
            static.append((site, quantizer, SampleMoments(spec.granularity)))
        else:
            static.append((site, quantizer, Values(samples)))
    if static:
        gather({site.name: [statistic] for site, _, statistic in static})
    for site, quantizer, statistic in static:
        range_, fmt = quantizer.spec.range, quantizer.spec.format
        try:
            found = statistic.value()
        except FewbitsError as error:
            raise FewbitsError(f"{site.name}: {error}") from error
        if isinstance(statistic, Bounds):
            lo, hi = found
            quantizer.set_params(range_.fit_bounds(lo, hi, fmt))
        elif isinstance(range_, Analytic):
            quantizer.set_params(range_.fit_moments(found, fmt))
        else:
            quantizer.calibrate(found)
        context.set_quantizer(site, quantizer)


class _Calibration(Step):
    """Activations are calibrated first or, `late`, in a sweep after the weights of every unit are final."""

    late: bool

    part: ClassVar[str] = "activations"
    streams: ClassVar[frozenset[str]] = frozenset({"prefix"})

    @property
    def stage(self) -> int:  # type: ignore[override]
        return 45 if self.late else 20

    @property
    def new_sweep(self) -> bool:  # type: ignore[override]
        return self.late


@dataclass(frozen=True)
class CalibrateActivations(_Calibration):
    """Parameters from what each site carries when the unit runs in floating point on the regime's stream, or on that of
    the float model.

    Ranges that need only minimum and maximum, or moments, see all the data; others see the values of the first
    `samples` samples. Dynamic quantizers need no data.
    """

    samples: int = 64
    late: bool = False
    stream: Literal["prefix", "float"] = "prefix"

    @property
    def streams(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.stream})

    def apply(self, unit: UnitContext) -> None:
        calibrate_sites(unit, self.samples, partial(unit.gather, stream=self._stream, quantized=False))

    def apply_glue(self, glue: GlueContext) -> None:
        calibrate_sites(glue, self.samples, partial(glue.gather, stream=self._stream))

    @property
    def _stream(self) -> str | None:
        return None if self.stream == "prefix" else self.stream


@dataclass(frozen=True)
class AttachDynamic(Step):
    """Quantizers that fit their parameters on every call (per token); needs no data."""

    part: ClassVar[str] = "activations"
    stage: ClassVar[int] = 20

    def apply(self, unit: UnitContext) -> None:
        for site in unit.activations():
            spec = unit.spec(site)
            assert spec is not None
            unit.set_quantizer(site, Quantizer(spec, site.name))

    def apply_glue(self, glue: GlueContext) -> None:
        for site in glue.activations():
            spec = glue.spec(site)
            assert spec is not None
            glue.set_quantizer(site, Quantizer(spec, site.name))


@dataclass(frozen=True)
class CalibrateInline(_Calibration):
    """One forward with every quantizer active, each fitted on the first tensor it sees.

    Later sites are thus calibrated on already quantized inputs, weights included (RepQ-ViT section 4.1, BRECQ's
    activation stage). `samples` samples form the one batch. With `weights` the weights are quantized to the nearest
    meanwhile, in the forward only.
    """

    samples: int = 32
    weights: bool = True
    late: bool = False

    def apply_glue(self, glue: GlueContext) -> None:
        calibrate_sites(glue, self.samples, glue.gather)

    def apply(self, unit: UnitContext) -> None:
        attachment = unit.attachment
        if self.weights:
            for site in unit.weights():
                spec = unit.spec(site)
                assert spec is not None
                quantizer = Quantizer(spec, site.name)
                quantizer.calibrate(unit.weight(site))
                unit.set_quantizer(site, quantizer)
        pending: set[str] = set()
        for site in unit.activations():
            spec = unit.spec(site)
            assert spec is not None
            unit.set_quantizer(site, Quantizer(spec, site.name))
            if not spec.dynamic:
                pending.add(site.name)
        if not pending:
            return
        inputs = unit.inputs()
        count = min(self.samples, inputs.count)
        args, kwargs = inputs.rows(torch.arange(count))
        attachment.calibrating = pending
        try:
            with torch.no_grad():
                unit.forward(args, kwargs)
        finally:
            missed, attachment.calibrating = attachment.calibrating, set()
        for name in sorted(missed):
            unit.note(f"{name} was not reached by the calibration batch and stays floating point")
            unit.set_quantizer(unit.graph.sites[name], None)
