"""Statistics gathered at sites in one pass: declared by steps, shared where two sites read the same tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Granularity
from fewbits.graph.types import Call, Site
from fewbits.rounding.hessian import HessianAccumulator, conv_patches


class Statistic(ABC):
    """Something accumulated over calibration batches. Statistics of equal `key` at one tensor are gathered once."""

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]: ...

    @abstractmethod
    def update(self, x: Tensor, samples: int) -> None:
        """Take in the tensor of one batch of `samples` sequences or images."""

    @abstractmethod
    def value(self) -> Any:
        """The result; raises `FewbitsError` where nothing was seen."""


class AbsMax(Statistic):
    """Running max of |x| per channel along `axis`, float32 (C,)."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self._max: Tensor | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return ("absmax", self.axis)

    @property
    def seen(self) -> bool:
        """Whether any data reached the site."""
        return self._max is not None

    def update(self, x: Tensor, samples: int) -> None:
        if not x.numel():
            return
        seen = x.detach().float().abs().transpose(self.axis, -1).flatten(0, -2).amax(0)
        self._max = seen if self._max is None else torch.maximum(self._max, seen)

    def value(self) -> Tensor:
        if self._max is None:
            raise FewbitsError("no calibration data reached this site")
        return self._max


class Bounds(Statistic):
    """Running minimum and maximum per block of a granularity whose parameters do not depend on the batch, float32."""

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self._lo: Tensor | None = None
        self._hi: Tensor | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return ("bounds", self.granularity)

    def update(self, x: Tensor, samples: int) -> None:
        x = x.detach().float()
        lo = self.granularity.reduce(x, lambda block: block.amin(1))
        hi = self.granularity.reduce(x, lambda block: block.amax(1))
        self._lo = lo if self._lo is None else torch.minimum(self._lo, lo)
        self._hi = hi if self._hi is None else torch.maximum(self._hi, hi)

    def value(self) -> tuple[Tensor, Tensor]:
        if self._lo is None or self._hi is None:
            raise FewbitsError("no calibration data reached this site")
        return self._lo, self._hi


class Values(Statistic):
    """The tensors themselves, joined along the first axis, up to `limit` samples."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._parts: list[Tensor] = []
        self._seen = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return ("values", self.limit)

    def update(self, x: Tensor, samples: int) -> None:
        if self._seen >= self.limit:
            return
        take = min(samples, self.limit - self._seen)
        rows = x.shape[0] if x.dim() else 1
        self._parts.append(x.detach().float()[: max(1, rows * take // samples)].clone())
        self._seen += take

    def value(self) -> Tensor:
        if not self._parts:
            raise FewbitsError("no calibration data reached this site")
        return torch.cat(self._parts)


class Hessian(Statistic):
    """H = (2/N) sum x^T x of the columns a weighted call multiplies its weight matrix with (`rounding.hessian`).

    `call` tells the layer's geometry: convolutions are unfolded with their own stride, padding, dilation and groups.
    """

    def __init__(self, site: Site, call: Call, device: torch.device) -> None:
        self.call = call
        self.site = site
        self.conv = call.op in ("conv1d", "conv2d", "conv3d")
        if not self.conv and (call.op not in ("linear", "addmm", "matmul") and not call.op.startswith("linear")):
            raise FewbitsError(f"{site.name}: no Hessian is defined for {call.op}")
        _, *rest = _canonical_shape(site)
        columns = 1
        for size in rest:
            columns *= size
        self.kernel = tuple(rest[1:])
        self.accumulator = HessianAccumulator(columns, groups=site.groups if self.conv else 1, device=device)

    @property
    def key(self) -> tuple[Any, ...]:
        geometry = tuple(self._geometry().items()) if self.conv else (self.site.slot,)
        return ("hessian", self.kernel, self.site.groups, repr(geometry))

    def update(self, x: Tensor, samples: int) -> None:
        x = x.detach()
        if self.conv:
            x = conv_patches(x, self.kernel, **self._geometry())
        elif self.site.op in ("matmul",) and self.site.slot == "lhs":
            x = x.transpose(-2, -1)
        self.accumulator.add(x, samples=samples)

    def value(self) -> Tensor:
        return self.accumulator.value

    def _geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        args = self.call.args
        given = {name: args[place] for place, name in enumerate(names, start=3) if place < len(args)}
        return {**given, **{name: self.call.kwargs[name] for name in names if name in self.call.kwargs}}


def _canonical_shape(site: Site) -> tuple[int, ...]:
    shape = site.shape
    if site.layout == "io":
        return (*shape[:-2], shape[-1], shape[-2])
    return shape
