"""From recorded calls to sites: names that stay the same over runs, and what each site's tensor is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from fewbits.graph.flow import Flow
from fewbits.graph.ops import ACTIVATIONS, MATMUL, NORMS, POOLS, WEIGHTED
from fewbits.graph.types import Call, CallKey, Graph, Ref, Site

__all__ = ["Flow", "find_sites"]


def find_sites(graph: Graph, param_shapes: dict[str, tuple[int, ...]]) -> dict[str, Site]:
    """All sites of a recorded forward, keyed by name, in call order."""
    flow = graph.flow
    names = _base_names(graph, flow)
    returned = {(note.path, value) for note in graph.module_io for value in note.outputs}
    sites: dict[str, Site] = {}
    for call in graph.calls:
        if call.index not in names:
            continue
        for role, ref in _site_roles(call, flow):
            assert call.key is not None
            name = f"{names[call.index]}.{role}" if names[call.index] else role
            value = graph.values[ref.value]
            if name in sites:
                sites[name].uses += 1
                continue
            site = Site(name, call.key, call.op, role, _slot(call, flow, role), call.index, ref.value, value.shape)
            site.tags = flow.tags(call, role, ref)
            made = flow.maker(ref.value)
            site.source = made.module if made and (made.module, ref.value) in returned else f"#{ref.value}"
            if "@" in call.key[1]:
                site.tags |= {"expert"}
            if role == "weight":
                shape = param_shapes.get(value.param or "")
                site.param = value.param
                site.layout = _layout(call, flow, len(value.shape))
                site.groups = _groups(call)
                site.view = None if shape is None else graph.view_of(ref.value, shape)
                site.sliced = shape is not None and _elements(value.shape) != _elements(shape)
            sites[name] = site
    sites = _with_unvisited(sites, param_shapes)
    _mark_shared(sites, graph)
    return sites


def _mark_shared(sites: dict[str, Site], graph: Graph) -> None:
    """Fill `used_by`: other sites that read the same elements of a parameter."""
    readers: dict[str, list[Site]] = {}
    for site in sites.values():
        if site.param is not None:
            readers.setdefault(graph.tied.get(site.param, site.param), []).append(site)
    for group in readers.values():
        for site in group:
            shared = (other for other in group if other is not site and _overlap(site, other))
            site.used_by = tuple(sorted(other.name.removesuffix(".weight") for other in shared))


def _overlap(first: Site, second: Site) -> bool:
    if first.view is None or second.view is None:
        return True
    spans = []
    for size, stride, offset in (first.view, second.view):
        spans.append((offset, offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _with_unvisited(sites: dict[str, Site], param_shapes: dict[str, tuple[int, ...]]) -> dict[str, Site]:
    """Sites of the slices of a parameter stack (experts) that this forward was not routed to, with `uses` 0.

    They are copies of a visited slice's sites: all slices of a stack go through the same code.
    """
    counts: dict[str, int] = {}  # module -> number of slices
    visited: dict[str, dict[int, list[Site]]] = {}
    for site in sites.values():
        if "expert" not in site.tags:
            continue
        visited.setdefault(site.module, {}).setdefault(_slice_index(site.key), []).append(site)
        if site.param is not None:
            counts[site.module] = param_shapes[site.param][0]
    if not counts:
        return sites
    out: dict[str, Site] = {}
    for name, site in sites.items():
        out[name] = site
        slices = visited.get(site.module, {})
        index = _slice_index(site.key) if "expert" in site.tags else -1
        if index < 0 or site is not slices[index][-1] or index != list(slices)[-1]:
            continue
        for other in range(counts.get(site.module, 0)):
            if other not in slices:
                for known in slices[index]:
                    copy = _at_slice(known, index, other, param_shapes)
                    out[copy.name] = copy
    return out


def _slice_index(key: CallKey) -> int:
    return int(key[1].rpartition("@")[2].rpartition(".")[2])


def _at_slice(site: Site, index: int, other: int, param_shapes: dict[str, tuple[int, ...]]) -> Site:
    path, op, ordinal = site.key
    key = (path, op.removesuffix(str(index)) + str(other), ordinal)
    view = site.view
    if view is not None and site.param is not None:
        step = _elements(param_shapes[site.param][1:])
        view = (view[0], view[1], view[2] + (other - index) * step)
    name = f"{_key_name(key)}.{site.role}"
    return replace(site, name=name, key=key, view=view, uses=0)


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _site_roles(call: Call, flow: Flow) -> list[tuple[str, Ref]]:
    out = Ref(call.outputs[0])
    operands = flow.operands(call)
    if call.op == "embedding":
        roles = ["weight"]
    elif flow.is_weighted(call):
        roles = ["weight", "input"]
    elif call.op in MATMUL:
        roles = ["lhs", "rhs"]
    elif call.op in (*NORMS, "softmax", *ACTIVATIONS, *POOLS):
        roles = ["input"]
    elif call.op == "index_copy":
        return [("input", operands["source"])] if "source" in operands else []
    elif call.op in ("add", "mul") and not flow.is_functional_norm(call):
        roles = ["lhs", "rhs"]
    else:
        roles = []
    return [*((role, operands[role]) for role in roles if role in operands), ("output", out)]


def _base_names(graph: Graph, flow: Flow) -> dict[int, str]:
    """Call index -> site name without its role, for every call that carries sites."""
    keyed = Counter((call.module, call.use) for call in graph.calls if call.key is not None)
    has_children = {path.rpartition(".")[0] for path in graph.module_classes if path}
    first_with_name: dict[str, CallKey] = {}
    names: dict[int, str] = {}
    for call in graph.calls:
        if call.key is None or not _carries_sites(call, flow):
            continue
        path = call.key[0]
        base = _key_name(call.key)
        owner = None if "@" in call.key[1] else _owner(call, flow)
        if owner is not None:
            base = owner
        elif path and path not in has_children and keyed[(call.module, call.use)] == 1:
            base = path
        if first_with_name.setdefault(base, call.key) != call.key:
            base = _key_name(call.key, True)
            first_with_name.setdefault(base, call.key)
        names[call.index] = base
    return names


def _key_name(key: CallKey, number: bool = False) -> str:
    """`attn.matmul_1`, or for an op on a slice of a parameter stack `experts.gate_up_proj.3` and `experts.mul.3`."""
    path, op, ordinal = key
    op, _, part = op.partition("@")
    stack, dot, index = part.rpartition(".")
    name = stack if dot else op
    if ordinal or number:
        name += f"_{ordinal}"
    if part:
        name += f".{index}"
    return f"{path}.{name}" if path else name


def _owner(call: Call, flow: Flow) -> str | None:
    """The module whose own `weight` sits in this call: the call then goes by that module's name."""
    param: str | None = None
    if flow.is_weighted(call) or call.op in NORMS:
        ref = flow.operands(call).get("weight")
        param = None if ref is None else flow.graph.values[ref.value].param
    elif flow.is_functional_norm(call):
        factor = next((value for value in flow.reads[call.index] if value not in flow.active), None)
        param = None if factor is None else flow.parameter_behind(factor)
    if param is None:
        return None
    owner, _, name = param.rpartition(".")
    return owner if name == "weight" and owner else None


def _carries_sites(call: Call, flow: Flow) -> bool:
    if call.op in WEIGHTED:
        return True
    if not flow.is_inside(call):
        return False
    if call.op in ("add", "mul"):
        if flow.is_functional_norm(call):
            return True
        return (flow.two_active(call) and not flow.is_norm_core(call)) or flow.is_residual(call)
    return any(value in flow.active for value in flow.reads[call.index])


def _layout(call: Call, flow: Flow, dims: int) -> str:
    if call.op == "addmm":
        return "io"
    if call.op in MATMUL:
        weighted = flow.weight_operand(call)
        assert weighted is not None
        if dims >= 3:
            return "expert_io" if weighted[0] == "rhs" else "expert_oi"
        return "io" if weighted[0] == "rhs" else "oi"
    if call.op.startswith("conv_transpose"):
        return "io_conv"
    return "oi"


def _slot(call: Call, flow: Flow, role: str) -> str:
    """The slot of the call that a site's tensor is passed at."""
    if call.op == "index_copy":
        return "source"
    weighted = flow.weight_operand(call)
    if weighted is None or role == "output":
        return role
    return weighted[0] if role == "weight" else {"lhs": "rhs", "rhs": "lhs"}[weighted[0]]


def _groups(call: Call) -> int:
    """The groups of a convolution: the seventh argument of conv and conv_transpose alike; 1 for every other op."""
    if not call.op.startswith("conv"):
        return 1
    return int(call.kwargs.get("groups", call.args[6] if len(call.args) > 6 else 1))
