"""Gradients of a task loss at many sites of the float model: one forward and one backward pass per calibration batch.

They are kept in the run's activation store, which moves them to host memory and disk past its budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from fewbits.attach import Observer
from fewbits.engine.context import ModelContext
from fewbits.engine.gradients import first_output
from fewbits.engine.tree import Batch, as_call, map_tensors, to
from fewbits.errors import FewbitsError
from fewbits.graph import operands
from fewbits.graph.types import Site

#: (number of the batch, float logits, the batch) -> the loss, summed over samples.
Loss = Callable[[int, Tensor, Batch], Tensor]


def site_gradients(ctx: ModelContext, sites: Iterable[Site], loss: Loss) -> None:
    """Differentiate `loss` with respect to what the float model carries at the sites, for `gradients_at` to read.

    Nothing is quantized meanwhile. A tensor that is changed in place afterwards counts as it was at its site. Raises
    `FewbitsError` where the model's output has no class axis, and where all gradients vanish.
    """
    names = [site.name for site in sites]
    peaks = [_one_batch(ctx, number, batch, names, loss) for number, batch in enumerate(ctx.run.batches)]
    largest = float(torch.stack(peaks).amax()) if peaks else 0.0
    if largest == 0:
        raise FewbitsError("the gradient of the task loss vanishes at every layer; choose another loss")
    if not largest < float("inf"):
        raise FewbitsError("NaN or infinity in the gradient of the task loss; check the model in float32")


def _one_batch(ctx: ModelContext, number: int, batch: Batch, names: list[str], loss: Loss) -> Tensor:
    """Keep one batch's gradients; the largest magnitude among them, float32 []."""
    store = ctx.run.store
    uses: dict[str, int] = dict.fromkeys(names, 0)
    leaves: list[Tensor] = []
    peaks: list[Tensor] = []

    def keep(name: str, use: int, gradient: Tensor) -> None:
        gradient = gradient.detach().float()
        peaks.append(gradient.abs().amax())
        store.put(("gradient", name, number, use), gradient)

    def watch(name: str, output: Tensor) -> None:
        use = uses[name]
        uses[name] = use + 1
        if not output.requires_grad:  # computed from constants: nothing before it is differentiated
            leaves.append(output.requires_grad_())
        output.register_hook(lambda gradient: keep(name, use, gradient))

    with torch.enable_grad(), _differentiable(ctx) as tables:
        args, kwargs = as_call(map_tensors(lambda t: _leaf(t, leaves), to(batch, ctx.device)))
        observers: dict[str, list[Observer]] = {name: [partial(watch, name)] for name in names}
        with ctx.attachment.disabled(), ctx.attachment.observing(observers):
            logits = first_output(ctx.model(*args, **kwargs))
        if logits.dim() not in (2, 3) or len(logits) != ctx.run.sizes[number]:
            raise FewbitsError(
                f"the model's output {tuple(logits.shape)} is not class scores (samples, ..., classes): no task loss "
                "is defined for it; choose a metric without gradients, such as 'l2' or 'cosine'"
            )
        value = loss(number, logits, batch)
        if not value.requires_grad:
            raise FewbitsError("the model's output carries no gradient; does its forward switch gradients off?")
        torch.autograd.grad(value, [*leaves, *tables], allow_unused=True)
    for name, count in uses.items():
        store.put(("gradient uses", name, number), count)
    return torch.stack(peaks).amax() if peaks else torch.zeros((), device=ctx.device)


def gradients_at(ctx: ModelContext, site: Site) -> list[Tensor | None]:
    """The gradient at a site for every batch and every use in it, in order, and forget it.

    None where the loss does not depend on the tensor. Raises `FewbitsError` where none were taken there.
    """
    store = ctx.run.store
    found: list[Tensor | None] = []
    for number in range(len(ctx.run.batches)):
        if ("gradient uses", site.name, number) not in store:
            raise FewbitsError(f"{site.name}: no gradients of a task loss were taken there before")
        for use in range(store.get(("gradient uses", site.name, number))):
            key = ("gradient", site.name, number, use)
            found.append(store.get(key) if key in store else None)
            store.drop(key)
    return found


def _leaf(x: Tensor, leaves: list[Tensor]) -> Tensor:
    """A floating-point input as something to differentiate; a copy, since the model may write into it."""
    if not x.is_floating_point():
        return x
    leaves.append(x.detach().clone().requires_grad_())
    return leaves[-1].clone()


@contextmanager
def _differentiable(ctx: ModelContext) -> Iterator[list[Tensor]]:
    """Lookup tables with gradients: where a model reads token ids, they are where differentiation can start."""
    tables: list[Tensor] = []
    for site in ctx.graph.sites.values():
        if site.op == "embedding" and site.role == "weight" and site.param is not None:
            table = operands.parameter(ctx.model, site.param)
            if table.is_floating_point() and not any(table is other for other in tables):
                tables.append(table.requires_grad_())
    try:
        yield tables
    finally:
        for table in tables:
            table.requires_grad_(False)
