"""Ranges from a few moments: the clip that a Laplace or normal prior says is best.

ACIQ (Banner, Nahshan, Soudry; NeurIPS 2019), section 3. Of a symmetric density clipped to [-a, a] and quantized to the
midpoints of 2^M bins, the expected squared error is a^2 / (3 2^2M), the rounding inside, plus twice the integral of
f(x) (x - a)^2 beyond a. Its minimum is a fixed number of deviations, which depends on M alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fewbits.allocation.channel_bits import BitRounding, allocate_bits, allocate_bits_in_rounds
from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params
from fewbits.formats.channel_bits import ChannelBits
from fewbits.ranges.base import Range, extremes, ranges

Prior = Literal["laplace", "gauss"]

#: Best clip in deviations (b or sigma) for M = 0, 1, ... 8 bits, as published (the normal one for 0 bits, which was
#: not, is solved). On half the range [0, a] the bins are those of M + 1 bits on [-a, a].
MULTIPLIERS: dict[tuple[Prior, bool], tuple[float, ...]] = {
    ("laplace", False): (1.05, 1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89),
    ("laplace", True): (1.86, 2.83, 3.89, 5.02, 6.2, 7.41, 8.64, 9.89, 11.16),
    ("gauss", False): (0.77, 1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92),
    ("gauss", True): (1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.2),
}


def expected_error(prior: Prior, clip: Tensor, deviation: float, bits: float) -> Tensor:
    """Expected squared error, float64, of values with this density clipped to [-clip, clip] at 2^bits levels.

    deviation: b of the Laplace density exp(-|x|/b)/(2b), or sigma of the normal one.
    """
    clip = clip.double()
    inside = clip.square() / (3 * 4.0**bits)
    if prior == "laplace":
        return 2 * deviation**2 * torch.exp(-clip / deviation) + inside
    ratio = clip / deviation
    beyond = (deviation**2 + clip.square()) * torch.erfc(ratio / math.sqrt(2))
    return beyond - math.sqrt(2 / math.pi) * clip * deviation * torch.exp(-ratio.square() / 2) + inside


@lru_cache(maxsize=256)
def best_multiplier(prior: Prior, bits: float, half: bool = False) -> float:
    """The clip of least expected error, in deviations: the root of its derivative, which only grows.

    half: of the range [0, a], which spends all its bins on one side. Any real bits >= 0.
    """
    bins = 4.0 ** (bits + half)

    def slope(a: float) -> float:
        inside = 2 * a / (3 * bins)
        if prior == "laplace":
            return inside - 2 * math.exp(-a)
        return inside + 2 * a * math.erfc(a / math.sqrt(2)) - 2 * math.sqrt(2 / math.pi) * math.exp(-a * a / 2)

    return _root(slope, 0.0, 1.0)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    while rising(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


_TABLES = {
    (prior, half): (*known, *(best_multiplier(prior, bits, half) for bits in range(len(known), 17)))
    for (prior, half), known in MULTIPLIERS.items()
}


class BlockMoments(NamedTuple):
    """What a clip is computed from, one float32 number per block: mean, b = E|x - mean|, unbiased standard deviation
    (0 for a single value), smallest and largest value."""

    mean: Tensor
    absolute: Tensor
    standard: Tensor
    low: Tensor
    high: Tensor


def block_moments(blocks: Tensor) -> BlockMoments:
    """Moments of float32 blocks [n, values >= 1], each [n]."""
    mean = blocks.mean(1)
    distance = (blocks - mean.unsqueeze(1)).abs()
    # squares of huge and tiny values leave float32: take them in units of the largest distance
    unit = distance.amax(1).clamp_min(torch.finfo(distance.dtype).tiny)
    squares = (distance / unit.unsqueeze(1)).square().sum(1)
    standard = unit * (squares / max(1, blocks.shape[1] - 1)).sqrt()
    return BlockMoments(mean, distance.mean(1), standard, *extremes(blocks))


@ranges.register
@dataclass(frozen=True)
class Analytic(Range):
    """A clip of so many deviations about the mean.

    prior: "laplace" (the multiple of b that is best for the bits of a block), "gauss" (of sigma), "deviations" (always
        `multiple` standard deviations), or "none" (no clip: the extremes).
    half: the range is [0, max(mean, 0) + clip], for values of which only the positive ones matter (a ReLU follows, or
        went before). Otherwise it is 2 clip wide and starts at mean - clip, or at the smallest value if that is higher.
    most: a known bound of the values above which nothing matters (6 for a ReLU6).

    On a `ChannelBits` format the blocks share its bits by their spread (b for "laplace", sigma otherwise), see
    `allocate_bits`, and each is clipped as is best for the bits it got. `rounding` is that of the bits; `budget`
    "rounds" meets their mean only as nearly as the released code.
    """

    kind: ClassVar[str] = "analytic"

    prior: Literal["laplace", "gauss", "deviations", "none"] = "laplace"
    half: bool = False
    most: float | None = None
    multiple: float = 2.0
    rounding: BitRounding = "round"
    budget: Literal["exact", "rounds"] = "exact"

    def __post_init__(self) -> None:
        choices = {
            "prior": ("laplace", "gauss", "deviations", "none"),
            "rounding": ("round", "ceil"),
            "budget": ("exact", "rounds"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise FewbitsError(f"analytic range: {name}={getattr(self, name)!r}; choose {', '.join(allowed)}")
        if not self.multiple > 0 or (self.most is not None and not self.most > 0):
            raise FewbitsError("analytic range: multiple and most must be positive")

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        return self.fit_moments(block_moments(blocks), fmt)

    def fit_moments(self, moments: BlockMoments, fmt: Format) -> Params:
        """Parameters of the blocks with these moments, of the moments' shape."""
        if not isinstance(fmt, ChannelBits):
            return fmt.from_range(*self.bounds(moments, torch.full_like(moments.mean, float(fmt.bits))))
        spread = moments.absolute if self.prior == "laplace" else moments.standard
        allocate = allocate_bits if self.budget == "exact" else allocate_bits_in_rounds
        bits = allocate(spread.flatten(), fmt.bits, rounding=self.rounding, limits=(0, fmt.ceiling)).view_as(spread)
        return fmt.from_range(*self.bounds(moments, bits), bits)

    def clip(self, moments: BlockMoments, bits: Tensor) -> Tensor:
        """The clip of every block at its `bits`."""
        if self.prior == "deviations":
            return self.multiple * moments.standard
        prior: Prior = "laplace" if self.prior == "laplace" else "gauss"
        table = torch.tensor(_TABLES[prior, self.half], dtype=torch.float32, device=bits.device)
        return table[bits.long()] * (moments.absolute if prior == "laplace" else moments.standard)

    def bounds(self, moments: BlockMoments, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends of the range of every block."""
        if self.prior == "none":
            low, high = moments.low, moments.high
            if self.half:
                low, high = torch.zeros_like(low), high.clamp_min(0)
        elif self.half:
            high = moments.mean.clamp_min(0) + self.clip(moments, bits)
            low = torch.zeros_like(high)
        else:
            clip = self.clip(moments, bits)
            low = torch.maximum(moments.low, moments.mean - clip)
            high = low + 2 * clip
        return low, high if self.most is None else high.clamp_max(self.most)
