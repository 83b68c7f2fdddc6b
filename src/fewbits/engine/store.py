"""Cached activations under a budget: on the device while they fit, then in host memory, then on disk."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from fewbits.engine.tree import Tree

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Budget:
    """Bytes of cached activations allowed on the accelerator and in host memory; what exceeds both goes to disk.

    None means: a quarter of the free device memory, half of the available host memory, both read when the run starts.
    """

    device: int | None = None
    host: int | None = None
    folder: Path | None = None

    def resolve(self, device: torch.device) -> tuple[int, int]:
        on_device = self.device
        if on_device is None:
            on_device = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0
        host = self.host if self.host is not None else psutil.virtual_memory().available // 2
        return on_device, host


@dataclass
class _Entry:
    leaves: list[Any]
    spec: Any
    device_bytes: int
    host_bytes: int
    file: Path | None
    homes: dict[int, torch.device]  # leaf number -> device to bring it back to


class ActivationStore:
    """Trees of tensors by key. `get` brings back exactly what was put, on the device it came from."""

    def __init__(self, budget: Budget, device: torch.device) -> None:
        self.device = device
        self.device_limit, self.host_limit = budget.resolve(device)
        self._folder = Path(tempfile.mkdtemp(prefix="fewbits-activations-", dir=budget.folder))
        self._entries: dict[Key, _Entry] = {}
        self._files = itertools.count()
        self.device_bytes = 0
        self.host_bytes = 0
        self.peak_host_bytes = 0
        self.spilled_bytes = 0

    def put(self, key: Key, tree: Tree) -> None:
        self.drop(key)
        leaves, spec = pytree.tree_flatten(tree)
        held = {id(leaf) for entry in self._entries.values() for leaf in entry.leaves if isinstance(leaf, Tensor)}
        entry = _Entry([], spec, 0, 0, None, {})
        spill: dict[str, Tensor] = {}
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or id(leaf) in held:
                entry.leaves.append(leaf)  # constants, and tensors another entry already pays for
                continue
            size = leaf.numel() * leaf.element_size()
            entry.homes[number] = leaf.device
            if leaf.device.type != "cpu" and self.device_bytes + entry.device_bytes + size <= self.device_limit:
                entry.device_bytes += size
                entry.leaves.append(leaf)
            elif self.host_bytes + entry.host_bytes + size <= self.host_limit:
                entry.host_bytes += size
                entry.leaves.append(leaf.cpu())
            else:
                spill[str(number)] = leaf.detach().cpu().contiguous()
                entry.leaves.append(None)
        if spill:
            entry.file = self._folder / f"{next(self._files)}.safetensors"
            save_file(spill, entry.file)
            self.spilled_bytes += sum(t.numel() * t.element_size() for t in spill.values())
        self.device_bytes += entry.device_bytes
        self.host_bytes += entry.host_bytes
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
        self._entries[key] = entry

    def get(self, key: Key) -> Tree:
        entry = self._entries[key]
        spilled = load_file(entry.file) if entry.file is not None else {}
        leaves = list(entry.leaves)
        for number, home in entry.homes.items():
            leaf = spilled.get(str(number), leaves[number])
            leaves[number] = leaf.to(home)
        return pytree.tree_unflatten(leaves, entry.spec)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def keys(self) -> list[Key]:
        return list(self._entries)

    def drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.device_bytes -= entry.device_bytes
        self.host_bytes -= entry.host_bytes
        if entry.file is not None:
            entry.file.unlink(missing_ok=True)

    def drop_where(self, *prefix: Any) -> None:
        """Drop every entry whose key starts with the given parts."""
        for key in [key for key in self._entries if key[: len(prefix)] == prefix]:
            self.drop(key)

    def close(self) -> None:
        self._entries.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
