"""Top-1 and top-5 accuracy of image classifiers, in percent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.tasks.measure import logits
from fewbits.tasks.registry import Metrics, Task, register_task


@register_task
class ImageClassification(Task):
    """Output.

    Logits [batch, classes]; targets: class numbers [batch]. Top-5 is left out where there are fewer than 5 classes.
    """

    name = "image_classification"
    domains = ("image",)
    metric = "top1"
    higher_is_better = True

    def __init__(self) -> None:
        self._hits: dict[int, int] = {}
        self._samples = 0

    def update(self, output: Any, targets: Tensor) -> None:
        scores = class_scores(output, targets, self.name)
        for k in (1, 5):
            if k <= scores.shape[1]:
                hits = (scores.topk(k, dim=1).indices == targets[:, None]).any(1).sum()
                self._hits[k] = self._hits.get(k, 0) + int(hits)
        self._samples += len(targets)

    def result(self) -> Metrics:
        return {f"top{k}": 100 * hits / self._samples for k, hits in self._hits.items()}


def class_scores(output: Any, targets: Tensor, task: str) -> Tensor:
    """The output as finite scores [batch, classes] that fit the targets.

    Raises:
        FewbitsError: another shape, labels beyond the classes, or scores that are not numbers.
    """
    scores = logits(output, task).float()
    if scores.ndim != 2 or len(scores) != len(targets) or targets.ndim != 1:
        raise FewbitsError(
            f"task {task}: output {tuple(scores.shape)} for {len(targets)} samples; [batch, classes] is expected"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= scores.shape[1]:
        raise FewbitsError(
            f"task {task}: the data has labels from {int(targets.min())} to {int(targets.max())}, the model "
            f"{scores.shape[1]} classes"
        )
    if scores.isnan().any():
        raise FewbitsError(f"task {task}: the model returned NaN")
    return scores
