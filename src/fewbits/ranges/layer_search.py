"""Parameters of a layer's two operands, searched in turn, each candidate judged at the layer's output.

PTQ4ViT (Yuan et al., ECCV 2022), sections 3.2 and 3.3: every operand has a list of candidate intervals around where its
extremes put the grid; one operand's are tried with the other quantized as it is now, then the other's, for a few
rounds. Many candidates run at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format, Granularity, Params, TwinMagnitude, TwinSign, expand_params
from fewbits.ranges.base import Range, extremes, ranges
from fewbits.ranges.output_metrics import Features, Metric, output_metric

_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes of candidates and their outputs per pass


@ranges.register
@dataclass(frozen=True)
class LayerSearch(Range):
    """Found by a step that runs the layer (`search_layer`); from a tensor's values alone, where that search starts.

    The start is the format's answer to [min, max]. Candidates are the start's step times alpha + i (beta - alpha) /
    steps, i = 0 .. steps-1, without zero. Where steps are powers of two: `splits` shifts from 0 up for regions by
    magnitude, and for regions by sign every power of two from alpha to 1 times the start.
    """

    kind: ClassVar[str] = "layer_search"
    at_output: ClassVar[bool] = True

    alpha: float = 0.01
    beta: float = 1.2
    steps: int = 100
    splits: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < self.beta or self.steps < 1 or not 1 <= self.splits <= 64:
            raise FewbitsError(
                f"layer search: alpha={self.alpha}, beta={self.beta}, steps={self.steps}, splits={self.splits}; "
                "need 0 <= alpha < beta, steps >= 1 and splits from 1 to 64"
            )

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        return fmt.from_range(*extremes(blocks))

    def fit_bounds(self, lo: Tensor, hi: Tensor, fmt: Format) -> Params:
        return fmt.from_range(lo, hi)

    def tried(self, fmt: Format, start: Params) -> Params:
        """Every candidate: the start's parameters with a leading candidate axis."""
        if isinstance(fmt, TwinMagnitude):
            shifts = torch.arange(self.splits, dtype=torch.float32)
            return {"shift": _beside(shifts, start["shift"]).expand(-1, *start["shift"].shape)}
        if isinstance(fmt, TwinSign) and fmt.tie == "negative":
            lowest = math.floor(math.log2(max(self.alpha, 1e-3)))
            shifts = torch.arange(lowest, 1, dtype=torch.float32)
            return {"shift": _beside(shifts, start["shift"]) + start["shift"]}
        if "scale" not in start:
            raise FewbitsError(f"layer search: {fmt.kind} has no step to search")
        factors = [self.alpha + i * (self.beta - self.alpha) / self.steps for i in range(self.steps)]
        scale = _beside(torch.tensor([factor for factor in factors if factor > 0]), start["scale"]) * start["scale"]
        if isinstance(fmt, TwinSign):
            return fmt.with_scale(scale)
        return {name: scale if name == "scale" else value.expand_as(scale) for name, value in start.items()}


def _beside(line: Tensor, param: Tensor) -> Tensor:
    """A line of candidates as the leading axis of a parameter."""
    return line.to(param.device).view(-1, *[1] * param.dim())


class LayerCall(NamedTuple):
    """One call of a layer on calibration data: its operands, its float output, the task gradient there (or None)."""

    first: Tensor
    second: Tensor
    raw: Tensor
    gradient: Tensor | None = None

    def operand(self, slot: int) -> Tensor:
        return self.second if slot else self.first


@dataclass(frozen=True)
class Operand:
    """One operand of a layer whose parameters are searched.

    slot: 0 for the call's `first`, 1 for its `second`. start: parameters in param shape; tried: the candidates'
    parameters, [candidates, *param shape]. group_axis: the axis of the param shape whose blocks never meet in one
    output element (rows of a weight, heads), so that each picks its own best; along other axes blocks are searched one
    after another. alone: its candidates are judged with the other operand in floating point.
    """

    slot: int
    format: Format
    granularity: Granularity
    start: Params
    tried: Params
    group_axis: int | None = None
    alone: bool = False

    def quantize(self, x: Tensor, params: Params) -> Tensor:
        """`x` on the grid; parameters may carry a leading candidate axis, which the result then has too."""
        return self.format.nearest(x, expand_params(self.format, self.granularity, params, x.shape))[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The param shape."""
        return tuple(next(iter(self.start.values())).shape)

    @property
    def groups(self) -> int:
        return 1 if self.group_axis is None else self.shape[self.group_axis]


class Found(NamedTuple):
    """params: of every operand, in param shape. scores: per round and operand, float32 [blocks one after another,
    candidates, groups]."""

    params: list[Params]
    scores: list[list[Tensor]]


@torch.no_grad()
def search_layer(
    run: Callable[[Tensor, Tensor], Tensor],
    calls: Sequence[LayerCall],
    operands: Sequence[Operand],
    *,
    metric: str = "hessian",
    rounds: int = 3,
    weighted: bool = True,
    channel_axis: int = -1,
    at_once: int | None = None,
) -> Found:
    """Search the operands' parameters in the order given, `rounds` times; the first of the best candidates wins.

    run: (first, second) -> output, of one call; it runs under `torch.vmap` over either argument. weighted: `second` is
    the weight matrix [out, columns], the same in all calls, and row blocks lie along the output's channel axis;
    otherwise both operands have the samples in front and a group axis is the same axis of operand and output.
    An operand that is not listed stays in floating point. metric: see `output_metrics`; its value is averaged over the
    positions of a sample and summed over the first axis of all calls, whatever passes they are computed in.
    at_once: bytes of candidates and outputs held at a time; passes become smaller, scores do not change.

    Candidates replace the start, not the current value. A round that meets the same other operand as the one before
    repeats it, and is not computed again. Raises `FewbitsError` where an operand, output or gradient is not finite.
    """
    if not calls:
        raise FewbitsError("no calibration data reached this layer")
    if rounds < 1:
        raise FewbitsError(f"layer search: rounds={rounds}; need at least 1")
    for call in calls:
        for name, value in zip(LayerCall._fields, call, strict=True):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise FewbitsError(f"NaN or infinity in the {name} operand, output or gradient of this layer")
    judge = _Judge(run, calls, output_metric(metric), weighted, channel_axis, at_once)
    current = [dict(operand.start) for operand in operands]
    known: dict[int, tuple[list[Tensor], Params, Tensor]] = {}
    rows: list[list[Tensor]] = []
    for _ in range(rounds):
        row: list[Tensor] = []
        for number, operand in enumerate(operands):
            met = next((i for i, o in enumerate(operands) if o.slot != operand.slot), None)
            other = None if met is None or operand.alone else (operands[met], current[met])
            state = [] if other is None else list(other[1].values())
            if _serial(operand) > 1:
                state = state + list(current[number].values())
            before = known.get(number)
            if before is None or not all(map(torch.equal, before[0], state)):
                held = [value.clone() for value in state]
                known[number] = (held, *_one_turn(judge, operand, current[number], other))
            current[number] = known[number][1]
            row.append(known[number][2])
        rows.append(row)
    return Found(current, rows)


def _serial(operand: Operand) -> int:
    return math.prod(operand.shape) // operand.groups


def _one_turn(
    judge: _Judge, operand: Operand, current: Params, other: tuple[Operand, Params] | None
) -> tuple[Params, Tensor]:
    """The operand's best parameters beside the other's, and the scores [blocks, candidates, groups]."""
    fixed = judge.fixed(operand, other)
    now = {name: _lines(value, operand) for name, value in current.items()}  # [blocks, groups]
    tried = {name: _lines(value, operand) for name, value in operand.tried.items()}  # [candidates, blocks, groups]
    scores: list[Tensor] = []
    for block in range(_serial(operand)):
        candidates = {}
        for name, value in tried.items():
            full = now[name].expand_as(value).clone()
            full[:, block] = value[:, block]
            candidates[name] = _unlines(full, operand)
        score = judge.scores(operand, candidates, fixed)
        if not bool(torch.isfinite(score).all()):
            raise FewbitsError("a candidate's output overflows float32, so that none can be called best")
        best = score.argmax(0)
        for name, value in tried.items():
            now[name][block] = value[:, block].gather(0, best[None])[0]
        scores.append(score)
    return {name: _unlines(value, operand) for name, value in now.items()}, torch.stack(scores)


def _lines(param: Tensor, operand: Operand) -> Tensor:
    """[..., *param shape] -> [..., blocks, groups], in memory of its own."""
    shape = operand.shape
    lead = param.shape[: param.dim() - len(shape)]
    if operand.group_axis is None:
        return param.reshape([*lead, -1, 1]).clone()
    moved = param.movedim(len(lead) + operand.group_axis % len(shape), -1)
    return moved.reshape([*lead, -1, operand.groups]).clone()


def _unlines(lines: Tensor, operand: Operand) -> Tensor:
    """The inverse of `_lines`."""
    shape, lead = list(operand.shape), lines.shape[:-2]
    if operand.group_axis is None:
        return lines.reshape([*lead, *shape])
    axis = operand.group_axis % len(shape)
    rest = shape[:axis] + shape[axis + 1 :]
    return lines.reshape([*lead, *rest, operand.groups]).movedim(-1, len(lead) + axis)


class _Judge:
    """Scores of candidates over all calls."""

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Tensor],
        calls: Sequence[LayerCall],
        metric: Metric,
        weighted: bool,
        channel_axis: int,
        at_once: int | None,
    ) -> None:
        self.run = run
        self.calls = calls
        self.metric = metric
        self.weighted = weighted
        self.channel_axis = channel_axis
        device = calls[0].raw.device.type
        self.at_once = at_once or _AT_ONCE.get(device, _AT_ONCE["cpu"])

    def fixed(self, operand: Operand, other: tuple[Operand, Params] | None) -> list[Tensor]:
        """The other operand of every call, quantized with its current parameters where it has some."""
        held = [call.operand(1 - operand.slot) for call in self.calls]
        if other is None:
            return held
        if self.weighted and operand.slot == 0:
            return [other[0].quantize(held[0], other[1])] * len(held)
        return [other[0].quantize(x, other[1]) for x in held]

    def scores(self, operand: Operand, candidates: Params, fixed: list[Tensor]) -> Tensor:
        """float32 [candidates, groups]."""
        count = len(next(iter(candidates.values())))
        shared = self.weighted and operand.slot == 1
        total: list[Tensor] = []
        size = self._candidates_at_once(operand, count)
        for start in range(0, count, size):
            part = {name: value[start : start + size] for name, value in candidates.items()}
            made = operand.quantize(self.calls[0].second, part) if shared else None
            sums: list[Tensor] = []
            for call, other in zip(self.calls, fixed, strict=True):
                for piece, beside in self._pieces(operand, call, other):
                    tensor = operand.quantize(piece.operand(operand.slot), part) if made is None else made
                    pair, dims = ((tensor, beside), (0, None)) if operand.slot == 0 else ((beside, tensor), (None, 0))
                    out = torch.vmap(self.run, dims)(*pair)
                    sums.append(self._similarity(operand, piece, out))
            total.append(torch.stack(sums).sum(0))
        return torch.cat(total)

    def _similarity(self, operand: Operand, call: LayerCall, out: Tensor) -> Tensor:
        """[candidates, groups]: averaged over the positions of each sample, summed over samples."""
        axis: int | None = None
        labels = None
        if operand.groups > 1 and self.weighted:
            labels = _row_groups(operand, call.second)
            if operand.groups == out.shape[self.channel_axis]:
                axis, labels = self.channel_axis, None
        elif operand.groups > 1:
            axis = operand.group_axis
        raw, made = (_arranged(x, self.channel_axis, axis) for x in (call.raw[None].float(), out.float()))
        gradient = None
        if call.gradient is not None:
            gradient = _arranged(call.gradient[None].float(), self.channel_axis, axis)
        features = Features(raw.shape[-1], labels, operand.groups)
        value = self.metric(raw, made, gradient, features)  # [candidates, samples, groups or 1, positions, 1 or groups]
        return value.mean(3).sum(1).flatten(1)

    def _candidates_at_once(self, operand: Operand, count: int) -> int:
        return max(1, min(count, self.at_once // max(self._bytes(operand, call) for call in self.calls)))

    def _bytes(self, operand: Operand, call: LayerCall) -> int:
        """Of one candidate on one call: the operand and the output, with what is made on the way."""
        return 12 * (call.operand(operand.slot).numel() + call.raw.numel()) + 1

    def _pieces(self, operand: Operand, call: LayerCall, other: Tensor) -> Iterator[tuple[LayerCall, Tensor]]:
        """The call and the other operand, cut along the samples where even one candidate is too large."""
        samples = call.raw.shape[0] if call.raw.dim() > 1 else 0
        whole = self.weighted and operand.slot == 0
        sliced = [call.first] if self.weighted else [call.first, call.second]
        parts = -(-self._bytes(operand, call) // self.at_once)
        if parts == 1 or samples < 2 or any(x.dim() != call.raw.dim() or x.shape[0] != samples for x in sliced):
            yield call, other
            return
        size = max(1, samples // parts)
        for start in range(0, samples, size):
            at = slice(start, start + size)
            yield (
                LayerCall(
                    call.first[at],
                    call.second if self.weighted else call.second[at],
                    call.raw[at],
                    None if call.gradient is None else call.gradient[at],
                ),
                other if whole else other[at],
            )


def _row_groups(operand: Operand, weight: Tensor) -> Tensor:
    """int64 [out]: the group of every row of a weight matrix."""
    assert operand.group_axis is not None
    shape = operand.shape
    line = torch.arange(operand.groups, dtype=torch.float32, device=weight.device)
    places = line.view([-1 if axis == operand.group_axis % len(shape) else 1 for axis in range(len(shape))])
    spread = operand.granularity.expand(places.expand(shape), weight.shape)
    return spread.expand(weight.shape)[:, 0].long()


def _arranged(out: Tensor, channel_axis: int, group_axis: int | None) -> Tensor:
    """[candidates, *output] -> [candidates, samples, groups, positions, features].

    Groups along the channel axis itself leave the other axes of a sample as the features.
    """
    if out.dim() == 2:
        out = out.unsqueeze(1)
    channel = channel_axis % (out.dim() - 1) + 1
    if group_axis is None:
        flat = out.movedim(channel, -1).unsqueeze(2)
        return flat.flatten(3, -2) if flat.dim() > 4 else flat.unsqueeze(3)
    group = group_axis % (out.dim() - 1) + 1
    if group == channel:
        apart = out.movedim(channel, 2)
        return apart.flatten(3).unsqueeze(3) if apart.dim() > 3 else apart.unsqueeze(3).unsqueeze(3)
    # the group axis stands before the channel axis or behind it; either way the channels come last
    apart = out.movedim((group, channel), (2, -1))
    return apart.flatten(3, -2) if apart.dim() > 4 else apart.unsqueeze(3)
