"""A third placement of activation quantizers: at what each layer computes, before a ReLU and before residual sums.

`layer_result` is a layer's output past the norm that alone follows it; past an activation too, unless that is a ReLU,
which a range that starts at zero takes over (`before_relu`; `before_relu6` where it ends at 6). Batch norms that no
layer feeds count as layers. `pooled` are outputs of pools. `bare_of_results` are the layer inputs and product operands
that are no such results, moved or summed: what a norm, a softmax or a product makes. `feature_map` are those of the
above whose channel axis is 1 and that have more than one position (outputs and inputs of convolutions).
"""

from __future__ import annotations

from fewbits.graph.flow import is_relu6
from fewbits.graph.ops import ACTIVATIONS, IDENTITY, LAYOUT, MATMUL, NORMS, POOLS
from fewbits.graph.positions import sole_reader
from fewbits.graph.types import Call, Graph, Site

TAGS = frozenset("layer_result before_relu before_relu6 pooled bare_of_results feature_map".split())
#: Ops that leave quantized values on grids: they move, drop, add or average them.
_KEEPING = LAYOUT | IDENTITY | frozenset(POOLS) - {"interpolate"} | {"add", "cat", "pad"}


def tag_results(graph: Graph, sites: dict[str, Site]) -> None:
    """Give `sites` these tags and no older ones of theirs, in place. Positions (`first_layer`, ...) come first."""
    for site in sites.values():
        site.tags -= TAGS
    at: dict[tuple[int, str], list[Site]] = {}  # (call, role) -> sites: several where experts share their code
    for site in sites.values():
        at.setdefault((site.call, site.role), []).append(site)
    flow = graph.flow
    layers = [call for call in graph.calls if flow.is_weighted(call) and call.op != "embedding"]
    behind = {past_norm(graph, call)[-1].index for call in layers}
    norms = [call for call in graph.calls if call.op == "batch_norm" and call.index not in behind]
    made: set[int] = set()
    for call in (*layers, *norms):
        end, tags = past_norm(graph, call)[-1], {"layer_result"}
        after = sole_reader(graph, end)
        relu = None if after is None else relu_kind(after)
        if relu is not None:
            tags.add(relu)
        elif after is not None and after.op in ACTIVATIONS:
            end = after
        if _is_map(graph, call, call.outputs[0]):
            tags.add("feature_map")
        for weight in at.get((call.index, "weight"), ()):
            tags |= {"first_layer", "last_layer", "lm_head"} & weight.tags
        for result in at.get((end.index, "output"), ()):
            result.tags |= tags
            made.add(end.outputs[0])
    for call in graph.calls:
        for pool in at.get((call.index, "output"), ()) if call.op in POOLS and call.op != "interpolate" else ():
            pool.tags |= {"pooled"}
            made.add(call.outputs[0])
    covered = _covered(graph, made)
    for (index, role), found in at.items():
        call = graph.calls[index]
        product = call.op in MATMUL and role in ("lhs", "rhs")
        if not product and not (role == "input" and flow.is_weighted(call)):
            continue
        for site in found:
            if site.value not in covered and "first_layer" not in site.tags:
                site.tags |= {"bare_of_results"}
            if _is_map(graph, call, site.value):
                site.tags |= {"feature_map"}


def past_norm(graph: Graph, call: Call) -> list[Call]:
    """A layer's call and the norm that alone reads its output, if there is one."""
    after = sole_reader(graph, call)
    return [call, after] if after is not None and after.op in NORMS and call.op not in NORMS else [call]


def relu_kind(call: Call) -> str | None:
    """`before_relu` or `before_relu6` for a call that clips at zero (and six)."""
    if call.op == "relu":
        return "before_relu"
    if is_relu6(call):
        return "before_relu6"
    return None


def _is_map(graph: Graph, call: Call, value: int) -> bool:
    shape = graph.values[value].shape
    positions = 1
    for size in shape[2:]:
        positions *= size
    return (call.op.startswith("conv") or call.op == "batch_norm") and len(shape) > 2 and positions > 1


def _covered(graph: Graph, made: set[int]) -> set[int]:
    """Values that are made of results alone, by ops that keep them on grids."""
    covered = set(made)
    for call in graph.calls:
        reads = [ref.value for ref in call.refs() if graph.values[ref.value].dtype.is_floating_point]
        scaled = call.op in ("mul", "div") and len(reads) == 1
        clipped = call.op in ACTIVATIONS and relu_kind(call) is not None
        if (call.op in _KEEPING or scaled or clipped) and reads and all(value in covered for value in reads):
            covered.update(call.outputs)
    return covered
