"""From references to a quantized checkpoint and back: what the command line does, for Python.

import fewbits
report = fewbits.quantize_reference("zoo/vit", "gptq", "W4", calib="cifar10/calibration.parquet", out="vit-w4")
loaded = fewbits.load("vit-w4")
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError
from fewbits.hub.output import REPORT_FILE, Output, readable, write_json
from fewbits.hub.references import check_model_ref
from fewbits.hub.requires import nearest, require
from fewbits.hub.sources import check_data_ref
from fewbits.papers.registry import check_name

if TYPE_CHECKING:
    from fewbits.hub.data import Data
    from fewbits.hub.loaded import LoadedModel
    from fewbits.recipe import Recipe

_EVALUATION_BATCH = {"text-generation": 8}
_EVALUATION_BATCH_OTHERWISE = 64


def quantize_reference(
    model: str | Path,
    recipe: str,
    bits: str,
    *,
    out: str | Path,
    calib: str | Path | None = None,
    samples: int | None = None,
    eval_data: str | Path | None = None,
    eval_samples: int | None = None,
    task: str | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int | None = None,
    seqlen: int | None = None,
    resume: bool = False,
    code_module: str | None = None,
    with_report: bool = False,
    float_metric: str | Path | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Load a model, measure it, quantize it, measure it again and write the checkpoint to `out`.

    Everything that can be checked without loading is checked first. `out` appears when it is complete; until then
    the finished units lie in `OUT.partial` beside it, from where `resume` goes on with the same bits.

    Args:
        model, calib, eval_data: references; see `fewbits.hub.models` and `fewbits.hub.data`.
        recipe, bits, options: see `fewbits.papers.build_recipe`.
        out: directory of the checkpoint; absent or empty, unless `resume` finds it finished by the same settings and
            returns its report.
        samples, batch_size, seqlen: calibration; by default what the recipe says. `seqlen` is the evaluation's
            window too.
        eval_samples: the first so many of `eval_data`; all by default.
        seed: calibration samples and everything random in the recipe. The evaluation does not depend on it.
        with_report: also diagnose the result and write `report.html` into `out` (`fewbits report`).
        float_metric: a JSON file that keeps the float model's metric for further runs on the same model and data.

    Returns:
        JSON-able: model, recipe, bits, options, bytes_before, bytes_after, size (`engine.size.summary`), metric,
        metric_before, metric_after, seconds, seconds_total, peak_memory_bytes, seed, device, dtype, hessian_arithmetic,
        needs_data, needs_gradients, calibration, evaluation, notes, versions, out; with a report, page: its file.

    Raises:
        FewbitsError: bad input; `out` is then untouched.
    """
    started = time.monotonic()
    _check_counts(samples=samples, eval_samples=eval_samples, batch_size=batch_size, seqlen=seqlen)
    check_name(recipe)
    if check_model_ref(model, code_module).kind == "fewbits":
        raise FewbitsError(f"model {str(model)!r} is a quantized checkpoint already; quantize the original")
    for ref in (calib, eval_data):
        if ref is not None:
            check_data_ref(ref)
    if with_report:
        require("plotly", "a report")
        if calib is None and eval_data is None:
            raise FewbitsError("a report needs data to run the model on: give --calib or --eval")
    Output(Path(out).expanduser(), resume)
    from fewbits.engine.size import summary
    from fewbits.hub.loaded import dtype_of  # from here on with torch
    from fewbits.hub.models import check_device, load_model
    from fewbits.papers import build_recipe

    built = build_recipe(recipe, bits=bits, options=dict(options or {}))
    if calib is None and built.needs_data:
        raise FewbitsError(f"recipe {recipe!r} at {bits} reads calibration data: give some (--calib)")
    wanted_dtype = dtype_of(dtype)
    _check_device_and_task(device, task, check_device)
    settings = {
        "model": str(model),
        "recipe": readable(built.to_dict()),
        "calib": _text(calib),
        "samples": samples,
        "seed": seed,
        "dtype": dtype,
        "batch_size": batch_size,
        "seqlen": seqlen,
    }
    place = Output(Path(out).expanduser(), resume, settings)
    if place.finished is not None:
        return _with_page(place.finished, out, device, code_module, show_progress) if with_report else place.finished

    with place.working() as work:
        loaded = load_model(model, dtype=wanted_dtype, device=device, code_module=code_module)
        calibration = _calibration(loaded, built, calib, samples, seed, batch_size, seqlen)
        evaluation = _evaluation(loaded, eval_data, eval_samples, batch_size, seqlen)
        bytes_before = _model_bytes(loaded.model)
        float_file = work / "float.json" if float_metric is None else Path(float_metric).expanduser()
        before = _measure_once(float_file, loaded, evaluation, task, device, show_progress)
        result = _quantize(loaded, built, calibration, seed, device, work / "units", resume, show_progress)
        after = _measure(loaded, evaluation, task, device, show_progress, "evaluating the quantized model")
        report: dict[str, Any] = {
            "model": str(model),
            "kind": loaded.kind,
            "recipe": recipe,
            "bits": str(built.bits),
            "options": readable(dict(options or {})),
            "bytes_before": bytes_before,
            "bytes_after": None,
            "size": summary(result.attachment, result.model),
            "metric": after["metric"] if after else None,
            "metric_before": before["value"] if before else None,
            "metric_after": after["value"] if after else None,
            "higher_is_better": after["higher_is_better"] if after else None,
            "seconds": round(result.seconds, 3),
            "seconds_total": None,
            "peak_memory_bytes": result.peak_bytes,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "hessian_arithmetic": result.hessian_arithmetic,
            "needs_data": built.needs_data,
            "needs_gradients": any(step.gradients for step in built.steps),
            "calibration": None
            if calibration is None
            else {**calibration.description, "fingerprint": calibration.fingerprint},
            "evaluation": {"before": before, "after": after} if after else None,
            "notes": [*loaded.notes, *result.notes, *_overlap(calib, eval_data)],
            "versions": versions(loaded.kind),
            "out": str(out),
        }
        place.publish(lambda folder: _write(folder, result, loaded, report, started))
    return _with_page(report, out, device, code_module, show_progress) if with_report else report


def evaluate_reference(
    model: str | Path,
    data: str | Path,
    task: str | None = None,
    *,
    samples: int | None = None,
    split: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
    code_module: str | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Load a model or checkpoint and measure it on `data`.

    The result of `fewbits.evaluate` with the model's reference and kind.
    """
    _check_counts(samples=samples, batch_size=batch_size, seqlen=seqlen, stride=stride)
    check_model_ref(model, code_module)
    check_data_ref(data, split)
    from fewbits.hub.loaded import dtype_of
    from fewbits.hub.models import check_device, load_model

    _check_device_and_task(device, task, check_device)
    loaded = load_model(model, dtype=dtype_of(dtype), device=device, code_module=code_module)
    prepared = _evaluation(loaded, data, samples, batch_size, seqlen, split=split, stride=stride)
    measured = _measure(loaded, prepared, task, device, show_progress, "evaluating")
    return {"model": str(model), "kind": loaded.kind, "device": device, "dtype": dtype, **(measured or {})}


def inspect_reference(model: str | Path, *, code_module: str | None = None, relations: bool = True) -> dict[str, Any]:
    """What fewbits sees in a model: parameters, units with their sites, relations, and what stays closed. JSON-able."""
    check_model_ref(model, code_module)
    from fewbits.engine.tree import as_call
    from fewbits.graph import record
    from fewbits.graph.describe import describe
    from fewbits.hub.models import load_model

    loaded = load_model(model, code_module=code_module)
    args, kwargs = as_call(loaded.example_batch(1))
    graph = record(loaded.model, *args, **kwargs)
    return {
        "model": str(model),
        "kind": loaded.kind,
        "domain": loaded.domain,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "bytes": _model_bytes(loaded.model),
        **describe(graph, loaded.model, relations=relations),
    }


def versions(kind: str) -> dict[str, str]:
    """Versions of fewbits, Python, torch and the model's library."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("fewbits", "torch", kind):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def list_papers(family: str | None = None) -> dict[str, Any]:
    """The catalogue by family.

    {"papers": count, "implemented": count, "families": {family: [entry, ...]}}. Without torch.
    """
    from fewbits.papers.catalogue import FAMILIES, catalogue

    if family is not None and family not in FAMILIES:
        raise FewbitsError(
            f"there is no family {family!r}{nearest(family, FAMILIES)} (there are: {', '.join(FAMILIES)})"
        )
    entries = [paper.to_dict() for paper in catalogue() if family in (None, paper.family)]
    grouped = {name: [entry for entry in entries if entry["family"] == name] for name in FAMILIES}
    return {
        "papers": len(entries),
        "implemented": sum(entry["implemented"] for entry in entries),
        "families": {name: group for name, group in grouped.items() if group},
    }


def describe_paper(slug: str, bits: str = "W4A8") -> dict[str, Any]:
    """A paper's entry, with `recipe`.

    Its options with defaults, steps and scheme at `bits`, or None where there is none.
    """
    from fewbits.papers import build_recipe, options_of, paper_info, recipe_names

    known = slug in recipe_names()
    try:
        entry = paper_info(slug).to_dict()
    except FewbitsError:
        if not known:
            raise
        entry = {"slug": slug, "title": slug, "implemented": True}  # a baseline, which no paper is credited for
    if not known:
        return {**entry, "recipe": None}
    recipe = readable(build_recipe(slug, bits=bits).to_dict())
    recipe["options"] = {name: readable(default) for name, (_, default, *_rest) in options_of(slug).items()}
    return {**entry, "recipe": recipe}


# -- preparing -------------------------------------------------------------------------------------
def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise FewbitsError(f"{name.replace('_', '-')} {value}: at least 1 is needed")


def _check_device_and_task(device: str, task: str | None, check_device: Callable[[str], Any]) -> None:
    check_device(device)
    if task is not None:
        from fewbits.tasks import task_named

        task_named(task)


def _calibration(
    loaded: LoadedModel,
    recipe: Recipe,
    calib: str | Path | None,
    samples: int | None,
    seed: int,
    batch_size: int | None,
    seqlen: int | None,
) -> Data | None:
    if calib is None:
        return None
    from fewbits.hub.data import load_data
    from fewbits.hub.examples import max_length

    regime = recipe.calibration
    if seqlen is None and loaded.domain == "text-generation":
        seqlen = min(regime.seqlen, max_length(loaded) or regime.seqlen)
    return load_data(
        calib,
        loaded,
        samples=samples or recipe.options.get("samples") or None,
        seed=seed,
        batch_size=batch_size or regime.batch_size,
        seqlen=seqlen,
        default_samples=regime.samples,
    )


def _evaluation(
    loaded: LoadedModel,
    ref: str | Path | None,
    samples: int | None,
    batch_size: int | None,
    seqlen: int | None,
    **more: Any,
) -> Data | None:
    if ref is None:
        return None
    from fewbits.hub.data import load_data

    size = batch_size or _EVALUATION_BATCH.get(loaded.domain, _EVALUATION_BATCH_OTHERWISE)
    return load_data(ref, loaded, samples=samples, batch_size=size, purpose="evaluation", seqlen=seqlen, **more)


def _overlap(calib: str | Path | None, eval_data: str | Path | None) -> list[str]:
    if calib is None or eval_data is None or str(calib) != str(eval_data):
        return []
    return ["calibration and evaluation read the same data; the metric after is flattered by it"]


def _model_bytes(model: Any) -> int:
    """Bytes of the distinct parameters and buffers as they are loaded."""
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(held.values())


# -- running ---------------------------------------------------------------------------------------
def _quantize(
    loaded: LoadedModel,
    recipe: Recipe,
    calibration: Data | None,
    seed: int,
    device: str,
    units: Path,
    resume: bool,
    show: bool,
) -> Any:
    from fewbits.engine import quantize
    from fewbits.hub.preprocess import input_range

    progress = None
    if show:
        from fewbits.engine.progress import Bar

        progress = Bar()
    batches = [] if calibration is None else list(calibration.batches())
    result = quantize(
        loaded.model,
        recipe,
        batches,
        example=loaded.example_batch(1),
        input_range=input_range(loaded.preprocessing),
        seed=seed,
        device=device,
        work_dir=units,
        resume=resume,
        progress=progress,
    )
    loaded.model = result.model
    return result


def _measure(
    loaded: LoadedModel, data: Data | None, task: str | None, device: str, show: bool, label: str
) -> dict[str, Any] | None:
    if data is None:
        return None
    from fewbits.tasks import evaluate

    with _bar(show, label) as progress:
        return evaluate(loaded, data, task, device=device, progress=progress)


def _measure_once(
    file: Path, loaded: LoadedModel, data: Data | None, task: str | None, device: str, show: bool
) -> dict[str, Any] | None:
    """The float model's metric; kept in `file` and taken from there where model, data and device are the same."""
    if data is None:
        return None
    wanted = {"task": task, "domain": data.domain, **data.description}
    wanted |= {"model": loaded.ref, "dtype": str(loaded.dtype), "device": device.partition(":")[0]}
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["wanted"] == wanted:
            return kept["measured"]
    measured = _measure(loaded, data, task, device, show, "evaluating the float model")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"wanted": wanted, "measured": measured})
    return measured


@contextmanager
def _bar(show: bool, label: str) -> Iterator[Callable[[int, int], None] | None]:
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# -- writing ---------------------------------------------------------------------------------------
def _write(folder: Path, result: Any, loaded: LoadedModel, report: dict[str, Any], started: float) -> None:
    from fewbits.hub import checkpoint

    checkpoint.save(folder, result, loaded, {key: value for key, value in report.items() if value is not None})
    report["bytes_after"] = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    report["seconds_total"] = round(time.monotonic() - started, 3)
    write_json(folder / REPORT_FILE, report)


def _with_page(
    report: dict[str, Any], out: str | Path, device: str, code_module: str | None, show: bool
) -> dict[str, Any]:
    """The report, after the page about it is written."""
    from fewbits.diagnosis.workflow import report_reference

    file, _ = report_reference(Path(out).expanduser(), device=device, code_module=code_module, show_progress=show)
    return {**report, "page": str(file)}


def _text(ref: str | Path | None) -> str | None:
    return None if ref is None else str(ref)
