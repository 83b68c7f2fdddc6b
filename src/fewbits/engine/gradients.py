"""The one provider of task gradients: d KL(float || quantized) at a unit's output, batch mean.

The loss needs no labels. It is taken with every unit up to and including this one quantized, never on the float model
itself, where KL(float || float) has no gradient at all; a gradient that vanishes is reported, not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewbits.engine.tree import as_call, tensors, to
from fewbits.errors import FewbitsError
from fewbits.reconstruction.fisher import kl_gradients

if TYPE_CHECKING:
    from fewbits.engine.context import UnitContext


def output_gradients(unit: UnitContext) -> Tensor:
    """Gradients (samples, ...) of the KL divergence with respect to the unit's first output tensor.

    Raises `FewbitsError` where weights are streamed (the rest of the network is not there), the unit runs more than
    once per forward, or the gradient vanishes.
    """
    run = unit.run
    if run.streamed:
        raise FewbitsError("Fisher weights need the whole network; they cannot be had with streamed weights")
    logits = run.float_logits
    if logits is None:
        raise FewbitsError("the float network's outputs were not gathered before the sweep")
    if unit.unit.uses != 1:
        raise FewbitsError(
            f"unit {unit.name!r} runs {unit.unit.uses} times in a forward; Fisher weights need one output"
        )

    def run_quantized(number: int) -> tuple[Tensor, Tensor]:
        held: list[Tensor] = []

        def tap(module: Any, args: Any, output: Any) -> Any:
            leaves, spec = torch.utils._pytree.tree_flatten(output)
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaves[place] = leaf.detach().requires_grad_()
                    held.append(leaves[place])
                    break
            return torch.utils._pytree.tree_unflatten(leaves, spec)

        handle = unit.module.register_forward_hook(tap)
        try:
            args, kwargs = as_call(to(run.batches[number], run.device))
            out = first_output(run.model(*args, **kwargs))
        finally:
            handle.remove()
        return out, held[0]

    return kl_gradients(
        lambda number: logits[number].to(run.device), run_quantized, range(len(run.batches)), vanished="warn"
    )


def first_output(output: Any) -> Tensor:
    """The network's logits: the tensor itself, `.logits`, or the first floating-point tensor of the output."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    found = next(
        (t for t in tensors(dict(output) if hasattr(output, "keys") else output) if t.is_floating_point()), None
    )
    if found is None:
        raise FewbitsError("the model's output holds no floating-point tensor to take a loss of")
    return found
