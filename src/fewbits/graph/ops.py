"""The canonical op table: which torch calls fewbits knows by name, and the roles of their operands.

A call is recognised by the `__name__` of the overridable function (`torch.matmul`, `Tensor.__matmul__` and
`torch.bmm` are all `matmul`). Everything else in `graph` speaks in these names. One row per op; adding an op means
adding a row and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Ops with a parameter in a slot: name -> positions (name, index) of input, weight, bias in the call's signature.
WEIGHTED: dict[str, tuple[tuple[str, int], ...]] = {
    "linear": (("input", 0), ("weight", 1), ("bias", 2)),
    "conv1d": (("input", 0), ("weight", 1), ("bias", 2)),
    "conv2d": (("input", 0), ("weight", 1), ("bias", 2)),
    "conv3d": (("input", 0), ("weight", 1), ("bias", 2)),
    "conv_transpose1d": (("input", 0), ("weight", 1), ("bias", 2)),
    "conv_transpose2d": (("input", 0), ("weight", 1), ("bias", 2)),
    "conv_transpose3d": (("input", 0), ("weight", 1), ("bias", 2)),
    "addmm": (("bias", 0), ("input", 1), ("weight", 2)),
    "embedding": (("indices", 0), ("weight", 1)),
}
#: Products of two tensors. When one operand is (laid out from) a parameter the call is weighted too.
MATMUL: dict[str, tuple[tuple[str, int], ...]] = {
    "matmul": (("lhs", 0), ("rhs", 1)),
    "baddbmm": (("bias", 0), ("lhs", 1), ("rhs", 2)),
    "grouped_mm": (("lhs", 0), ("rhs", 1)),
}
NORMS: dict[str, tuple[tuple[str, int], ...]] = {
    "layer_norm": (("input", 0), ("shape", 1), ("weight", 2), ("bias", 3)),
    "rms_norm": (("input", 0), ("shape", 1), ("weight", 2)),
    "group_norm": (("input", 0), ("groups", 1), ("weight", 2), ("bias", 3)),
    "instance_norm": (("input", 0), ("running_mean", 1), ("running_var", 2), ("weight", 3), ("bias", 4)),
    "normalize": (("input", 0),),
    "batch_norm": (("input", 0), ("running_mean", 1), ("running_var", 2), ("weight", 3), ("bias", 4)),
}
ACTIVATIONS = (
    "relu relu6 hardtanh leaky_relu prelu elu selu celu gelu silu mish sigmoid hardsigmoid hardswish tanh softplus "
    "softsign threshold rrelu glu logsigmoid"
).split()
POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate"
).split()
BINARY = ("add", "mul")
JOINS = ("cat", "stack")

#: Ops that only move elements (or cast them): a tensor laid out from a parameter stays that parameter.
LAYOUT = frozenset(
    "view reshape transpose permute t T mT H mH flatten unflatten unsqueeze squeeze expand contiguous chunk split "
    "unbind getitem narrow select to float half bfloat16 double type type_as clone detach repeat repeat_interleave "
    "roll flip movedim swapaxes swapdims view_as reshape_as expand_as data real tensor_split hsplit vsplit dsplit "
    "pixel_shuffle pixel_unshuffle split_with_sizes alias tile moveaxis adjoint ravel broadcast_to unsafe_chunk "
    "requires_grad_ cuda cpu channel_shuffle".split()
)
#: Ops that leave each element's meaning alone (identity in evaluation mode).
IDENTITY = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout identity".split())

#: Ops that take only the shape and type of their operand.
CREATION = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty "
    "new_full new_tensor new_empty_strided shape size".split()
)
#: Elementwise and counting ops that read parameters (biases, tables, layer scales) without being products with a
#: weight.
PLAIN_READERS = frozenset(
    "add sub rsub mul div rdiv neg pow rpow where cat stack masked_fill copy lerp addcmul sum mean norm vector_norm "
    "abs max min amax amin argmax sort topk exp log sqrt rsqrt maximum minimum clamp eq ne lt le gt ge isnan isinf "
    "isfinite any all setitem allclose equal index_select gather take_along_dim interpolate pad numel dim size "
    "is_floating_point stride storage_offset data_ptr untyped_storage".split()
)

#: Calls that hide several sites; `decompose` opens them.
COMPOSITES = ("scaled_dot_product_attention", "multi_head_attention_forward", "einsum")
#: Calls that hide weights and that nothing here opens: reported by name, never skipped in silence.
OPAQUE = (
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "lstm_cell",
    "gru_cell",
    "flex_attention",
    "bilinear",
    "multi_head_attention",
)

#: Every op that is counted and may carry sites, with its tensor slots.
SLOTS: dict[str, tuple[tuple[str, int], ...]] = {
    **WEIGHTED,
    **MATMUL,
    **NORMS,
    "softmax": (("input", 0),),
    "add": (("lhs", 0), ("rhs", 1)),
    "mul": (("lhs", 0), ("rhs", 1)),
    "cat": (),
    "stack": (),
    "index_copy": (("source", 3),),
    **dict.fromkeys((*ACTIVATIONS, *POOLS), (("input", 0),)),
}
#: Keyword names under which torch passes a slot, where they differ from ours.
KEYWORDS: dict[str, tuple[str, ...]] = {
    "lhs": ("input", "self", "mat1", "batch1", "mat_a"),
    "rhs": ("other", "mat2", "tensor2", "batch2", "mat_b"),
    "weight": ("weight", "mat2"),
    "input": ("input", "mat1", "self"),
    "bias": ("bias", "input"),
    "indices": ("input",),
}

_ALIASES: dict[str, str] = {
    "__matmul__": "matmul",
    "bmm": "matmul",
    "mm": "matmul",
    "_grouped_mm": "grouped_mm",
    "_safe_softmax": "softmax",
    "_softmax": "softmax",
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add",
    "__sub__": "sub",
    "__rsub__": "rsub",
    "__isub__": "sub",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__imul__": "mul",
    "__truediv__": "div",
    "__itruediv__": "div",
    "__rtruediv__": "rdiv",
    "__neg__": "neg",
    "__pow__": "pow",
    "__rpow__": "rpow",
    "__getitem__": "getitem",
    "__setitem__": "setitem",
    "multiply": "mul",
    "true_divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "hardtanh_": "hardtanh",
    "_max_pool2d": "max_pool2d",
    "max_pool2d_with_indices": "max_pool2d",
    "upsample": "interpolate",
}


def canonical(func: Callable[..., Any]) -> str:
    """The op name of an overridable torch function.

    In-place variants share the name of their out-of-place op. `__get__` of a property becomes the property's name.
    """
    name: str = getattr(func, "__name__", "") or ""
    if name == "__get__":
        owner = getattr(func, "__self__", None)
        return str(getattr(owner, "__name__", "property"))
    packet = getattr(func, "overloadpacket", None)
    if packet is not None:  # torch.ops.aten.mm.default
        name = str(packet.__name__)
    known = _ALIASES.get(name)
    if known is not None:
        return known
    if name.endswith("_") and not name.endswith("__") and len(name) > 1:
        return _ALIASES.get(name[:-1], name[:-1])
    return name


# A function's name never changes: torch.compile may look it up once instead of tracing through the string handling.
canonical._dynamo_marked_constant = True  # type: ignore[attr-defined]


def bind(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Slot name -> argument for a call of a known op (missing optional slots are left out)."""
    bound: dict[str, Any] = {}
    for slot, position in SLOTS[op]:
        if position < len(args):
            bound[slot] = args[position]
        else:
            for keyword in (slot, *KEYWORDS.get(slot, ())):
                if keyword in kwargs:
                    bound[slot] = kwargs[keyword]
                    break
    return bound


def rebind(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], new: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's args and kwargs with the slots in `new` replaced."""
    out_args, out_kwargs = list(args), dict(kwargs)
    for slot, position in SLOTS[op]:
        if slot not in new:
            continue
        if position < len(out_args):
            out_args[position] = new[slot]
            continue
        for keyword in (slot, *KEYWORDS.get(slot, ())):
            if keyword in out_kwargs:
                out_kwargs[keyword] = new[slot]
                break
    return tuple(out_args), out_kwargs
