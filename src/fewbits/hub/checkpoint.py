"""Quantized checkpoints: a directory of safetensors (codes, parameters, everything left in floating point) and readable JSON.

`fewbits.json` holds the recipe and scheme, the sites that carry quantizers, how to build the architecture, versions, seed, the
calibration fingerprint, metrics and the SHA-256 of every tensor file. Loading rebuilds the model, decodes the codes and attaches the
quantizers; its outputs are bit-equal to those of the model that was saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewbits.attach import Attachment
from fewbits.engine import snapshot
from fewbits.engine.run import QuantizeResult, outside
from fewbits.errors import FewbitsError
from fewbits.graph.ops import WEIGHTED
from fewbits.graph.types import Site
from fewbits.hub.models import from_spec, save_companions
from fewbits.hub.output import write_json
from fewbits.hub.references import CHECKPOINT_FILE

if TYPE_CHECKING:
    from fewbits.hub.loaded import LoadedModel

VERSION = 1


def save(folder: Path | str, result: QuantizeResult, loaded: LoadedModel, metadata: dict[str, Any] | None = None) -> None:
    """Write a checkpoint. The folder appears whole or not at all; raises `FewbitsError` where it exists and is not empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FewbitsError(f"{folder} exists and is not empty; give another directory")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = _write_tensors(temporary, result)
        attachment = result.attachment
        known = [list(key) for key in sorted(attachment.known) if key[1].partition("@")[0] in WEIGHTED]
        write_json(
            temporary / CHECKPOINT_FILE,
            {
                "fewbits_checkpoint": VERSION,
                "model": loaded.rebuild_spec,
                "recipe": result.recipe.to_dict(),
                "seed": result.seed,
                "calibration_fingerprint": result.calibration_fingerprint,
                "metadata": metadata or {},
                "notes": result.notes,
                "files": {name: _sha256(temporary / name) for name in files},
                "sites": [site.to_dict() for site, _ in attachment.items()],
                "weighted_calls": known,
            },
        )
        save_companions(loaded, temporary)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path | str, *, code_module: str | None = None) -> LoadedModel:
    """The model of a checkpoint, quantizers attached, on the CPU.

    code_module: for models built by code of your own, the file and function that builds them. Raises `FewbitsError` for a missing,
    damaged, truncated or foreign file.
    """
    folder = Path(folder)
    described = _read_description(folder)
    held: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []
    for name, expected in described["files"].items():
        path = folder / name
        if Path(name).name != name:
            raise FewbitsError(f"{folder / CHECKPOINT_FILE}: file name {name!r} leads out of the checkpoint")
        if not path.is_file():
            raise FewbitsError(f"{path}: missing; the checkpoint is incomplete")
        tensors, part = snapshot.read(path)
        if _sha256(path) != expected:
            raise FewbitsError(f"{path}: its contents are not what was saved (checksum differs); restore the file or quantize again")
        held.append((tensors, part))
    try:
        sites = {data["name"]: Site.from_dict(data) for data in described["sites"]}
        known = {(str(path), str(op), int(ordinal)) for path, op, ordinal in described["weighted_calls"]}
    except (KeyError, TypeError, ValueError) as error:
        raise FewbitsError(f"{folder / CHECKPOINT_FILE}: damaged list of sites ({error!r})") from error
    loaded = from_spec(described["model"], folder, code_module=code_module)
    attachment = Attachment(loaded.model, sites, known)
    stored: set[str] = set()
    for tensors, part in held:
        stored |= {key.removeprefix("tensor/") for key in tensors if key.startswith("tensor/")} | set(part["alias"]) | set(part["coded"])
        snapshot.put(loaded.model, attachment, tensors, part)
    lacking = [name for name in loaded.model.state_dict() if name not in stored]
    if lacking:
        raise FewbitsError(f"{folder}: the checkpoint holds no values for {', '.join(lacking[:3])}; it does not fit its own model")
    loaded.ref = str(folder)
    return loaded


def description(folder: Path | str) -> dict[str, Any]:
    """The checkpoint's `fewbits.json`, checked."""
    return _read_description(Path(folder))


def _write_tensors(folder: Path, result: QuantizeResult) -> list[str]:
    """One file for a model in memory; one per unit, from the commits, where weights were streamed."""
    if not result.streamed:
        sites = [site for site, _ in result.attachment.items()]
        names = list(result.model.state_dict(keep_vars=True))
        snapshot.write(folder / "model.safetensors", *snapshot.take(result.model, result.attachment, names, sites))
        return ["model.safetensors"]
    if result.work is None:
        raise FewbitsError("a model quantized from streamed weights is saved from its committed units; give the run a work_dir")
    last = len(result.recipe.sweeps()) - 1
    files = ["outside.safetensors"]
    snapshot.write(folder / files[0], *outside(result.model, result.attachment, result.graph, result.units))
    for index in range(len(result.units)):
        name = f"unit{index:04d}.safetensors"
        shutil.copyfile(result.work / f"sweep{last}-unit{index:04d}.safetensors", folder / name)
        files.append(name)
    return files


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise FewbitsError(f"{folder}: not a fewbits checkpoint (no {CHECKPOINT_FILE})")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FewbitsError(f"{path}: damaged or truncated ({error})") from error
    needed = ("model", "recipe", "files", "sites", "weighted_calls", "seed")
    if not isinstance(data, dict) or data.get("fewbits_checkpoint") != VERSION:
        raise FewbitsError(f"{path}: not a checkpoint of this version of fewbits")
    missing = [key for key in needed if key not in data]
    if missing:
        raise FewbitsError(f"{path}: incomplete, it lacks {', '.join(missing)}")
    return data


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
