"""Recorded calls run again on other tensors: one layer alone, or a layer with the activation that follows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbits.errors import FewbitsError
from fewbits.graph import operands
from fewbits.graph.positions import following_activation
from fewbits.graph.types import Call, Graph, Ref, Site


def replay_calls(model: nn.Module, graph: Graph, calls: Sequence[Call], known: dict[int, Tensor]) -> Tensor:
    """Run recorded calls in order, from the given values (by id), parameters of the model and recorded constants.

    Parameters come in the type of the given values. Returns the first output of the last call. Raises `FewbitsError`
    where a call reads something else.
    """
    values = dict(known)
    dtype = next(iter(known.values())).dtype
    out: Any = None
    for call in calls:

        def fill(leaf: Any, call: Call = call) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            if leaf.value in values:
                return values[leaf.value]
            value = graph.values[leaf.value]
            if value.param is not None:
                held = graph.replay(leaf.value, operands.parameter(model, value.param))
                return held.to(dtype) if held.is_floating_point() and dtype.is_floating_point else held
            if value.data is not None:
                return value.data
            raise FewbitsError(
                f"{call.module}: {call.op} reads a tensor that is not available outside the model's forward"
            )

        args, kwargs = pytree.tree_map(fill, (call.args, call.kwargs), is_leaf=lambda x: isinstance(x, Ref))
        out = call.func(*args, **kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        values.update(zip(call.outputs, leaves, strict=True))
    assert out is not None
    first: Tensor = values[calls[-1].outputs[0]]
    return first


def layer_with_activation(model: nn.Module, graph: Graph, site: Site) -> Callable[[Tensor, Tensor], Tensor]:
    """(input, weight matrix (out, columns)) -> the layer's output past the norm and activation that alone follow it."""
    call = graph.calls[site.call]
    return _layer(model, graph, site, [call, *following_activation(graph, call)])


def layer_alone(model: nn.Module, graph: Graph, site: Site) -> Callable[[Tensor, Tensor], Tensor]:
    """(input, weight matrix (out, columns)) -> the layer's own output."""
    return _layer(model, graph, site, [graph.calls[site.call]])


def _layer(model: nn.Module, graph: Graph, site: Site, chain: Sequence[Call]) -> Callable[[Tensor, Tensor], Tensor]:
    source = graph.sites[site.name.removesuffix("weight") + "input"].value

    def run(x: Tensor, weight: Tensor) -> Tensor:
        stored = operands.operand(model, site)
        full = weight.view(operands.canonical(stored, site.layout, site.groups).shape)
        operand = operands.restore(full, site.layout, tuple(stored.shape), site.groups)
        # In-place activations must not write into a tensor that autograd still needs.
        return replay_calls(model, graph, [_out_of_place(c) for c in chain], {source: x, site.value: operand})

    return run


def tail(model: nn.Module, graph: Graph, call: Call) -> Callable[[Tensor], Tensor]:
    """A layer's output -> the same past the norm and activation that alone follow it."""
    chain = [_out_of_place(c) for c in following_activation(graph, call)]
    if not chain:
        return lambda y: y
    return lambda y: replay_calls(model, graph, chain, {call.outputs[0]: y})


def channel_axis(graph: Graph, value: int) -> int:
    """The channel axis of a recorded value: 1 behind convolutions and their norms, the last axis otherwise."""
    while True:
        held = graph.values[value]
        if held.call is None:
            return 1 if len(held.shape) == 4 else -1
        call = graph.calls[held.call]
        if (
            call.op.startswith("conv")
            or call.op in ("batch_norm", "group_norm", "instance_norm")
            or call.op.endswith("pool2d")
        ):
            return 1 if len(held.shape) > 2 else -1
        first = next(call.refs(), None)
        same_shape = first is not None and graph.values[first.value].shape == held.shape
        if call.op in ("linear", "addmm", "matmul", "layer_norm", "rms_norm") or first is None or not same_shape:
            return -1
        value = first.value


def _out_of_place(call: Call) -> Call:
    if not call.inplace:
        return call
    out_of_place = getattr(torch.nn.functional, call.op, None)
    if out_of_place is None:
        raise FewbitsError(f"{call.module}: {call.op} works in place and has no other form")
    kwargs = {key: value for key, value in call.kwargs.items() if key != "inplace"}
    args = tuple(
        False if value is True and index == len(call.args) - 1 else value for index, value in enumerate(call.args)
    )
    return dataclasses.replace(call, func=out_of_place, kwargs=kwargs, args=args)
