"""The task loss behind gradients that a method asks for: defined, label-free, and said by name.

KL between the float network and itself is no such loss: it is zero, and so is its gradient.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.engine.tree import Batch, as_call
from fewbits.errors import FewbitsError

#: next_token: cross-entropy against the input's own next tokens (language models).
#: pseudo: cross-entropy against the class (or token) the float network ranks first.
#: sampled: cross-entropy against a class drawn from the float network's softmax (unbiased Fisher information).
#: gaussian: half the squared distance to the float network's own output plus unit normal noise, for outputs that are no
#:     classes (noise, images, features): the same for a regression (unbiased Fisher information).
LossKind = Literal["next_token", "pseudo", "sampled", "gaussian"]


def task_loss(kind: LossKind, logits: Tensor, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
    """The loss of float `logits` (samples, ..., classes), summed over samples and averaged over positions in each.

    `batch` is what the model was called with; `next_token` reads its `decoder_input_ids`, `input_ids` or another
    integer tensor, the first that has a token for every position of the output. `sampled` and `gaussian` draw with
    `generator` (on the CPU, so that every device draws the same). Raises `FewbitsError` for an unknown kind, logits
    without a class axis, or `next_token` where the batch holds no token ids.
    """
    if logits.dim() < 2:
        raise FewbitsError(
            f"a task loss needs logits (samples, ..., classes), the model returned {tuple(logits.shape)}"
        )
    logits = logits.float()
    if kind == "gaussian":
        noise = torch.randn(logits.shape, generator=generator).to(logits.device)
        return ((logits - logits.detach() - noise).square() / 2).flatten(1).mean(1).sum()
    if kind == "next_token":
        labels = _token_ids(batch, logits)[:, 1:].to(logits.device)
        logits = logits[:, :-1]
    elif kind == "pseudo":
        labels = logits.detach().argmax(-1)
    elif kind == "sampled":
        chances = logits.detach().cpu().softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator)
        labels = drawn.view(chances.shape[:-1]).to(logits.device)
    else:
        raise FewbitsError(f"unknown task loss {kind!r}; there are: {', '.join(get_args(LossKind))}")
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(len(logits), -1)
    return each.mean(1).sum()


def _token_ids(batch: Batch, logits: Tensor) -> Tensor:
    args, kwargs = as_call(batch)
    given: list[Any] = [kwargs.get("decoder_input_ids"), kwargs.get("input_ids"), *args, *kwargs.values()]
    ids = next(
        (t for t in given if isinstance(t, Tensor) and not t.is_floating_point() and t.shape == logits.shape[:2]), None
    )
    if ids is None or logits.dim() != 3:
        raise FewbitsError(
            "the next-token loss needs a language model: token ids (samples, positions) in and logits (samples, "
            "positions, vocabulary) out; use the loss 'pseudo' for other models"
        )
    return ids.long()
