"""How finely a format's parameters vary over a tensor.

A granularity splits a tensor into blocks that share parameters. `blocks` gives them as 2-D tensors [blocks, values] for
fitting, `assemble` puts what was fitted into the param shape, `expand` makes that broadcast against the tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.registry import Described, Registry

Shape = Sequence[int]


class Granularity(Described, ABC):
    """A partition of a tensor into blocks. Block order is the row-major order of the param shape."""

    @abstractmethod
    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        """Shape of a plain parameter for a tensor of `shape`. Raises FewbitsError where the tensor does not fit."""

    @abstractmethod
    def blocks(self, x: Tensor) -> list[Tensor]:
        """The values of `x` as 2-D tensors [n_blocks, values_per_block]; two of them where a ragged last group
        exists."""

    @abstractmethod
    def assemble(self, parts: list[Tensor], shape: Shape) -> Tensor:
        """What was computed per block ([..., n_blocks] for every tensor `blocks` gave) as [...,
        *param_shape(shape)]."""

    def expand(self, param: Tensor, shape: Shape) -> Tensor:
        """`param` ([..., *param_shape]) so that it broadcasts against a tensor of `shape`; leading axes stay in
        front."""
        expected = self.param_shape(shape)
        lead = param.ndim - len(expected)
        if lead < 0 or tuple(param.shape[lead:]) != expected:
            raise FewbitsError(
                f"parameter of shape {tuple(param.shape)} does not fit a tensor of shape {tuple(shape)}: "
                f"{self.describe()} needs {expected}"
            )
        return self._expand(param, lead, shape)

    @abstractmethod
    def _expand(self, param: Tensor, lead: int, shape: Shape) -> Tensor: ...

    def reduce(self, x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """`fn` maps blocks [n, values] to one number each [n]; returns them in param shape. Exact on ragged groups."""
        return self.assemble([fn(block) for block in self.blocks(x)], x.shape)

    def count(self, shape: Shape) -> int:
        """Number of blocks of a tensor of `shape`."""
        return _product(self.param_shape(shape))

    def describe(self) -> str:
        """Short text for messages."""
        fields = ", ".join(f"{key}={value}" for key, value in self.to_dict().items() if key != "kind")
        return f"{self.kind}({fields})" if fields else self.kind


granularities: Registry[Granularity] = Registry("granularity")


def granularity_from_dict(data: dict[str, Any]) -> Granularity:
    """The granularity described by `Granularity.to_dict()` output; FewbitsError for anything else."""
    return granularities.from_dict(data)


def _product(sizes: Shape) -> int:
    # not math.prod: this runs inside compiled forwards, on symbolic sizes too
    out = 1
    for size in sizes:
        out = out * size
    return out


def _axis(axis: int, shape: Shape, what: str) -> int:
    if not -len(shape) <= axis < len(shape):
        raise FewbitsError(f"{what}: axis {axis} does not exist in a tensor of shape {tuple(shape)}")
    return axis % len(shape)


@granularities.register
@dataclass(frozen=True)
class PerTensor(Granularity):
    """One block: the whole tensor. Param shape ()."""

    kind: ClassVar[str] = "tensor"

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        return ()

    def blocks(self, x: Tensor) -> list[Tensor]:
        return [x.reshape(1, -1)]

    def assemble(self, parts: list[Tensor], shape: Shape) -> Tensor:
        return parts[0].squeeze(-1)

    def _expand(self, param: Tensor, lead: int, shape: Shape) -> Tensor:
        return param.reshape(*param.shape, *[1] * len(shape)) if lead else param


@dataclass(frozen=True)
class _KeepsAxes(Granularity):
    """Blocks indexed by some axes of the tensor; the others are reduced and keep size 1 in the param shape."""

    def kept(self, shape: Shape) -> list[int]:
        raise NotImplementedError

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        kept = self.kept(shape)
        return tuple(size if axis in kept else 1 for axis, size in enumerate(shape))

    def blocks(self, x: Tensor) -> list[Tensor]:
        kept = self.kept(x.shape)
        rest = [axis for axis in range(x.ndim) if axis not in kept]
        rows = _product([x.shape[axis] for axis in kept])
        cols = _product([x.shape[axis] for axis in rest])
        return [x.permute(*kept, *rest).reshape(rows, cols)]

    def assemble(self, parts: list[Tensor], shape: Shape) -> Tensor:
        return parts[0].reshape(*parts[0].shape[:-1], *self.param_shape(shape))

    def _expand(self, param: Tensor, lead: int, shape: Shape) -> Tensor:
        return param


@granularities.register
@dataclass(frozen=True)
class PerChannel(_KeepsAxes):
    """One block per index of `axis`; param shape (1, ..., n, ..., 1). Channel 0 of a conv weight: (out, 1, 1, 1)."""

    kind: ClassVar[str] = "channel"
    axis: int = 0

    def kept(self, shape: Shape) -> list[int]:
        return [_axis(self.axis, shape, "channel granularity")]


@granularities.register
@dataclass(frozen=True)
class PerToken(_KeepsAxes):
    """One block per slice along `axis` (the feature axis); param shape is the tensor's with that axis 1."""

    kind: ClassVar[str] = "token"
    axis: int = -1

    def kept(self, shape: Shape) -> list[int]:
        feature = _axis(self.axis, shape, "token granularity")
        return [axis for axis in range(len(shape)) if axis != feature]


@granularities.register
@dataclass(frozen=True)
class PerHead(Granularity):
    """One block per attention head.

    heads=None: `axis` is the head axis ([batch, head, token, dim], axis 1). heads=n: `axis` holds n heads of equal
    width side by side ([batch, token, n*dim], axis -1); the param shape then has n at that axis.
    """

    kind: ClassVar[str] = "head"
    axis: int = 1
    heads: int | None = None

    def _split(self, shape: Shape) -> tuple[int, int, int]:
        axis = _axis(self.axis, shape, "head granularity")
        heads = shape[axis] if self.heads is None else self.heads
        if heads < 1 or shape[axis] % heads:
            raise FewbitsError(
                f"head granularity: axis {axis} of shape {tuple(shape)} does not split into {heads} heads"
            )
        return axis, heads, shape[axis] // heads

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        axis, heads, _ = self._split(shape)
        return tuple(heads if at == axis else 1 for at in range(len(shape)))

    def blocks(self, x: Tensor) -> list[Tensor]:
        axis, heads, _ = self._split(x.shape)
        return [x.movedim(axis, 0).reshape(heads, x.numel() // heads)]

    def assemble(self, parts: list[Tensor], shape: Shape) -> Tensor:
        return parts[0].reshape(*parts[0].shape[:-1], *self.param_shape(shape))

    def _expand(self, param: Tensor, lead: int, shape: Shape) -> Tensor:
        axis, heads, width = self._split(shape)
        if width == 1 or heads == 1:
            return param
        at = lead + axis
        wide = param.unsqueeze(at + 1)
        wide = wide.expand(*wide.shape[: at + 1], width, *wide.shape[at + 2 :])
        return wide.reshape(*param.shape[:at], heads * width, *param.shape[at + 1 :])


@granularities.register
@dataclass(frozen=True)
class PerGroup(Granularity):
    """Runs of `size` neighbours along `axis` share parameters; [out, in] has param shape (out, ceil(in/size)).

    The last group is shorter where `size` does not divide the axis. `rows=True` treats the tensor as the matrix
    [shape[0], everything else] first (conv weights grouped along flattened ci*kh*kw as GPTQ does); param shape (out,
    groups).
    """

    kind: ClassVar[str] = "group"
    size: int = 128
    axis: int = -1
    rows: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FewbitsError(f"group granularity: size must be at least 1, got {self.size}")
        if self.rows and self.axis not in (-1, 1):
            raise FewbitsError("group granularity: rows=True groups along the flattened last axis; leave axis at -1")

    def _view_shape(self, shape: Shape) -> tuple[int, ...]:
        if not self.rows:
            return tuple(shape)
        if not shape:
            raise FewbitsError("group granularity: rows=True needs a tensor with at least one axis")
        return (shape[0], _product(shape[1:]))

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        view = self._view_shape(shape)
        axis = _axis(self.axis, view, "group granularity")
        return tuple(-(-size // self.size) if at == axis else size for at, size in enumerate(view))

    def blocks(self, x: Tensor) -> list[Tensor]:
        view = x.reshape(self._view_shape(x.shape))
        axis = _axis(self.axis, view.shape, "group granularity")
        last = view.movedim(axis, -1)
        length = last.shape[-1]
        full = length // self.size
        parts = []
        if full:
            parts.append(last[..., : full * self.size].reshape(-1, self.size))
        if length - full * self.size:
            parts.append(last[..., full * self.size :].reshape(-1, length - full * self.size))
        return parts

    def assemble(self, parts: list[Tensor], shape: Shape) -> Tensor:
        view = self._view_shape(shape)
        axis = _axis(self.axis, view, "group granularity")
        others = [size for at, size in enumerate(view) if at != axis]
        full = view[axis] // self.size
        counts = ([full] if full else []) + ([1] if view[axis] % self.size else [])
        grid = [part.reshape(*part.shape[:-1], *others, count) for part, count in zip(parts, counts, strict=True)]
        joined = torch.cat(grid, dim=-1)
        return joined.movedim(-1, joined.ndim - len(view) + axis)

    def _expand(self, param: Tensor, lead: int, shape: Shape) -> Tensor:
        view = self._view_shape(shape)
        at = lead + _axis(self.axis, view, "group granularity")
        wide = param.unsqueeze(at + 1)
        wide = wide.expand(*wide.shape[: at + 1], self.size, *wide.shape[at + 2 :])
        wide = wide.reshape(*param.shape[:at], param.shape[at] * self.size, *param.shape[at + 1 :])
        wide = wide.narrow(at, 0, view[at - lead])
        return wide.reshape(*param.shape[:lead], *shape) if self.rows else wide
