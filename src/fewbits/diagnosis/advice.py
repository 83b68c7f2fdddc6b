"""What to do about the sites that hurt most: changes are tried, and the best is told with what it wins."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from fewbits.diagnosis.bench import FLOAT, QUANTIZED, Bench, Trial
from fewbits.diagnosis.candidates import Candidate, candidates, extra_bits
from fewbits.diagnosis.measures import NO_GAIN, Gain, expected, gain
from fewbits.diagnosis.sites import Measured, SiteErrors
from fewbits.engine.statistics import Bounds
from fewbits.errors import FewbitsError
from fewbits.quantizer import Quantizer
from fewbits.ranges import AbsMax, MinMax

#: A cheaper change is preferred if it wins at least this share of what the best one wins; the smaller share where the
#: samples do not tell the two apart.
ENOUGH, ENOUGH_IN_DOUBT = 0.7, 0.5
#: Sure gains below this share of the whole output error are not worth a word.
NOTICEABLE = 0.01


@dataclass
class Target:
    """Sites that are changed together: one with those that read the same tensor, or all that a glob names."""

    globs: tuple[str, ...]
    sites: tuple[str, ...]
    kind: str  # "site" | "pattern"


@dataclass
class Suggestion:
    """A change of a target that was tried in the quantized model, and what it did to the output."""

    target: Target
    candidate: Candidate
    trial: Trial
    alone: Trial
    quantizers: dict[str, Quantizer | None]
    extra_bytes: int
    gain: Gain = NO_GAIN
    others: list[dict[str, Any]] = field(default_factory=list)  # what else was tried there

    @property
    def option(self) -> str:
        """The value of the recipe option `sites`."""
        return ",".join(f"{glob}:{self.candidate.text}" for glob in self.target.globs)


def advise(
    bench: Bench, measured: Measured, top: int, announce: Callable[[int], None]
) -> tuple[list[Suggestion], list[Suggestion]]:
    """(for single sites, for groups of like sites), each by falling gain. `announce` is told how much work is ahead."""
    singles = _single_targets(bench, measured, top)
    groups = _group_targets(bench, measured, max(1, top // 2))
    tried: list[tuple[Target, Candidate]] = []
    for target in (*singles, *groups):
        site = bench.sites[target.sites[0]]
        fitting = candidates(site, bench.board.quantizers[site.name].spec)
        tried += [(target, candidate) for candidate in fitting]
    announce(bench.runs([], 1) + bench.runs([Trial(QUANTIZED, ())] * (2 * len(tried) + len(singles) + len(groups)), 2))
    fitted = _fit(bench, tried)
    everything = frozenset(bench.sites)
    made: list[Suggestion] = []
    for (target, candidate), quantizers in zip(tried, fitted, strict=True):
        trial = Trial(QUANTIZED, everything, quantizers, differs=target.sites)
        alone = Trial(FLOAT, target.sites, quantizers, differs=target.sites)
        made.append(Suggestion(target, candidate, trial, alone, quantizers, _extra_bytes(bench, quantizers)))
    as_it_is = {target.sites: Trial(FLOAT, target.sites, differs=target.sites) for target in (*singles, *groups)}
    bench.run([*as_it_is.values(), *(s.trial for s in made), *(s.alone for s in made)])
    whole = measured.whole.error
    for suggestion in made:
        seen = gain(measured.whole.errors, suggestion.trial.errors)
        calm = gain(as_it_is[suggestion.target.sites].errors, suggestion.alone.errors)
        suggestion.gain = expected(seen, calm, measured.scale, whole)
    chosen = [_choose([s for s in made if s.target is target], whole) for target in (*singles, *groups)]
    found = sorted((s for s in chosen if s is not None), key=lambda s: -s.gain.sure)
    return [s for s in found if s.target.kind == "site"], [s for s in found if s.target.kind == "pattern"]


@dataclass
class Together:
    """Several suggestions followed at once."""

    followed: list[Suggestion]
    trial: Trial
    gain: Gain


def together(
    bench: Bench, measured: Measured, suggestions: Sequence[Suggestion], announce: Callable[[int], None]
) -> list[Together]:
    """The first two, three ... suggestions followed at once."""
    everything = frozenset(bench.sites)
    out: list[Together] = []
    calm: list[tuple[Trial, Trial]] = []
    for count in range(2, len(suggestions) + 1):
        followed = list(suggestions[:count])
        changed = {name: quantizer for s in followed for name, quantizer in s.quantizers.items()}
        out.append(Together(followed, Trial(QUANTIZED, everything, changed, differs=changed), NO_GAIN))
        calm.append((Trial(FLOAT, changed, differs=changed), Trial(FLOAT, changed, changed, differs=changed)))
    trials = [item.trial for item in out] + [trial for pair in calm for trial in pair]
    if out:
        announce(bench.runs(trials, 2))
        bench.run(trials)
    for item, (as_it_is, alone) in zip(out, calm, strict=True):
        seen, lone = gain(measured.whole.errors, item.trial.errors), gain(as_it_is.errors, alone.errors)
        item.gain = expected(seen, lone, measured.scale, measured.whole.error)
    return out


def _single_targets(bench: Bench, measured: Measured, top: int) -> list[Target]:
    """The sites that hurt most, each with those that read the same tensor."""
    found: list[Target] = []
    taken: set[str] = set()
    for errors in measured.ranked():
        if len(found) < top and errors.site.name not in taken:
            sites = _siblings(bench, errors)
            taken.update(sites)
            found.append(Target(sites, sites, "site"))
    return found


def _siblings(bench: Bench, errors: SiteErrors) -> tuple[str, ...]:
    """The site and the others that read the same tensor: they want one grid."""
    name, recorded = errors.site.name, bench.subject.graph.sites
    if errors.site.role in ("weight", "output"):
        return (name,)
    value = recorded[name].value
    same = [
        other for other in bench.sites if recorded[other].value == value and recorded[other].role == errors.site.role
    ]
    return tuple(same) if errors.site.role == "input" else (name,)


def pattern(name: str) -> str:
    """A site's name with every number that stands for itself replaced by `*`: the same place in all blocks."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _group_targets(bench: Bench, measured: Measured, top: int) -> list[Target]:
    """The places that hurt most over all blocks, by the sum of the errors that their sites cause alone."""
    names = list(bench.sites)
    harm: dict[str, float] = {}
    for errors in measured.sites:
        harm[pattern(errors.site.name)] = harm.get(pattern(errors.site.name), 0.0) + errors.alone
    found: list[Target] = []
    by_name = {errors.site.name: errors for errors in measured.sites}
    taken: set[str] = set()
    for glob in sorted(harm, key=lambda g: -harm[g]):
        first = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        if len(first) < 2 or glob in taken or len(found) == top:
            continue
        globs = tuple(dict.fromkeys(pattern(sibling) for n in first for sibling in _siblings(bench, by_name[n])))
        sites = tuple(name for name in names if any(fnmatch.fnmatchcase(name, g) for g in globs))
        specs = {(bench.board.quantizers[n].spec.format.kind, bench.sites[n].role) for n in sites}
        if len(specs) == 1:
            taken.update(globs)
            found.append(Target(globs, sites, "pattern"))
    return found


def _fit(bench: Bench, tried: list[tuple[Target, Candidate]]) -> list[dict[str, Quantizer | None]]:
    """Quantizers on the changed grids: weights to the nearest level, activations fitted to the float run.

    Ranges that need only minimum and maximum see all batches, others the first.
    """
    out: list[dict[str, Quantizer | None]] = []
    waiting: dict[str, list[Quantizer]] = {}
    for target, candidate in tried:
        made: dict[str, Quantizer | None] = {}
        for name in target.sites:
            site, own = bench.sites[name], bench.board.quantizers[name]
            try:
                spec = candidate.spec(own.spec, site)
            except FewbitsError:
                made[name] = own  # another grid than the first site's: stays as it is
                continue
            made[name] = None if spec is None else Quantizer(spec, name).to(bench.subject.device)
            quantizer = made[name]
            if quantizer is None:
                continue
            if site.role == "weight":
                quantizer.calibrate(bench.board.weight(site))
            elif not quantizer.spec.dynamic:
                waiting.setdefault(name, []).append(quantizer)
        out.append(made)
    bounds: list[tuple[Quantizer, Bounds]] = []
    observers: dict[str, list[Callable[[Tensor], None]]] = {}
    for name, quantizers in waiting.items():
        for quantizer in quantizers:
            if isinstance(quantizer.spec.range, (MinMax, AbsMax)):
                statistic = Bounds(quantizer.spec.granularity)
                bounds.append((quantizer, statistic))
                observers.setdefault(name, []).append(partial(_bound, statistic))
            else:
                observers.setdefault(name, []).append(partial(_calibrate_once, quantizer))
    bench.run([], {FLOAT: observers})
    for quantizer, statistic in bounds:
        if statistic.seen:
            quantizer.set_params(quantizer.spec.range.fit_bounds(*statistic.value(), quantizer.spec.format))
    for made in out:
        for name, fitted in made.items():
            if fitted is not None and not (fitted.ready or fitted.spec.dynamic):
                made[name] = bench.board.quantizers[name]  # no data reached it
    return out


def _bound(statistic: Bounds, x: Tensor) -> None:
    if x.numel():
        statistic.update(x, len(x))


def _calibrate_once(quantizer: Quantizer, x: Tensor) -> None:
    if x.numel() and not quantizer.ready:
        quantizer.calibrate(x)


def _choose(tried: list[Suggestion], whole: float) -> Suggestion | None:
    """The cheapest change that wins nearly as much as the best; None where none wins anything."""
    best = max((suggestion.gain for suggestion in tried), key=lambda found: found.sure)
    if not best.sure > (NOTICEABLE * whole if math.isfinite(whole) else 0):
        return None
    chosen = next(suggestion for suggestion in tried if _enough(suggestion.gain, best))
    chosen.others = [
        {
            "change": s.candidate.text,
            "gain": s.gain.mean,
            "error": s.trial.error,
            "metric": s.trial.metric,
            "extra_bytes": s.extra_bytes,
        }
        for s in tried
        if s is not chosen
    ]
    return chosen


def _enough(found: Gain, best: Gain) -> bool:
    """Nearly as good as the best, or at least half as good and not to be told from it."""
    told_apart = found.mean + found.spread < best.mean
    return found.sure >= (ENOUGH if told_apart else ENOUGH_IN_DOUBT) * best.sure


def _extra_bytes(bench: Bench, quantizers: dict[str, Quantizer | None]) -> int:
    """Bytes that the checkpoint grows by; activations store nothing."""
    bits = 0
    for name, quantizer in quantizers.items():
        site, own = bench.sites[name], bench.board.quantizers[name]
        if site.role == "weight":
            weight = bench.board.floats[name]
            shape = tuple(weight.flatten(1).shape)
            width = weight.element_size() * 8
            bits += extra_bits(own.spec, None if quantizer is None else quantizer.spec, shape, width)
    return -(-bits // 8)
