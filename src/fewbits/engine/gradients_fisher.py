"""The diagonal of the empirical Fisher information of weights: squared task gradients, summed over samples.

The square is taken sample by sample, before anything is added: gradients of opposite sign do not cancel (SqueezeLLM,
Kim et al., ICML 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fewbits.engine.context import ModelContext
from fewbits.engine.gradients import first_output
from fewbits.engine.losses import LossKind, task_loss
from fewbits.engine.tree import Batch, as_call, map_tensors, tensors, to
from fewbits.errors import FewbitsError
from fewbits.graph.types import Site


def squared_weight_gradients(
    ctx: ModelContext, sites: Iterable[Site], kind: LossKind, samples: int | None = None
) -> dict[str, Tensor]:
    """Site name -> float32 (out, columns): sum over samples of the squared gradient of the task loss.

    One forward and one backward of the floating-point model per calibration sample (the first `samples` of them). The
    gradient is that of the site's own calls: of a weight that is used several times it is summed before it is squared,
    and of one that another site reads too (a tied head) only this site's use counts. Zeros where no sample's loss
    depends on the weight.

    Raises `FewbitsError` without calibration data, where no weight gets any gradient, and for NaN or infinity.
    """
    sites = list(sites)
    generator = ctx.generator(f"task-loss/{kind}")
    with _taps(ctx, sites) as taps, torch.enable_grad():
        for number, sample in enumerate(each_sample(ctx)):
            if number == samples:
                break
            args, kwargs = as_call(to(sample, ctx.device))
            loss = task_loss(kind, first_output(ctx.model(*args, **kwargs)), sample, generator)
            if not loss.requires_grad:
                raise FewbitsError(
                    f"{ctx.recipe.name}: the task loss does not depend on any of the weights; the model may run "
                    "without gradients or return what is not differentiable (detections)"
                )
            loss.backward()
            for tap in taps.values():
                tap.settle()
        found = {name: tap.sum for name, tap in taps.items()}
    bad = [name for name, value in found.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise FewbitsError(f"{bad[0]}: its gradient holds NaN or infinity; check the model in float32")
    if not any(bool(value.any()) for value in found.values()):
        raise FewbitsError(f"{ctx.recipe.name}: the gradient of the task loss {kind!r} vanishes at every weight")
    return found


def natural_loss(ctx: ModelContext) -> LossKind:
    """The task loss that suits the model, found by running it: next_token where it reads token ids and no output
    depends on later ones (a causal language model), pseudo for other logits over classes or tokens, and gaussian where
    the output is no such thing (images, noise, features)."""
    sample = next(each_sample(ctx))
    output = _output(ctx, sample)
    ids = next(
        (t for t in tensors(sample) if not t.is_floating_point() and t.shape == output.shape[:2] and t.shape[1] > 1),
        None,
    )
    if output.shape[:-1] == (1,) or (output.dim() == 3 and ids is not None and not _causal(ctx, sample, ids, output)):
        return "pseudo"
    return "next_token" if output.dim() == 3 and ids is not None else "gaussian"


def each_sample(ctx: ModelContext) -> Iterator[Batch]:
    """The calibration data as batches of one sample; `FewbitsError` where there is none."""
    if not ctx.run.batches:
        raise FewbitsError(f"{ctx.recipe.name} takes gradients of calibration data, and none was given")
    for batch, size in zip(ctx.run.batches, ctx.run.sizes, strict=True):
        for at in range(size):
            yield map_tensors(partial(_one, at, size), batch)


def _one(at: int, size: int, tensor: Tensor) -> Tensor:
    """Sample `at` of a tensor that has one entry per sample; others as they are."""
    return tensor[at : at + 1] if tensor.dim() and tensor.shape[0] == size else tensor


def _output(ctx: ModelContext, sample: Batch) -> Tensor:
    args, kwargs = as_call(to(sample, ctx.device))
    with torch.no_grad(), ctx.attachment.disabled():
        return first_output(ctx.model(*args, **kwargs)).detach()


def _causal(ctx: ModelContext, sample: Batch, ids: Tensor, output: Tensor) -> bool:
    """Whether another last token changes the last output and no earlier one."""
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids[:, 1], ids[:, 0])
    if torch.equal(other, ids):
        other[:, -1] = (ids[:, -1] + 1) % output.shape[-1]
    moved = (_output(ctx, map_tensors(lambda t: other if t is ids else t, sample)) - output).abs().amax(-1)
    return bool(moved[:, -1].max() > 0) and bool(moved[:, :-1].max() <= 1e-4 * output.abs().max())


class _Tap(nn.Module):
    """Stands where a weight's quantizer would and lets the weight through unchanged, as a leaf that takes gradients.

    A leaf's gradient is added up and let go as soon as it is complete, so that never more than a few exist.
    """

    enabled = True

    def __init__(self, sum_: Tensor) -> None:
        super().__init__()
        self.sum = sum_
        self._waiting = 0
        self._gradient: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        leaf = weight.detach().requires_grad_()
        if torch.is_grad_enabled():
            self._waiting += 1
            leaf.register_post_accumulate_grad_hook(self._take)
        return leaf

    def _take(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradient = leaf.grad.float()
        leaf.grad = None
        self._gradient = gradient if self._gradient is None else self._gradient + gradient
        self._waiting -= 1
        if not self._waiting:
            self.settle()

    def settle(self) -> None:
        """The sample is over, or all uses of the weight have answered."""
        if self._gradient is not None:
            self.sum.addcmul_(self._gradient, self._gradient)
        self._gradient, self._waiting = None, 0


@contextmanager
def _taps(ctx: ModelContext, sites: list[Site]) -> Iterator[dict[str, _Tap]]:
    """A tap at every site, and no quantizer acting, while the context lasts."""
    attachment = ctx.attachment
    quantized = [site.name for site, _ in attachment.items() if site.role == "weight"]
    if quantized:
        raise FewbitsError(f"{quantized[0]} is quantized already; squared gradients are those of the float model")
    taps = {site.name: _Tap(torch.zeros_like(ctx.weight(site))) for site in sites}
    try:
        for name, tap in taps.items():
            attachment.set_quantizer(name, tap)  # type: ignore[arg-type]
        with attachment.without_activations():
            yield taps
    finally:
        for name in taps:
            attachment.set_quantizer(name, None)
