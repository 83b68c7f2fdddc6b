"""Tags that tell where in the network a site lies: layer inputs, matmul operands, first and last layers, layer outputs.

`layer_input` and `matmul_operand` are where most papers put activation quantizers. `layer_output` is the other
placement: after a layer's normalisation and activation, and after a residual add's activation instead of on the two
branches before it (BRECQ's blocks); `bare_input` are the layer inputs and matmul operands that such outputs do not
reach unchanged. `first_layer` and `last_layer` have no weighted layer before or after them; `lm_head` is a last layer
that gives one row of logits per input token. `feeds_last_layer` are the layer outputs that a last layer reads with no
other layer between: before pooling or a final norm.
"""

from __future__ import annotations

from fewbits.graph.flow import Flow
from fewbits.graph.ops import ACTIVATIONS, IDENTITY, LAYOUT, MATMUL, NORMS
from fewbits.graph.types import Call, Graph, Ref, Site

_FOLLOWS = frozenset((*NORMS, *ACTIVATIONS))
#: Ops that leave values on the grid they are on.
_UNCHANGED = LAYOUT | IDENTITY | {"max_pool1d", "max_pool2d", "max_pool3d"}


def tag_positions(graph: Graph, sites: dict[str, Site]) -> None:
    """Add the position tags to `sites`, in place."""
    flow = graph.flow
    weighted = [call for call in graph.calls if flow.is_weighted(call)]
    layers = [call for call in weighted if call.op != "embedding"]
    first = _without_earlier(graph, weighted)
    last = _without_later(graph, flow, layers)
    embedded = any(call.op == "embedding" and _from_tokens(graph, call) for call in weighted)
    ends = {call.index: layer_output(graph, flow, call) for call in layers if call.index not in last}
    outputs = set(ends.values())
    feeding = _feeding(graph, last, outputs)
    first_outputs = {ends[index] for index in first if index in ends}
    by_call: dict[int, list[Site]] = {}
    for site in sites.values():
        by_call.setdefault(site.call, []).append(site)
    layer_calls = {call.index: call for call in layers}
    for index, held in by_call.items():
        call = graph.calls[index]
        tags: set[str] = set()
        if index in first and call.op != "embedding":
            tags.add("first_layer")
        if index in last:
            tags.add("last_layer")
            if embedded and len(graph.values[call.outputs[0]].shape) >= 3:
                tags.add("lm_head")
        for site in held:
            own = set(tags)
            if index in layer_calls and site.role == "input":
                own.add("layer_input")
            if call.op in MATMUL and site.role in ("lhs", "rhs"):
                own.add("matmul_operand")
            if site.role == "output" and index in outputs:
                own.add("layer_output")
                if index in feeding:
                    own.add("feeds_last_layer")
                if index in first_outputs:
                    own.add("first_layer")
            if own & {"layer_input", "matmul_operand"} and "first_layer" not in own:
                made = flow.origin(site.value, _UNCHANGED)
                if made is None or made.index not in outputs:
                    own.add("bare_input")
            if index in layer_calls and call.op.startswith("conv"):
                own.add("conv")
            site.tags = site.tags | own


def layer_output(graph: Graph, flow: Flow, call: Call) -> int:
    """The call whose output stands for a layer's: past the norm, activation and residual add that alone follow it."""
    current = call
    while True:
        after = sole_reader(graph, current)
        if after is None:
            return current.index
        if after.op in _FOLLOWS or (after.op == "add" and flow.is_residual(after)):
            current = after
            continue
        return current.index


def following_activation(graph: Graph, call: Call) -> list[Call]:
    """The calls from a layer's output to the activation that alone reads it, with any norm between; empty if none."""
    chain: list[Call] = []
    current = call
    while (after := sole_reader(graph, current)) is not None and after.op in _FOLLOWS:
        chain.append(after)
        if after.op in ACTIVATIONS:
            return chain
        current = after
    return []


def _from_tokens(graph: Graph, call: Call) -> bool:
    """Whether a lookup's indices are an integer input of the model, reshaped or clamped on the way perhaps."""
    tokens = {value for value in graph.inputs if not graph.values[value].dtype.is_floating_point}
    indices = call.bound.get("indices")
    frontier = [indices.value] if isinstance(indices, Ref) else []
    seen: set[int] = set()
    while frontier:
        value = frontier.pop()
        if value in tokens:
            return True
        if value in seen:
            continue
        seen.add(value)
        made = graph.values[value].call
        if made is not None:
            frontier.extend(ref.value for ref in graph.calls[made].refs())
    return False


def sole_reader(graph: Graph, call: Call) -> Call | None:
    """The call that alone reads a call's output, past dropout and the like."""
    readers = graph.consumers.get(call.outputs[0], [])
    if len(readers) != 1:
        return None
    reader = graph.calls[readers[0]]
    if reader.op in IDENTITY:
        return sole_reader(graph, reader)
    return reader


def _without_earlier(graph: Graph, weighted: list[Call]) -> set[int]:
    """Weighted calls whose inputs depend on no other weighted call."""
    marks = {call.index for call in weighted}
    depends: set[int] = set()
    first: set[int] = set()
    for call in graph.calls:
        earlier = any(ref.value in depends for ref in call.refs())
        if call.index in marks and not earlier:
            first.add(call.index)
        if earlier or call.index in marks:
            depends.update(call.outputs)
    return first


def _without_later(graph: Graph, flow: Flow, layers: list[Call]) -> set[int]:
    """Layers whose outputs reach no other layer and no product of activations."""
    marks = {call.index for call in layers}
    leads: set[int] = set()  # values that lead to a layer
    last: set[int] = set()
    for call in reversed(graph.calls):
        later = any(value in leads for value in call.outputs)
        product = call.op in MATMUL and call.key is not None
        if call.index in marks and not later:
            last.add(call.index)
        if later or call.index in marks or product:
            leads.update(ref.value for ref in call.refs())
    return last


def _feeding(graph: Graph, last: set[int], outputs: set[int]) -> set[int]:
    """The calls of `outputs` that lead to a call of `last` through no other of them."""
    frontier = [ref.value for index in last for ref in graph.calls[index].refs()]
    found: set[int] = set()
    seen: set[int] = set()
    while frontier:
        value = frontier.pop()
        made = graph.values[value].call
        if value in seen or made is None:
            continue
        seen.add(value)
        if made in outputs:
            found.add(made)
        else:
            frontier.extend(ref.value for ref in graph.calls[made].refs())
    return found
