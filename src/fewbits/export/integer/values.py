"""What a recorded value is in integers: the register that holds its codes, and the grid that they are on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.attach import Attachment
from fewbits.export.integer.grids import Refusal, grid_of
from fewbits.export.integer.operations import LAYOUT
from fewbits.export.integer.program import Grid, Op, Port
from fewbits.export.layers import Layer, layers_of
from fewbits.graph.ops import IDENTITY
from fewbits.graph.requantize import Placement, find_placement
from fewbits.graph.types import CASTS, Call, CallKey, Graph, Ref, Site
from fewbits.kernels import fixed_point
from fewbits.kernels.integer_ops import ADD_SHIFT

NO_QUANTIZER, FLOATING = "carries no quantizer", "reads floating point"


class Values:
    """The values of a recorded forward, on the grids of the quantizers that make or read them.

    What is read on another grid than it is held on is rescaled, and the network's inputs enter as codes where they are
    first read; both add operations to `ops`.
    """

    def __init__(self, model: nn.Module, graph: Graph, attachment: Attachment) -> None:
        self.model = model
        self.graph = graph
        self.attachment = attachment
        self.placement: Placement = find_placement(graph)
        self.layers: dict[str, Layer] = {layer.site.name: layer for layer in layers_of(attachment)}
        self.at: dict[CallKey, dict[str, Site]] = {}
        for site in graph.sites.values():
            self.at.setdefault(site.key, {}).setdefault(site.role, site)
        self.held: dict[int, tuple[int, Grid]] = {}  # value -> register and grid
        self.entered: dict[tuple[int, Grid], int] = {}  # input value or its layout, on a grid -> register
        self.ports: list[Port] = []
        self.ops: list[Op] = []
        self.refused: list[str] = []
        self._registers = iter(range(1 << 30))

    # -- where values are ----------------------------------------------------------------------------------------------
    def _site(self, call: Call, role: str) -> Site | None:
        return None if call.key is None else self.at.get(call.key, {}).get(role)

    def _name(self, call: Call) -> str:
        site = self._site(call, "output")
        return site.name.removesuffix(".output") if site is not None else f"{call.module}.{call.op}".lstrip(".")

    def _label(self, call: Call, value: int, grid: Grid) -> str:
        """A name for what keeps its operand's grid: the site, here or where it is read, whose quantizer makes the same
        codes in the simulation; where there is none, the place of the call."""
        site = self._site(call, "output")
        own = self._quantizer_grid(site)
        if site is not None and own is not None:
            return site.name if own == grid else f"{self._name(call)} unscaled"
        for index in self.graph.consumers.get(value, ()):
            reader = self.graph.calls[index]
            for role, ref in self.graph.flow.operands(reader).items():
                site = self._site(reader, role)
                if site is not None and ref.value == value and self._quantizer_grid(site) == grid:
                    return site.name
        return self._name(call)

    def _quantizer_grid(self, site: Site | None) -> Grid | None:
        quantizer = None if site is None else self.attachment.quantizer(site.name)
        if site is None or quantizer is None or not quantizer.enabled:
            return None
        return grid_of(quantizer, site.name)

    def _read(self, call: Call, role: str = "input") -> tuple[int, Grid]:
        """The register of an operand, on the grid of the quantizer that sits there, if one does."""
        ref = self.graph.flow.operands(call).get(role)
        if ref is None and role == "input":
            ref = next(call.refs(), None)
        if ref is None:
            raise Refusal(f"{self._name(call)}: {role} is not a tensor")
        site = self._site(call, role)
        wanted = self._quantizer_grid(site)
        return self._on(ref.value, wanted, site.name if site is not None else self._name(call))

    def _on(self, value: int, wanted: Grid | None, where: str) -> tuple[int, Grid]:
        if self.graph.values[value].aliased:
            raise Refusal(f"{where} reads a tensor that was written through another view")
        if value in self.held:
            register, grid = self.held[value]
            if grid.accumulator:
                raise Refusal(f"{where} reads accumulators: their output {NO_QUANTIZER}")
            if wanted is None or wanted == grid:
                return register, grid
            return self._rescale(register, grid, wanted, where), wanted
        if self._from_input(value):
            if wanted is None:
                raise Refusal(f"{where} reads the network's input, which no quantizer makes bytes of")
            return self._enter(value, wanted), wanted
        if self.graph.values[value].param is not None or value not in self.graph.flow.active:
            raise Refusal(f"{where} reads a parameter or constant that is on no grid")
        raise Refusal("" if self.refused else f"{where} {FLOATING}")

    def _from_input(self, value: int) -> bool:
        while True:
            held = self.graph.values[value]
            if held.kind == "input":
                return True
            call = None if held.call is None else self.graph.calls[held.call]
            if call is None or not moves(call):
                return False
            value = self.graph.flow.reads[call.index][0]

    def _enter(self, value: int, grid: Grid) -> int:
        """The network's input, or what layout ops make of it, as codes on a grid."""
        if (value, grid) in self.entered:
            return self.entered[value, grid]
        held = self.graph.values[value]
        if held.kind == "input":
            register = next(self._registers)
            self.ports.append(Port(register, grid, self.graph.inputs.index(value)))
        else:
            call = self.graph.calls[held.call or 0]
            register = self._enter(self.graph.flow.reads[call.index][0], grid)
            if call.op == "getitem" or call.op in LAYOUT:
                register = self._layout(call, register, call.outputs.index(value), grid)
        self.entered[value, grid] = register
        return register

    def _grid_after(self, call: Call) -> Grid | None:
        """The grid of what a call makes: its quantizer's, or the one that all readers share; None for an output of
        the model that stays an accumulator."""
        own = self._quantizer_grid(self._site(call, "output"))
        if own is not None:
            return own
        grids = set(self._reader_grids(call.outputs[0]))
        if len(grids) == 1 and None not in grids:
            return grids.pop()
        if (not grids or grids == {None}) and self._reaches_output(call.outputs[0]):
            return None
        raise Refusal(f"{self._name(call)}.output {NO_QUANTIZER}")

    def _reader_grids(self, value: int) -> Iterator[Grid | None]:
        for index in self.graph.consumers.get(value, ()):
            call = self.graph.calls[index]
            if moves(call):
                for out in call.outputs:
                    yield from self._reader_grids(out)
                continue
            role = next((r for r, ref in self.graph.flow.operands(call).items() if ref.value == value), "input")
            yield self._quantizer_grid(self._site(call, role))

    def _reaches_output(self, value: int) -> bool:
        if value in self.graph.outputs:
            return True
        readers = [self.graph.calls[index] for index in self.graph.consumers.get(value, ())]
        return any(self._reaches_output(out) for call in readers if moves(call) for out in call.outputs)

    # -- bringing them elsewhere ---------------------------------------------------------------------------------------
    def _put(
        self,
        kind: str,
        name: str,
        reads: tuple[int, ...],
        attributes: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> int:
        register = next(self._registers)
        plain = json.loads(json.dumps(attributes or {}))
        self.ops.append(Op(kind, name, reads, register, plain, tensors or {}))
        return register

    def _layout(self, call: Call, register: int, part: int, grid: Grid) -> int:
        name, arguments = self._label(call, call.outputs[part], grid), call.args[1:]
        before = self.graph.values[self.graph.flow.reads[call.index][0]].shape
        after = self.graph.values[call.outputs[part]].shape
        if call.op == "getitem":
            return self._put("pick", name, (register,), {"index": _index(arguments[0], name)})
        if call.op not in LAYOUT:
            raise Refusal(f"{name}: {call.op} has no integer form here")
        keywords = dict(call.kwargs)
        if call.op in ("view", "reshape"):
            if before[:1] != after[:1]:
                raise Refusal(f"{name}: a {call.op} that mixes samples has no integer form here")
            arguments, keywords = ([-1, *after[1:]],), {}
        if any(isinstance(item, Ref) for item in (*arguments, *keywords.values())):
            raise Refusal(f"{name}: {call.op} by a tensor has no integer form here")
        attributes = {"op": call.op, "args": list(arguments), "keywords": keywords, "part": part}
        return self._put("layout", name, (register,), attributes)

    def _rescale(self, register: int, grid: Grid, wanted: Grid, name: str) -> int:
        real = torch.tensor(grid.scale) / 2.0**ADD_SHIFT / torch.tensor(wanted.scale)
        multiplier = fixed_point.decompose(real)
        tensors = {
            "mantissa": multiplier.mantissa, "shift": multiplier.shift, "zero": integer(wanted.zero),
            "zero_x": integer(grid.zero),
        }  # fmt: skip
        return self._put("rescale", name, (register,), {"low": wanted.low, "high": wanted.high}, tensors)


def moves(call: Call) -> bool:
    """Whether a call leaves codes what they are."""
    return call.op == "getitem" or call.op in LAYOUT or call.op in IDENTITY or call.op in CASTS


def _index(index: Any, name: str) -> list[Any]:
    """A recorded index as plain data."""
    items = list(index) if isinstance(index, tuple) else [index]
    found: list[Any] = []
    for item in items:
        if isinstance(item, slice) and all(part is None or isinstance(part, int) for part in _ends(item)):
            found.append(list(_ends(item)))
        elif item is Ellipsis:
            found.append("...")
        elif item is None or (isinstance(item, int) and not isinstance(item, bool)):
            found.append(item)
        else:
            raise Refusal(f"{name}: indexing by {type(item).__name__} has no integer form here")
    return found


def _ends(item: slice) -> tuple[Any, Any, Any]:
    return item.start, item.stop, item.step


def integer(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)
