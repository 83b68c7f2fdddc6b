"""Writing results: strict JSON, and a checkpoint directory that appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError

REPORT_FILE = "report.json"


class Output:
    """The directory of the checkpoint and the work folder beside it.

    Without settings it only checks that the directory can be written.
    """

    def __init__(self, out: Path, resume: bool, settings: dict[str, Any] | None = None) -> None:
        self.out, self.work = out, out.with_name(out.name + ".partial")
        self.settings = settings or {}
        self.finished: dict[str, Any] | None = None
        if not out.name:
            raise FewbitsError(f"output {str(out)!r} is not a directory that can be made")
        if out.exists() and not out.is_dir():
            raise FewbitsError(f"output {str(out)!r} is a file; give a directory that does not exist yet")
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise FewbitsError(f"output {str(out)!r} cannot be made: {parent} is not a directory one can write to")
        if out.is_dir() and any(out.iterdir()):
            self.finished = self._report_of_same_run(resume)
        elif self.work.exists() and not resume:
            raise FewbitsError(
                f"an unfinished run lies in {self.work}: --resume goes on with it; delete it to start again"
            )
        elif (self.work / "settings.json").is_file():
            self._check_same(json.loads((self.work / "settings.json").read_text()), self.work)

    def _report_of_same_run(self, resume: bool) -> dict[str, Any]:
        if not resume:
            raise FewbitsError(
                f"output {str(self.out)!r} exists and is not empty: give another directory (--resume goes on with "
                "an unfinished run)"
            )
        file = self.out / REPORT_FILE
        if not file.is_file():
            raise FewbitsError(
                f"output {str(self.out)!r} is not empty and holds no checkpoint of fewbits: give another directory"
            )
        report = json.loads(file.read_text())
        self._check_same(report.get("settings", {}), self.out)
        return report

    def _check_same(self, before: dict[str, Any], where: Path) -> None:
        changed = [key for key, value in self.settings.items() if before.get(key) != value]
        if changed:
            raise FewbitsError(
                f"{where} comes from a run with another {' and '.join(changed)}; resume with the same settings or "
                "take another directory"
            )

    @contextmanager
    def working(self) -> Iterator[Path]:
        """The work folder; removed on failure unless finished units lie in it."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / "settings.json", self.settings)
        try:
            yield self.work
        except BaseException:
            if not any((self.work / "units").glob("*.safetensors")):
                shutil.rmtree(self.work, ignore_errors=True)
            raise

    def publish(self, write: Callable[[Path], None]) -> None:
        """Let `write` fill a fresh folder in the work folder, then put it in the output's place and drop the work
        folder.
        """
        folder = self.work / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        write(folder)
        report = json.loads((folder / REPORT_FILE).read_text())
        write_json(folder / REPORT_FILE, {**report, "settings": self.settings})
        if self.out.is_dir():
            self.out.rmdir()  # empty, as checked
        os.replace(folder, self.out)
        shutil.rmtree(self.work, ignore_errors=True)


def write_json(file: Path, data: Any) -> None:
    """Write JSON so that the file appears whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    temporary.write_text(dumps(data, indent=1))
    os.replace(temporary, file)


def dumps(data: Any, indent: int | None = None) -> str:
    """Strict JSON: numbers that are not finite become null."""
    return json.dumps(readable(data), indent=indent, allow_nan=False, ensure_ascii=False)


def readable(value: Any) -> Any:
    """The value as strict JSON holds it.

    Not-finite numbers as None, sets and tuples as lists, anything else as text.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): readable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [readable(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
