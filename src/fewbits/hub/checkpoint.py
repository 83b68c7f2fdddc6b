"""Quantized checkpoints: a directory of safetensors (codes, parameters, what stays floating point) and readable JSON.

`fewbits.json` holds the recipe and scheme, the sites that carry quantizers, how to build the architecture, versions,
seed, the calibration fingerprint, how Hessians were added up, metrics and the SHA-256 of every other file, and of
itself. Loading rebuilds the model, decodes the codes and attaches the quantizers; its outputs are bit-equal to those of
the model that was saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fewbits.attach import Attachment
from fewbits.engine import snapshot
from fewbits.engine.run import QuantizeResult, outside
from fewbits.errors import FewbitsError
from fewbits.graph.ops import MATMUL, WEIGHTED
from fewbits.graph.trace import clean
from fewbits.graph.types import Site
from fewbits.hub.models import from_spec, save_companions
from fewbits.hub.output import dumps
from fewbits.hub.references import CHECKPOINT_FILE

if TYPE_CHECKING:
    from fewbits.hub.loaded import LoadedModel

VERSION = 1
#: What each key of `fewbits.json` must hold.
_KEYS: dict[str, type] = {
    "model": dict, "recipe": dict, "seed": int, "files": dict, "companions": dict, "sites": list,
    "weighted_calls": list,
}  # fmt: skip
_UNSIGNED = "0" * 64  # stands for the file's own checksum while that is computed


def save(
    folder: Path | str, result: QuantizeResult, loaded: LoadedModel, metadata: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint; the folder appears whole or not at all.

    Raises `FewbitsError` where it exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FewbitsError(f"{folder} exists and is not empty; give another directory")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    with _removing_new_parents(folder):
        try:
            temporary.mkdir(parents=True)
            _write(temporary, result, loaded, metadata or {})
            if folder.is_dir():
                folder.rmdir()
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, result: QuantizeResult, loaded: LoadedModel, metadata: dict[str, Any]) -> None:
    files = _write_tensors(folder, result)
    save_companions(loaded, folder)
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    attachment = result.attachment
    products = {*WEIGHTED, *MATMUL}
    data = {
        "fewbits_checkpoint": VERSION,
        "model": loaded.rebuild_spec,
        "recipe": result.recipe.to_dict(),
        "seed": result.seed,
        "calibration_fingerprint": result.calibration_fingerprint,
        "hessian_arithmetic": result.hessian_arithmetic,
        "metadata": metadata,
        "notes": result.notes,
        "files": {name: _sha256(folder / name) for name in files},
        "companions": {name: _sha256(folder / name) for name in others if name not in files},
        "sites": [
            site.to_dict()
            for site in attachment.sites.values()
            if attachment.quantizer(site.name) is not None or site.name in attachment.factors
        ],
        "overrides": result.overrides,
        "weighted_calls": [list(key) for key in sorted(attachment.known) if key[1].partition("@")[0] in products],
        "checksum": _UNSIGNED,
    }
    text = dumps(data, indent=1)
    head, _, tail = text.rpartition(_UNSIGNED)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / CHECKPOINT_FILE).write_text(head + digest + tail, encoding="utf-8")


@contextmanager
def _removing_new_parents(folder: Path) -> Iterator[None]:
    """Take away again, on failure, the folders that had to be made for this one."""
    new = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in new:  # innermost first
            if not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()
        raise


def load(folder: Path | str, *, code_module: str | None = None) -> LoadedModel:
    """The model of a checkpoint, quantizers attached, on the CPU.

    code_module: for models built by code of your own, the file and function that builds them. Raises `FewbitsError` for
    a missing, damaged, truncated or foreign file.
    """
    folder = Path(folder)
    described = _read_description(folder)
    source = folder / CHECKPOINT_FILE
    for name, expected in (*described["files"].items(), *described["companions"].items()):
        _check_file(folder, name, expected)
    with _naming(source, "damaged list of sites"):
        sites = {data["name"]: Site.from_dict(data) for data in described["sites"]}
        known = {(str(path), str(op), int(ordinal)) for path, op, ordinal in described["weighted_calls"]}
    with _naming(source, "the model it describes cannot be built"):
        loaded = from_spec(described["model"], folder, code_module=code_module)
    attachment = Attachment(loaded.model, sites, known)
    stored: set[str] = set()
    for name in described["files"]:
        tensors, part = snapshot.read(folder / name)
        stored |= (
            {key.removeprefix("tensor/") for key in tensors if key.startswith("tensor/")}
            | set(part["alias"])
            | set(part["coded"])
        )
        with _naming(folder / name, "does not fit its own model"):
            snapshot.put(loaded.model, attachment, tensors, part)
        del tensors
    lacking = [name for name in map(clean, loaded.model.state_dict()) if name not in stored]
    if lacking:
        raise FewbitsError(
            f"{folder}: the checkpoint holds no values for {', '.join(lacking[:3])}; it does not fit its own model"
        )
    bare = [name for name in sites if attachment.quantizer(name) is None and name not in attachment.factors]
    if bare:
        raise FewbitsError(
            f"{folder}: the checkpoint holds no quantizer for {', '.join(bare[:3])}, which {source.name} lists"
        )
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
        raise FewbitsError(
            "a model quantized from streamed weights is saved from its committed units; give the run a work_dir"
        )
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
        raw = path.read_bytes()
        data = json.loads(raw.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise FewbitsError(f"{path}: damaged or truncated ({error})") from error
    if not isinstance(data, dict) or data.get("fewbits_checkpoint") != VERSION:
        raise FewbitsError(f"{path}: not a checkpoint of this version of fewbits")
    digest = data.get("checksum")
    if not isinstance(digest, str) or re.fullmatch("[0-9a-f]{64}", digest) is None:
        raise FewbitsError(f"{path}: incomplete, it lacks its checksum")
    head, _, tail = raw.rpartition(digest.encode())
    if hashlib.sha256(head + _UNSIGNED.encode() + tail).hexdigest() != digest:
        raise FewbitsError(
            f"{path}: its contents are not what was saved (checksum differs); restore the file or quantize again"
        )
    wrong = [key for key, kind in _KEYS.items() if not isinstance(data.get(key), kind)]
    if wrong:
        raise FewbitsError(f"{path}: incomplete, it lacks {', '.join(wrong)}")
    return data


def _check_file(folder: Path, name: str, expected: Any) -> None:
    """A file of the checkpoint must lie in it and be what was saved."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or not parts.parts or ".." in parts.parts or "\\" in name or "\0" in name:
        raise FewbitsError(f"{folder / CHECKPOINT_FILE}: file name {name!r} leads out of the checkpoint")
    path = folder / name
    if not path.is_file():
        raise FewbitsError(f"{path}: missing; the checkpoint is incomplete")
    if _sha256(path) != expected:
        raise FewbitsError(
            f"{path}: its contents are not what was saved (checksum differs); restore the file or quantize again"
        )


@contextmanager
def _naming(path: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong with a file's contents into one FewbitsError that names the file."""
    try:
        yield
    except (
        FewbitsError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        AssertionError,
    ) as error:
        reason = str(error) if isinstance(error, FewbitsError) else repr(error)
        raise FewbitsError(f"{path}: {what}: {reason}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
