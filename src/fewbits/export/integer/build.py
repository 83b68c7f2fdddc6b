"""From a quantized model to an integer program: read the recorded forward, find the grids, work out the integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.attach import Attachment, attachment_of
from fewbits.engine.tree import Batch, as_call
from fewbits.errors import FewbitsError
from fewbits.export.integer.grids import Refusal, grid_of, table_of, within
from fewbits.export.integer.operations import LAYOUT
from fewbits.export.integer.program import Grid, IntegerProgram, Op, Port
from fewbits.export.layers import Layer, layers_of
from fewbits.graph import record
from fewbits.graph.constants import layer_constants, norm_constants
from fewbits.graph.operands import canonical, operand
from fewbits.graph.ops import ACTIVATIONS, CREATION, IDENTITY, MATMUL
from fewbits.graph.record import without_cache
from fewbits.graph.requantize import Placement, find_placement, is_average, is_fixed
from fewbits.graph.results import relu_kind
from fewbits.graph.types import CASTS, Call, CallKey, Graph, Ref, Site
from fewbits.kernels import fixed_point
from fewbits.kernels.integer_ops import ADD_SHIFT, add_factors, check_depth

#: Bits that the accumulators of `channels` may take up.
_CHANNEL_BITS = 29
_SHOWN = 6
_NO_QUANTIZER, _FLOATING = "carries no quantizer", "reads floating point"


def build(model: nn.Module, example: Batch) -> IntegerProgram:
    """The integer program of a model with quantizers attached (quantized just now, or loaded from a checkpoint).

    example: inputs that exercise the model, as `fewbits.quantize` takes them; the program runs on any batch size of
    the same resolution. The model stays as it is. Raises `FewbitsError` naming every op that integers cannot do here.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise FewbitsError("the model carries no quantizers; quantize it first, or load a checkpoint of fewbits")
    if attachment.factors:
        raise FewbitsError(f"{next(iter(attachment.factors))}: factors at run time have no integer form")
    args, kwargs = as_call(example)
    with attachment.disabled(), attachment.hiding(attachment.rewrites()), without_cache(model):
        graph = record(model, *args, **kwargs)
    for call in graph.calls:
        if call.key in attachment.replacements:
            call.op, call.args, call.kwargs = attachment.replacements[call.key], (call.bound["input"],), {}
            call.bound = {"input": call.args[0]}
    return Builder(model, graph, attachment).program()


class Builder:
    """Walks the recorded calls once. What a call that cannot be built makes is missing; why is told at the end."""

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

    def program(self) -> IntegerProgram:
        for call in self.graph.calls:
            if call.index in self.placement.fused or call.op in CREATION or not self._concerns(call):
                continue
            try:
                self._emit(call)
            except Refusal as refusal:
                if str(refusal):
                    self.refused.append(str(refusal))
        outputs = []
        for place, value in enumerate(self.graph.outputs):
            if value in self.held:
                outputs.append(Port(*self.held[value], place))
        if len(outputs) < len(self.graph.outputs) or not outputs:
            more = len(self.refused) - _SHOWN
            shown = "; ".join(self.refused[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            placed = any(reason.endswith((_NO_QUANTIZER, _FLOATING)) for reason in self.refused)
            hint = "; the recipe jacob-integer-only puts quantizers where integers need them" if placed else ""
            raise FewbitsError(
                f"no integer-only form of {self.graph.model_class}: {shown or 'no output is on a grid'}{hint}"
            )
        return IntegerProgram(self.ports, _needed(self.ops, outputs), outputs)

    # -- values ------------------------------------------------------------------------------------------------------
    def _concerns(self, call: Call) -> bool:
        """Whether a call works on the network's inputs or what became of them."""
        return any(value in self.graph.flow.active for value in self.graph.flow.reads[call.index])

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
                raise Refusal(f"{where} reads accumulators: their output {_NO_QUANTIZER}")
            if wanted is None or wanted == grid:
                return register, grid
            return self._rescale(register, grid, wanted, where), wanted
        if self._from_input(value):
            if wanted is None:
                raise Refusal(f"{where} reads the network's input, which no quantizer makes bytes of")
            return self._enter(value, wanted), wanted
        if self.graph.values[value].param is not None or value not in self.graph.flow.active:
            raise Refusal(f"{where} reads a parameter or constant that is on no grid")
        raise Refusal("" if self.refused else f"{where} {_FLOATING}")

    def _from_input(self, value: int) -> bool:
        while True:
            held = self.graph.values[value]
            if held.kind == "input":
                return True
            call = None if held.call is None else self.graph.calls[held.call]
            if call is None or not _moves(call):
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
        raise Refusal(f"{self._name(call)}.output {_NO_QUANTIZER}")

    def _reader_grids(self, value: int) -> Iterator[Grid | None]:
        for index in self.graph.consumers.get(value, ()):
            call = self.graph.calls[index]
            if _moves(call):
                for out in call.outputs:
                    yield from self._reader_grids(out)
                continue
            role = next((r for r, ref in self.graph.flow.operands(call).items() if ref.value == value), "input")
            yield self._quantizer_grid(self._site(call, role))

    def _reaches_output(self, value: int) -> bool:
        if value in self.graph.outputs:
            return True
        readers = [self.graph.calls[index] for index in self.graph.consumers.get(value, ())]
        return any(self._reaches_output(out) for call in readers if _moves(call) for out in call.outputs)

    # -- operations --------------------------------------------------------------------------------------------------
    def _emit(self, call: Call) -> None:
        op, flow = call.op, self.graph.flow
        if op in IDENTITY or op in CASTS:
            value = flow.reads[call.index][0]
            if value in self.held:
                self.held[call.outputs[0]] = self.held[value]
            elif not self._from_input(value):
                raise Refusal("" if self.refused else f"{self._name(call)} {_FLOATING}")
        elif op == "getitem" or op in LAYOUT:
            self._move(call)
        elif op == "pad":
            self._pad(call)
        elif flow.is_weighted(call):
            self._layer(call)
        elif is_average(call):
            self._average(call)
        else:
            self._by_name(call)(call)

    def _by_name(self, call: Call) -> Callable[[Call], None]:
        op = call.op
        if op in MATMUL:
            return self._product
        if op in ACTIVATIONS:
            return self._table
        known = {
            "add": self._add, "mul": self._multiply, "cat": self._concatenate, "batch_norm": self._norm,
            "max_pool1d": self._max_pool, "max_pool2d": self._max_pool, "max_pool3d": self._max_pool,
        }  # fmt: skip
        if op not in known:
            raise Refusal(f"{self._name(call)}: {op} has no integer form here")
        return known[op]

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

    def _output(self, call: Call, step: Tensor, name: str) -> tuple[Grid | None, dict[str, int], dict[str, Tensor]]:
        """What brings the accumulator of a chain, in units of `step`, to bytes: grid, clamp and tensors."""
        end = self.placement.chains.get(call.index, [call])[-1]
        grid = self._grid_after(end)
        kind = relu_kind(end) if end is not call else None
        if grid is None:
            if kind is not None:
                raise Refusal(f"{name} {_NO_QUANTIZER}")
            return None, {}, {}
        multiplier = fixed_point.decompose(step.float() / torch.tensor(grid.scale))
        low, high = within(grid, kind)
        tensors = {"mantissa": multiplier.mantissa, "shift": multiplier.shift, "zero": _integer(grid.zero)}
        return grid, {"low": low, "high": high}, tensors

    def _chain(self, call: Call) -> tuple[Call, str]:
        """The last call that is done in one go with this one, and the site of what it makes."""
        end = self.placement.chains.get(call.index, [call])[-1]
        site = self._site(end, "output")
        return end, site.name if site is not None else self._name(end)

    def _layer(self, call: Call) -> None:
        register, grid = self._read(call)
        end, name = self._chain(call)
        site = self._site(call, "weight")
        layer = None if site is None else self.layers.get(site.name)
        if site is None or layer is None:
            raise Refusal(f"{self._name(call)}.weight is not quantized")
        convolution = call.op in ("conv1d", "conv2d", "conv3d")
        if not convolution and (call.op not in ("linear", "addmm", "matmul") or site.slot == "lhs" or site.sliced):
            raise Refusal(f"{self._name(call)}: {call.op} has no integer form here")
        codes, zero, scale = _weight(layer, self._name(call))
        shape = canonical(operand(self.model, site), site.layout, site.groups).shape
        codes = codes.view(shape)
        try:
            check_depth(codes[0].numel(), site.name)
        except FewbitsError as error:
            raise Refusal(str(error)) from error
        gain, constant = layer_constants(self.model, self.graph, call, len(codes))
        if not bool((gain > 0).all()):
            raise Refusal(f"{self._name(call)}: the batch norm behind it is not folded and flips signs; fold it first")
        if bool((gain == 1).all()):
            step = scale * torch.tensor(grid.scale)
        else:
            step = scale.expand(len(codes)) * torch.tensor(grid.scale) * gain.float()
        tensors = {"weight": codes, "zero_w": zero, "zero_x": _integer(grid.zero)}
        if bool(constant.any()):
            tensors["bias"], saturated = fixed_point.quantize_bias(constant, step)
            # a simulation that saturates them too holds what is left of them, up to its own rounding
            if saturated and not torch.allclose(tensors["bias"].double() * step.double(), constant, rtol=1e-5, atol=0):
                raise Refusal(f"{self._name(call)}: {saturated} biases leave 32 bits at the step of their accumulator")
        attributes = _geometry(call) if convolution else {}
        out, clamp, ending = self._output(call, step, name)
        made = self._put("convolution" if convolution else "linear", name, (register,), attributes | clamp,
                         tensors | ending)  # fmt: skip
        if out is None:
            scales = float(step) if step.dim() == 0 else tuple(step.tolist())
            out = Grid(scales, 0, accumulator=True)
        self.held[end.outputs[0]] = made, out

    def _two(self, call: Call) -> tuple[tuple[int, Grid], tuple[int, Grid]]:
        if call.kwargs.get("alpha", 1) != 1:
            raise Refusal(f"{self._name(call)}: an addition with a factor has no integer form here")
        return self._read(call, "lhs"), self._read(call, "rhs")

    def _binary(self, kind: str, call: Call, factor: Tensor, extra: dict[str, Tensor], pair: Any) -> None:
        (first, a), (second, b) = pair
        end, name = self._chain(call)
        out, clamp, ending = self._output(call, factor, name)
        if out is None:
            raise Refusal(f"{name} {_NO_QUANTIZER}")
        zeros = {"zero_a": _integer(a.zero), "zero_b": _integer(b.zero)}
        self.held[end.outputs[0]] = self._put(kind, name, (first, second), clamp, zeros | extra | ending), out

    def _add(self, call: Call) -> None:
        pair = self._two(call)
        scales = [torch.tensor(grid.scale) for _, grid in pair]
        left, right, rest = add_factors(scales[0], scales[1], torch.tensor(1.0))
        extra: dict[str, Tensor] = {}
        for side, factor in zip("ab", (left, right), strict=True):
            part = fixed_point.decompose(factor)
            extra |= {f"mantissa_{side}": part.mantissa, f"shift_{side}": part.shift}
        self._binary("add", call, rest, extra, pair)

    def _multiply(self, call: Call) -> None:
        pair = self._two(call)
        self._binary("multiply", call, torch.tensor(pair[0][1].scale) * torch.tensor(pair[1][1].scale), {}, pair)

    def _product(self, call: Call) -> None:
        if call.op != "matmul":
            raise Refusal(f"{self._name(call)}: {call.op} has no integer form here")
        pair = self._two(call)
        check_depth(self.graph.values[self.graph.flow.operands(call)["lhs"].value].shape[-1], self._name(call))
        self._binary("product", call, torch.tensor(pair[0][1].scale) * torch.tensor(pair[1][1].scale), {}, pair)

    def _norm(self, call: Call) -> None:
        """A batch norm that no layer takes up: a fixed-point multiple of every channel, and an int32 bias."""
        if not is_fixed(self.graph, call):
            raise Refusal(f"{self._name(call)}: a batch norm without stored statistics has no integer form here")
        register, grid = self._read(call)
        end, name = self._chain(call)
        gain, offset = (part.cpu() for part in norm_constants(self.model, self.graph, call))
        real = gain * torch.tensor(grid.scale).double()
        step = torch.maximum(real.abs() * 255, offset.abs()) / 2.0**_CHANNEL_BITS
        step = torch.where(step > 0, step, torch.ones_like(step))
        weight, bias = (fixed_point.quantize_bias(part, step)[0] for part in (real, offset))
        out, clamp, ending = self._output(call, step, name)
        if out is None:
            raise Refusal(f"{name} {_NO_QUANTIZER}")
        tensors = {"weight": weight, "bias": bias, "zero_x": _integer(grid.zero)}
        self.held[end.outputs[0]] = self._put("channels", name, (register,), clamp, tensors | ending), out

    def _concatenate(self, call: Call) -> None:
        grid = self._grid_after(call)
        name = self._chain(call)[1]
        if grid is None:
            raise Refusal(f"{name} {_NO_QUANTIZER}")
        registers = []
        for ref in call.refs():
            registers.append(self._on(ref.value, grid, f"{self._name(call)}.input")[0])
        axis = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
        self.held[call.outputs[0]] = self._put("concatenate", name, tuple(registers), {"axis": int(axis)}), grid

    def _average(self, call: Call) -> None:
        register, grid = self._read(call)
        value = self.graph.flow.reads[call.index][0]
        before, after = self.graph.values[value].shape, self.graph.values[call.outputs[0]].shape
        tensors = {"zero_x": _integer(grid.zero)}
        kind, attributes = _averaging(call, before, after, self._name(call))
        made = self._put(kind, self._label(call, call.outputs[0], grid), (register,), attributes, tensors)
        self._settle(call, made, grid)

    def _max_pool(self, call: Call) -> None:
        register, grid = self._read(call)
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        given = _arguments(call, names)
        if call.kwargs.get("return_indices") or (len(call.args) > 6 and call.args[6]):
            raise Refusal(f"{self._name(call)}: a pool that returns indices has no integer form here")
        attributes = {name: value for name, value in given.items() if value is not None}
        name = self._label(call, call.outputs[0], grid)
        self._settle(call, self._put("max_pool", name, (register,), attributes), grid)

    def _table(self, call: Call) -> None:
        if len(list(call.refs())) != 1:
            raise Refusal(f"{self._name(call)}: {call.op} with parameters has no integer form here")
        register, grid = self._read(call)
        out = self._grid_after(call)
        if out is None:
            raise Refusal(f"{self._name(call)}.output {_NO_QUANTIZER}")
        table = table_of(call, grid, out)
        attributes = {"low": out.low, "high": out.high}
        made = self._put("table", self._chain(call)[1], (register,), attributes, {"table": table})
        self.held[call.outputs[0]] = made, out

    def _pad(self, call: Call) -> None:
        register, grid = self._read(call)
        given = _arguments(call, ("pad", "mode", "value"))
        if given.get("mode") not in (None, "constant") or given.get("value"):
            raise Refusal(f"{self._name(call)}: padding with anything but zero has no integer form here")
        attributes = {"pad": list(given["pad"]), "code": grid.zero}
        name = self._label(call, call.outputs[0], grid)
        self.held[call.outputs[0]] = self._put("pad", name, (register,), attributes), grid

    def _move(self, call: Call) -> None:
        value = self.graph.flow.reads[call.index][0]
        if value not in self.held:
            if self._from_input(value):
                return  # emitted once somebody reads it
            raise Refusal("" if self.refused else f"{self._name(call)} {_FLOATING}")
        register, grid = self.held[value]
        if isinstance(grid.scale, tuple):
            raise Refusal(f"{self._name(call)}: accumulators with a scale per channel cannot be moved; quantize them")
        for part, out in enumerate(call.outputs):
            self.held[out] = self._layout(call, register, part, grid), grid

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

    def _settle(self, call: Call, register: int, grid: Grid) -> None:
        """What keeps the grid of its input, brought to that of its own quantizer where there is another."""
        site = self._site(call, "output")
        own = self._quantizer_grid(site)
        if own is not None and own != grid and site is not None:
            register, grid = self._rescale(register, grid, own, site.name), own
        self.held[call.outputs[0]] = register, grid

    def _rescale(self, register: int, grid: Grid, wanted: Grid, name: str) -> int:
        real = torch.tensor(grid.scale) / 2.0**ADD_SHIFT / torch.tensor(wanted.scale)
        multiplier = fixed_point.decompose(real)
        tensors = {
            "mantissa": multiplier.mantissa, "shift": multiplier.shift, "zero": _integer(wanted.zero),
            "zero_x": _integer(grid.zero),
        }  # fmt: skip
        return self._put("rescale", name, (register,), {"low": wanted.low, "high": wanted.high}, tensors)


def _moves(call: Call) -> bool:
    """Whether a call leaves codes what they are."""
    return call.op == "getitem" or call.op in LAYOUT or call.op in IDENTITY or call.op in CASTS


def _needed(ops: list[Op], outputs: list[Port]) -> list[Op]:
    """The operations that the outputs depend on, in order."""
    wanted = {port.register for port in outputs}
    kept = []
    for op in reversed(ops):
        if op.writes in wanted:
            kept.append(op)
            wanted.update(op.reads)
    return kept[::-1]


def _weight(layer: Layer, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8 codes [out, columns], int32 zero () or [out], float32 scale () or [out]) of a quantized weight."""
    fmt = layer.quantizer.spec.format
    kind = layer.quantizer.spec.granularity.kind
    if layer.parts or layer.group_index is not None or kind not in ("tensor", "channel"):
        raise Refusal(f"{name}.weight: integer accumulators need one scale a tensor or output channel, not {kind}")
    try:
        uniform = layer.uniform
    except FewbitsError as error:
        raise Refusal(str(error)) from error
    if uniform.bits > 8 or uniform.zero_point == "real":
        raise Refusal(f"{name}.weight: {fmt.bits}-bit {uniform.zero_point}-zero-point codes are no bytes")
    codes, zero = layer.unsigned()
    scale, zero = layer.scales()[0].flatten().cpu(), zero.flatten().cpu()
    if kind == "tensor":
        scale, zero = scale[0], zero[0]
    return codes, zero.round().to(torch.int32), scale.float()


def _geometry(call: Call) -> dict[str, Any]:
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    given = _arguments(call, names)
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {name: default if given.get(name) is None else given[name] for name, default in defaults.items()}


def _arguments(call: Call, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments after the first, by name."""
    given = dict(zip(names, call.args[1:], strict=False))
    return given | {name: call.kwargs[name] for name in names if name in call.kwargs}


def _averaging(call: Call, before: tuple[int, ...], after: tuple[int, ...], name: str) -> tuple[str, dict[str, Any]]:
    """Kind and attributes of a mean over windows or over axes."""
    if call.op == "mean":
        given = _arguments(call, ("dim", "keepdim"))
        axes = given["dim"] if isinstance(given["dim"], (tuple, list)) else [given["dim"]]
        axes = [axis % len(before) for axis in axes]
        if 0 in axes:
            raise Refusal(f"{name}: a mean over samples has no integer form here")
        return "global_average", {"axes": axes, "keepdim": bool(given.get("keepdim", False))}
    spatial, made = before[2:], after[2:]
    if call.op.startswith("adaptive"):
        if set(made) == {1}:
            return "global_average", {"axes": list(range(2, len(before))), "keepdim": True}
        if any(size % count for size, count in zip(spatial, made, strict=True)):
            raise Refusal(f"{name}: windows of different sizes have no integer form here")
        kernel = [size // count for size, count in zip(spatial, made, strict=True)]
        return "average", {"kernel": kernel, "stride": kernel, "padding": [0] * len(kernel), "ceil_mode": False,
                           "count_include_pad": True}  # fmt: skip
    given = _arguments(call, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"))
    if given.get("divisor_override") is not None:
        raise Refusal(f"{name}: an average with a divisor of its own has no integer form here")

    def each(value: Any) -> list[int]:
        return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * len(spatial)

    kernel = each(given["kernel_size"])
    stride = given.get("stride")
    return "average", {
        "kernel": kernel,
        "stride": kernel if stride is None or stride == () else each(stride),
        "padding": each(given.get("padding") or 0),
        "ceil_mode": bool(given.get("ceil_mode", False)),
        "count_include_pad": bool(given.get("count_include_pad", True)),
    }


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


def _integer(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)
