"""Statistics gathered at sites in one pass: declared by steps, shared where two sites read the same tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from fewbits.correction.bias import channel_mean
from fewbits.errors import FewbitsError
from fewbits.formats import Granularity
from fewbits.graph.types import Call, Site
from fewbits.ranges.analytic import BlockMoments, block_moments
from fewbits.rounding.hessian import HessianAccumulator, conv_patches


class Statistic(ABC):
    """Something accumulated over calibration batches. Statistics of equal `key` at one tensor are gathered once."""

    @property
    def hessian_arithmetic(self) -> Set[str]:
        """How a Hessian was added up (`rounding.hessian`), which depends on the device and the inputs."""
        return frozenset()

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

    @property
    def seen(self) -> bool:
        """Whether any data reached the site."""
        return self._lo is not None

    def value(self) -> tuple[Tensor, Tensor]:
        if self._lo is None or self._hi is None:
            raise FewbitsError("no calibration data reached this site")
        return self._lo, self._hi


class MovingBounds(Bounds):
    """Exponential moving averages of the minimum and maximum of each batch, per block of a granularity, float32.

    `smoothing`, from 0 to below 1, is the weight of what was seen before; the first batch starts the average.
    """

    def __init__(self, granularity: Granularity, smoothing: float) -> None:
        super().__init__(granularity)
        self.smoothing = smoothing

    @property
    def key(self) -> tuple[Any, ...]:
        return ("moving bounds", self.granularity, self.smoothing)

    def update(self, x: Tensor, samples: int) -> None:
        batch = Bounds(self.granularity)
        batch.update(x, samples)
        lo, hi = batch.value()
        if self._lo is not None and self._hi is not None:
            lo, hi = (new.lerp(old, self.smoothing) for old, new in ((self._lo, lo), (self._hi, hi)))
        self._lo, self._hi = lo, hi


class ChannelMean(Statistic):
    """Mean over everything but the channel axis, float64 (C,)."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._sum: Tensor | None = None
        self._count = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return ("channel_mean", self.axis)

    @property
    def seen(self) -> bool:
        """Whether any data reached the site."""
        return self._count > 0

    def update(self, x: Tensor, samples: int) -> None:
        if not x.numel():
            return
        count = x.numel() // x.shape[self.axis]
        total = channel_mean(x.detach(), self.axis) * count
        self._sum = total if self._sum is None else self._sum + total
        self._count += count

    def value(self) -> Tensor:
        if self._sum is None:
            raise FewbitsError("no calibration data reached this site")
        return self._sum / self._count


class SampleMoments(Statistic):
    """Moments per block of a granularity whose parameters do not depend on the batch: the mean over samples of those
    of each sample, and the extremes of all of them."""

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self._sums: list[Tensor] | None = None
        self._ends: tuple[Tensor, Tensor] | None = None
        self._count = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return ("moments", self.granularity)

    def update(self, x: Tensor, samples: int) -> None:
        if not x.numel():
            return
        x = x.detach().float()
        rows = x.shape[0] if x.dim() else 1
        for part in x.split(rows // samples) if x.dim() and rows % samples == 0 else [x]:
            found = [block_moments(block) for block in self.granularity.blocks(part)]
            *means, low, high = (
                self.granularity.assemble(list(field), part.shape) for field in zip(*found, strict=True)
            )
            self._sums = [
                mean.double() + (0 if self._sums is None else self._sums[place]) for place, mean in enumerate(means)
            ]
            before = (low, high) if self._ends is None else self._ends
            self._ends = torch.minimum(before[0], low), torch.maximum(before[1], high)
            self._count += 1

    def value(self) -> BlockMoments:
        if self._sums is None or self._ends is None:
            raise FewbitsError("no calibration data reached this site")
        mean, absolute, standard = ((total / self._count).float() for total in self._sums)
        return BlockMoments(mean, absolute, standard, *self._ends)


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


class Calls(Statistic):
    """The tensor of every call, in order: a list, float32."""

    def __init__(self) -> None:
        self._calls: list[Tensor] = []

    @property
    def key(self) -> tuple[Any, ...]:
        return ("calls",)

    def update(self, x: Tensor, samples: int) -> None:
        self._calls.append(x.detach().float().clone())

    def value(self) -> list[Tensor]:
        if not self._calls:
            raise FewbitsError("no calibration data reached this site")
        return self._calls


class AbsMean(Statistic):
    """Mean of |x| per channel along `axis` over everything seen, float32 (C,)."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self._sum: Tensor | None = None
        self._count = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return ("absmean", self.axis)

    @property
    def seen(self) -> bool:
        """Whether any data reached the site."""
        return self._sum is not None

    def update(self, x: Tensor, samples: int) -> None:
        if not x.numel():
            return
        rows = x.detach().abs().transpose(self.axis, -1).flatten(0, -2)
        # A GPU adds up in pairs, for which float32 is enough, and would make a float64 copy of everything first.
        total = rows.sum(0, dtype=torch.float32 if rows.is_cuda else torch.float64).double()
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)

    @property
    def rows(self) -> int:
        """How many vectors of channels were seen (tokens, positions)."""
        return self._count

    def value(self) -> Tensor:
        if self._sum is None:
            raise FewbitsError("no calibration data reached this site")
        return (self._sum / self._count).float()


_CONVS = ("conv1d", "conv2d", "conv3d")


def multiplies_rows(call: Call) -> bool:
    """Whether a call's weight matrix multiplies rows of its input (`LayerInput`)."""
    return call.op in (*_CONVS, "linear", "addmm", "matmul")


class LayerInput:
    """How a weighted call turns its input into the rows that its weight matrix (out, columns) multiplies.

    Convolutions are unfolded with their own stride, padding, dilation and groups. Raises `FewbitsError` for a call
    whose weight does not multiply rows of its input.
    """

    def __init__(self, site: Site, call: Call) -> None:
        self.call = call
        self.site = site
        self.conv = call.op in _CONVS
        if not multiplies_rows(call):
            raise FewbitsError(f"{site.name}: the weight of {call.op} does not multiply rows of its input")
        _, *rest = _canonical_shape(site)
        self.columns = 1
        for size in rest:
            self.columns *= size
        self.kernel = tuple(rest[1:])
        self.groups = site.groups if self.conv else 1

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for layers that make the same rows of one tensor."""
        geometry = tuple(self._geometry().items()) if self.conv else (self.site.slot,)
        return (self.kernel, self.site.groups, repr(geometry))

    def rows(self, x: Tensor) -> Tensor:
        """[N, ..., columns], or for a grouped convolution [N, groups, positions, columns]."""
        if self.conv:
            return conv_patches(x, self.kernel, **self._geometry())
        if self.site.op == "matmul" and self.site.slot == "lhs":
            return x.transpose(-2, -1)
        return x

    def _geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        args = self.call.args
        given = {name: args[place] for place, name in enumerate(names, start=3) if place < len(args)}
        return {**given, **{name: self.call.kwargs[name] for name in names if name in self.call.kwargs}}


_GOLDEN = (5**0.5 - 1) / 2  # its multiples, taken modulo 1, fill the unit interval most evenly


class Rows(Statistic):
    """Rows of a layer's input taken at even steps, float32 (groups, at least `limit` where there are as many, columns).

    Of n rows every max(1, n // limit)-th is kept, as AWQ's released code does. Of a convolution's positions one in each
    such stretch is kept, at a place that wanders from stretch to stretch: even steps through an image tend to divide
    its width, and then see nothing but one border. `samples` is how many samples will come; n is foretold from the
    first batch.
    """

    def __init__(self, site: Site, call: Call, samples: int, limit: int = 512) -> None:
        self.input = LayerInput(site, call)
        self.samples, self.limit = samples, limit
        self._parts: list[Tensor] = []
        self._stride = 0
        self._past = 0  # rows that came before

    @property
    def key(self) -> tuple[Any, ...]:
        return ("rows", self.limit, *self.input.key)

    @property
    def seen(self) -> bool:
        """Whether any data reached the site."""
        return bool(self._parts)

    def update(self, x: Tensor, samples: int) -> None:
        rows = self.input.rows(x.detach())
        if self.input.groups > 1:
            rows = rows.transpose(0, 1).flatten(1, 2)
        else:
            rows = rows.reshape(1, -1, self.input.columns)
        count = rows.shape[1]
        if not count:
            return
        if not self._stride:
            self._stride = max(1, count * self.samples // samples // self.limit)
        self._parts.append(rows[:, self._places(count)].float())
        self._past += count

    def _places(self, count: int) -> list[int]:
        """Which of the next `count` rows are kept."""
        stride, past = self._stride, self._past
        blocks = range(past // stride, (past + count - 1) // stride + 1)
        kept = [b * stride + (int(b * _GOLDEN % 1 * stride) if self.input.conv else 0) - past for b in blocks]
        return [place for place in kept if 0 <= place < count]

    def value(self) -> Tensor:
        if not self._parts:
            raise FewbitsError("no calibration data reached this site")
        return torch.cat(self._parts, 1)


class Hessian(Statistic):
    """H = (2/N) sum x^T x of the columns a weighted call multiplies its weight matrix with (`rounding.hessian`)."""

    def __init__(self, site: Site, call: Call, device: torch.device) -> None:
        self.input = LayerInput(site, call)
        self.device = device
        self._accumulator: HessianAccumulator | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return ("hessian", *self.input.key)

    @property
    def accumulator(self) -> HessianAccumulator:
        """Its memory is taken when it is first wanted: layers on one input share one."""
        if self._accumulator is None:
            columns, groups = self.input.columns, self.input.groups
            self._accumulator = HessianAccumulator(columns, groups=groups, device=self.device)
        return self._accumulator

    @property
    def hessian_arithmetic(self) -> Set[str]:
        return frozenset() if self._accumulator is None else self._accumulator.arithmetic

    def update(self, x: Tensor, samples: int) -> None:
        self.accumulator.add(self.input.rows(x.detach()), samples=samples)

    def value(self) -> Tensor:
        return self.accumulator.value


def _canonical_shape(site: Site) -> tuple[int, ...]:
    shape = site.shape
    if site.layout == "io":
        return (*shape[:-2], shape[-1], shape[-2])
    return shape
