"""Batch norms folded into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.engine.context import ModelContext
from fewbits.graph import operands
from fewbits.graph.moments import norm_statistics
from fewbits.graph.types import Call, Graph, Ref, Site
from fewbits.graph.weights import bias_parameter
from fewbits.recipe import Step
from fewbits.transforms.fold import fold_batch_norm


@dataclass(frozen=True)
class FoldBatchNorm(Step):
    """Move each batch norm's scale into the convolution or linear that alone feeds it.

    The norm stays in place, reduced to adding a constant, so the model keeps its modules and `state_dict` keys. Norms
    with other inputs are left as they are. What the norms say about their outputs is kept in the run (`norms`).
    """

    part: ClassVar[str] = "transform"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 0

    def apply(self, unit: ModelContext) -> None:
        for value, statistics in norm_statistics(unit.graph, unit.model).items():
            unit.run.norms.setdefault(value, statistics)
        for site, norm in foldable(unit.graph):
            fold_norm(unit, site, norm)


def fold_norm(context: ModelContext, site: Site, norm: Call) -> None:
    """Move the scale that a batch norm has now into the layer before it.

    Folding again takes up what was multiplied on since.
    """
    graph, model = context.graph, context.model
    layer = graph.calls[site.call]
    names = {slot: graph.stored_in(norm, slot) for slot in ("running_mean", "running_var", "weight", "bias")}
    held = {slot: None if name is None else operands.parameter(model, name) for slot, name in names.items()}
    eps = norm.kwargs.get("eps", norm.args[7] if len(norm.args) > 7 else 1e-5)
    bias = bias_parameter(model, graph, layer)
    weight = operands.operand(model, site)
    mean, var = held["running_mean"], held["running_var"]
    assert mean is not None and var is not None
    folded = fold_batch_norm(
        weight, bias, mean, var, held["weight"], held["bias"], float(eps),
        groups=site.groups, transposed=site.layout == "io_conv",
    )  # fmt: skip
    _copy(weight, folded.weight)
    _copy(bias, folded.bias)
    _copy(held["weight"], folded.norm_weight)
    _copy(held["bias"], folded.norm_bias)
    _copy(mean, folded.norm_mean)
    _copy(var, folded.norm_var)


def foldable(graph: Graph) -> list[tuple[Site, Call]]:
    """(weight site, batch-norm call) where that norm alone reads a layer's output; both run once, on own parameters."""
    weights = {
        site.call: site
        for site in graph.sites.values()
        if site.role == "weight" and not site.used_by and site.uses == 1
    }
    found: list[tuple[Site, Call]] = []
    for call in graph.calls:
        source = call.bound.get("input")
        if call.op != "batch_norm" or not isinstance(source, Ref) or not _fixed(graph, call):
            continue
        made = graph.values[source.value].call
        if made is None or made not in weights or len(graph.consumers.get(source.value, ())) != 1:
            continue
        site = weights[made]
        supported = site.op.startswith("conv") or site.op == "linear"
        if supported and site.view is not None and not site.sliced and graph.module_calls.get(call.module, 1) == 1:
            found.append((site, call))
    return found


def _fixed(graph: Graph, norm: Call) -> bool:
    """Whether a norm works with stored statistics, not with those of its batch."""
    training = norm.kwargs.get("training", norm.args[5] if len(norm.args) > 5 else False)
    return not training and all(graph.stored_in(norm, slot) for slot in ("running_mean", "running_var"))


def _copy(target: Tensor | None, value: Tensor | None) -> None:
    if target is not None and value is not None:
        with torch.no_grad():
            target.detach().copy_(value)
