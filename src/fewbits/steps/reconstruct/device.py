"""Where the data of a reconstruction lies, and how, as suits a GPU.

On a CPU nothing here does anything, so that results there do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.engine.tree import Samples, Tree, map_tensors, nbytes


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
