"""Accuracy of text classifiers, in percent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewbits.tasks.image_classification import class_scores
from fewbits.tasks.registry import Metrics, Task, register_task


@register_task
class SequenceClassification(Task):
    """Output: logits [batch, classes]; targets: class numbers [batch]."""

    name = "sequence_classification"
    domains = ("text-classification",)
    metric = "accuracy"
    higher_is_better = True

    def __init__(self) -> None:
        self._hits = self._samples = 0

    def update(self, output: Any, targets: Tensor) -> None:
        self._hits += int((class_scores(output, targets, self.name).argmax(1) == targets).sum())
        self._samples += len(targets)

    def result(self) -> Metrics:
        return {"accuracy": 100 * self._hits / self._samples}
