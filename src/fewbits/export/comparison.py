"""What a model answers in another runtime against what its simulation answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.engine.tree import as_call, tensors
from fewbits.errors import FewbitsError


def answer(output: Any) -> Tensor:
    """The tensor that stands for a model's output: its logits, else the first tensor in it; float32, on the CPU."""
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        found = next(tensors(dict(output) if hasattr(output, "keys") else output), None)
    if found is None:
        raise FewbitsError(f"the model returned {type(output).__name__}, in which there is no tensor to compare")
    return found.detach().float().cpu()


@torch.no_grad()
def answers(model: Callable[..., Any], batches: Sequence[Any]) -> list[Tensor]:
    """`answer` to every batch."""
    found = []
    for batch in batches:
        args, kwargs = as_call(batch)
        found.append(answer(model(*args, **kwargs)))
    return found


def compared(runtime: str, expected: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, Any]:
    """The entry of `Target.check` for one runtime.

    runtime: its name. agreement: the share of positions with the same largest value along the last axis. difference,
    scale: the largest absolute difference and the largest absolute expected value. samples: rows of the batches.
    """
    pairs = list(zip(expected, found, strict=True))
    for one, other in pairs:
        if one.shape != other.shape:
            raise FewbitsError(f"{runtime} answers in shape {tuple(other.shape)}, the simulation {tuple(one.shape)}")
    same = torch.cat([(one.argmax(-1) == other.argmax(-1)).flatten() for one, other in pairs])
    return {
        "runtime": runtime,
        "agreement": round(float(same.float().mean()), 6),
        "difference": max(float((one - other).abs().max()) for one, other in pairs),
        "scale": max(float(one.abs().max()) for one in expected),
        "samples": sum(len(one) for one in expected),
    }


def insist(entry: dict[str, Any], tolerance: float) -> None:
    """Raises `FewbitsError` where the difference exceeds `tolerance` times the scale."""
    difference, limit = entry["difference"], tolerance * max(entry["scale"], 1e-6)
    if not difference <= limit:  # NaN counts as different
        raise FewbitsError(
            f"{entry['runtime']} answers differently from the simulation: by {difference:.3g}, where {limit:.3g} "
            f"({tolerance:g} of the largest answer) is allowed; top-1 agreement {entry['agreement']:.1%}"
        )
