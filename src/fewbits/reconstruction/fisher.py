"""The task gradient at a unit's output, for weighting its reconstruction error.

BRECQ (Li et al., ICLR 2021), section 3.3. The task loss is KL(softmax(float logits) || softmax(quantized logits)): it
needs no labels, but it has a gradient only where the two networks differ. Between a network and itself it is exactly
flat.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import FewbitsError

Batch = TypeVar("Batch")

NOISE = 1e-6  # largest difference of class probabilities that float32 evaluation of one network can explain


def fisher_weight(gradient: Tensor, *, damping: float = 1.0) -> Tensor:
    """|gradient| + damping, the released weighting. Raw gradients are mostly far below the damping of 1, which then
    makes the loss nearly plain squared error; lower it (and rescale the gradient) to let the gradient speak."""
    return gradient.abs() + damping


def kl_gradients(
    run_float: Callable[[Batch], Tensor],
    run_quantized: Callable[[Batch], tuple[Tensor, Tensor]],
    batches: Iterable[Batch],
    *,
    class_axis: int = -1,
    vanished: Literal["raise", "warn"] = "raise",
) -> Tensor:
    """d KL / d (unit output), concatenated over batches along axis 0, detached.

    run_float: batch -> logits of the float network. run_quantized: batch -> (logits, unit output) of the network with
    every unit up to and including this one quantized; the unit output is a tensor the logits were computed from, with
    gradients enabled. The loss of a batch is summed over classes and positions and divided by its first axis
    ("batchmean"), so gradients scale with 1 / batch size; use equal batches.

    Raises FewbitsError where the logits do not depend on the unit output, the gradient is not finite, or
    (vanished="raise"; "warn" warns) it vanishes: all probabilities agree to 1e-6, or every entry is zero. One host read
    per call, at the end.
    """
    found: list[Tensor] = []
    evidence: list[Tensor] = []
    for batch in batches:
        with torch.no_grad():
            target = F.softmax(run_float(batch).float(), class_axis)
        with torch.enable_grad():
            logits, output = run_quantized(batch)
            if logits.shape != target.shape:
                raise FewbitsError(
                    f"KL gradient: float logits {tuple(target.shape)} but quantized logits {tuple(logits.shape)}"
                )
            log_probability = F.log_softmax(logits.float(), class_axis)
            loss = F.kl_div(log_probability, target, reduction="batchmean")
            if not (loss.requires_grad and output.requires_grad):
                raise FewbitsError(
                    "KL gradient: the unit output carries no gradient; make it require one before the forward"
                )
            (gradient,) = torch.autograd.grad(loss, output, allow_unused=True)
        if gradient is None:
            raise FewbitsError("KL gradient: the logits do not depend on this unit's output")
        gradient = gradient.detach()
        found.append(gradient)
        apart = (log_probability.detach().exp() - target).abs().amax()
        evidence.append(torch.stack([apart, gradient.abs().amax().float()]))
    if not found:
        raise FewbitsError("KL gradient: no calibration batch was given")
    apart, size = torch.stack(evidence).amax(0).tolist()
    if not (apart < float("inf") and size < float("inf")):
        raise FewbitsError("KL gradient: NaN or infinity in the logits or the gradient")
    if apart <= NOISE or size == 0:
        message = (
            f"KL gradient vanishes (probabilities differ by {apart:.1e}, gradient at most {size:.1e}): quantize the "
            "units up to this one before asking for it, or use the plain squared error"
        )
        if vanished == "raise":
            raise FewbitsError(message)
        warnings.warn(message, stacklevel=2)
    return torch.cat(found)
