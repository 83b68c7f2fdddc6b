"""How far a network's outputs move when a part of it is quantized."""

from __future__ import annotations

import torch
from torch import Tensor


def output_divergence(reference: Tensor, logits: Tensor, axis: int = -1) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) per sample, float64 (samples,), never negative (ZeroQ equation 4).

    reference, logits: (samples, ...) with classes along `axis`; the mean over all other places of a sample (tokens,
    pixels).
    """
    first, second = (t.detach().double().movedim(axis, -1).log_softmax(-1) for t in (reference, logits))
    # the terms of softmax(first) = 0 are zero, not 0 times infinity
    gap = torch.where(first == -torch.inf, 0.0, first - second)
    divergence = (first.exp() * gap).sum(-1)
    return divergence.flatten(1).mean(1).clamp_min(0) if divergence.dim() > 1 else divergence.clamp_min(0)
