"""Quantizer parameters searched layer by layer at the layers' outputs (PTQ4ViT, Yuan et al., ECCV 2022).

All of it looks at the float model: inputs, outputs and gradients. The order of the layers does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.engine.context import GlueContext, ModelContext, UnitContext
from fewbits.engine.gradients import first_output
from fewbits.engine.gradients_sites import Loss, gradients_at, site_gradients
from fewbits.engine.layers import layer_alone
from fewbits.engine.losses import task_loss
from fewbits.engine.statistics import Calls
from fewbits.engine.tree import as_call, to
from fewbits.errors import FewbitsError
from fewbits.formats import PerBlock, PerChannel, PerGroup, PerHead, PerTensor, TwinMagnitude
from fewbits.graph.fused import fused_rows
from fewbits.graph.ops import MATMUL, WEIGHTED
from fewbits.graph.types import Call, Graph, Site, Unit
from fewbits.quantizer import Quantizer
from fewbits.ranges.layer_search import LayerCall, LayerSearch, Operand, search_layer
from fewbits.recipe import QSpec, Step
from fewbits.steps.calibrate import calibrate_sites

#: Tag of an operand of an attention product whose axis 1 holds the heads.
HEADS = "attention_heads"
LossName = Literal["pseudo", "sampled", "next_token", "kl"]


@dataclass(frozen=True)
class Layer:
    """A call that multiplies two operands, and the sites of those that the scheme quantizes."""

    call: Call
    quantized: dict[str, Site]  # by role: weight and input, or lhs and rhs
    output: Site

    @property
    def name(self) -> str:
        return self.output.name.removesuffix("output").removesuffix(".") or "the model"

    @property
    def roles(self) -> tuple[str, str]:
        """The operands in the order in which they are searched: the first of a product, the weight of a layer."""
        if {"weight", "input"} & set(self.quantized):
            return "weight", "input"
        softmax_last = "post_softmax" in self.quantized["rhs"].tags if "rhs" in self.quantized else False
        return ("rhs", "lhs") if softmax_last else ("lhs", "rhs")


def layers(ctx: ModelContext) -> Iterator[Layer]:
    """Layers and products of activations with an operand that the scheme quantizes and whose call can be repeated."""
    held: dict[tuple[str, str, int], dict[str, Site]] = {}
    for site in ctx.sites():
        held.setdefault(site.key, {})[site.role] = site
    for sites in held.values():
        quantized = {
            role: site
            for role, site in sites.items()
            if role in ("weight", "input", "lhs", "rhs") and ctx.spec(site) is not None
        }
        first = next(iter(quantized.values()), None)
        op = "" if first is None else first.op.partition("@")[0]
        if first is None or op not in (*WEIGHTED, *MATMUL) or op in ("embedding", "grouped_mm"):
            continue
        if "weight" in sites or "lhs" in sites:
            yield Layer(ctx.graph.calls[first.call], quantized, sites["output"])


@dataclass(frozen=True)
class SplitFused(Step):
    """A weight interval of its own for each of the operands (queries, keys, values) that a fused projection makes.

    `per_operand` row blocks each. Only weight grids that are searched at the output and not finer already change.
    """

    per_operand: int = 1

    part: ClassVar[str] = "activations"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 29

    def apply(self, unit: ModelContext) -> None:
        for site in unit.weights():
            spec = unit.spec(site)
            call = unit.graph.calls[site.call]
            whole = spec is not None and isinstance(spec.granularity, (PerTensor, PerBlock)) and spec.range.at_output
            if not whole or call.op not in ("linear", "addmm", "matmul") or site.slot == "lhs":
                continue
            runs = fused_rows(unit.graph, call)
            if runs is None:
                continue
            assert spec is not None
            if any(run % self.per_operand for run in runs):
                raise FewbitsError(f"{site.name}: runs of {runs} rows do not divide into {self.per_operand} blocks")
            rows = tuple(run // self.per_operand for run in runs for _ in range(self.per_operand))
            columns = spec.granularity.columns if isinstance(spec.granularity, PerBlock) else 1
            unit.override(site, dataclasses.replace(spec, granularity=PerBlock(rows, columns)))


@dataclass(frozen=True)
class TaskGradients(Step):
    """Gradients of a task loss at the outputs of all searched layers, from the float model, before anything is rounded.

    `loss`: cross-entropy against the class that the float model ranks first (`pseudo`), against one drawn from its
    softmax (`sampled`), against the next tokens (`next_token`), or the divergence of its softmax from that of the model
    quantized by the starting intervals (`kl`). Between the float model and itself a divergence has no gradient.
    """

    loss: LossName = "pseudo"

    part: ClassVar[str] = "activations"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = 30
    gradients: ClassVar[bool] = True

    def apply(self, unit: ModelContext) -> None:
        site_gradients(unit, [layer.output for layer in layers(unit)], self._loss(unit))

    def _loss(self, ctx: ModelContext) -> Loss:
        if self.loss == "kl":
            targets = [logits.softmax(-1) for logits in quantized_logits(ctx)]

            def divergence(number: int, logits: Tensor, batch: object) -> Tensor:
                target = targets[number].to(logits.device)
                each = F.kl_div(logits.float().log_softmax(-1), target, reduction="none").sum(-1)
                return each.reshape(len(logits), -1).mean(1).sum()

            return divergence
        kind, generator = self.loss, ctx.generator("task loss")
        return lambda number, logits, batch: task_loss(kind, logits, batch, generator)


def quantized_logits(ctx: ModelContext) -> list[Tensor]:
    """The network's outputs, batch by batch, with every site of the scheme on the grid its own values give it."""
    attachment = ctx.attachment
    sites = [*ctx.weights(), *ctx.activations()]
    for site in sites:
        spec = ctx.spec(site)
        assert spec is not None
        quantizer = Quantizer(spec, site.name)
        if site.role == "weight":
            quantizer.calibrate(ctx.weight(site))
        ctx.set_quantizer(site, quantizer)
    attachment.calibrating = {site.name for site in sites if site.role != "weight"}
    out: list[Tensor] = []
    try:
        for batch in ctx.run.batches:
            args, kwargs = as_call(to(batch, ctx.device))
            out.append(first_output(ctx.model(*args, **kwargs)).float())
    finally:
        attachment.calibrating = set()
        for site in sites:
            ctx.set_quantizer(site, None)
    return out


@dataclass(frozen=True)
class SearchLayers(Step):
    """Intervals of every layer's two operands, searched in turn over `rounds` rounds, judged by `metric` at its output.

    Candidates are those of the scheme's `LayerSearch`; an operand with another range is fitted to its values and stays.
    `stream`: "float", every layer sees what the float model gives it, or "quantized", what the finished units do.
    Weights are not rounded here: their intervals are kept for the step that does, and until then they act as they are.
    """

    metric: str = "hessian"
    rounds: int = 3
    stream: Literal["float", "quantized"] = "float"

    part: ClassVar[str] = "activations"
    stage: ClassVar[int] = 20

    @property
    def streams(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.stream})

    def prepare(self, graph: Graph, units: list[Unit]) -> None:
        for site in graph.sites.values():
            call = graph.calls[site.call]
            if site.role not in ("lhs", "rhs") or site.op not in MATMUL or len(site.shape) != 4:
                continue
            if graph.flow.is_query_key(call) or graph.flow.attention_side(call) is not None:
                site.tags |= {HEADS}

    def apply(self, unit: UnitContext) -> None:
        found = list(layers(unit))
        for number, layer in enumerate(found):
            self._search(unit, layer)
            unit.run.progress.part((number + 1) / len(found))
        searched = {site.name for layer in found for site in layer.quantized.values()}
        rest = [site for site in unit.activations() if site.name not in searched]
        if rest:
            self._start_only(unit, rest)
        for site in unit.weights():
            spec = unit.spec(site)
            if site.name not in searched and spec is not None and spec.range.at_output:
                unit.note(f"{site.name}: its call cannot be repeated, the interval comes from its largest value")

    def _start_only(self, unit: UnitContext, sites: list[Site]) -> None:
        gather: Callable[..., None] = lambda requests: unit.gather(requests, self.stream, quantized=False)  # noqa: E731
        calibrate_sites(unit, 1 << 62, gather, sites)
        _note_unsearched(unit, sites)

    def apply_glue(self, glue: GlueContext) -> None:
        calibrate_sites(glue, 1 << 62, glue.gather)
        _note_unsearched(glue, glue.activations())

    # -- one layer ---------------------------------------------------------------------------------------------------
    def _search(self, unit: UnitContext, layer: Layer) -> None:
        weighted = layer.roles[0] == "weight"
        calls, metric = self._calls(unit, layer, weighted)
        roles = [role for role in layer.roles if role in layer.quantized]
        try:
            operands = [_operand(unit, layer, role, calls) for role in roles]
        except FewbitsError as error:
            raise FewbitsError(f"{layer.name}: {error}") from error
        channel_axis = -1
        if weighted:
            site = unit.graph.sites[layer.output.name.removesuffix("output") + "weight"]
            run = layer_alone(unit.model, unit.graph, site)
            if layer.call.op.startswith("conv"):
                channel_axis = 1 - len(site.shape)
            elif site.slot == "lhs":
                channel_axis = -2
        else:
            run = torch.matmul
        try:
            result = search_layer(
                run, calls, operands, metric=metric, rounds=self.rounds, weighted=weighted, channel_axis=channel_axis
            )
        except FewbitsError as error:
            raise FewbitsError(f"{layer.name}: {error}") from error
        for role, params in zip(roles, result.params, strict=True):
            site = layer.quantized[role]
            spec = unit.spec(site)
            assert spec is not None
            quantizer = Quantizer(spec, site.name)
            quantizer.set_params(params)
            quantizer.enabled = role != "weight"
            unit.set_quantizer(site, quantizer)

    def _calls(self, unit: UnitContext, layer: Layer, weighted: bool) -> tuple[list[LayerCall], str]:
        """What reached the layer, call by call, and the metric to judge by."""
        base = layer.output.name.removesuffix("output")
        names = [f"{base}input"] if weighted else [f"{base}lhs", f"{base}rhs"]
        held = {name: Calls() for name in names}
        unit.gather({name: [statistic] for name, statistic in held.items()}, self.stream, quantized=False)
        try:
            tensors = [held[name].value() for name in names]
        except FewbitsError as error:
            raise FewbitsError(f"{layer.name}: {error}; give more or other calibration data") from error
        if weighted:
            weight = unit.graph.sites[f"{base}weight"]
            run = layer_alone(unit.model, unit.graph, weight)
            matrix = unit.weight(weight)
            pairs = [(x, matrix) for x in tensors[0]]
        else:
            run, pairs = torch.matmul, list(zip(*tensors, strict=True))
        with torch.no_grad():
            outputs = [run(first, second) for first, second in pairs]
        gradients: list[Tensor | None] = [None] * len(outputs)
        metric = self.metric
        if metric == "hessian":
            gradients = self._gradients(unit, layer, outputs)
            if gradients[0] is None:
                metric = "l2"
                unit.note(f"{layer.name}: the task loss does not depend on its output; judged by squared error")
        calls = [
            LayerCall(first, second, raw, gradient)
            for (first, second), raw, gradient in zip(pairs, outputs, gradients, strict=True)
        ]
        return calls, metric

    def _gradients(self, unit: UnitContext, layer: Layer, outputs: list[Tensor]) -> list[Tensor | None]:
        """Task gradients beside the outputs, the largest magnitude 1; all None where all are zero."""
        found = gradients_at(unit, layer.output)
        if len(found) != len(outputs):
            raise FewbitsError(
                f"{layer.name} ran {len(outputs)} times on the calibration data and {len(found)} times when its "
                "gradients were taken; the model's forward must be the same each time"
            )
        peak = max((float(gradient.abs().amax()) for gradient in found if gradient is not None), default=0.0)
        if peak == 0:
            return [None] * len(outputs)
        # a common factor changes no choice, but the squares of tiny gradients would vanish in float32
        return [
            torch.zeros_like(raw) if gradient is None else (gradient / peak).view_as(raw)
            for gradient, raw in zip(found, outputs, strict=True)
        ]


def _note_unsearched(ctx: ModelContext, sites: list[Site]) -> None:
    for site in sites:
        spec = ctx.spec(site)
        if spec is not None and spec.range.at_output:
            ctx.note(f"{site.name}: no layer's operand that could be searched, the interval comes from its extremes")


def _operand(unit: UnitContext, layer: Layer, role: str, calls: list[LayerCall]) -> Operand:
    site = layer.quantized[role]
    spec = unit.spec(site)
    assert spec is not None
    slot = 1 if role in ("weight", "rhs") else 0
    if role == "weight":
        start = spec.range.fit(calls[0].second, spec.format, spec.granularity, where=site.name)
    else:
        start = _joint_start(spec, [call.operand(slot) for call in calls], site.name)
    if isinstance(spec.range, LayerSearch):
        tried = spec.range.tried(spec.format, start)
    else:
        tried = {name: value[None] for name, value in start.items()}
    alone = isinstance(spec.format, TwinMagnitude)
    return Operand(slot, spec.format, spec.granularity, start, tried, _group_axis(spec, role), alone)


def _joint_start(spec: QSpec, tensors: list[Tensor], name: str) -> dict[str, Tensor]:
    """Parameters for the values of all calls."""
    if isinstance(spec.range, LayerSearch):
        gran = spec.granularity
        lows = [gran.reduce(x, lambda block: block.amin(1)) for x in tensors]
        highs = [gran.reduce(x, lambda block: block.amax(1)) for x in tensors]
        if all(bool(torch.isfinite(bound).all()) for bound in (*lows, *highs)):
            return spec.range.fit_bounds(torch.stack(lows).amin(0), torch.stack(highs).amax(0), spec.format)
        raise FewbitsError(f"{name}: NaN or infinity in the calibration data's activations")
    return spec.range.fit(torch.cat(tensors), spec.format, spec.granularity, where=name)


def _group_axis(spec: QSpec, role: str) -> int | None:
    """The axis of the param shape whose blocks never meet in one element of the output."""
    if role == "weight":
        return 0 if isinstance(spec.granularity, (PerBlock, PerChannel, PerGroup)) else None
    return 1 if isinstance(spec.granularity, PerHead) and spec.granularity == PerHead(1) else None
