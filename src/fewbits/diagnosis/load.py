"""From references to a subject of diagnosis: a checkpoint beside its float original, or a model quantized now."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.attach import attachment_of
from fewbits.diagnosis.bench import Subject
from fewbits.engine import QuantizeResult, quantize
from fewbits.engine.gradients import first_output
from fewbits.engine.tree import as_call, to
from fewbits.errors import FewbitsError
from fewbits.graph import operands, record
from fewbits.graph.record import without_cache
from fewbits.graph.types import Graph
from fewbits.hub import checkpoint
from fewbits.hub.data import Batch, Data, load_data
from fewbits.hub.examples import max_length
from fewbits.hub.loaded import LoadedModel, dtype_of
from fewbits.hub.models import check_device, load_model
from fewbits.hub.output import REPORT_FILE, readable
from fewbits.hub.preprocess import input_range
from fewbits.papers import build_recipe
from fewbits.recipe import Recipe
from fewbits.steps.nearest import RoundNearest
from fewbits.tasks.registry import Task, task_for

_SAMPLES = {"text-generation": 8}
_SAMPLES_OTHERWISE = 64
_BATCH = {"text-generation": 2}
_BATCH_OTHERWISE = 32
#: Domains whose output is a distribution over classes along the last axis.
_CLASSES = ("image", "text-classification", "text-generation")


def from_checkpoint(
    folder: Path,
    *,
    original: str | None = None,
    data: str | None = None,
    samples: int | None = None,
    device: str = "cpu",
    code_module: str | None = None,
) -> Subject:
    """A checkpoint directory and the float model that it says it was made from.

    original: the float model, where it is not found under that reference any more. data: by default the calibration
    data. Where the recipe transforms the float model before it quantizes it, the recipe is run again for the
    transformed weights: in full only if a transform depends on what was quantized before it.

    Raises `FewbitsError` where the original or the data cannot be read or do not fit the checkpoint.
    """
    described = checkpoint.description(folder)
    report = _report(folder, described)
    place = check_device(device)
    loaded = load_model(original or report["model"], dtype=dtype_of(report["dtype"]), code_module=code_module)
    loaded.model.to(place)
    prepared = _data(loaded, data or _known_data(report), samples, report)
    graph = _recorded(loaded)
    batches, outputs = _float_outputs(loaded, prepared, place)
    floats, notes = _transformed(loaded, report, described, place)
    quantized = checkpoint.load(folder, **({"code_module": code_module} if code_module else {}))
    quantized.model.to(place)
    attachment = attachment_of(quantized.model)
    assert attachment is not None
    unknown = [name for name in attachment.sites if name not in graph.sites]
    if unknown:
        raise FewbitsError(f"{folder}: its site {unknown[0]} does not exist in {report['model']!r}; is that its model?")
    attachment.add_sites(graph.sites.values())
    if floats is None:
        weights = [site for site, _ in attachment.items() if site.role == "weight"]
        floats = {site.name: operands.read(loaded.model, site) for site in weights}
    kind, task = _comparison(loaded, prepared, batches)
    return Subject(
        quantized.model, attachment, graph, floats, batches, outputs, kind, task, report, _described(prepared),
        place, notes,
    )  # fmt: skip


def from_model(
    model: str,
    recipe: str,
    bits: str,
    *,
    calib: str | None = None,
    calib_samples: int | None = None,
    options: dict[str, Any] | None = None,
    data: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    seqlen: int | None = None,
    code_module: str | None = None,
) -> Subject:
    """A float model, quantized in memory by a recipe."""
    place = check_device(device)
    built = build_recipe(recipe, bits=bits, options=dict(options or {}))
    if calib is None and built.needs_data:
        raise FewbitsError(f"recipe {recipe!r} at {bits} reads calibration data: give some (--calib)")
    loaded = load_model(model, dtype=dtype_of(dtype), code_module=code_module)
    loaded.model.to(place)
    report: dict[str, Any] = {
        "model": model,
        "recipe": recipe,
        "bits": bits,
        "options": readable(dict(options or {})),
        "seed": seed,
        "dtype": dtype,
        "calibration": {"data": calib} if calib else None,
        "settings": {"samples": calib_samples, "seqlen": seqlen, "calib": calib},
    }
    prepared = _data(loaded, data or calib, samples, report)
    batches, outputs = _float_outputs(loaded, prepared, place)
    calibration = _calibration(loaded, built, report)
    result, floats = _quantized(loaded, built, calibration, seed, place)
    kind, task = _comparison(loaded, prepared, batches)
    return Subject(
        result.model, result.attachment, result.graph, floats, batches, outputs, kind, task, report,
        _described(prepared), place, list(result.notes),
    )  # fmt: skip


def _report(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """What the quantization told of itself, from the report beside the checkpoint or else from within it."""
    file = folder / REPORT_FILE
    try:
        report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise FewbitsError(f"{file}: damaged ({error})") from error
    report = {**described.get("metadata", {}), **(report if isinstance(report, dict) else {})}
    missing = [key for key in ("model", "recipe", "bits", "dtype") if not isinstance(report.get(key), str)]
    if missing:
        raise FewbitsError(f"{folder}: the checkpoint does not say its {missing[0]}, so it cannot be diagnosed")
    return {**report, "out": str(folder)}


def _known_data(report: dict[str, Any]) -> str | None:
    """The calibration data, or what the model was measured on."""
    evaluation = (report.get("evaluation") or {}).get("after") or {}
    return (report.get("calibration") or {}).get("data") or evaluation.get("data")


def _data(loaded: LoadedModel, ref: str | None, samples: int | None, report: dict[str, Any]) -> Data:
    if ref is None:
        raise FewbitsError("the model was quantized without calibration data: say what to diagnose it on (--data)")
    return load_data(
        ref,
        loaded,
        samples=samples,
        seed=int(report.get("seed") or 0),
        batch_size=_BATCH.get(loaded.domain, _BATCH_OTHERWISE),
        seqlen=(report.get("settings") or {}).get("seqlen"),
        default_samples=_SAMPLES.get(loaded.domain, _SAMPLES_OTHERWISE),
    )


def _described(data: Data) -> dict[str, Any]:
    return {**data.description, "fingerprint": data.fingerprint}


def _calibration(loaded: LoadedModel, recipe: Recipe, report: dict[str, Any]) -> list[Any]:
    """The batches that the quantization was, or is to be, calibrated with."""
    settings = report.get("settings") or {}
    ref = settings.get("calib") or (report.get("calibration") or {}).get("data")
    if ref is None:
        return []
    regime = recipe.calibration
    seqlen = settings.get("seqlen")
    if seqlen is None and loaded.domain == "text-generation":
        seqlen = min(regime.seqlen, max_length(loaded) or regime.seqlen)
    data = load_data(
        ref,
        loaded,
        samples=settings.get("samples") or recipe.options.get("samples") or None,
        seed=int(report.get("seed") or 0),
        batch_size=settings.get("batch_size") or regime.batch_size,
        seqlen=seqlen,
        default_samples=regime.samples,
    )
    return list(data.batches())


def _recorded(loaded: LoadedModel) -> Graph:
    args, kwargs = as_call(loaded.example_batch(1))
    with without_cache(loaded.model):
        return record(loaded.model, *args, **kwargs)


def _float_outputs(loaded: LoadedModel, data: Data, device: torch.device) -> tuple[list[Batch], list[Tensor]]:
    batches = list(data)
    outputs = []
    with torch.no_grad():
        for batch in batches:
            args, kwargs = as_call(to(batch.inputs, device))
            outputs.append(first_output(loaded.model(*args, **kwargs)).detach().cpu())
    return batches, outputs


def _comparison(loaded: LoadedModel, data: Data, batches: list[Batch]) -> tuple[str, type[Task] | None]:
    """How outputs are compared, and what is measured where the data has labels."""
    kind = "kl" if loaded.domain in _CLASSES else "mse"
    if any(batch.targets is None for batch in batches):
        return kind, None
    try:
        return kind, task_for(loaded, data)
    except FewbitsError:
        return kind, None


def _transformed(
    loaded: LoadedModel, report: dict[str, Any], described: dict[str, Any], device: torch.device
) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Float weights after the recipe's transforms, None where it has none; the loaded model is used up by it."""
    recipe = build_recipe(report["recipe"], bits=report["bits"], options=dict(report.get("options") or {}))
    if not any(step.part == "transform" for step in recipe.steps):
        return None, []
    notes = []
    if readable(recipe.to_dict()) != readable(described["recipe"]):
        notes.append("the recipe is not what it was when the checkpoint was made; its transforms may differ")
    if all(step.scope == "model" for step in recipe.steps if step.part == "transform"):
        # transforms of the whole model come first: how weights are rounded afterwards does not matter
        kept = tuple(step for step in recipe.steps if step.part not in ("rounding", "tuning", "correction"))
        recipe = dataclasses.replace(recipe, steps=(*kept, RoundNearest()))
    calibration = _calibration(loaded, recipe, report)
    result, floats = _quantized(loaded, recipe, calibration, int(report.get("seed") or 0), device)
    result.attachment.detach()
    return floats, notes


def _quantized(
    loaded: LoadedModel, recipe: Recipe, calibration: list[Any], seed: int, device: torch.device
) -> tuple[QuantizeResult, dict[str, Tensor]]:
    """The model quantized in place, and its float weights after the recipe's transforms."""
    result = quantize(
        loaded.model, recipe, calibration, example=loaded.example_batch(1), seed=seed, device=device, keep_float=True,
        input_range=input_range(loaded.preprocessing),
    )  # fmt: skip
    floats = dict(result.float_weights or {})
    for site, _ in result.attachment.items():
        if site.role == "weight" and site.name not in floats:  # quantized in the forward only
            floats[site.name] = operands.read(result.model, site)
    return result, floats
