"""Mean squared error of what a denoiser predicts (the noise, for most) on images noised at random time steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.tasks.registry import Metrics, Task, register_task


@register_task
class NoisePrediction(Task):
    """Output.

    An object with `sample` or a tuple led by it, [batch, channels, height, width]; targets of the same shape.
    """

    name = "noise_prediction"
    domains = ("diffusion",)
    metric = "mse"
    higher_is_better = False

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, output: Any, targets: Tensor) -> None:
        predicted = output if isinstance(output, Tensor) else getattr(output, "sample", None)
        if predicted is None and isinstance(output, tuple):
            predicted = output[0]
        if not isinstance(predicted, Tensor) or predicted.shape != targets.shape:
            raise FewbitsError(
                f"task {self.name}: the model returned no tensor of the targets' shape {tuple(targets.shape)}"
            )
        self._sum += float((predicted.float() - targets.float()).square().to(torch.float64).sum())
        self._count += targets.numel()

    def result(self) -> Metrics:
        mse = self._sum / self._count
        if math.isnan(mse):
            raise FewbitsError(f"task {self.name}: the model returned NaN")
        return {"mse": mse}
