"""From a checkpoint to a folder that another runtime loads: what `fewbits export` does, for Python."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.export.targets import check_target, load_target, target_names
from fewbits.hub.output import Output, write_json
from fewbits.hub.references import check_model_ref
from fewbits.hub.requires import require
from fewbits.hub.sources import check_data_ref

EXPORT_FILE = "fewbits-export.json"


def export_reference(
    folder: str | Path,
    to: str,
    *,
    out: str | Path | None = None,
    options: dict[str, Any] | None = None,
    data: str | None = None,
    samples: int | None = None,
    check: bool = True,
    code_module: str | None = None,
) -> dict[str, Any]:
    """Write a quantized checkpoint in the form of another runtime, then reload it there and compare.

    The folder appears when it is complete and, with `check`, agrees with the simulation.

    Args:
        folder: a checkpoint of fewbits.
        to: a target; see `fewbits.export.targets`.
        out: where to; by default FOLDER-TO beside the checkpoint. Absent or empty.
        options: of the target's `write`.
        data, samples: what to compare on; by default synthetic inputs.

    Returns:
        JSON-able: target, checkpoint, out, bytes, files, written (facts of the target), comparison (see `Target.check`;
        None without check), seconds.

    Raises:
        FewbitsError: bad input, or a model that the target cannot hold (naming sites and the targets that can), or one
            that answers differently there. Nothing is left in `out` then.
    """
    started = time.monotonic()
    check_target(to)
    if check_model_ref(folder, code_module).kind != "fewbits":
        raise FewbitsError(f"{str(folder)!r} is not a checkpoint of fewbits: run `fewbits quantize` first")
    if data is not None:
        check_data_ref(data)
    target = load_target(to)
    for package in target.packages:
        require(package, f"export to {to}")
    folder = Path(folder).expanduser()
    place = Path(out).expanduser() if out is not None else folder.with_name(f"{folder.name}-{to}")
    Output(place, resume=False)
    from fewbits.attach import attachment_of
    from fewbits.export.base import Subject, refuse
    from fewbits.hub import checkpoint

    loaded = checkpoint.load(folder, code_module=code_module)
    attachment = attachment_of(loaded.model)
    assert attachment is not None
    subject = Subject(loaded, attachment, checkpoint.description(folder))
    obstacles = target.obstacles(subject)
    if obstacles:
        raise refuse(target, obstacles, _able(subject, to))
    if data is not None:
        from fewbits.hub.data import load_data

        subject.batches = list(load_data(data, loaded, samples=samples or 64, batch_size=16).batches())
    temporary = place.with_name(f".{place.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        written = target.write(subject, temporary, **(options or {}))
        comparison = target.check(subject, temporary) if check else None
        report = {
            "target": to,
            "checkpoint": str(folder),
            "out": str(place),
            "bytes": sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file()),
            "files": sorted(file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if file.is_file()),
            "written": written,
            "comparison": comparison,
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(temporary / EXPORT_FILE, report)
        if place.is_dir():
            place.rmdir()  # empty, as checked
        os.replace(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _able(subject: Any, but: str) -> list[str]:
    """The targets without an obstacle for this model."""
    return [name for name in target_names() if name != but and not load_target(name).obstacles(subject)]
