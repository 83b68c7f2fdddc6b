"""Questions about the data flow of a recorded forward: what made a value, what it reaches, and what that says
about its role.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from fewbits.graph.ops import (
    ACTIVATIONS,
    BINARY,
    CREATION,
    IDENTITY,
    JOINS,
    LAYOUT,
    MATMUL,
    NORMS,
    POOLS,
    SLOTS,
    WEIGHTED,
)
from fewbits.graph.types import Call, Graph, Ref

#: Elementwise ops between a query-key product and its softmax (scaling, masks, biases, soft caps).
TOWARDS_SOFTMAX = (
    frozenset("mul div add sub masked_fill where tanh clamp setitem max maximum".split()) | LAYOUT | IDENTITY
)
#: Ops through which a value keeps its distribution for the purpose of tags.
SAME = LAYOUT | IDENTITY | {"masked_fill", "pad"}
#: Ops whose outputs are elementwise functions of their operands, rather than new features.
ELEMENTWISE = (
    SAME
    | frozenset(ACTIVATIONS)
    | frozenset(
        "add sub rsub mul div rdiv neg pow rpow square exp exp2 log log2 sqrt abs sin cos erf where clamp maximum "
        "minimum cat stack setitem sign floor round lerp addcmul addcdiv reciprocal expm1 log1p masked_scatter "
        "copy".split()
    )
)
_NORMS_OF = frozenset("norm vector_norm linalg_vector_norm std".split())
_STATISTICS = frozenset("mean sum var var_mean".split()) | _NORMS_OF
_ZEROS = frozenset("zeros zeros_like new_zeros".split())


class Flow:
    """The data flow of one graph. Values are *active* if they depend on a weighted op's output or on a floating-
    point input.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._weights: dict[int, tuple[str, Ref, Ref] | None] = {}
        self.reads: list[tuple[int, ...]] = [tuple(ref.value for ref in call.refs()) for call in graph.calls]
        self.active: set[int] = {v.id for v in graph.values if v.kind == "input" and v.dtype.is_floating_point}
        for call in graph.calls:
            if call.op in CREATION:
                continue
            if call.op in WEIGHTED or any(value in self.active for value in self.reads[call.index]):
                self.active.update(out for out in call.outputs if graph.values[out].dtype.is_floating_point)
        self.deep: set[int] = set()  # active values that depend on a weighted op's output
        for call in graph.calls:
            if (
                call.op in WEIGHTED
                or self.weight_operand(call)
                or any(value in self.deep for value in self.reads[call.index])
            ):
                self.deep.update(out for out in call.outputs if out in self.active)
        self._sources: dict[int, frozenset[int]] = {}

    def concerns(self, call: Call) -> bool:
        """Whether a call works on the network's inputs or on what became of them."""
        return any(value in self.active for value in self.reads[call.index])

    def maker(self, value: int) -> Call | None:
        index = self.graph.values[value].call
        return None if index is None else self.graph.calls[index]

    def origin(self, value: int, through: frozenset[str] = SAME) -> Call | None:
        """The call that made a value, looking back through ops that only move or cast it (first operand)."""
        while True:
            call = self.maker(value)
            if call is None or call.op not in through or not self.reads[call.index]:
                return call
            value = self.reads[call.index][0]

    def reached(self, value: int, through: frozenset[str], limit: int = 16) -> Iterator[tuple[Call, int]]:
        """Calls that a value flows into through the given ops only, each with the value as it reads it."""
        frontier = [(value, 0)]
        seen = {value}
        while frontier:
            current, depth = frontier.pop()
            for index in self.graph.consumers.get(current, ()):
                call = self.graph.calls[index]
                yield call, current
                if depth < limit and call.op in through:
                    for out in call.outputs:
                        if out not in seen:
                            seen.add(out)
                            frontier.append((out, depth + 1))

    def sources(self, value: int, limit: int = 24) -> frozenset[int]:
        """Active values that a value is an elementwise function of, itself included."""
        known = self._sources.get(value)
        if known is not None:
            return known
        found: set[int] = set()
        frontier = [(value, 0)]
        while frontier:
            current, depth = frontier.pop()
            if current in found or current not in self.active:
                continue
            found.add(current)
            call = self.maker(current)
            if call is not None and depth < limit and call.op in ELEMENTWISE:
                frontier.extend((read, depth + 1) for read in self.reads[call.index])
        result = self._sources[value] = frozenset(found)
        return result

    # -- weights -----------------------------------------------------------------------------------------------------
    def weight_operand(self, call: Call) -> tuple[str, Ref, Ref] | None:
        """For a product with (something laid out from) a parameter: the operand's slot, its ref and the other
        operand's.
        """
        if call.op not in MATMUL:
            return None
        if call.index not in self._weights:
            self._weights[call.index] = self._find_weight(call)
        return self._weights[call.index]

    def _find_weight(self, call: Call) -> tuple[str, Ref, Ref] | None:
        for slot, other in (("rhs", "lhs"), ("lhs", "rhs")):
            ref, rest = call.bound.get(slot), call.bound.get(other)
            if not isinstance(ref, Ref) or not isinstance(rest, Ref):
                continue
            value = self.graph.values[ref.value]
            root = value
            while root.call is not None and root.param is not None:
                root = self.graph.values[self.reads[root.call][0]]
            if (
                value.param is not None
                and root.kind == "parameter"
                and len(value.shape) >= 2
                and rest.value in self.active
            ):
                return slot, ref, rest
        return None

    def is_weighted(self, call: Call) -> bool:
        return call.op in WEIGHTED or self.weight_operand(call) is not None

    def operands(self, call: Call) -> dict[str, Ref]:
        """Role -> ref of the tensor operands; a parameter in a product has the role `weight`."""
        weighted = self.weight_operand(call)
        if weighted is not None:
            return {"weight": weighted[1], "input": weighted[2]}
        return {slot: ref for slot, ref in call.bound.items() if isinstance(ref, Ref)}

    def weight_param(self, call: Call) -> str | None:
        """The parameter in a weighted call's weight slot, None where the weight is computed."""
        ref = self.operands(call).get("weight")
        return None if ref is None else self.graph.values[ref.value].param

    def parameter_behind(self, value: int) -> str | None:
        """The parameter that a value without activations is computed from (`1 + weight`), if it is one only."""
        names: set[str] = set()
        frontier = [value]
        seen: set[int] = set()
        while frontier:
            current = frontier.pop()
            if current in seen or current in self.active:
                continue
            seen.add(current)
            held = self.graph.values[current]
            call = self.maker(current)
            if held.param is not None and held.kind != "buffer":
                names.add(held.param)
            elif call is not None:
                frontier.extend(self.reads[call.index])
        return names.pop() if len(names) == 1 else None

    # -- patterns ----------------------------------------------------------------------------------------------------
    def two_active(self, call: Call) -> bool:
        reads = self.reads[call.index]
        return len(reads) == 2 and reads[0] != reads[1] and all(value in self.active for value in reads)

    def is_norm_core(self, call: Call) -> bool:
        """`x * rsqrt(statistic of x)` or `x / sqrt(statistic of x)`: a normalisation written out, before its
        affine part.
        """
        if call.op not in ("mul", "div") or not self.two_active(call):
            return False
        reads = self.reads[call.index]
        for x, factor in (reads, reads[::-1]) if call.op == "mul" else (reads,):
            made = self.origin(factor, SAME | {"add", "clamp", "mul"})
            root = ("rsqrt", "pow") if call.op == "mul" else ("sqrt", "pow", *_NORMS_OF)
            if made is None or made.op not in root:
                continue
            statistic = made
            if made.op not in _STATISTICS:
                found = self.origin(self.reads[made.index][0], SAME | {"add", "clamp", "mul", "div"})
                if found is None or found.op not in _STATISTICS:
                    continue
                statistic = found
            if self.sources(x) & self.sources(self.reads[statistic.index][0]):
                return True
        return False

    def is_functional_norm(self, call: Call) -> bool:
        """A normalisation written out: its product with a weight that is no activation, or itself where it has no
        weight.
        """
        if call.op == "mul" and not self.two_active(call):
            inner = self._normalised(call)
            return inner is not None and self.is_norm_core(inner)
        return self.is_norm_core(call) and not self.has_affine(call)

    def _normalised(self, call: Call) -> Call | None:
        """The maker of the one active operand of a product with something that is laid out like a parameter."""
        reads = self.reads[call.index]
        actives = [value for value in reads if value in self.active]
        if len(reads) != 2 or len(actives) != 1:
            return None
        return self.origin(actives[0])

    def has_affine(self, core: Call) -> bool:
        """Whether a written-out normalisation is followed by its weight."""
        return any(
            call.op == "mul" and len(self.reads[call.index]) == 2 and not self.two_active(call)
            for call, _ in self.reached(core.outputs[0], LAYOUT)
        )

    def functional_activation(self, call: Call) -> str | None:
        """`gelu` or `silu` where a product writes one out: x times tanh, erf or sigmoid of x itself."""
        if call.op != "mul" or not self.two_active(call):
            return None
        reads = self.reads[call.index]
        for x, gate in (reads, reads[::-1]):
            for made in self._gates(gate):
                inner = self.reads[made.index][0]
                if not (self.sources(x) & self.sources(inner)):
                    continue
                if made.op in ("tanh", "erf"):
                    return "gelu"
                direct = self.origin(inner)
                if direct is not None and direct.op in ("mul", "div") and len(self.reads[direct.index]) == 1:
                    return "gelu"  # x * sigmoid(1.702 x)
                if inner in self.sources(x) or self.origin(inner) is self.origin(x):
                    return "silu"
        return None

    def _gates(self, value: int) -> list[Call]:
        made = self.origin(value, SAME | {"add", "mul", "div"})
        return [made] if made is not None and made.op in ("tanh", "erf", "sigmoid") else []

    def is_residual(self, call: Call) -> bool:
        """Whether an addition joins a branch with what it branched off from.

        Not so: rotary embeddings and activations written out (both operands elementwise in one tensor), sums of
        embeddings, and biases on their way to a softmax, and outputs of several heads averaged at the end.
        """
        if call.op != "add" or len(self.reads[call.index]) != 2:
            return False
        first, second = self.reads[call.index]
        values = self.graph.values
        if first == second or values[first].shape != values[second].shape or not values[first].dtype.is_floating_point:
            return False
        if any(reader.op == "softmax" for reader, _ in self.reached(call.outputs[0], TOWARDS_SOFTMAX)):
            return False
        active = [value in self.active for value in (first, second)]
        if not all(active):
            constant = second if active[0] else first
            made = self.origin(constant)
            return any(active) and made is not None and made.op in _ZEROS
        if all(self._only_embeddings(value) for value in (first, second)):
            return False
        if call.outputs[0] not in self.leading and all(self._is_fresh(value) for value in (first, second)):
            return False
        common = self.sources(first) & self.sources(second)
        return not common or self._independent(first, common) or self._independent(second, common)

    @cached_property
    def leading(self) -> set[int]:
        """Activations from which a weighted op, an attention product or a norm is still to come.

        Of an op that is not known only the first operand counts: the others say where to look (boxes, grids), not
        what is seen.
        """
        found: set[int] = set()
        for call in reversed(self.graph.calls):
            reads = self.reads[call.index]
            if self.is_weighted(call) or call.op in NORMS or call.op in MATMUL:
                found.update(reads)
            elif any(out in found and out in self.active for out in call.outputs):
                found.update(reads if call.op in SLOTS or call.op in ELEMENTWISE else reads[:1])
        return found

    def is_inside(self, call: Call) -> bool:
        """Whether a call belongs to the network rather than to what prepares its inputs or makes something of its
        outputs.

        Preparation depends on no weighted op yet. What comes after the last layer counts only where it directly takes
        its output.
        """
        reads = self.reads[call.index]
        joins = call.op in (*BINARY, *JOINS, *POOLS)
        if self.is_weighted(call) or call.op in NORMS or call.op in MATMUL:
            return True
        if joins and not any(value in self.deep for value in reads):
            return False
        if call.outputs[0] in self.leading:
            return True
        made = [self.origin(value) for value in reads if value in self.active]
        return any(m is not None and (self.is_weighted(m) or m.op in NORMS) for m in made)

    def _is_fresh(self, value: int) -> bool:
        made = self.origin(value)
        return made is not None and self.is_weighted(made)

    def _only_embeddings(self, value: int) -> bool:
        for source in self.sources(value):
            made = self.maker(source)
            if made is not None and made.op not in ELEMENTWISE and made.op != "embedding":
                return False
        return True

    def _independent(self, value: int, common: frozenset[int]) -> bool:
        """Whether a value has a part that is no elementwise function of the common sources."""
        frontier = [value]
        seen: set[int] = set()
        while frontier:
            current = frontier.pop()
            if current in common or current in seen or current not in self.active:
                continue
            seen.add(current)
            call = self.maker(current)
            if call is None or call.op not in ELEMENTWISE:
                return True
            frontier.extend(self.reads[call.index])
        return False

    def attention_side(self, call: Call) -> str | None:
        """Which operand of a product is the value that attention probabilities weigh: `rhs`, `lhs` or None."""
        if call.op not in MATMUL or self.is_weighted(call):
            return None
        softmaxed = {}
        for slot in ("lhs", "rhs"):
            ref = call.bound.get(slot)
            softmaxed[slot] = isinstance(ref, Ref) and any(
                (made := self.maker(source)) is not None and made.op == "softmax" for source in self.sources(ref.value)
            )
        if softmaxed["lhs"] and not softmaxed["rhs"]:
            return "rhs"
        if softmaxed["rhs"] and not softmaxed["lhs"]:
            return "lhs"
        return None

    def is_query_key(self, call: Call) -> bool:
        """Whether a product of two activations becomes attention scores."""
        if call.op not in MATMUL or self.is_weighted(call):
            return False
        return any(reader.op == "softmax" for reader, _ in self.reached(call.outputs[0], TOWARDS_SOFTMAX))

    def is_cache_write(self, call: Call) -> bool:
        """Whether a concatenation or indexed write joins new keys or values to stored ones, on the way to an
        attention product.
        """
        if call.op not in ("cat", "index_copy"):
            return False
        reads = self.reads[call.index]
        for reader, value in self.reached(call.outputs[0], SAME):
            slot = next((s for s, ref in reader.bound.items() if isinstance(ref, Ref) and ref.value == value), None)
            if slot != "rhs" or not (self.is_query_key(reader) or self.attention_side(reader) == "rhs"):
                continue
            return call.op == "index_copy" or not self._same_source(reads)
        return False

    def is_join(self, call: Call) -> bool:
        """Whether a concatenation joins two or more activations that are not parts of one tensor, for a later layer."""
        actives = [value for value in self.reads[call.index] if value in self.active]
        if call.op not in ("cat", "stack") or len(actives) < 2 or call.outputs[0] not in self.leading:
            return False
        return not self._same_source(tuple(actives))

    def _same_source(self, reads: tuple[int, ...]) -> bool:
        actives = [value for value in reads if value in self.active]
        if len(actives) < 2:
            return False
        common = frozenset.intersection(*(self.sources(value) for value in actives))
        return bool(common) and not any(self._independent(value, common) for value in actives)

    # -- tags --------------------------------------------------------------------------------------------------------
    def tags(self, call: Call, role: str, ref: Ref) -> frozenset[str]:
        """Role tags of one operand or output."""
        tags: set[str] = {role if role not in ("lhs", "rhs") else "input"}
        if role == "weight":
            if call.op == "embedding":
                tags.add("embedding")
            if call.op.startswith("conv"):
                tags.add("conv")
            if self.graph.values[ref.value].param is None:
                tags.add("computed")
            return frozenset(tags)
        made: Call | None = call if role == "output" else self.origin(ref.value)
        if role == "output":
            if self.is_residual(call):
                tags.add("residual")
            if self.is_join(call) and not self.is_cache_write(call):
                tags.add("skip_concat")
        if made is not None:
            tags |= self._made_by(made)
        if role == ("input" if call.op == "index_copy" else "output") and self.is_cache_write(call):
            tags.add("kv_cache")
        if role in ("lhs", "rhs"):
            if self.is_query_key(call):
                tags.add("query_key")
            if self.attention_side(call) == role:
                tags.add("attention_value")
        return frozenset(tags)

    def _made_by(self, call: Call) -> set[str]:
        if call.op == "softmax":
            return {"post_softmax"}
        if call.op in ("layer_norm", "rms_norm") or self.is_functional_norm(call):
            return {"post_layernorm"}
        if call.op in NORMS:
            return {"post_norm"}
        if call.op in ACTIVATIONS:
            return {"post_activation", f"post_{call.op}"} | ({"post_relu6"} if is_relu6(call) else set())
        written = self.functional_activation(call)
        if written is not None:
            return {"post_activation", f"post_{written}"}
        if call.op == "add":
            if self.is_residual(call):
                return {"post_residual"}
            inner = self._normalised(call)  # a norm's bias
            if inner is not None and inner.op == "mul" and self.is_functional_norm(inner):
                return {"post_layernorm"}
        return set()


def is_relu6(call: Call) -> bool:
    """Whether a call clips at zero and six, by whatever name (`nn.ReLU6` may run as `hardtanh`)."""
    ends = tuple(
        call.kwargs.get(name, call.args[place] if place < len(call.args) else default)
        for name, place, default in (("min_val", 1, -1.0), ("max_val", 2, 1.0))
    )
    return call.op == "relu6" or (call.op == "hardtanh" and ends == (0, 6))
