"""The errors of every quantized site: alone, in the whole, and what the network would win without it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from fewbits.diagnosis.bench import FLOAT, QUANTIZED, Bench, Observer, Trial
from fewbits.diagnosis.histogram import histogram
from fewbits.diagnosis.measures import NO_GAIN, Gain, Noise, excerpt, expected, gain
from fewbits.engine.size import weight_sizes
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer


@dataclass
class SiteErrors:
    """One quantized site.

    tensor: SQNR in dB of the float model's tensor on the site's grid. layer: of the output of the op that reads it,
        with this tensor alone quantized. accumulated: of what runs there when everything is quantized, against the
        float run; for a weight, of its layer's output. Infinite: exact; None: not reached by the data.
    alone: the network's output error with only this site quantized. left_out: with every site but this one.
    gain: what leaving it in floating point is expected to win, from both (`measures.expected`).
    """

    site: Site
    quantizer: Quantizer
    tensor: float | None = None
    layer: float | None = None
    accumulated: float | None = None
    alone: float = 0.0
    left_out: float = 0.0
    left_out_gain: Gain = NO_GAIN
    gain: Gain = NO_GAIN
    histogram: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        spec, site = self.quantizer.spec, self.site
        return {
            "site": site.name,
            "op": site.op,
            "role": site.role,
            "tags": sorted(site.tags - {site.role, "input", "weight", "output"}),
            "shape": list(site.shape),
            "format": spec.format.kind,
            "bits": spec.format.bits,
            "granularity": spec.granularity.describe(),
            "range": spec.range.kind,
            "dynamic": spec.dynamic,
            "tensor_db": self.tensor,
            "layer_db": self.layer,
            "accumulated_db": self.accumulated,
            "alone": self.alone,
            "left_out": self.left_out,
            "left_out_gain": self.left_out_gain.mean,
            "left_out_spread": self.left_out_gain.spread,
            "gain": self.gain.mean,
            "gain_spread": self.gain.spread,
            "histogram": self.histogram,
        }


@dataclass
class Measured:
    """All sites in call order, and the network with none (`residual`) and all (`whole`) of them quantized.

    `scale` is how much larger the whole error is than the sum of the lone ones.
    """

    sites: list[SiteErrors]
    residual: Trial
    whole: Trial
    sizes: list[dict[str, Any]] = field(default_factory=list)
    scale: float = 1.0

    def ranked(self) -> list[SiteErrors]:
        """Who hurts most: by what the network surely wins without the site, then by the error it makes alone."""
        return sorted(self.sites, key=lambda s: (-s.gain.sure, -s.alone))


def count_trials(sites: int) -> int:
    """Trials that `measure` runs."""
    return 2 + 2 * sites


def measure(bench: Bench) -> Measured:
    """Run every site alone and left out, and compare its tensors in the float and in the quantized run."""
    found = {name: SiteErrors(site, bench.board.quantizers[name]) for name, site in bench.sites.items()}
    sizes = [
        {"site": size.site, "values": size.values, "bits": size.bits, "bits_per_weight": size.bits_per_weight}
        for size in weight_sizes(bench.subject.attachment)
    ]
    everything = frozenset(found)
    watch = _Watch(bench, found)
    residual, whole = Trial(FLOAT, ()), Trial(QUANTIZED, everything)
    alone = {name: Trial(FLOAT, {name}, differs={name}, watch=_output_of(bench, name)) for name in found}
    left_out = {name: Trial(QUANTIZED, everything - {name}, differs={name}) for name in found}
    observers = {FLOAT: watch.float_run(), QUANTIZED: watch.quantized_run()}
    bench.run([residual, whole, *alone.values(), *left_out.values()], observers, watch.compare)
    for name, errors in found.items():
        errors.alone, errors.left_out = alone[name].error, left_out[name].error
        errors.left_out_gain = gain(whole.errors, left_out[name].errors)
        errors.tensor, errors.accumulated = watch.tensor[name].decibels(), watch.accumulated[name].decibels()
        errors.layer = errors.tensor if alone[name].watch is None else alone[name].noise
    measured = Measured(list(found.values()), residual, whole, sizes)
    harms = {name: gain(trial.errors, residual.errors) for name, trial in alone.items()}
    lone = sum(max(harm.mean, 0.0) for harm in harms.values())
    if lone > 0 and math.isfinite(lone) and math.isfinite(whole.error):
        measured.scale = max(0.0, whole.error - residual.error) / lone
    for name, errors in found.items():
        errors.gain = expected(errors.left_out_gain, harms[name], measured.scale, whole.error)
    return measured


def _output_of(bench: Bench, name: str) -> str | None:
    """The output site of the op that reads a site; None for outputs, which are their own."""
    site = bench.sites[name]
    output = name.removesuffix(site.role) + "output"
    return output if site.role != "output" and output in bench.subject.graph.sites else None


class _Watch:
    """Observers of the float and the quantized run, and what they saw."""

    def __init__(self, bench: Bench, found: dict[str, SiteErrors]) -> None:
        self.bench = bench
        self.found = found
        self.tensor = {name: Noise() for name in found}
        self.accumulated = {name: Noise() for name in found}
        #: where accumulated error is read: at the site, or for weights at the layer's output
        self.place = {
            name: (_output_of(bench, name) if errors.site.role == "weight" else name) for name, errors in found.items()
        }
        self._float: dict[str, list[Tensor]] = {}
        self._quantized: dict[str, list[Tensor]] = {}
        for name, errors in found.items():
            if errors.site.role == "weight":
                exact, quantized = bench.board.weight(errors.site), bench.board.quantized_weight(errors.site)
                self.tensor[name].update(exact, quantized)
                permuted = name in bench.subject.attachment.group_index
                errors.histogram = histogram(exact, quantized, errors.quantizer, permuted=permuted)

    def float_run(self) -> dict[str, list[Observer]]:
        observers: dict[str, list[Observer]] = {}
        for name, place in self.place.items():
            if place is not None:
                observers.setdefault(place, []).append(partial(self._exact, name))
            if self.found[name].site.role != "weight":
                observers.setdefault(name, []).append(partial(self._local, name))
        return observers

    def quantized_run(self) -> dict[str, list[Observer]]:
        observers: dict[str, list[Observer]] = {}
        for name, place in self.place.items():
            if place is not None:
                observers.setdefault(place, []).append(partial(self._running, name))
        return observers

    def _exact(self, name: str, x: Tensor) -> None:
        self._float.setdefault(name, []).append(excerpt(x))

    def _local(self, name: str, x: Tensor) -> None:
        errors = self.found[name]
        quantized = errors.quantizer(x)
        self.tensor[name].update(x, quantized)
        if errors.histogram is None and x.numel():
            errors.histogram = histogram(x, quantized, errors.quantizer)

    def _running(self, name: str, x: Tensor) -> None:
        """What the quantized model computes with: an activation on its grid, or a layer's output."""
        errors = self.found[name]
        seen = x if errors.site.role == "weight" else errors.quantizer(x)
        self._quantized.setdefault(name, []).append(excerpt(seen))

    def compare(self) -> None:
        """After a batch: pair what the two runs saw."""
        for name, exact in self._float.items():
            for before, now in zip(exact, self._quantized.get(name, ()), strict=False):
                self.accumulated[name].update(before, now)
        self._float.clear()
        self._quantized.clear()
