"""What a run leaves on disk as it goes, and how it knows its own again: committed units and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbits.engine import snapshot
from fewbits.engine.tree import Batch, tensors
from fewbits.errors import FewbitsError


class Commits:
    """Finished units on disk. A file appears whole or not at all, so a killed run leaves only finished units.

    With `behind` a unit is written while the next one is at work, its tensors being copies that nobody changes: in
    order, one at a time, an error told at the next call or by `flush`.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool, behind: bool = False) -> None:
        self.folder = folder
        self._writer = ThreadPoolExecutor(1, "fewbits-commits") if behind else None
        self._writing: Future[None] | None = None
        state = folder / "run.json"
        text = json.dumps(identity, sort_keys=True, indent=1)
        if resume and state.is_file():
            try:
                before = json.loads(state.read_text())
            except json.JSONDecodeError as error:
                raise FewbitsError(f"{state}: damaged; delete {folder} and start again") from error
            changed = [key for key in identity if before.get(key) != json.loads(text)[key]]
            if changed:
                raise FewbitsError(
                    f"{folder} holds a run with another {' and '.join(changed)}; "
                    "resume with the same settings, or use another folder"
                )
        else:
            if folder.exists() and any(folder.glob("sweep*.safetensors")):
                raise FewbitsError(f"{folder} holds another run's units; resume it, or use another folder")
            folder.mkdir(parents=True, exist_ok=True)
            temporary = state.with_name(f".{state.name}.{os.getpid()}.part")
            temporary.write_text(text)
            os.replace(temporary, state)

    def path(self, sweep: int, index: int) -> Path:
        return self.folder / f"sweep{sweep}-unit{index:04d}.safetensors"

    def has(self, sweep: int, index: int) -> bool:
        return self.path(sweep, index).is_file()

    def write(self, sweep: int, index: int, held: dict[str, Tensor], described: dict[str, Any]) -> None:
        self.flush()
        if self._writer is None:
            snapshot.write(self.path(sweep, index), held, described)
        else:
            self._writing = self._writer.submit(snapshot.write, self.path(sweep, index), held, described)

    def flush(self) -> None:
        """Return when every unit is on disk. Raises what a write raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Let a write that has begun end, whatever becomes of it."""
        if self._writer is not None:
            self._writer.shutdown()

    def read(self, sweep: int, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.flush()
        return snapshot.read(self.path(sweep, index))

    def remember(self, name: str, held: dict[str, Tensor]) -> None:
        """Keep what a model-scope step computed."""
        path = self._memory(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(held, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def recall(self, name: str) -> dict[str, Tensor] | None:
        """What was kept under this name, None where nothing was. Raises `FewbitsError` for a damaged file."""
        path = self._memory(name)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise FewbitsError(f"{path}: damaged ({error}); delete it and resume") from error

    def _memory(self, name: str) -> Path:
        return self.folder / f"memory-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}.safetensors"


def fingerprint(batches: Sequence[Batch]) -> str:
    """SHA-256 of the exact calibration tensors."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in tensors(batch):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of parameter names, shapes and a sample of each one's values (no values on the meta device)."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if value.numel() and not value.is_meta:
            flat = value.detach().reshape(-1)
            step = max(1, flat.numel() // 1024)
            digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
