"""Label rules of ops that move, copy, fill, pad or pool values and do no arithmetic between channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.graph.labels import FIXED, WILD, base, compact, full, is_live, reshaped
from fewbits.graph.ops import IDENTITY, LAYOUT
from fewbits.graph.propagation import Propagation, Rule, argument
from fewbits.graph.types import CASTS, Call, Ref


def _layout(p: Propagation, call: Call) -> None:
    if call.op == "setitem" and call.index in p.aliased:
        p.block_all(call, "alias")
        return
    if call.op == "contiguous":
        p.put(call, p.get(argument(call, 0, "input", "self")))  # the same elements, wherever they lie
    elif call.op in ("reshape", "view", "flatten") and (labels := _reshaped(p, call)) is not None:
        p.put(call, compact(labels))
    elif call.op in ("cat", "stack"):
        p.run_layout(call, lambda ref: p.vector(ref, call))
    else:
        p.run_layout(call)


def _reshaped(p: Propagation, call: Call) -> Tensor | None:
    """The first operand's labels in the shape of the output, where its elements are the operand's."""
    first, out = argument(call, 0, "input", "self"), p.graph.values[call.outputs[0]]
    given, labels = p.value(first), p.get(first)
    if given is None or labels is None or given.dtype != out.dtype:
        return None
    return reshaped(labels, out.shape)


def _setitem(p: Propagation, call: Call) -> None:
    if call.index in p.aliased:
        p.block_all(call, "alias")
        return
    target, where, new = call.args[:3]
    if not isinstance(new, Ref):
        label = WILD if new == 0 else FIXED
        call = _replaced(call, (target, where, label))
        p.forbid(p.get(target), "shift")
    p.run_layout(call)


def _replaced(call: Call, args: tuple[Any, ...]) -> Call:
    return Call(call.index, call.op, call.func, args, call.kwargs, call.outputs, call.module, call.key, call.use)


def same(p: Propagation, call: Call) -> None:
    """Casts, dropout and the like: the first operand's labels."""
    first = argument(call, 0, "input", "self")
    labels = p.get(first)
    if labels is None or not p.graph.values[call.outputs[0]].dtype.is_floating_point:
        p.labels.block(labels, call.op)
        return
    if tuple(labels.shape) != p.out_shape(call):
        p.labels.block(labels, call.op)
        return
    p.put(call, labels)


def _zeros(p: Propagation, call: Call) -> None:
    if p.graph.values[call.outputs[0]].dtype.is_floating_point:
        p.put(call, full(WILD, p.out_shape(call)))


def _filled(p: Propagation, call: Call) -> None:
    number = argument(call, 2 if call.op == "new_full" else 1, "fill_value", "value")
    if call.op in ("fill", "zero"):
        if call.index in p.aliased:
            p.block_all(call, "alias")
        number = 0 if call.op == "zero" else number
    if isinstance(number, (int, float)) and number == 0:
        _zeros(p, call)


def _copy(p: Propagation, call: Call) -> None:
    if call.index in p.aliased:
        p.block_all(call, "alias")
        return
    p.put(call, p.get(argument(call, 1, "src", "other")))


def _no_labels(p: Propagation, call: Call) -> None:
    """Reads nothing but shape or type."""


def _positional(p: Propagation, call: Call) -> None:
    """Ops over positions of one channel: pooling, resizing, region alignment."""
    x = argument(call, 0, "input", "self")
    labels = p.get(x)
    if not is_live(labels):
        if labels is not None and call.op != "roi_align":
            p.put(call, full(WILD, p.out_shape(call)) if bool((base(labels) == WILD).all()) else None)
        return
    assert labels is not None
    out = p.out_shape(call)
    spatial = 2 if call.op == "roi_align" else labels.dim() - 2 if call.op == "interpolate" else int(call.op[-2])
    p.tag(labels, "pool")
    dims = range(labels.dim() - spatial, labels.dim())
    kept = p.labels.along(labels, dims, call.op)
    if call.op == "roi_align":
        kept = p.labels.along(kept, [0], call.op)
    p.put(call, compact(kept.expand(out)))


def _reduced(p: Propagation, call: Call) -> None:
    """mean, sum and amax over some dimensions."""
    x = argument(call, 0, "input", "self")
    labels = p.get(x)
    if labels is None or not labels.numel():
        return
    dims = argument(call, 1, "dim", "axis")
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        dims = tuple(range(labels.dim()))
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    dims = tuple(dim % labels.dim() for dim in dims)
    if call.op == "amax":
        p.tag(labels, "pool")
    elif call.op == "sum":
        p.forbid(labels, "shift")
    kept = p.labels.along(labels, dims, call.op)
    out = p.out_shape(call)
    if len(out) != labels.dim():
        for dim in sorted(dims, reverse=True):
            kept = kept.squeeze(dim)
    p.put(call, kept.expand(out))


def _pad(p: Propagation, call: Call) -> None:
    labels = p.get(argument(call, 0, "input"))
    if labels is None:
        return
    widths, mode = argument(call, 1, "pad"), argument(call, 2, "mode", default="constant")
    number = argument(call, 3, "value", default=None)
    if mode == "constant":
        out = F.pad(labels, list(widths), value=WILD if not number else FIXED)
        p.forbid(labels, "shift")
    else:
        out = F.pad(labels.double(), list(widths), mode=mode).long()
    p.put(call, compact(out))


def _index_add(p: Propagation, call: Call) -> None:
    x, dim, index, source = (argument(call, i, n) for i, n in enumerate(("input", "dim", "index", "source")))
    into, added, at = p.get(x), p.get(source), p.value(index)
    if not is_live(into) and not is_live(added):
        return
    if at is None or at.data is None or call.index in p.aliased:
        p.block_all(call, call.op)
        return
    into = full(FIXED, p.shape(x)) if into is None else into
    added = full(FIXED, p.shape(source)) if added is None else added
    p.forbid(into, "shift")
    p.forbid(added, "shift")
    out = into.clone(memory_format=torch.contiguous_format)
    rows = out.index_select(dim, at.data)
    out.index_copy_(dim, at.data, torch.where(rows == WILD, added, rows))
    p.labels.unite(out.index_select(dim, at.data), added, call.op)
    p.labels.unite(out.index_select(dim, at.data), rows, call.op)
    p.put(call, compact(out))


_SHAPE_ONLY = "arange ones ones_like new_ones rand randn rand_like randn_like tensor as_tensor one_hot".split()
RULES: dict[str, Rule] = {
    **dict.fromkeys(LAYOUT - CASTS, _layout),
    **dict.fromkeys(("cat", "stack", "index_select", "gather", "take_along_dim", "unfold", "contiguous"), _layout),
    **dict.fromkeys((CASTS - {"contiguous"}) | IDENTITY, same),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"), _zeros),
    **dict.fromkeys(("full", "full_like", "new_full", "fill", "zero"), _filled),
    **dict.fromkeys(_SHAPE_ONLY, _no_labels),
    **{f"{kind}_pool{n}d": _positional for n in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")},
    **dict.fromkeys(("interpolate", "roi_align"), _positional),
    **dict.fromkeys(("mean", "sum", "amax"), _reduced),
    "setitem": _setitem,
    "copy": _copy,
    "pad": _pad,
    "index_add": _index_add,
}
