"""Which calibration samples each optimisation step uses: iterators of int64 index tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewbits.errors import FewbitsError


def without_replacement(
    samples: int, batch: int, generator: torch.Generator, *, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Endless `randperm(samples)[:batch]`: a fresh draw every step, no sample twice in a step (AdaRound, BRECQ).
    Fewer samples than the batch give them all."""
    _check(samples, batch)
    while True:
        yield torch.randperm(samples, generator=generator)[:batch].to(device, non_blocking=True)


def with_replacement(
    samples: int, batch: int, generator: torch.Generator, *, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Endless `randint(samples, (batch,))` (QDrop)."""
    _check(samples, batch)
    while True:
        yield torch.randint(samples, (batch,), generator=generator).to(device, non_blocking=True)


def _check(samples: int, batch: int) -> None:
    if samples < 1 or batch < 1:
        raise FewbitsError(f"sampling: {samples} samples in batches of {batch}; both must be at least 1")
