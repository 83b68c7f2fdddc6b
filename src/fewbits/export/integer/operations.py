"""The kinds of operation of an integer program: what each does with registers, numbers and integer tensors.

All are thin: the arithmetic is `fewbits.kernels.integer_ops`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels import integer_ops as ops
from fewbits.kernels.fixed_point import Multiplier

Reads = list[Tensor]
Attributes = dict[str, Any]
Tensors = dict[str, Tensor]

#: Ops that only move codes.
LAYOUT: dict[str, Callable[..., Any]] = {
    "view": torch.Tensor.reshape,
    "reshape": torch.Tensor.reshape,
    "flatten": torch.Tensor.flatten,
    "unflatten": torch.Tensor.unflatten,
    "transpose": torch.Tensor.transpose,
    "permute": torch.Tensor.permute,
    "unsqueeze": torch.Tensor.unsqueeze,
    "squeeze": torch.Tensor.squeeze,
    "contiguous": torch.Tensor.contiguous,
    "clone": torch.Tensor.clone,
    "detach": torch.Tensor.detach,
    "chunk": torch.Tensor.chunk,
    "split": torch.Tensor.split,
    "unbind": torch.Tensor.unbind,
    "swapaxes": torch.Tensor.swapaxes,
    "movedim": torch.Tensor.movedim,
    "narrow": torch.Tensor.narrow,
    "select": torch.Tensor.select,
    "flip": torch.Tensor.flip,
    "roll": torch.Tensor.roll,
    "pixel_shuffle": torch.nn.functional.pixel_shuffle,
    "pixel_unshuffle": torch.nn.functional.pixel_unshuffle,
    "channel_shuffle": torch.nn.functional.channel_shuffle,
}


def _finish(acc: Tensor, attributes: Attributes, tensors: Tensors, axis: int = -1) -> Tensor:
    """Codes of an accumulator, or the accumulator itself where the operation is to put that out."""
    if "mantissa" not in tensors:
        return acc
    out = ops.Output(
        Multiplier(tensors["mantissa"], tensors["shift"]), tensors["zero"], attributes["low"], attributes["high"]
    )
    return out(acc, axis)


def _linear(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    acc = ops.linear(reads[0], tensors["zero_x"], tensors["weight"], tensors["zero_w"], tensors.get("bias"))
    return _finish(acc, attributes, tensors)


def _convolution(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    geometry = {name: attributes[name] for name in ("stride", "padding", "dilation", "groups")}
    acc = ops.convolution(
        reads[0], tensors["zero_x"], tensors["weight"], tensors["zero_w"], tensors.get("bias"), **geometry
    )
    return _finish(acc, attributes, tensors, 1)


def _product(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return _finish(ops.product(reads[0], tensors["zero_a"], reads[1], tensors["zero_b"]), attributes, tensors)


def _add(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    factors = [Multiplier(tensors[f"mantissa_{side}"], tensors[f"shift_{side}"]) for side in "ab"]
    acc = ops.add(reads[0], tensors["zero_a"], reads[1], tensors["zero_b"], (factors[0], factors[1]))
    return _finish(acc, attributes, tensors)


def _multiply(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return _finish(ops.multiply(reads[0], tensors["zero_a"], reads[1], tensors["zero_b"]), attributes, tensors)


def _rescale(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return _finish(ops.rescale(reads[0], tensors["zero_x"]), attributes, tensors)


def _channels(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    acc = ops.affine_channels(reads[0], tensors["zero_x"], tensors["weight"], tensors["bias"])
    return _finish(acc, attributes, tensors, 1)


def _concatenate(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return ops.concatenate(reads, attributes["axis"])


def _average(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return ops.average_pool(
        reads[0], tensors["zero_x"], attributes["kernel"], attributes["stride"], attributes["padding"],
        ceil_mode=attributes["ceil_mode"], count_include_pad=attributes["count_include_pad"],
    )  # fmt: skip


def _global_average(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return ops.global_average(reads[0], tensors["zero_x"], attributes["axes"], attributes["keepdim"])


def _max_pool(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return ops.max_pool(reads[0], **attributes)


def _table(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return ops.look_up(reads[0], tensors["table"])


def _pad(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    return torch.nn.functional.pad(reads[0], attributes["pad"], value=attributes["code"])


def _layout(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    made = LAYOUT[attributes["op"]](reads[0], *attributes["args"], **attributes["keywords"])
    return made[attributes["part"]] if isinstance(made, (tuple, list)) else made


def _pick(reads: Reads, attributes: Attributes, tensors: Tensors) -> Tensor:
    index = tuple(slice(*item) if isinstance(item, list) else ... if item == "..." else item
                  for item in attributes["index"])  # fmt: skip
    return reads[0][index]


RUN: dict[str, Callable[[Reads, Attributes, Tensors], Tensor]] = {
    "add": _add,
    "average": _average,
    "channels": _channels,
    "concatenate": _concatenate,
    "convolution": _convolution,
    "global_average": _global_average,
    "layout": _layout,
    "linear": _linear,
    "max_pool": _max_pool,
    "multiply": _multiply,
    "pad": _pad,
    "pick": _pick,
    "product": _product,
    "rescale": _rescale,
    "table": _table,
}
