"""Channel labels carried through a recorded forward: some twenty rules, and layout ops run on the labels themselves.

`propagate(graph)` gives every parameter element that could be scaled a label, joins labels that must share a scale, and
blocks those that reach something no scale passes. What it finds is read off by `relations`.
"""

from __future__ import annotations

from fewbits.graph import rules_elementwise, rules_layout, rules_weighted
from fewbits.graph.ops import LAYOUT
from fewbits.graph.propagation import Propagation, Rule
from fewbits.graph.types import Graph

RULES: dict[str, Rule] = {**rules_layout.RULES, **rules_elementwise.RULES, **rules_weighted.RULES}


def propagate(graph: Graph) -> Propagation:
    """Labels of a recorded forward."""
    p = Propagation(graph)
    p.aliased = _aliased_writes(graph)
    for call in graph.calls:
        rule = RULES.get(call.op)
        if rule is not None:
            rule(p, call)
        else:
            p.block_all(call, call.op)
    _block_ends(p)
    _block_shared(p)
    return p


def _block_ends(p: Propagation) -> None:
    """Block what leaves the recorded forward: outputs, and values Python looked at."""
    graph = p.graph
    held = {value for note in graph.module_io if note.path == "" for value in note.held_out}
    passed = {value for note in graph.module_io if note.path == "" for value in note.outputs} - held
    for value_id in graph.outputs:
        # tensors inside caches are the model's own business: only it reads them
        if value_id not in held or value_id in passed:
            p.labels.block(p.of.get(value_id), "output")
    for value_id in graph.escaped:
        p.labels.block(p.of.get(value_id), "read by Python")


def _block_shared(p: Propagation) -> None:
    """Block operands that share elements of a parameter, and parameters used both as weights and element by element."""
    for slot, other in p.clashes:
        for labels in (slot.out, slot.inputs, other.out, other.inputs):
            p.labels.block(labels, "shared parameter")
    for name, slots in p.by_param.items():
        if name in p.vectors:
            p.labels.block(p.vectors[name].labels, "shared parameter")
            for slot in slots:
                p.labels.block(slot.out, "shared parameter")
                p.labels.block(slot.inputs, "shared parameter")


def _aliased_writes(graph: Graph) -> set[int]:
    """Calls that write where something reads through an alias: such reads have no labels, so the writes are blocked."""
    roots: dict[int, int] = {}
    for call in graph.calls:
        first = next(call.refs(), None)
        for out in call.outputs:
            same = first is not None and (call.inplace or call.op in LAYOUT)
            roots[out] = roots.get(first.value, first.value) if same and first is not None else out
    bad: set[int] = set()
    for value in graph.values:
        if value.aliased and value.call is not None:
            bad.update(roots.get(out, out) for out in graph.calls[value.call].outputs)
    writes = (call for call in graph.calls if call.inplace)
    return {call.index for call in writes if any(roots.get(out, out) in bad for out in call.outputs)}
