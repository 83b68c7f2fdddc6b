"""Scheme lines that several papers share: which sites hold weights and activations, and their usual grids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fewbits.formats import Format, Granularity, PerChannel, PerGroup, PerToken, symmetric
from fewbits.ranges import AbsMax, Range
from fewbits.recipe import Bits, QSpec, Rule

#: Tags of weights that stay floating point in the language-model papers: lookup tables and the head.
EMBEDDING = frozenset({"embedding"})
HEAD = frozenset({"embedding", "lm_head"})


def weight_rules(
    bits: Bits,
    fmt: Format,
    range_: Range,
    *,
    without: frozenset[str] = EMBEDDING,
    granularity: Granularity | None = None,
) -> tuple[Rule, ...]:
    """One grid per output row, or per row and group where the bits name a group; none where weights stay float."""
    if bits.weight is None:
        return ()
    if granularity is None:
        granularity = PerGroup(bits.group, -1) if bits.group else PerChannel(0)
    return (Rule(QSpec(fmt, granularity, range_), roles=("weight",), without=without),)


def token_rules(bits: Bits, *, without: frozenset[str] = frozenset()) -> tuple[Rule, ...]:
    """Inputs of weighted layers on a symmetric grid per token, fitted on every call."""
    if bits.activation is None:
        return ()
    spec = QSpec(symmetric(bits.activation), PerToken(-1), AbsMax(), dynamic=True)
    return (Rule(spec, roles=("input",), tags=frozenset({"layer_input"}), without=without),)


def input_rules(spec: QSpec, *, matmuls: bool = True, without: frozenset[str] = frozenset()) -> tuple[Rule, ...]:
    """Inputs of weighted layers, and with `matmuls` both operands of attention products."""
    rules = [Rule(spec, roles=("input",), tags=frozenset({"layer_input"}), without=without)]
    if matmuls:
        rules.append(Rule(spec, roles=("lhs", "rhs"), tags=frozenset({"matmul_operand"}), without=without))
    return tuple(rules)


def block_rules(spec: QSpec, placement: str) -> tuple[Rule, ...]:
    """Where block reconstruction puts activation quantizers.

    "outputs": outputs of layers and blocks, with what such an output does not feed at the input. "inputs": inputs of
    layers and attention products but the first layer's.
    """
    if placement == "inputs":
        return input_rules(spec, without=HEAD | {"first_layer"})
    return (
        Rule(spec, roles=("output",), tags=frozenset({"layer_output"}), without=HEAD),
        Rule(spec, roles=("input", "lhs", "rhs"), tags=frozenset({"bare_input"}), without=HEAD),
    )


def edge_rules(rules: Iterable[Rule], edges: Iterable[str], bits: int) -> tuple[Rule, ...]:
    """The rules once more for sites that also bear a tag of `edges` ("first_layer", "last_layer"), at other bits."""
    return tuple(
        replace(rule, spec=at_bits(rule.spec, bits), tags=rule.tags | {edge})
        for rule in rules
        for edge in edges
        if rule.spec is not None
    )


def at_bits(spec: QSpec, bits: int) -> QSpec:
    """The same quantizer at another width. Raises `FewbitsError` for a format that has only one."""
    return spec.at_bits(bits)
