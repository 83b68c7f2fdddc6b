"""A diagnosis: where the accuracy of a quantized model went, and what to do about it."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from typing import Any

from fewbits.diagnosis.advice import Suggestion, Together, advise, together
from fewbits.diagnosis.bench import Bench, Subject, Trial
from fewbits.diagnosis.measures import Gain
from fewbits.diagnosis.sites import Measured, count_trials, measure
from fewbits.tasks.registry import Task

TOP = 8
#: What the float weights with every site in floating point may differ by, as a share of the whole error, unsaid.
_RESIDUAL = 0.02


def study(
    subject: Subject, *, top: int = TOP, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Measure every quantized site, try changes at the `top` worst and put it in words.

    progress: called with (forwards done, forwards known of, what is being done).

    Returns:
        JSON-able (numbers that are not finite become null when written):
        `model`, `recipe`, `bits`, `options`, `seed` of the quantization; `data`: what was run on;
        `output`: `measure` ("kl" in nats a sample or token, or "mse" over the float output's power), `float` (the
        error with no site quantized) and `quantized`;
        `metric`: `name`, `higher_is_better`, `float`, `quantized`, `samples` on the same data, or None;
        `sites`: in call order, see `SiteErrors.to_dict`, with `rank` from 1; `ranking`: their names, worst first;
        `suggestions` for single sites and `patterns` for like sites of several blocks: see `_suggestion`;
        `together`: the first two, three ... suggestions at once; `sizes`: of every quantized weight; `notes`;
        `seconds`.
    """
    started = time.monotonic()
    work = _Work(progress)
    bench = Bench(subject, work.advance)
    try:
        work.ahead(bench.runs([Trial("", ())] * count_trials(len(bench.sites)), 2), "measuring the sites")
        measured = measure(bench)
        singles, groups = advise(bench, measured, top, lambda runs: work.ahead(runs, "trying changes"))
        several = together(bench, measured, singles[:5], lambda runs: work.ahead(runs, "trying changes together"))
    finally:
        bench.close()
    ranked = [errors.site.name for errors in measured.ranked()]
    whole = measured.whole.error
    report = subject.report
    return {
        **{key: report.get(key) for key in ("model", "recipe", "bits", "options", "seed")},
        "data": subject.data,
        "output": {"measure": subject.kind, "float": measured.residual.error, "quantized": whole},
        "metric": _metric(subject, measured),
        "sites": [{**errors.to_dict(), "rank": ranked.index(errors.site.name) + 1} for errors in measured.sites],
        "ranking": ranked,
        "suggestions": [_suggestion(s, subject, measured) for s in singles],
        "patterns": [_suggestion(s, subject, measured) for s in groups],
        "together": [_several(item, subject, measured) for item in several],
        "sizes": measured.sizes,
        "notes": [*subject.notes, *_notes(measured)],
        "seconds": round(time.monotonic() - started, 1),
    }


class _Work:
    """Counts forwards for a progress bar; more work becomes known on the way."""

    def __init__(self, progress: Callable[[int, int, str], None] | None) -> None:
        self.progress = progress
        self.done = self.total = 0
        self.label = ""

    def ahead(self, runs: int, label: str) -> None:
        self.total += runs
        self.label = label

    def advance(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, self.label)


def _metric(subject: Subject, measured: Measured) -> dict[str, Any] | None:
    task: type[Task] | None = subject.task
    if task is None or measured.residual.metric is None:
        return None
    return {
        "name": task.metric,
        "higher_is_better": task.higher_is_better,
        "float": measured.residual.metric,
        "quantized": measured.whole.metric,
        "samples": subject.data["samples"],
    }


def _effect(trial: Trial, found: Gain, subject: Subject, measured: Measured) -> dict[str, Any]:
    """What a change did and is expected to do.

    `error` and `metric`: of the quantized model with the change, on the samples run here. `gain`, with its standard
    error `gain_spread`: what it is expected to take off the output error, and `share` and `share_spread` of the whole.
    `predicted`: the metric to expect where the quantization itself was measured, or else here, if it comes back as the
    output error goes. All None where they are not known.
    """
    whole = measured.whole.error
    finite = 0 < whole < math.inf
    share = found.mean / whole if finite else None
    return {
        "error": trial.error,
        "metric": trial.metric,
        "gain": found.mean,
        "gain_spread": found.spread,
        "share": share,
        "share_spread": found.spread / whole if finite else None,
        "predicted": _predicted(share, subject.report, _metric(subject, measured)),
    }


def _predicted(share: float | None, report: dict[str, Any], metric: dict[str, Any] | None) -> float | None:
    before, after = report.get("metric_before"), report.get("metric_after")
    if before is None or after is None:
        if metric is None:
            return None
        before, after = metric["float"], metric["quantized"]
    if share is None or before is None or after is None:
        return None
    return after + min(max(share, 0.0), 1.0) * (before - after)


def _suggestion(suggestion: Suggestion, subject: Subject, measured: Measured) -> dict[str, Any]:
    """`sites`, `change` and its meaning (`says`), the effect, `extra_bytes`, how to follow it (`option` for `--set`,
    `command`), `tried`: what else was tried."""
    return {
        "sites": list(suggestion.target.sites),
        "globs": list(suggestion.target.globs),
        "change": suggestion.candidate.text,
        "says": suggestion.candidate.says,
        **_effect(suggestion.trial, suggestion.gain, subject, measured),
        "extra_bytes": suggestion.extra_bytes,
        "option": f"sites={suggestion.option}",
        "command": command(subject.report, suggestion.option),
        "tried": suggestion.others,
    }


def _several(item: Together, subject: Subject, measured: Measured) -> dict[str, Any]:
    option = ",".join(suggestion.option for suggestion in item.followed)
    return {
        "count": len(item.followed),
        **_effect(item.trial, item.gain, subject, measured),
        "extra_bytes": sum(suggestion.extra_bytes for suggestion in item.followed),
        "option": f"sites={option}",
        "command": command(subject.report, option),
    }


def command(report: dict[str, Any], change: str) -> str:
    """The command line that quantizes again with a change of the recipe option `sites` added."""
    settings = report.get("settings") or {}
    words = ["fewbits", "quantize", str(report["model"]), "--recipe", report["recipe"], "--bits", report["bits"]]
    calib = (report.get("calibration") or {}).get("data")
    given = {
        "--calib": calib,
        "--samples": settings.get("samples"),
        "--seqlen": settings.get("seqlen"),
        "--batch-size": settings.get("batch_size"),
        "--seed": report.get("seed") or None,
        "--dtype": None if report.get("dtype") in (None, "float32") else report["dtype"],
        "--eval": ((report.get("evaluation") or {}).get("after") or {}).get("data"),
    }
    words += [str(word) for key, value in given.items() if value is not None for word in (key, value)]
    options = dict(report.get("options") or {})
    earlier = options.pop("sites", "")
    options["sites"] = f"{earlier},{change}" if earlier else change
    words += [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    out = str(report["out"]).rstrip("/") + "-2" if report.get("out") else "OUT"
    return shlex.join([*words, "--out", out])


def _notes(measured: Measured) -> list[str]:
    whole, residual = measured.whole.error, measured.residual.error
    notes = []
    if whole == math.inf:
        notes.append("the quantized model's output is not finite; gains are told only where a change makes it finite")
    elif residual > _RESIDUAL * whole:
        notes.append(
            f"with every site in floating point the output still differs from the original model's ({residual:.3g} of "
            f"{whole:.3g}): what the recipe changed besides (biases, replaced activations) is part of the error"
        )
    return notes
