"""One pass of a model over evaluation data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.engine.tree import as_call, to
from fewbits.errors import FewbitsError
from fewbits.hub.data import Data
from fewbits.hub.loaded import LoadedModel
from fewbits.tasks.registry import task_for, task_named


def evaluate(
    model: nn.Module | LoadedModel,
    data: Data,
    task: str | None = None,
    *,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model, float or quantized, on data that `load_data(..., purpose="evaluation")` prepared for it.

    Args:
        task: its name; by default the one for the model's domain.
        device: where to run; by default where the model is. The model stays there.
        progress: called with (samples done, samples in all) after every batch.

    Returns:
        JSON-able: `task`, `metric` (name of the main metric), `value`, `higher_is_better`, `metrics` (all of them),
        `samples`, what the data says about itself (`data`, `subset`, and for language models `window` and `stride`),
        `fingerprint` of the inputs, `seconds`.

    Raises:
        FewbitsError: no labels in the data, an output of another kind than the task reads, a metric that is not a
            number.
    """
    net = model.model if isinstance(model, LoadedModel) else model
    measured = (task_named(task) if task else task_for(model if isinstance(model, LoadedModel) else None, data))()
    if device is not None:
        net.to(device)
    where = next((p.device for p in net.parameters()), torch.device(device or "cpu"))
    was_training, started, done = net.training, time.monotonic(), 0
    net.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a model caches in its forward must stay usable for gradients
            for batch in data:
                if batch.targets is None:
                    raise FewbitsError(f"data {data.ref!r} has no labels, so {measured.name} cannot be measured on it")
                args, kwargs = as_call(to(batch.inputs, where))
                measured.update(net(*args, **kwargs), batch.targets.to(where))
                done += len(batch.targets)
                if progress is not None:
                    progress(done, data.samples)
    finally:
        net.train(was_training)
    metrics = measured.result()
    return {
        "task": measured.name,
        "metric": measured.metric,
        "value": metrics[measured.metric],
        "higher_is_better": measured.higher_is_better,
        "metrics": metrics,
        **data.description,
        **measured.counts(),
        "samples": done,
        "fingerprint": data.fingerprint,
        "seconds": round(time.monotonic() - started, 3),
    }


def logits(output: Any, task: str) -> Tensor:
    """The scores in what a model returned.

    A tensor, an object with `logits`, a dict with `logits`, or a tuple led by them.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise FewbitsError(
            f"task {task}: the model returned {type(output).__name__} without logits; choose the task that fits "
            "the model"
        )
    return found
