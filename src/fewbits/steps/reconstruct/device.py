"""What suits a GPU: where data lies and how, and norms of which folding has left a constant to add.

On a CPU nothing here does anything, so that results there do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.engine.context import UnitContext
from fewbits.engine.tree import Samples, Tree, map_tensors, nbytes
from fewbits.graph import operands


def gathered(unit: UnitContext, *streams: str | None) -> list[Samples]:
    """The unit's inputs of each stream (None: the regime's), and last its float outputs: on the unit's device where
    all of them fit there, else in host memory."""
    place = unit.device if fits(unit, streams) else torch.device("cpu")
    return [_laid_out(unit, data) for data in (*(unit.inputs(s, place) for s in streams), unit.targets(place))]


def fits(unit: UnitContext, streams: Sequence[str | None]) -> bool:
    """Whether the device has room for the unit's inputs of these streams and its outputs, twice while they are joined.

    Judged by the first batch of each.
    """
    if unit.device.type != "cuda":
        return True
    keys = [("input", stream or unit.prefix, 0, 0) for stream in streams] + [("float", unit.name, 0, 0)]
    first = sum(nbytes(unit.run.store.get(key)) for key in keys)
    total = first * unit.run.uses(unit.unit, 0) * sum(unit.run.sizes) / unit.run.sizes[0]
    unused = torch.cuda.memory_reserved(unit.device) - torch.cuda.memory_allocated(unit.device)
    return 2 * total <= torch.cuda.mem_get_info(unit.device)[0] + unused


def rows(unit: UnitContext, data: Samples | Tensor, index: Tensor) -> Tree:
    """The chosen samples on the unit's device. What lies in host memory is copied while the device still works on
    earlier steps."""
    return map_tensors(lambda t: _sent(t, unit.device), data[index] if isinstance(data, Tensor) else data.rows(index))


def _sent(t: Tensor, device: torch.device) -> Tensor:
    return t if t.device.type == device.type else t.pin_memory().to(device, non_blocking=True)


def _laid_out(unit: UnitContext, data: Samples) -> Samples:
    """Images with their channels innermost, as a GPU's convolutions read them, where the unit convolves on one.

    Shapes and values stay. A unit that looks at a tensor through `view` may demand the usual layout and keeps it.
    """
    ops = {unit.graph.calls[index].op for index in unit.unit.calls}
    if unit.device.type == "cuda" and "conv2d" in ops and "view" not in ops:
        data.leaves = [
            innermost(leaf) if per_sample and isinstance(leaf, Tensor) else leaf
            for leaf, per_sample in zip(data.leaves, data.per_sample, strict=True)
        ]
    return data


def innermost(x: Tensor) -> Tensor:
    """A floating-point image tensor with its channels innermost in memory; any other as it is."""
    if x.dim() != 4 or not x.is_floating_point():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def cheap_norms(unit: UnitContext) -> AbstractContextManager[Any]:
    """Inside, on a GPU, batch norms of the unit that only add a constant are run as that addition, whose gradient costs
    nothing."""
    if unit.device.type != "cuda":
        return nullcontext()
    return _AddedConstants(unit)


class _AddedConstants(TorchFunctionMode):
    """Runs batch norms with the running variances given to it as additions."""

    def __init__(self, unit: UnitContext) -> None:
        super().__init__()
        self.variances: list[Tensor] = []
        for index in unit.unit.calls:
            call = unit.graph.calls[index]
            names = [unit.graph.stored_in(call, slot) for slot in ("running_mean", "running_var", "weight", "bias")]
            if call.op != "batch_norm" or None in names:
                continue
            mean, var, weight, _ = (operands.parameter(unit.model, str(name)) for name in names)
            eps = call.kwargs.get("eps", call.args[7] if len(call.args) > 7 else 1e-5)
            if bool((mean == 0).all() & (weight == 1).all() & ((var - (1 - eps)).abs() < 1e-7).all()):
                self.variances.append(var)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and not kwargs.get("training") and not (len(args) > 5 and args[5]):
            var = kwargs["running_var"] if "running_var" in kwargs else args[2]
            bias = kwargs["bias"] if "bias" in kwargs else args[4] if len(args) > 4 else None
            if bias is not None and any(var is known for known in self.variances):
                return args[0] + bias.view(-1, *[1] * (args[0].dim() - 2))
        return func(*args, **kwargs)
