"""Cached activations under a budget: on the device while they fit, then in host memory, then on disk."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from fewbits.engine.tree import Tree, to_host

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Budget:
    """Bytes of cached activations allowed on the accelerator and in host memory; what exceeds both goes to disk.

    None means: half of the available host memory, and of the device a quarter of what is free, both read when the run
    starts; nothing on the device where weights are streamed, since its memory is then what is scarce.
    """

    device: int | None = None
    host: int | None = None
    folder: Path | None = None

    def resolve(self, device: torch.device, streamed: bool = False) -> tuple[int, int]:
        """(bytes on the device, bytes in host memory)."""
        on_device = self.device
        if on_device is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" and not streamed else 0
            on_device = free // 4
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
    """Trees of tensors by key. `get` brings back exactly what was put, on the device it came from.

    What a GPU gave lies in page-locked host memory and travels on a stream of its own, beside the work; `walk` fetches
    one tree ahead. A tensor that `get` returned, unchanged, costs nothing to put again.
    """

    def __init__(self, budget: Budget, device: torch.device, streamed: bool = False) -> None:
        self.device = device
        self.device_limit, self.host_limit = budget.resolve(device, streamed)
        self._folder = Path(tempfile.mkdtemp(prefix="fewbits-activations-", dir=budget.folder))
        self._entries: dict[Key, _Entry] = {}
        self._files = itertools.count()
        self._travel = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[Key, tuple[list[Any], torch.cuda.Event | None]] = {}
        # A tensor on the device -> what it is a copy of here, and its version then.
        self._copies = WeakIdKeyDictionary()
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
            here = self._known(leaf)
            if here is not None and id(here) in held:
                entry.leaves.append(here)
            elif leaf.device.type != "cpu" and self.device_bytes + entry.device_bytes + size <= self.device_limit:
                entry.device_bytes += size
                entry.leaves.append(leaf)
            elif self.host_bytes + entry.host_bytes + size <= self.host_limit:
                entry.host_bytes += size
                entry.leaves.append(to_host(leaf, self._travel))
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
        spec = self._entries[key].spec
        self.fetch(key)
        return pytree.tree_unflatten(self._arrived(key), spec)

    def fetch(self, key: Key) -> None:
        """Start to bring a tree back to where it came from; the next `get` of it waits for that."""
        if key in self._ahead or key not in self._entries:
            return
        entry = self._entries[key]
        spilled = load_file(entry.file) if entry.file is not None else {}
        leaves = list(entry.leaves)
        for number, home in entry.homes.items():
            leaf = spilled.get(str(number), leaves[number])
            leaves[number] = self._bring(leaf, home)
        self._ahead[key] = leaves, None if self._travel is None else self._travel.record_event()

    def walk(self, keys: Iterable[Key]) -> Iterator[Tree]:
        """The trees of these keys in order, each fetched while the one before it is at work."""
        keys = list(keys)
        for place, key in enumerate(keys):
            tree = self.get(key)
            if place + 1 < len(keys) and self._travel is not None:
                self.fetch(keys[place + 1])
            yield tree

    def compose(self, key: Key, like: Key, sources: Sequence[tuple[Key, int] | None]) -> bool:
        """Put a tree of the structure of `like` whose leaves are leaves of other trees, moving nothing.

        sources: for each leaf the tree and the place of the leaf there, None where it is the one of `like`. Returns
        False, having put nothing, where a leaf lies on disk.
        """
        model = self._entries[like]
        made = _Entry([], model.spec, 0, 0, None, {})
        for number, source in enumerate(sources):
            entry, place = (model, number) if source is None else (self._entries[source[0]], source[1])
            leaf = entry.leaves[place]
            if leaf is None and entry.file is not None:
                return False
            made.leaves.append(leaf)
            if place in entry.homes:
                made.homes[number] = entry.homes[place]
        self.drop(key)
        self._entries[key] = made
        return True

    def alike(self, one: Key, other: Key) -> bool:
        """Whether two trees differ in nothing but the values of their tensors; False where one lies on disk."""
        a, b = self._entries[one], self._entries[other]
        if a.spec != b.spec or a.file is not None or b.file is not None:
            return False
        return all(
            x.shape == y.shape and x.dtype == y.dtype
            if isinstance(x, Tensor) and isinstance(y, Tensor)
            else type(x) is type(y) and not isinstance(x, Tensor) and x == y
            for x, y in zip(a.leaves, b.leaves, strict=True)
        )

    def rename(self, old: Key, new: Key) -> None:
        """Give every entry whose key starts with `old` a key that starts with `new` in its place."""
        self.drop_where(*new)
        for key in [key for key in self._entries if key[: len(old)] == old]:
            self._entries[(*new, *key[len(old) :])] = self._entries.pop(key)
            if key in self._ahead:
                self._ahead[(*new, *key[len(old) :])] = self._ahead.pop(key)

    def _arrived(self, key: Key) -> list[Any]:
        """The leaves of a tree that is on its way; whatever works on the device next waits for them."""
        leaves, event = self._ahead.pop(key)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return leaves

    def _bring(self, leaf: Tensor, home: torch.device) -> Tensor:
        if leaf.device == home or self._travel is None:
            return leaf.to(home)
        # The memory belongs to the stream that works on it, whose earlier readers of that memory must be done.
        out = torch.empty_like(leaf, device=home)
        self._travel.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._travel):
            out.copy_(leaf, non_blocking=True)
        self._copies[out] = (leaf, out._version)
        return out

    def _known(self, leaf: Tensor) -> Tensor | None:
        """What a tensor on the device is an unchanged copy of."""
        if leaf not in self._copies:
            return None
        here, version = self._copies[leaf]
        found: Tensor | None = here if leaf._version == version else None
        return found

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def keys(self) -> list[Key]:
        return list(self._entries)

    def drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if key in self._ahead:
            self._arrived(key)  # the memory it travels to must not be used again before
        self.device_bytes -= entry.device_bytes
        self.host_bytes -= entry.host_bytes
        if entry.file is not None:
            entry.file.unlink(missing_ok=True)

    def drop_where(self, *prefix: Any) -> None:
        """Drop every entry whose key starts with the given parts."""
        for key in [key for key in self._entries if key[: len(prefix)] == prefix]:
            self.drop(key)

    def close(self) -> None:
        self._ahead.clear()
        self._entries.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
