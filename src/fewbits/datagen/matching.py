"""Objectives that ask features to have given means and standard deviations (ZeroQ section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

Per = Literal["sample", "batch"]


class Objective(Protocol):
    """A term of the loss that images are optimised for."""

    def __call__(self, step: int, images: Tensor, seen: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """A scalar. `images` are what the network was given at this step, (N, channels, ...); `seen` are the tensors at
        the watched places, one per time a place was passed."""


def feature_statistics(x: Tensor, per: Per = "sample", eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + eps) of every channel of features (N, channels, *space), float32 (rows, channels).

    per "sample": one row per sample, over space. "batch": one row, over samples and space; also where space has less
    than two positions, as a single value has no variance. The variance is the unbiased one (of a single value: zero).
    """
    if x.dim() < 2:
        raise FewbitsError(f"statistics need features of shape (samples, channels, ...), got {tuple(x.shape)}")
    values = x.float().flatten(2) if x.dim() > 2 else x.float().unsqueeze(-1)
    if per == "batch" or values.shape[-1] < 2:
        values = values.transpose(0, 1).flatten(1).unsqueeze(0)
    variance = values.var(-1, correction=1 if values.shape[-1] > 1 else 0)
    return values.mean(-1), (variance + eps).sqrt()


def stored_statistics(running_mean: Tensor, running_var: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What a batch norm remembers of its inputs as (mean, standard deviation), float32 (channels,) each."""
    return running_mean.detach().float(), (running_var.detach().float() + eps).sqrt()


def matching_loss(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
    """|mean - mean'|^2 + |std - std'|^2 summed over channels, averaged over rows; found (rows, C), wanted (C,)."""
    gaps = [(a - b).square().sum() / a.shape[0] for a, b in zip(found, wanted, strict=True)]
    return gaps[0] + gaps[1]


@dataclass(frozen=True)
class StatisticsMatching:
    """Features at the watched places have these statistics.

    targets: place -> (mean, standard deviation), each (channels,). per "sample": every sample must match by itself, as
    ZeroQ does; "batch": the batch as a whole. A place passed several times counts as often.
    """

    targets: Mapping[str, tuple[Tensor, Tensor]]
    per: Per = "sample"
    eps: float = 1e-6

    def __call__(self, step: int, images: Tensor, seen: Mapping[str, Sequence[Tensor]]) -> Tensor:
        terms = []
        for name, wanted in self.targets.items():
            if not seen.get(name):
                raise FewbitsError(f"{name} was not reached by the images")
            terms += [matching_loss(feature_statistics(x, self.per, self.eps), wanted) for x in seen[name]]
        return torch.stack(terms).sum()


@dataclass(frozen=True)
class InputMatching:
    """The images themselves have this mean and standard deviation in every channel: 0 and 1 for normalised data."""

    mean: float = 0.0
    std: float = 1.0
    per: Per = "sample"
    eps: float = 1e-6

    def __call__(self, step: int, images: Tensor, seen: Mapping[str, Sequence[Tensor]]) -> Tensor:
        found = feature_statistics(images, self.per, self.eps)
        return matching_loss(found, (torch.full_like(found[0][0], self.mean), torch.full_like(found[1][0], self.std)))
