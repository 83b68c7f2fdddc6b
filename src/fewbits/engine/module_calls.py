"""The calls of one module inside a unit, kept so that the module can be run again and again on what it really gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.engine.gradients import first_output
from fewbits.engine.tree import Tree, map_tensors
from fewbits.errors import FewbitsError
from fewbits.kernels.available import has_triton

if TYPE_CHECKING:
    from fewbits.engine.context import UnitContext


class ModuleCalls:
    """(args, kwargs, output) of every call of a module, in order; iterate as often as needed."""

    def __init__(self, unit: UnitContext, path: str, count: int) -> None:
        self._unit = unit
        self.path = path
        self._count = count
        self.module: nn.Module = unit.model.get_submodule(path)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Tree]]:
        for args, kwargs, output in self._unit.run.store.walk([("module", self.path, n) for n in range(self._count)]):
            if self._unit.writes_in_place:
                args, kwargs = map_tensors(torch.clone, (args, kwargs))
            yield args, kwargs, output

    @torch.no_grad()
    def squared_error(self) -> float:
        """Mean squared difference between the module's first output as it is now and as it was recorded."""
        # Summed where the outputs are: the host does not wait for every call.
        total, elements = torch.zeros((), dtype=torch.float64, device=self._unit.device), 0
        for args, kwargs, output in self:
            found, expected = first_output(self.module(*args, **kwargs)), first_output(output)
            total += _squared_distance(found, expected)
            elements += expected.numel()
        return float(total) / max(elements, 1)


def _squared_distance(found: Tensor, expected: Tensor) -> Tensor:
    """Scalar float64."""
    if found.is_cuda and has_triton():
        from fewbits.kernels.triton_losses import alike, squared_distance

        if alike(found, expected):
            return squared_distance(found, expected)
    difference = found.float() - expected.float()
    if difference.is_cuda:  # which adds up in pairs; without a copy in float64
        return torch.linalg.vector_norm(difference).double().square()
    return difference.double().square().sum()


@contextmanager
def module_calls(unit: UnitContext, path: str, stream: str, every: int = 1) -> Iterator[ModuleCalls]:
    """The calls of a module of the unit while the unit runs in floating point on a stream's cached inputs.

    Of the cached inputs the first, and every so many-th after it, are run. The calls lie in the run's activation store,
    under its budget, while the context lasts, in which no quantizer acts.
    """
    module, store = unit.model.get_submodule(path), unit.run.store
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    count = 0

    def starts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(map_tensors(torch.clone, (args, kwargs)) if unit.writes_in_place else (args, kwargs))

    def ends(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tree) -> None:
        nonlocal count
        held = map_tensors(torch.clone, output) if unit.writes_in_place else output
        store.put(("module", path, count), (*given.pop(), held))
        count += 1

    try:
        with unit.attachment.disabled(), torch.no_grad():
            handles = [
                module.register_forward_pre_hook(starts, with_kwargs=True),
                module.register_forward_hook(ends, with_kwargs=True),
            ]
            try:
                for _, args, kwargs in unit.batches(stream, every):
                    unit.forward(args, kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            if not count:
                raise FewbitsError(f"{path} did not run on the calibration data")
            yield ModuleCalls(unit, path, count)
    finally:
        store.drop_where("module", path)
