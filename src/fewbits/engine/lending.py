"""Large weights that no unit owns, embeddings and heads, on the device only while they are read.

Where weights are streamed, the memory of the device is what is scarce, and a forward that ends at some unit needs its
embedding for one batch and its head not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbits.graph.types import Graph

#: Bytes from which a parameter is worth the journey.
LARGE = 1 << 24


def read_by_their_module_alone(graph: Graph, names: Iterable[str]) -> list[str]:
    """Those of the parameters that the recorded forward read, and read nowhere but in the module that has them."""
    wanted = set(names)
    readers: dict[str, set[str]] = {}
    for value in graph.values:
        if value.param in wanted:
            calls = [graph.calls[index] for index in graph.consumers.get(value.id, ())]
            readers.setdefault(value.param, set()).update(call.module for call in calls)
    return sorted(name for name, places in readers.items() if places == {name.rpartition(".")[0]})


class Lending:
    """Keeps parameters in host memory and lends them to their modules for their forwards.

    What was lent stays on the device, for the next forward, until it is asked back. A first journey to a GPU leaves a
    copy in page-locked memory, from which the others start.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.bytes = 0  # that are spared on the device
        self._handles: list[RemovableHandle] = []
        self._lent: dict[nn.Parameter, nn.Parameter] = {}

    def take(self, names: Iterable[str], value: Tensor) -> None:
        """From now on `value`, in host memory, is the parameter of these names, and is lent where it is read."""
        held = nn.Parameter(value, requires_grad=False)
        self.bytes += value.nbytes if self.device.type != "cpu" else 0
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            module._parameters[leaf] = held
            self._handles += [
                module.register_forward_pre_hook(partial(self._lend, held, leaf)),
                module.register_forward_hook(partial(_back, held, leaf), always_call=True),
            ]

    def ask_back(self) -> None:
        """Nothing more is read for now."""
        self._lent.clear()

    def end(self) -> None:
        """Lend nothing any more; the parameters stay in host memory."""
        self.ask_back()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _lend(self, held: nn.Parameter, leaf: str, module: nn.Module, args: Any) -> None:
        if self.device.type == "cuda" and not held.is_pinned():
            held.data = held.data.pin_memory()
        if held not in self._lent:
            self._lent[held] = nn.Parameter(held.data.to(self.device, non_blocking=True), requires_grad=False)
        module._parameters[leaf] = self._lent[held]


def _back(held: nn.Parameter, leaf: str, module: nn.Module, args: Any, output: Any) -> None:
    module._parameters[leaf] = held
