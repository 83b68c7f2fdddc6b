"""Perplexity per token of language models: exp of the mean negative log-likelihood of the next tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.hub.data import IGNORED
from fewbits.tasks.measure import logits
from fewbits.tasks.registry import Metrics, Task, register_task


@register_task
class LanguageModeling(Task):
    """Output: logits [batch, length, vocabulary]; targets: the next tokens [batch, length], `IGNORED` where they do
    not count.

    Summed in float64. A perplexity past float64 is reported as infinite.
    """

    name = "language_modeling"
    domains = ("text-generation",)
    metric = "perplexity"
    higher_is_better = False

    def __init__(self) -> None:
        self._loss = 0.0
        self._tokens = 0

    def update(self, output: Any, targets: Tensor) -> None:
        scores = logits(output, self.name)
        if scores.ndim != 3 or scores.shape[:2] != targets.shape:
            raise FewbitsError(
                f"task {self.name}: output {tuple(scores.shape)} for targets {tuple(targets.shape)}; [batch, "
                "length, vocabulary] is expected"
            )
        for row, target in zip(scores, targets, strict=True):  # by row: float32 logits of a whole batch are large
            loss = F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none").to(torch.float64).sum()
            self._loss += float(loss)
        self._tokens += int((targets != IGNORED).sum())

    def result(self) -> Metrics:
        mean = self._loss / self._tokens
        if math.isnan(mean):
            raise FewbitsError(f"task {self.name}: the model returned NaN")
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "nats_per_token": mean}

    def counts(self) -> dict[str, int]:
        return {"tokens": self._tokens}
