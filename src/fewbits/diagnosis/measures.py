"""How far two runs of a network are apart: at one tensor, and at the network's output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import FewbitsError

#: Values of one tensor that are kept to compare two runs by.
KEPT = 1 << 15


class Noise:
    """Signal-to-quantization-noise ratio over any number of tensor pairs."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0
        self._seen = False

    def update(self, exact: Tensor, approximate: Tensor) -> None:
        """Take in a tensor and its approximation, of one shape."""
        exact, approximate = exact.detach().double(), approximate.detach().double()
        self._signal += float(exact.square().sum())
        self._noise += float((exact - approximate).square().sum())
        self._seen = True

    def decibels(self) -> float | None:
        """10 log10(signal power / noise power); infinite without noise, None where nothing was seen or is not finite.

        Noise on a signal that is zero everywhere gives minus infinity.
        """
        if not self._seen or not (math.isfinite(self._signal) and math.isfinite(self._noise)):
            return None
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf


@lru_cache(maxsize=256)
def _places(count: int, limit: int) -> Tensor:
    return torch.randint(count, (limit,), generator=torch.Generator().manual_seed(count))


def excerpt(x: Tensor, limit: int = KEPT) -> Tensor:
    """At most `limit` values of a tensor, float32 on the CPU: the same places for every tensor of that many elements.

    Drawn at random, not at a stride: a stride would meet the same channels again and again.
    """
    flat = x.detach().reshape(-1)
    if flat.numel() > limit:
        flat = flat[_places(flat.numel(), limit).to(flat.device)]
    return flat.float().cpu().clone()


class OutputError:
    """Distance of a network's output from the float network's, sample by sample.

    kl: KL(float || quantized) of the class probabilities along the last axis, in nats, mean over a sample's positions.
    mse: squared error over the mean power of the float outputs.
    """

    def __init__(self, kind: Literal["kl", "mse"]) -> None:
        self.kind = kind
        self._errors: list[Tensor] = []
        self._powers: list[Tensor] = []

    @staticmethod
    def reference(kind: str, output: Tensor) -> Tensor:
        """A float output in the form in which `update` takes it: log probabilities for kl, float32."""
        return F.log_softmax(output.float(), -1) if kind == "kl" else output.float()

    def update(self, exact: Tensor, output: Tensor) -> None:
        """Take in a batch: `reference` of the float output, and the output. `FewbitsError` where shapes differ."""
        if exact.shape != output.shape:
            raise FewbitsError(
                f"the float model returned {tuple(exact.shape)}, the quantized one {tuple(output.shape)}; their "
                "outputs cannot be compared"
            )
        for row, other in zip(exact, output, strict=True):  # by sample: float32 logits of a whole batch are large
            self._add(row, other.float())

    def _add(self, exact: Tensor, output: Tensor) -> None:
        if self.kind == "mse":
            self._errors.append((exact - output).square().sum(dtype=torch.float64).cpu())
            self._powers.append(exact.square().sum(dtype=torch.float64).cpu())
            return
        divergence = F.kl_div(F.log_softmax(output, -1), exact, log_target=True, reduction="none")
        positions = max(1, exact.shape[:-1].numel())
        self._errors.append((divergence.sum(dtype=torch.float64) / positions).cpu())

    def samples(self) -> Tensor:
        """The error of every sample so far, float64 [samples], their mean being the whole; infinite for one that is not
        finite."""
        errors = torch.stack(self._errors) if self._errors else torch.zeros(0, dtype=torch.float64)
        if self.kind == "mse" and len(errors):
            errors = errors / torch.stack(self._powers).mean().clamp_min(1e-300)
        return torch.nan_to_num(errors, nan=math.inf, posinf=math.inf).clamp_min(0)


@dataclass(frozen=True)
class Gain:
    """What a change takes off an error: the mean and its standard error."""

    mean: float
    spread: float

    @property
    def sure(self) -> float:
        """The mean less its standard error: what to rank by, so that a few lucky samples do not decide."""
        return self.mean - self.spread


NO_GAIN = Gain(0.0, 0.0)


def gain(before: Tensor, after: Tensor) -> Gain:
    """The gain between the errors [samples] of two runs on the same samples."""
    both = torch.isinf(before) & torch.isinf(after)
    difference = torch.where(both, torch.zeros_like(before), before - after)
    mean = float(difference.mean()) if len(difference) else 0.0
    if not math.isfinite(mean) or not len(difference):
        return Gain(mean, 0.0)
    spread = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else abs(mean)
    return Gain(mean, spread)


#: How far the gain of a change made alone may be from its gain in the whole, once scaled: as a share of itself, and of
#: the whole error.
_DOUBT, _FLOOR = 0.5, 0.01


def expected(seen: Gain, alone: Gain, scale: float, whole: float) -> Gain:
    """The gain to be expected of a change on other data.

    `seen` is what it won in the quantized network: the thing itself, but any change there stirs the errors of all other
    sites, so that a few samples that flip can hide it. `alone` is what it wins where nothing else is quantized: calm,
    but on the scale of small errors; `scale` is how much larger the whole error is than the sum of the lone ones. The
    two are averaged, each weighed by how far it is to be trusted.
    """
    if not (math.isfinite(seen.mean) and math.isfinite(whole) and math.isfinite(alone.mean)) or whole <= 0:
        return seen
    prior = scale * alone.mean
    doubt = math.hypot(scale * alone.spread, _DOUBT * prior, _FLOOR * whole)
    first, second = 1 / max(seen.spread, 1e-6 * whole) ** 2, 1 / doubt**2
    return Gain((first * seen.mean + second * prior) / (first + second), (first + second) ** -0.5)
