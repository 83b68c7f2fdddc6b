"""Label rules of products, layers with weights, lookups and norms: where slots and their labels are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.graph.labels import compact, is_live
from fewbits.graph.ops import IDENTITY
from fewbits.graph.propagation import Propagation, Rule, argument
from fewbits.graph.types import CASTS, Call, Ref


def _matmul(p: Propagation, call: Call) -> None:
    a, b = call.bound.get("lhs"), call.bound.get("rhs")
    if not isinstance(a, Ref) or not isinstance(b, Ref):
        p.block_all(call, call.op)
        return
    out = _product(p, call, a, b)
    if call.op == "baddbmm":
        bias = p.get(call.bound.get("bias"))
        if is_live(out) or is_live(bias):
            p.labels.block(out, "baddbmm")
            p.labels.block(bias, "baddbmm")
        return
    p.put(call, out)


def _product(p: Propagation, call: Call, a: Ref, b: Ref) -> Tensor | None:
    """Labels of the product of two values, or of a value and a parameter."""
    for weight, x, on_right in ((b, a, True), (a, b, False)):
        if p.root(weight) is not None and len(p.shape(weight)) >= 2 and x.value in p.active:
            return _by_weight(p, call, x, weight, on_right)
    left, right, shape = p.get(a), p.get(b), p.out_shape(call)
    live_left, live_right = is_live(left), is_live(right)
    if not (live_left or live_right):
        return None
    if len(p.shape(a)) < 2 or len(p.shape(b)) < 2:
        p.block_all(call, "matmul with a vector")
        return None
    if live_left and live_right:
        assert left is not None and right is not None
        rows = p.labels.along(left, [left.dim() - 2], "query_key").squeeze(-2)
        columns = p.labels.along(right, [right.dim() - 1], "query_key").squeeze(-1)
        rows, columns = torch.broadcast_tensors(rows, columns)
        if call.key is not None:
            p.pairs.append((rows.reshape(-1), columns.reshape(-1), call.key))
        p.block_all(call, "query_key")
        return None
    # One side's values stay as they are: the product is linear in the other.
    labels, contracted, other = (right, -2, a) if live_right else (left, -1, b)
    assert labels is not None
    p.tag(labels, "attention")
    if not (live_right and _sums_to_one(p, other)):
        p.forbid(labels, "shift")
    kept = p.labels.along(labels, [labels.dim() + contracted], call.op)
    return compact(kept.expand(shape))


def _sums_to_one(p: Propagation, arg: Ref) -> bool:
    """Whether a value's rows are softmax probabilities, nothing masked out afterwards."""
    through = CASTS | IDENTITY | {"view", "reshape", "masked_fill"}
    value_id = arg.value
    while True:
        index = p.graph.values[value_id].call
        if index is None:
            return False
        call = p.graph.calls[index]
        if call.op == "softmax":
            dim = argument(call, 1, "dim")
            return isinstance(dim, int) and dim % len(p.out_shape(call)) == len(p.out_shape(call)) - 1
        if call.op not in through:
            return False
        if call.op == "masked_fill":
            mask = p.value(argument(call, 1, "mask"))
            if mask is None or mask.data is None or bool(mask.data.any()):
                return False
        if call.op in ("view", "reshape") and p.shape(call.args[0])[-1:] != p.out_shape(call)[-1:]:
            return False
        value_id = next(call.refs()).value


def _by_weight(p: Propagation, call: Call, x: Ref, weight: Ref, on_right: bool) -> Tensor | None:
    """x @ W (rows of W are inputs) or W @ x; W may be a stack of matrices."""
    shape, out = p.shape(weight), p.out_shape(call)
    stack, (rows, columns) = shape[:-2], shape[-2:]
    ins, outs = (rows, columns) if on_right else (columns, rows)
    layout = ("io" if on_right else "oi") if not stack else ("expert_io" if on_right else "expert_oi")
    count = torch.Size(stack).numel()
    slot = p.slot(call, weight, layout, outs, ins, stack=count)
    if slot is None or slot.inputs is None:
        p.block_all(call, "computed weight")
        return None
    axis = -2 if on_right else -1
    p.consume(x, slot.inputs.view(*stack, ins).unsqueeze(axis))
    if stack:
        p.forbid(slot.inputs, "permute", "rotate", "shift")
        p.forbid(slot.out, "permute", "rotate")
    return compact(slot.out.view(*stack, outs).unsqueeze(axis).expand(out))


def _addmm(p: Propagation, call: Call) -> None:
    x, weight, bias = (call.bound.get(name) for name in ("input", "weight", "bias"))
    if not isinstance(weight, Ref) or not isinstance(x, Ref) or p.root(weight) is None:
        p.block_all(call, call.op)
        return
    out = _by_weight(p, call, x, weight, True)
    if out is None:
        return
    slot = next(s for s in p.by_param[p.param_name(p.root(weight))] if call.key in s.calls)  # type: ignore[arg-type]
    p.bias(call, bias, slot, slot.out)
    p.put(call, out)


def _linear(p: Propagation, call: Call) -> None:
    x, weight, bias = (call.bound.get(name) for name in ("input", "weight", "bias"))
    if not isinstance(weight, Ref) or len(p.shape(weight)) != 2:
        p.block_all(call, call.op)
        return
    outs, ins = p.shape(weight)
    slot = p.slot(call, weight, "oi", outs, ins)
    if slot is None or slot.inputs is None:
        p.block_all(call, "computed weight")
        return
    p.consume(x, slot.inputs)
    p.bias(call, bias, slot, slot.out)
    p.put(call, slot.out.expand(p.out_shape(call)))


def _conv(p: Propagation, call: Call) -> None:
    x, weight, bias = (call.bound.get(name) for name in ("input", "weight", "bias"))
    spatial = int(call.op[-2])
    groups = int(argument(call, 6, "groups", default=1))
    if not isinstance(weight, Ref) or not isinstance(x, Ref):
        p.block_all(call, call.op)
        return
    shape = p.shape(weight)
    transposed = call.op.startswith("conv_transpose")
    outs, ins = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    slot = p.slot(call, weight, "io_conv" if transposed else "oi", outs, ins, groups)
    if slot is None or slot.inputs is None:
        p.block_all(call, "computed weight")
        return
    padding = argument(call, 4, "padding", default=0)
    slot.padded = (
        slot.padded or transposed or (padding if isinstance(padding, str) else _any(padding)) not in (False, "valid")
    )
    if slot.padded:
        p.forbid(slot.inputs, "shift")
    if groups > 1:
        p.forbid(slot.inputs, "permute", "rotate")
        p.forbid(slot.out, "permute", "rotate")
    p.consume(x, slot.inputs.view(-1, *[1] * spatial))
    p.bias(call, bias, slot, slot.out)
    p.put(call, slot.out.view(-1, *[1] * spatial).expand(p.out_shape(call)))


def _any(padding: Any) -> bool:
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def _grouped_mm(p: Propagation, call: Call) -> None:
    """x [tokens, in] times a stack of matrices [experts, in, out], the rows of x belonging to experts by offsets."""
    x, weight = call.bound.get("lhs"), call.bound.get("rhs")
    ends = p.value(argument(call, 2, "offs"))
    if (
        not isinstance(x, Ref)
        or not isinstance(weight, Ref)
        or ends is None
        or ends.data is None
        or len(p.shape(weight)) != 3
    ):
        p.block_all(call, call.op)
        return
    experts, ins, outs = p.shape(weight)
    slot = p.slot(call, weight, "expert_io", outs, ins, stack=experts)
    if slot is None or slot.inputs is None or len(p.shape(x)) != 2:
        p.block_all(call, "computed weight")
        return
    which = torch.bucketize(torch.arange(p.shape(x)[0]), ends.data.long().cpu(), right=True).clamp(max=experts - 1)
    slot.touched.update(which.tolist())
    p.forbid(slot.inputs, "permute", "rotate", "shift")
    p.forbid(slot.out, "permute", "rotate", "shift")
    p.consume(x, slot.inputs.view(experts, ins)[which])
    p.put(call, compact(slot.out.view(experts, outs)[which]))


def _embedding(p: Propagation, call: Call) -> None:
    weight = call.bound.get("weight")
    if not isinstance(weight, Ref):
        return
    width = p.shape(weight)[1]
    slot = p.slot(call, weight, "io", width, 0)
    if slot is not None:
        p.put(call, slot.out.expand(p.out_shape(call)))


def _norm(p: Propagation, call: Call) -> None:
    p.labels.block(p.get(call.bound.get("input")), call.op)
    weight, bias = call.bound.get("weight"), call.bound.get("bias")
    out = p.out_shape(call)
    labels = p.affine(weight, call)
    if labels is None:
        return
    p.forbid(labels, "permute", "rotate")
    root = p.root(weight)
    vector = p.vectors.get(p.param_name(root)) if root is not None else None
    if isinstance(bias, Ref):
        shift = p.vector(bias, call)
        if shift is None:
            p.labels.block(labels, "computed bias")
        else:
            p.labels.unite(labels, shift, "bias")
            bias_root = p.root(bias)
            if vector is not None and bias_root is not None:
                vector.bias = p.param_name(bias_root)
    if call.op not in ("layer_norm", "rms_norm"):
        labels = labels.view(-1, *[1] * (len(out) - 2))
    p.put(call, compact(labels.expand(out)))


RULES: dict[str, Rule] = {
    **{f"conv{kind}{n}d": _conv for n in (1, 2, 3) for kind in ("", "_transpose")},
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"), _norm),
    **dict.fromkeys(("matmul", "baddbmm"), _matmul),
    "addmm": _addmm,
    "linear": _linear,
    "grouped_mm": _grouped_mm,
    "embedding": _embedding,
}
