"""Where float weights come from: a model in memory, or safetensors files read a unit at a time."""

from __future__ import annotations

import gc
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewbits.engine.lending import LARGE, Lending, read_by_their_module_alone
from fewbits.engine.store import ActivationStore
from fewbits.errors import FewbitsError
from fewbits.graph import operands
from fewbits.graph.types import Graph, Unit


def names_in(model: nn.Module, unit: Unit) -> list[str]:
    """Names of the parameters and persistent buffers under a unit, shared ones under each of their names."""
    prefix = f"{unit.name}." if unit.name else ""
    return [prefix + name for name in model.get_submodule(unit.name).state_dict(keep_vars=True)]


def names_outside(model: nn.Module, units: list[Unit]) -> list[str]:
    """Names of the parameters and persistent buffers that lie in no unit."""
    return [
        name
        for name in model.state_dict(keep_vars=True)
        if not any(unit.contains(name.rpartition(".")[0]) for unit in units)
    ]


class Source(ABC):
    """Float weights of the units, brought in and let go as the sweep moves."""

    streamed = False

    @abstractmethod
    def bring_in(self, unit: Unit) -> None:
        """Make the unit's parameters real, with their float values when this is the first time."""

    @abstractmethod
    def let_go(self, unit: Unit) -> None:
        """The unit is not needed for now."""

    def expect(self, unit: Unit) -> None:  # noqa: B027 (a hint, which a source may ignore)
        """The unit will be brought in next: its weights may be read meanwhile."""

    def close(self) -> None:  # noqa: B027
        """Nothing is needed any more."""

    def captured(self) -> None:  # noqa: B027
        """What the model has outside its units is not read for now."""

    @abstractmethod
    def remember(self, unit: Unit) -> None:
        """Keep the unit's float values for `recall`, before anything changes them."""

    @abstractmethod
    def recall(self, unit: Unit) -> dict[str, Tensor]:
        """The unit's float values by name."""


class InMemory(Source):
    """A model that is there as a whole. Float copies are kept in the activation store, under its budget."""

    def __init__(self, model: nn.Module, store: ActivationStore) -> None:
        self.model = model
        self.store = store

    def bring_in(self, unit: Unit) -> None:
        pass

    def let_go(self, unit: Unit) -> None:
        pass

    def remember(self, unit: Unit) -> None:
        values = {
            name: operands.parameter(self.model, name).detach().cpu().clone() for name in names_in(self.model, unit)
        }
        self.store.put(("parameters", unit.name), values)

    def recall(self, unit: Unit) -> dict[str, Tensor]:
        values: dict[str, Tensor] = self.store.get(("parameters", unit.name))
        return values


class Streamed(Source):
    """A model on the meta device whose weights lie in safetensors files under the model's own parameter names.

    Parameters outside the units are loaded once, large ones into host memory (`engine.lending`); a unit's only while it
    is processed, on a GPU read from the files while the unit before is at work. Raises `FewbitsError` for a folder
    without safetensors files, a damaged file, or a parameter no file holds.
    """

    streamed = True

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = Path(folder)
        self.dtype = dtype
        self.files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as handle:
                    self.files.update(dict.fromkeys(handle.keys(), path))
            except SafetensorError as error:
                raise FewbitsError(f"{path}: damaged or truncated ({error})") from error
        if not self.files:
            raise FewbitsError(f"{self.folder}: no safetensors files to stream weights from")
        self._reader: ThreadPoolExecutor | None = None
        self._read_ahead: tuple[list[str], Future[dict[str, Tensor]]] | None = None

    def open(self, model: nn.Module, graph: Graph, units: list[Unit], device: torch.device) -> None:
        """Load everything outside the units and remember which places share a parameter."""
        self.model = model
        self.device = device
        # Every place of a parameter, and its names; a tied one may be stored under any of them.
        places: dict[int, list[str]] = {}
        for name, held in model.named_parameters(remove_duplicate=False):
            places.setdefault(id(held), []).append(name)
        self._twins = {name: names for names in places.values() for name in names}
        glue = names_outside(model, units)
        self._kept = {twin for name in glue for twin in self._twins.get(name, [name])}
        self.lending = Lending(model, device)
        self._lend(graph, glue)
        self._load(glue)
        for name, buffer in model.named_buffers():
            if buffer.is_meta:
                raise FewbitsError(
                    f"buffer {name} has no values: to stream the model, build it with real buffers "
                    "(only its parameters on the meta device)"
                )

    def _lend(self, graph: Graph, glue: list[str]) -> None:
        """Those of the glue that are large and read by their modules alone."""
        alone = set(read_by_their_module_alone(graph, glue))
        for name, stored in self._wanted(glue).items():
            twins = self._twins.get(name, [name])
            if alone.issuperset(twins) and operands.parameter(self.model, name).nbytes >= LARGE:
                self.lending.take(twins, self.read([stored])[stored])

    def bring_in(self, unit: Unit) -> None:
        self._load(self._missing(unit))

    def expect(self, unit: Unit) -> None:
        if self.device.type == "cuda":
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "fewbits-weights")
            stored = list(self._wanted(self._missing(unit)).values())
            self._read_ahead = stored, self._reader.submit(self._read_locked, stored)

    def captured(self) -> None:
        self.lending.ask_back()

    def close(self) -> None:
        self.lending.end()
        self._read_ahead = None
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None

    def let_go(self, unit: Unit) -> None:
        gone: list[weakref.ref[Tensor]] = []
        for name in names_in(self.model, unit):
            module, leaf = self._place(name)
            held = module._parameters.get(leaf)
            if held is not None and name not in self._kept:
                module._parameters[leaf] = nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)
                gone.append(weakref.ref(held))
        held = None
        if any(reference() is not None for reference in gone):
            gc.collect()  # something in a reference cycle, as a library's forward may leave one, still holds weights

    def remember(self, unit: Unit) -> None:
        pass

    def recall(self, unit: Unit) -> dict[str, Tensor]:
        return self.read([name for name in names_in(self.model, unit) if name in self.files])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise FewbitsError(f"{self.folder}: no file holds the parameter {name}")
            by_file.setdefault(self.files[name], []).append(name)
        out: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            with safe_open(path, "pt") as handle:
                for name in wanted:
                    value = handle.get_tensor(name)
                    out[name] = value.to(self.dtype) if value.is_floating_point() else value
        return out

    def _missing(self, unit: Unit) -> list[str]:
        return [name for name in names_in(self.model, unit) if operands.parameter(self.model, name).is_meta]

    def _wanted(self, names: list[str]) -> dict[str, str]:
        """Those of the names that must be read, and what each is stored under."""
        wanted: dict[str, str] = {}
        for name in names:
            twins = self._twins.get(name, [name])
            if operands.parameter(self.model, name).is_meta and not any(twin in wanted for twin in twins):
                wanted[name] = next((twin for twin in twins if twin in self.files), name)
        return wanted

    def _read_locked(self, names: list[str]) -> dict[str, Tensor]:
        """As `read`, into page-locked memory."""
        return {name: torch.empty_like(value, pin_memory=True).copy_(value) for name, value in self.read(names).items()}

    def _load(self, names: list[str]) -> None:
        wanted = self._wanted(names)
        ahead, self._read_ahead = self._read_ahead, None
        expected = ahead is not None and ahead[0] == list(wanted.values())
        values = ahead[1].result() if ahead is not None and expected else self.read(wanted.values())
        for name, stored in wanted.items():
            new = nn.Parameter(values[stored].to(self.device, non_blocking=expected), requires_grad=False)
            for twin in self._twins.get(name, [name]):
                module, leaf = self._place(twin)
                module._parameters[leaf] = new

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf
