"""Layers that make queries, keys and values at once: which rows of theirs go where, read off the data flow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewbits.graph.flow import ELEMENTWISE
from fewbits.graph.ops import IDENTITY, JOINS, LAYOUT, MATMUL, NORMS
from fewbits.graph.types import Call, Graph, Ref

_MOVES = LAYOUT | IDENTITY | frozenset(JOINS)
_PASSES = ELEMENTWISE | frozenset(NORMS)


def fused_rows(graph: Graph, call: Call) -> tuple[int, ...] | None:
    """How the output rows of a linear split among the operands of attention products.

    The lengths of a sequence of runs that repeats down the rows, one run per operand: (d, d, d) for queries, keys and
    values one after another, (w, w, w) for w of each head by head. None where all rows go to the same operands, and
    where no such sequence describes the split. Splits into heads, biases, scales, norms and rotary embeddings may lie
    between the layer and the products.
    """
    rows = graph.values[call.outputs[0]].shape[-1]
    goes: list[set[tuple[int, str]]] = [set() for _ in range(rows)]
    for sink, labels in _operands_reached(graph, call):
        for row in labels.unique().tolist():
            goes[row].add(sink)
    kinds = [frozenset(sinks) for sinks in goes]
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    period = len(set(kinds))
    if period < 2 or len(runs) % period or any(run != runs[place % period] for place, run in enumerate(runs)):
        return None
    return tuple(length for _, length in runs[:period])


def _operands_reached(graph: Graph, call: Call) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """((product, slot), labels) of every attention operand that the layer's output flows into; labels are rows."""
    shape = graph.values[call.outputs[0]].shape
    held: dict[int, Tensor] = {call.outputs[0]: torch.arange(shape[-1]).expand(shape)}
    for later in graph.calls[call.index + 1 :]:
        reads = [ref.value for ref in later.refs()]
        if not any(value in held for value in reads):
            continue
        if later.op in MATMUL:
            if graph.flow.is_query_key(later) or graph.flow.attention_side(later) is not None:
                for slot, ref in later.bound.items():
                    if isinstance(ref, Ref) and ref.value in held:
                        yield (later.index, slot), held[ref.value]
        elif later.op in _MOVES and (moved := _moved(graph, later, held)):
            held.update(moved)
        elif later.op in _PASSES or later.op in _MOVES:
            # also a key joined to an empty cache
            out = graph.values[later.outputs[0]].shape
            first = next((held[v] for v in reads if v in held and graph.values[v].shape == out), None)
            if first is not None:
                held[later.outputs[0]] = first


def _moved(graph: Graph, call: Call, held: dict[int, Tensor]) -> dict[int, Tensor]:
    """The labels behind an op that only moves elements; nothing where it also reads something unlabelled."""

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        known = held.get(leaf.value)
        return graph.values[leaf.value].data if known is None else known

    if call.op in ("to", "type", "type_as", "float", "half", "bfloat16", "double", *IDENTITY):
        first = held.get(next(call.refs()).value)
        return {} if first is None else {call.outputs[0]: first}
    args, kwargs = pytree.tree_map(fill, (call.args, call.kwargs), is_leaf=lambda x: isinstance(x, Ref))
    try:
        out = call.func(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return {}
    leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    return {
        value: leaf
        for value, leaf in zip(call.outputs, leaves, strict=True)
        if tuple(leaf.shape) == graph.values[value].shape
    }
