"""The arithmetic of the steps that reconstruct a unit: float32, or 16 bits where that is safe.

Mixed precision (Micikevicius et al., ICLR 2018) around the unit alone. Convolutions and products run in 16 bits, as
`torch.autocast` sorts operations, and so does whatever lies between them. What is learned, its gradients, Adam, the
regulariser and the loss behind the unit's output are float32.

bfloat16 has the range of float32 and 8 bits of precision. float16 has the 11 bits of TF32, in which GPUs multiply
float32 convolutions, but a small range: gradients of a mean over all positions of an output fall below its smallest
number. They travel the unit multiplied by a power of two (section 3.2 there), which changes no digit. It is fixed, so
there is no state to keep and every step is the same work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewbits.engine.context import UnitContext
from fewbits.engine.tree import Samples
from fewbits.errors import FewbitsError
from fewbits.reconstruction.steps import Group, Number, Steady

Arithmetic = Literal["float32", "bfloat16", "float16"]

SMALLEST = 1e-12  # weight of a loss that gradients are still scaled for


def check(arithmetic: str) -> None:
    """Raises FewbitsError for anything that is no `Arithmetic`."""
    if arithmetic not in get_args(Arithmetic):
        raise FewbitsError(f"arithmetic {arithmetic!r}: choose one of {', '.join(get_args(Arithmetic))}")


def running(arithmetic: Arithmetic, device: torch.device) -> AbstractContextManager[Any]:
    """Around a unit's forward. With "float32" the unit runs in the model's own types."""
    if arithmetic == "float32":
        return nullcontext()
    # Learned weights are new at every step, and what one recorded step has kept must not be read in another.
    return torch.autocast(device.type, dtype=getattr(torch, arithmetic), cache_enabled=False)


def narrowed(unit: UnitContext, arithmetic: Arithmetic, *data: Samples) -> Arithmetic:
    """Holds samples in 16 bits, in place, and returns the arithmetic that the unit can run in.

    Inputs lose nothing: the unit's products round them to 16 bits in any case, and additions give 16 bits. Targets lose
    what the outputs that they are compared with lose too, half a unit in the last place each, and errors below that
    carry no gradient. Leaves that belong to no sample (tables, masks) keep their type. The lowest number of a type,
    which masks write for minus infinity, becomes the lowest that 16 bits hold.

    "float32", and a note, where a number of any sample is too large for the type; nothing is changed then.
    """
    if arithmetic == "float32":
        return arithmetic
    dtype = getattr(torch, arithmetic)
    if any(rows and _overflows(leaf, dtype) for part in data for leaf, rows in _leaves(part)):
        unit.note(f"{unit.name}: its samples hold numbers too large for {arithmetic}, learned in float32")
        return "float32"
    for part in data:
        for place, (leaf, rows) in enumerate(list(_leaves(part))):
            part.leaves[place] = _narrow(leaf, dtype, bool(rows))
    return arithmetic


def narrowed_tensors(unit: UnitContext, arithmetic: Arithmetic, *data: Tensor) -> tuple[Arithmetic, list[Tensor]]:
    """`narrowed` of tensors whose first axis is the samples: (arithmetic, tensors)."""
    parts = [Samples([x], [1], None, len(x)) for x in data]
    return narrowed(unit, arithmetic, *parts), [part.leaves[0] for part in parts]


def _leaves(data: Samples) -> Iterator[tuple[Any, int]]:
    return zip(data.leaves, data.per_sample, strict=True)


def _narrow(leaf: Any, dtype: torch.dtype, per_sample: bool) -> Any:
    """A leaf with the lowest number replaced, in 16 bits where it is per sample; no floating-point tensor: itself."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.element_size() < 4:
        return leaf
    lowest = leaf == torch.finfo(leaf.dtype).min
    if bool(lowest.any()):
        leaf = leaf.masked_fill(lowest, torch.finfo(dtype).min)
    return leaf.to(dtype) if per_sample else leaf


def _overflows(leaf: Any, dtype: torch.dtype) -> bool:
    """Whether a number becomes infinite in the type; the lowest of its own type does not count."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.element_size() < 4 or leaf.numel() == 0:
        return False
    low, high = leaf.aminmax()
    most = torch.finfo(dtype).max
    if bool((low >= -most) & (high <= most)):  # as a rule, and nothing is copied
        return False
    counted = leaf[leaf.isfinite() & (leaf != torch.finfo(leaf.dtype).min)]
    return bool(counted.to(dtype).isinf().any())


# -- gradients -------------------------------------------------------------------------------------------------------


def gradient_scale(arithmetic: Arithmetic, positions: int, weight: float = 1.0) -> float:
    """The power of two by which gradients are multiplied inside the unit: 1 unless the arithmetic is float16.

    positions: P, of the unit's output in one batch, over which the loss is a mean. weight: how many times larger the
    loss's gradient is than that of the plain squared error.

    An output error e has the gradient 2e/P; that of a weight is a sum of P products of such gradients with inputs,
    which cancel or, at worst, add up. With the gradients times sqrt(P) the former are e times 2/sqrt(P) and the latter
    at most the mean product times 2 sqrt(P): as far from float16's smallest number as from its largest.
    """
    if arithmetic != "float16":
        return 1.0
    return 2.0 ** round(math.log2(max(positions, 1)) / 2 - math.log2(max(weight, SMALLEST)))


@contextmanager
def magnified(loss: Steady, groups: Sequence[Group], scale: float) -> Iterator[Steady]:
    """The loss, of which every gradient is `scale` times as large, while those that reach the parameters of the groups
    are divided by it again.

    scale: a power of two. Parameters are float32, where neither changes a digit. The error of a run whose loss became
    NaN or infinite says what float16 has to do with it.
    """
    if scale == 1:
        yield loss
        return

    def function(index: Tensor, number: Number) -> Tensor:
        return _Magnified.apply(loss.function(index, number), scale)

    hooks = [p.register_hook(lambda gradient: gradient * (1 / scale)) for group in groups for p in group.parameters]
    try:
        yield dataclasses.replace(loss, function=function)
    except FewbitsError as error:
        if "NaN or infinite" not in str(error):
            raise
        raise FewbitsError(f"{error}; float16 holds nothing beyond 65504: take bfloat16 or float32") from error
    finally:
        for hook in hooks:
            hook.remove()


class _Magnified(torch.autograd.Function):
    """A tensor as it is; its gradient times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
