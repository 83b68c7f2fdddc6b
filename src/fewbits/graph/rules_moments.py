"""Moments of all values of a recorded forward, from what the batch norms of the model say.

Behind a batch norm the elements of channel i are taken as normal with mean beta_i and standard deviation |gamma_i|
(Nagel et al., ICCV 2019, sections 4.2 and 5). From there on: activations by the moments of functions of a normal
variable, sums as sums of independent ones, layers without a norm by E[Wx + b] = W E[x] + b. No data is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbits.correction.analytic import clipped_normal, mean_output
from fewbits.graph.moments import MOST_GUESSES, Moments, NormStatistics, State, normal, stored
from fewbits.graph.ops import ACTIVATIONS, IDENTITY, LAYOUT, rebind
from fewbits.graph.propagation import argument
from fewbits.graph.types import CASTS, Call, Graph, Ref
from fewbits.graph.weights import bias_of_call


@torch.no_grad()
def propagate_moments(
    graph: Graph,
    model: nn.Module,
    norms: Mapping[int, NormStatistics],
    inputs: Mapping[int, Moments] | None = None,
    sigmas: float = 6.0,
) -> dict[int, Moments]:
    """Moments by value id, for every value that the statistics reach.

    norms: of the values that norms make, as they are now (`norm_statistics`, kept up by whoever rescales channels).
    inputs: what is known of the model's inputs. sigmas: how far from its mean a normal element is taken to reach.
    """
    state = State(graph, model, norms, dict(inputs or {}), sigmas)
    for call in graph.calls:
        known = norms.get(call.outputs[0]) if call.outputs else None
        if known is not None:
            shape = (1, -1, *[1] * (len(graph.values[call.outputs[0]].shape) - 2))
            state.of[call.outputs[0]] = normal(known[0].view(shape), known[1].view(shape), sigmas)
            continue
        rule = _RULES.get(call.op)
        if rule is not None:
            rule(state, call)
    return state.of


_Rule = Callable[[State, Call], None]


# -- activations -----------------------------------------------------------------------------------------------------
def _clip(state: State, call: Call) -> None:
    low, high = argument(call, 1, "min_val", "min"), argument(call, 2, "max_val", "max")
    if call.op == "relu":
        low, high = 0.0, None
    elif call.op == "relu6":
        low, high = 0.0, 6.0
    elif call.op == "hardtanh":
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    x = state.first(call)
    if x is None or isinstance(low, Ref) or isinstance(high, Ref):
        return
    bottom = -np.inf if low is None else float(low)
    top = np.inf if high is None else float(high)
    x = Moments.of(torch.broadcast_tensors(x.mean, x.var, x.low, x.high), x.guesses)
    mean, var = clipped_normal(x.mean, x.var.sqrt(), bottom, top)
    inside = (x.low >= bottom) & (x.high <= top)  # clipped before: no longer normal, and nothing happens to it
    state.put(
        call,
        Moments(
            torch.where(inside, x.mean, mean),
            torch.where(inside, x.var, var),
            x.low.clamp(bottom, top),
            x.high.clamp(bottom, top),
            x.guesses,
        ),
    )


def _elementwise(state: State, call: Call) -> None:
    """Any other activation: mean and variance by summing over a normal density, the ends over what lies between."""
    x = state.first(call)
    if x is None:
        return

    def run(value: Tensor) -> Tensor:
        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            if leaf == first:
                return value.clone()
            held = stored(state.graph, state.model, leaf)
            return None if held is None else held.double().cpu()

        args, kwargs = pytree.tree_map(fill, (call.args, call.kwargs), is_leaf=lambda leaf: isinstance(leaf, Ref))
        out: Tensor = call.func(*args, **kwargs)
        return out

    first = argument(call, 0, "input", "self")
    shape = torch.broadcast_shapes(*(f.shape for f in (x.mean, x.var, x.low, x.high)))
    mean, std = x.mean.expand(shape), x.var.sqrt().expand(shape)
    total, square = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for node, weight in zip(*_DENSITY, strict=True):
        value = run(mean + float(node) * std)
        total, square = total + float(weight) * value, square + float(weight) * value.square()
    span = [run(x.low.expand(shape) * (1 - t) + x.high.expand(shape) * t) for t in np.linspace(0, 1, 129)]
    stacked = torch.stack(span)
    state.put(
        call,
        Moments(total, (square - total.square()).clamp_min(0), stacked.amin(0), stacked.amax(0), x.guesses),
    )


def _normal_density(count: int = 257, reach: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    nodes = np.linspace(-reach, reach, count)
    weights = np.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


_DENSITY = _normal_density()


# -- arithmetic ------------------------------------------------------------------------------------------------------
def _add(state: State, call: Call) -> None:
    a, b = argument(call, 0, "input", "self"), argument(call, 1, "other")
    x, y, alpha = state.get(a), state.get(b), argument(call, 2, "alpha", default=1)
    if x is None or y is None or not isinstance(alpha, (int, float)):
        return
    if call.op == "sub":
        alpha = -alpha
    if call.op == "rsub":
        x, y, alpha = y, x, -alpha
    y = _times(y, float(alpha))
    if isinstance(a, Ref) and a == b:  # the same value twice is anything but independent
        state.put(call, _times(x, 1.0 + float(alpha)))
        return
    mean = x.mean + y.mean
    # Normal summands: exactly `sigmas` deviations of the sum. Bounded ones: within the sum of their ends.
    up = torch.hypot(x.high - x.mean, y.high - y.mean)
    down = torch.hypot(x.mean - x.low, y.mean - y.low)
    state.put(call, Moments(mean, x.var + y.var, mean - down, mean + up, max(x.guesses, y.guesses)))


def _times(x: Moments, factor: float | Tensor) -> Moments:
    one, other = x.low * factor, x.high * factor
    squared = factor * factor
    return Moments(x.mean * factor, x.var * squared, torch.minimum(one, other), torch.maximum(one, other), x.guesses)


def _mul(state: State, call: Call) -> None:
    x, y = state.get(argument(call, 0, "input", "self")), state.get(argument(call, 1, "other"))
    if x is None or y is None:
        return
    if call.op == "div":
        if bool((y.var != 0).any()) or bool((y.mean == 0).any()):
            return
        y = Moments(1 / y.mean, y.var, 1 / y.mean, 1 / y.mean)
    ends = torch.stack(torch.broadcast_tensors(x.low * y.low, x.low * y.high, x.high * y.low, x.high * y.high))
    var = x.var * y.var + x.var * y.mean.square() + y.var * x.mean.square()
    state.put(call, Moments(x.mean * y.mean, var, ends.amin(0), ends.amax(0), max(x.guesses, y.guesses)))


def _neg(state: State, call: Call) -> None:
    x = state.first(call)
    state.put(call, None if x is None else _times(x, -1.0))


# -- layers ----------------------------------------------------------------------------------------------------------
def _layer(state: State, call: Call) -> None:
    """A layer without a norm behind it: mean and variance of independent inputs, convolutions over all positions."""
    graph = state.graph
    readers = graph.consumers.get(call.outputs[0], ())
    if readers and all(graph.calls[index].outputs[0] in state.norms for index in readers):
        return
    found = _operands(graph, state.model, call, state.of)
    if found is None or found[0].guesses >= MOST_GUESSES:
        return
    x, weight, bias = found
    mean, var = _replayed(graph, call, x.mean, weight, bias), _replayed(graph, call, x.var, weight.square(), None)
    if call.op.startswith("conv"):
        mean, var = _positions(mean), _positions(var)
    state.put(call, normal(mean, var.sqrt(), state.sigmas, x.guesses + 1))


@torch.no_grad()
def layer_mean(graph: Graph, model: nn.Module, call: Call, of: Mapping[int, Moments]) -> Tensor | None:
    """What a weighted call puts out on average, float64 per output channel, with the model's parameters as they are.

    None where nothing is known of its input, or its operand is no parameter.
    """
    found = _operands(graph, model, call, of)
    if found is None:
        return None
    x, weight, bias = found
    on_left = call.bound.get("lhs") == graph.flow.operands(call)["weight"]
    axis = 1 if call.op.startswith("conv") else -2 if on_left else -1
    return mean_output(lambda mean, matrix: _replayed(graph, call, mean, matrix, bias), weight, x.mean, axis)


def _operands(
    graph: Graph, model: nn.Module, call: Call, of: Mapping[int, Moments]
) -> tuple[Moments, Tensor, Tensor | None] | None:
    """A weighted call's input, weight and bias, the latter as the model has them now (float64)."""
    found = graph.flow.operands(call)
    x = of.get(found["input"].value) if "input" in found else None
    weight = stored(graph, model, found.get("weight"))
    if x is None or weight is None:
        return None
    bias = bias_of_call(model, graph, call)
    return x, weight.double().cpu(), None if bias is None else bias.double().cpu()


def _replayed(graph: Graph, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The call on another input (broadcastable to the recorded one; one sample, if all are alike), weight and bias."""
    found = graph.flow.operands(call)
    shape = graph.values[found["input"].value].shape
    lead = 1 if x.dim() == len(shape) and x.shape[0] == 1 and len(shape) > 1 else shape[0]
    x = x.expand(lead, *shape[1:])
    new = {slot: x if ref == found["input"] else weight for slot, ref in call.bound.items() if ref in found.values()}
    kwargs = call.kwargs
    if "bias" in call.bound:
        new["bias"] = x.new_zeros(()) if bias is None and call.op == "addmm" else bias  # type: ignore[assignment]
    elif bias is not None:
        kwargs, new["bias"] = {**kwargs, "bias": None}, bias
    args, kwargs = rebind(call.op, call.args, kwargs, new)
    out: Tensor = call.func(*args, **kwargs)
    return out


def _positions(x: Tensor) -> Tensor:
    """[N, C, *positions] averaged over the positions."""
    return x.flatten(2).mean(2).view(*x.shape[:2], *[1] * (x.dim() - 2))


# -- positions and layout --------------------------------------------------------------------------------------------
def _pool(state: State, call: Call) -> None:
    """Pooling, resizing and means over positions: run on the moments, neighbours taken as alike.

    The largest of k neighbours is taken as that of sqrt(k) independent normal ones: neighbours resemble each other.
    """
    x, arg = state.first(call), argument(call, 0, "input", "self")
    if x is None:
        return
    shape = state.shape(arg)
    if "max_pool" in call.op:
        shift, shrink = _largest_of(_window(call, shape, state.graph.values[call.outputs[0]].shape) ** 0.5)
        x = Moments(torch.minimum(x.mean + shift * x.var.sqrt(), x.high), shrink * x.var, x.low, x.high, x.guesses)
    made = []
    for held in (x.mean, x.var, x.low, x.high):
        out = _run_on(state, call, {arg.value: held.expand(shape)})
        if not out or tuple(out[0].shape) != state.graph.values[call.outputs[0]].shape:
            return
        made.append(out[0])
    state.put(call, Moments.of(made, x.guesses))


def _window(call: Call, shape: tuple[int, ...], out: tuple[int, ...]) -> float:
    """How many elements a pooled one is the largest of."""
    spatial = int(call.op[-2])
    if call.op.startswith("adaptive"):
        return float(torch.Size(shape[-spatial:]).numel()) / torch.Size(out[-spatial:]).numel()
    kernel = argument(call, 1, "kernel_size")
    return float(kernel**spatial if isinstance(kernel, int) else torch.Size(kernel).numel())


def _largest_of(count: float) -> tuple[float, float]:
    """Mean and variance of the largest of `count` independent standard normal variables (any count of at least 1)."""
    nodes = torch.from_numpy(_DENSITY[0])
    weights = torch.from_numpy(_DENSITY[1]) * count * torch.special.ndtr(nodes) ** (count - 1)
    mean = float((weights * nodes).sum() / weights.sum())
    return mean, float((weights * (nodes - mean).square()).sum() / weights.sum())


def _layout(state: State, call: Call) -> None:
    """Ops that move elements run on the moments themselves."""
    refs = [ref for ref in call.refs() if state.graph.values[ref.value].dtype.is_floating_point]
    known = {ref.value: state.get(ref) for ref in refs}
    if not any(ref.value in state.of for ref in refs) or any(held is None for held in known.values()):
        return
    made: list[list[Tensor]] = []
    for field in ("mean", "var", "low", "high"):
        spread = {value: getattr(held, field).expand(state.graph.values[value].shape) for value, held in known.items()}
        out = _run_on(state, call, spread)
        if [tuple(t.shape) for t in out] != [state.graph.values[o].shape for o in call.outputs]:
            return
        made.append(out)
    guesses = max(held.guesses for held in known.values() if held is not None)
    for position, parts in enumerate(zip(*made, strict=True)):
        state.put(call, Moments.of(parts, guesses), position)


def _run_on(state: State, call: Call, spread: Mapping[int, Tensor]) -> list[Tensor]:
    """The call's output tensors on these operands; none where it does not run on them."""

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        if leaf.value in spread:
            return spread[leaf.value]
        held = state.graph.values[leaf.value].data
        return None if held is None else held.cpu()

    args, kwargs = pytree.tree_map(fill, (call.args, call.kwargs), is_leaf=lambda leaf: isinstance(leaf, Ref))
    try:
        out = call.func(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        return []
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def _same(state: State, call: Call) -> None:
    state.put(call, state.first(call))


_WEIGHTED = ("linear", "addmm", "matmul", *(f"conv{kind}{n}d" for n in (1, 2, 3) for kind in ("", "_transpose")))
_POOLS = [f"{kind}_pool{n}d" for n in (1, 2, 3) for kind in ("avg", "max", "adaptive_avg", "adaptive_max")]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(set(ACTIVATIONS) - {"glu", "rrelu"}, _elementwise),
    **dict.fromkeys(("relu", "relu6", "hardtanh", "clamp"), _clip),
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    **dict.fromkeys(("mul", "div"), _mul),
    "neg": _neg,
    **dict.fromkeys(_WEIGHTED, _layer),
    **dict.fromkeys((*_POOLS, "interpolate", "mean"), _pool),
    **dict.fromkeys((LAYOUT - CASTS) | {"cat", "stack", "pad", "contiguous", "index_select"}, _layout),
    **dict.fromkeys((CASTS - {"contiguous"}) | IDENTITY, _same),
}
