"""Changing a model's parameters along a relation, in place: the same function, other numbers.
 The arithmetic is `fewbits.transforms.fold`'s; here a relation's channels are carried to the rows, columns and
elements of the parameters, whatever slice, transpose or stack of them the forward reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.graph.operands import canonical, parameter
from fewbits.graph.relations import End, Relation
from fewbits.graph.types import Call, Graph, Ref, Site
from fewbits.transforms.fold import absorb_shift, fold_into_outputs, scale_inputs


@torch.no_grad()
def scale(model: nn.Module, relation: Relation, s: Tensor, *, only: str = "both", force: bool = False) -> None:
    """Multiply the relation's channels by s at the producers and divide by s at the consumers, in place.

    s: [relation.size], finite and nonzero, positive unless `relation.permits` contains "scale". `only`: "both", or
    "producers" or "consumers" alone (for a control; that changes the function). `force` skips the refusal of
    relations that are blocked or that the recorded forward covered in part. Raises `FewbitsError` on a wrong s or a
    refused relation.
    """
    s = _check(relation, s, "positive_scale", force)
    if not bool((s != 0).all()) or ("scale" not in relation.permits and not bool((s > 0).all())):
        sign = "nonzero" if "scale" in relation.permits else "positive"
        raise FewbitsError(f"relation {relation.name}: scales must be {sign}; an op on the way allows nothing else")
    if only != "consumers":
        for end in relation.producers:
            _multiply(model, relation, end, s)
    if only != "producers":
        for end in relation.consumers:
            _multiply(model, relation, end, 1 / s)


@torch.no_grad()
def shift(model: nn.Module, relation: Relation, t: Tensor, *, force: bool = False) -> None:
    """Add t to the relation's channels at the producers and take it back in the consumers' biases, in place.

    t: [relation.size], finite. A linear or convolution without a bias gets one (a new `Parameter` named `bias`). Raises
    `FewbitsError` where the relation does not permit a shift or t is wrong. `force` shifts a relation that permits
    positive scales only, for a caller who knows that what passes the ops on the way is shifted too (values that a ReLU
    does not clip); zeros that a convolution pads with are not.
    """
    t = _check(relation, t, "positive_scale" if force else "shift", False)
    for end in relation.consumers:  # from the old weights; the order does not matter, producers only change biases
        weight = canonical(operand(model, end), end.layout, end.groups)
        moved = _spread(end, t, 0.0).to(weight.device)
        name, index = _bias_of(model, end, create=True)
        bias = parameter(model, name).detach()
        rows = bias.view(-1)[index]
        bias.view(-1)[index] = absorb_shift(weight, rows, moved, groups=end.groups).to(bias.dtype)
    for end in relation.producers:
        name, index = _bias_of(model, end, create=True)
        if not len(index):
            continue  # scaled and shifted with the other reader of the same bias
        bias = parameter(model, name).detach()
        rows = bias.view(-1)[index].double()
        bias.view(-1)[index] = (rows + _spread(end, t, 0.0).to(rows.device)).to(bias.dtype)


@torch.no_grad()
def operand(model: nn.Module, end: End) -> Tensor:
    """The end's operand as its call reads it: a view of the parameter where the forward takes one, else a copy."""
    param = parameter(model, end.param).detach()
    if end.index is not None:
        return param.reshape(-1)[end.index.to(param.device)]
    flat = param if param.is_contiguous() else param.contiguous()
    return flat if end.view is None else flat.as_strided(*_shifted(end, flat))


@torch.no_grad()
def channels(model: nn.Module, end: End) -> Tensor:
    """The end's elements channel by channel, [rows, elements per row], rows as in `end.channel_of` (a copy).

    For axis "in" a row holds everything that multiplies one input channel; for "out" everything that makes one output
    channel.
    """
    held = operand(model, end)
    if end.layout == "vector":
        return held.reshape(-1, 1).clone()
    if end.layout.startswith("expert"):
        matrices = held.flatten(0, -3)
        direct = (end.axis == "in") == (end.layout == "expert_io")
        return (matrices if direct else matrices.transpose(1, 2)).flatten(0, 1).clone()
    if (end.axis == "out") == (end.layout == "oi"):
        return held.flatten(1).clone()
    return held.unflatten(0, (end.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1).clone()


@torch.no_grad()
def bias_of_call(model: nn.Module, graph: Graph, call: Call) -> Tensor | None:
    """The bias that a weighted call adds now, one element per output, or None (a copy).

    A bias that was not there when the forward was recorded is found on the module.
    """
    found = _bias_place(model, graph, call)
    if found is None:
        return None
    name, index = found
    held = parameter(model, name).detach()
    return held.clone() if index is None else held.reshape(-1)[index.to(held.device)]


def bias_parameter(model: nn.Module, graph: Graph, call: Call) -> Tensor | None:
    """The parameter that is a weighted call's bias as a whole, as `bias_of_call` finds it."""
    found = _bias_place(model, graph, call)
    return None if found is None or found[1] is not None else parameter(model, found[0])


@torch.no_grad()
def add_to_bias(model: nn.Module, graph: Graph, site: Site, t: Tensor) -> None:
    """Add t [out] to what the layer of a weight site adds to its output, in place.

    A linear or convolution without a bias gets one (a new `Parameter` named `bias`). Raises `FewbitsError` where none
    can be.
    """
    call = graph.calls[site.call]
    found = _bias_place(model, graph, call)
    if found is None:
        owner, _, leaf = (site.param or "").rpartition(".")
        if leaf != "weight" or site.sliced or not (site.op == "linear" or site.op.startswith("conv")):
            raise FewbitsError(f"{site.name}: this layer has no bias, and none can be added to it")
        _new_bias(model.get_submodule(owner), parameter(model, site.param or ""), len(t))
        found = f"{owner}.bias" if owner else "bias", None
    name, index = found
    bias = parameter(model, name).detach()
    place = torch.arange(bias.numel()) if index is None else index
    if len(place) != len(t):
        raise FewbitsError(f"{site.name}: {len(t)} values do not fit its bias of {len(place)}")
    rows = bias.view(-1)[place].double()
    bias.view(-1)[place] = (rows + t.double().to(rows.device)).to(bias.dtype)


def _bias_place(model: nn.Module, graph: Graph, call: Call) -> tuple[str, Tensor | None] | None:
    """Name of the bias a weighted call adds, and its elements there (None: all of them)."""
    ref = call.bound.get("bias")
    if isinstance(ref, Ref):
        name = graph.values[ref.value].param
        if name is None:
            return None
        held = parameter(model, name)
        index = graph.index_of(ref.value, tuple(held.shape)).reshape(-1)
        return name, None if len(index) == held.numel() else index
    weight = graph.flow.operands(call).get("weight")
    owner, _, leaf = ((graph.values[weight.value].param if weight else None) or "").rpartition(".")
    if leaf != "weight" or not (call.op == "linear" or call.op.startswith("conv")):
        return None
    own = getattr(model.get_submodule(owner), "bias", None)
    return (f"{owner}.bias" if owner else "bias", None) if isinstance(own, Tensor) else None


def _check(relation: Relation, vector: Tensor, use: str, force: bool) -> Tensor:
    if relation.blocked_by and not force:
        raise FewbitsError(
            f"relation {relation.name} holds only once {', '.join(sorted(relation.blocked_by))} is replaced"
        )
    if relation.uncovered and not force:
        unseen = ", ".join(relation.uncovered)
        message = f"relation {relation.name}: the recorded forward did not use all of {unseen}; record with more data"
        raise FewbitsError(message)
    if use not in relation.permits:
        raise FewbitsError(f"relation {relation.name} permits {', '.join(sorted(relation.permits))}, not {use}")
    if tuple(vector.shape) != (relation.size,):
        raise FewbitsError(
            f"relation {relation.name} has {relation.size} channels, but got a vector {tuple(vector.shape)}"
        )
    vector = vector.detach().double().cpu()
    if not bool(vector.isfinite().all()):
        raise FewbitsError(f"relation {relation.name}: the vector contains NaN or infinity")
    return vector


def _spread(end: End, vector: Tensor, neutral: float) -> Tensor:
    """One number per row of the end from one per channel; rows that take no part get the neutral one."""
    taking = end.channel_of >= 0
    out = torch.full((len(end.channel_of),), neutral, dtype=torch.float64)
    out[taking] = vector[end.channel_of[taking]]
    return out


def _multiply(model: nn.Module, relation: Relation, end: End, s: Tensor) -> None:
    factor = _spread(end, s, 1.0)
    _edit(model, end, lambda held: _scaled(end, held, factor.to(held.device)))
    if end.axis == "in":
        return
    name, index = _bias_of(model, end, create=False)
    own_end = end.bias is None and any(other.param == name for other in relation.producers)
    if name and len(index) and not own_end:
        bias = parameter(model, name).detach()
        rows = bias.view(-1)[index].double()
        bias.view(-1)[index] = (rows * factor.to(rows.device)).to(bias.dtype)


def _scaled(end: End, held: Tensor, factor: Tensor) -> Tensor:
    """The operand with its rows, columns or elements multiplied by `factor`."""
    inverse = 1 / factor  # fold's vectors divide
    if end.layout == "vector":
        new = (held.double() + end.offset) * factor.view(held.shape) - end.offset
        return new.to(held.dtype)
    if end.layout.startswith("expert"):
        matrices = held.flatten(0, -3)
        parts = inverse.view(len(matrices), -1)
        along_io = end.layout == "expert_io"
        new = torch.stack([_matrix(end, m, part, along_io) for m, part in zip(matrices, parts, strict=True)])
        return new.view(held.shape)
    if end.layout == "io":
        return _matrix(end, held, inverse, True)
    transposed = end.layout == "io_conv"
    if end.axis == "out":
        return fold_into_outputs(held, None, inverse, groups=end.groups, transposed=transposed)[0]
    return scale_inputs(held, inverse.reciprocal(), groups=end.groups, transposed=transposed)


def _matrix(end: End, held: Tensor, inverse: Tensor, transposed: bool) -> Tensor:
    weight = held.transpose(0, 1) if transposed else held
    new = (
        fold_into_outputs(weight, None, inverse)[0] if end.axis == "out" else scale_inputs(weight, inverse.reciprocal())
    )
    return new.transpose(0, 1) if transposed else new


def _edit(model: nn.Module, end: End, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the operand's elements within its parameter."""
    param = parameter(model, end.param).detach()
    new = change(operand(model, end))
    if end.index is not None:
        flat = param.contiguous()
        flat.view(-1)[end.index.reshape(-1).to(param.device)] = new.reshape(-1)
    else:
        flat = param if param.is_contiguous() else param.contiguous()
        (flat if end.view is None else flat.as_strided(*_shifted(end, flat))).copy_(new)
    if flat.data_ptr() != param.data_ptr():
        param.copy_(flat)


def _shifted(end: End, flat: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The end's view, counted from where the parameter starts in its storage."""
    assert end.view is not None
    size, stride, offset = end.view
    return size, stride, offset + int(flat.storage_offset())


def _bias_of(model: nn.Module, end: End, create: bool) -> tuple[str, Tensor]:
    """Name of the bias the end adds and its element per row; "" where there is none.

    A bias that was not there when the forward was recorded (made by an earlier shift) is found on the module.
    """
    if end.bias is not None and end.bias_index is not None:
        return end.bias, end.bias_index
    owner, _, leaf = end.param.rpartition(".")
    outputs = canonical(operand(model, end), end.layout, end.groups).shape[0] if end.axis == "in" else None
    rows = torch.arange(len(end.channel_of) if outputs is None else outputs)
    plain = end.whole and leaf == "weight" and (end.op == "linear" or end.op.startswith("conv"))
    if not plain:
        if create:
            raise FewbitsError(f"{end.site}: {end.param} has no bias to hold a shift, and none can be added there")
        return "", rows
    module = model.get_submodule(owner)
    name = f"{owner}.bias" if owner else "bias"
    if getattr(module, "bias", None) is None:
        if not create:
            return "", rows
        _new_bias(module, parameter(model, end.param), len(rows))
    return name, rows


def _new_bias(module: nn.Module, weight: Tensor, outputs: int) -> None:
    zeros = torch.zeros(outputs, dtype=weight.dtype, device=weight.device)
    module.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))
