"""Label rules of elementwise ops: sums join labels, products and activations pass or block them."""

from __future__ import annotations

from typing import Any

import torch

from fewbits.graph.labels import FIXED, WILD, base, compact, full, holds, is_live, merged
from fewbits.graph.propagation import Propagation, Rule, argument
from fewbits.graph.rules_layout import same
from fewbits.graph.types import Call, Ref

#: Ops a step can replace by ReLU: labels pass, the class is blocked by the op's name.
REPLACEABLE = ("relu6", "hardtanh", "clamp")


def _number(p: Propagation, arg: Any) -> float | None:
    return float(arg) if isinstance(arg, (int, float)) and not isinstance(arg, bool) else None


def _add(p: Propagation, call: Call) -> None:
    a, b = argument(call, 0, "input", "self"), argument(call, 1, "other")
    if argument(call, 2, "alpha", default=1) != 1 or call.op != "add":
        p.forbid(p.get(a), "shift")
        p.forbid(p.get(b), "shift")
    _sum(p, call, a, b)


def _sum(p: Propagation, call: Call, a: Any, b: Any) -> None:
    """Elementwise sum (or choice) of two operands: their labels are joined."""
    if call.inplace and call.index in p.aliased:
        p.block_all(call, "alias")
        return
    sides = []
    for arg, other in ((a, b), (b, a)):
        number = _number(p, arg)
        labels = p.get(arg)
        if number is not None:
            labels = full(WILD, ()) if number == 0 else full(FIXED, ())
        elif labels is None and is_live(p.get(other)) and isinstance(arg, Ref):
            labels = p.vector(arg, call)
        sides.append(full(FIXED, p.shape(arg)) if labels is None else labels)
    first, second = sides
    if not is_live(first) and not is_live(second):
        if not (holds(first, FIXED) or holds(second, FIXED)):
            p.put(call, full(WILD, p.out_shape(call)))
        return
    reason = f"{call.op} of a fixed value"
    p.labels.unite(first, second, reason)
    # now that they are joined, positions of a channel share a class: back to one label per channel
    out = p.labels.settled(merged(first, second))
    for side, other in ((first, second), (second, first)):
        if is_live(side) and bool((base(other) != WILD).any()):
            p.forbid(side, "shift")
    p.put(call, out)


def _where(p: Propagation, call: Call) -> None:
    if len(call.args) + len(call.kwargs) < 3:
        p.block_all(call, "where")
        return
    p.block_all(Call(0, "", call.func, call.args[:1], {}, (), "", None), "where")
    _sum(p, call, argument(call, 1, "input"), argument(call, 2, "other"))


def _masked_fill(p: Propagation, call: Call) -> None:
    x, number = p.get(call.args[0]), argument(call, 2, "value")
    mask = p.value(argument(call, 1, "mask"))
    unused = mask is not None and mask.data is not None and not bool(mask.data.any())
    if _number(p, number) == 0 or unused:
        p.forbid(x, "shift")
        p.put(call, x)
    else:
        p.labels.block(x, "masked_fill")


def _mul(p: Propagation, call: Call) -> None:
    a, b = argument(call, 0, "input", "self"), argument(call, 1, "other")
    if call.inplace and call.index in p.aliased:
        p.block_all(call, "alias")
        return
    for x, y in ((a, b), (b, a)):
        number = _number(p, y)
        if number is None:
            continue
        if call.op == "rdiv" or (call.op == "div" and y is a):
            p.block_all(call, call.op)
            return
        labels = p.get(x)
        if number == 0 and call.op == "mul":
            p.put(call, full(WILD, p.out_shape(call)))
            return
        if number != 1:
            p.forbid(labels, "shift")
        p.put(call, labels)
        return
    left, right = p.get(a), p.get(b)
    live_left, live_right = is_live(left), is_live(right)
    if call.op in ("div", "rdiv"):
        over, under = (b, a) if call.op == "rdiv" else (a, b)
        p.labels.block(p.get(under), "div")
        if is_live(p.get(over)):
            _through_product(p, call, over, under)
        return
    if live_left and live_right:
        p.block_all(call, "product")
        return
    for x, y in ((a, b), (b, a)):
        # a parameter that multiplies makes new channels, unless it is a single number
        if torch.Size(p.shape(y)).numel() > 1:
            made = p.affine(y, call)
            if made is not None:
                p.forbid(made, "permute", "rotate")  # the other side stays in its order
                reads = p.affine_inputs(y, call)
                p.forbid(reads, "shift", "permute", "rotate")
                p.consume(x, reads)
                p.put(call, compact(made.expand(p.out_shape(call))))
                return
    if live_left or live_right:
        _through_product(p, call, *((a, b) if live_left else (b, a)))


def _through_product(p: Propagation, call: Call, x: Any, y: Any) -> None:
    """A labelled side times a side whose values stay as they are."""
    labels = p.get(x)
    if isinstance(y, Ref) and y.value in p.active:
        p.tag(labels, "gate")
    elif torch.Size(p.shape(y)).numel() > 1:
        p.forbid(labels, "shift", "permute", "rotate")
    else:
        p.forbid(labels, "shift")
    assert labels is not None
    p.put(call, compact(labels.expand(p.out_shape(call))) if labels.dim() == len(p.out_shape(call)) else labels)


def _neg(p: Propagation, call: Call) -> None:
    p.forbid(p.get(call.args[0]), "shift")
    same(p, call)


def _relu(p: Propagation, call: Call) -> None:
    x = argument(call, 0, "input", "self")
    if call.inplace and call.index in p.aliased:
        p.block_all(call, "alias")
        return
    p.tag(p.get(x), "relu")
    same(p, call)


def _bounded(p: Propagation, call: Call) -> None:
    """ReLU6 and its kin: with a lower bound of 0 they pass a positive scale but for the upper one."""
    low, high = argument(call, 1, "min_val", "min"), argument(call, 2, "max_val", "max")
    if call.op == "relu6":
        low, high = 0.0, 6.0
    elif call.op == "hardtanh":
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    x = argument(call, 0, "input", "self")
    if _number(p, low) != 0 or isinstance(high, Ref):
        p.block_all(call, call.op)
        return
    if high is not None:
        p.labels.block(p.get(x), call.op)
    _relu(p, call)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    **dict.fromkeys(("mul", "div", "rdiv"), _mul),
    **dict.fromkeys(("relu", "leaky_relu", "prelu"), _relu),
    **dict.fromkeys(REPLACEABLE, _bounded),
    "where": _where,
    "masked_fill": _masked_fill,
    "neg": _neg,
}
