"""From a quantized model to an integer program: every recorded call in integers, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.attach import attachment_of
from fewbits.engine.tree import Batch, as_call
from fewbits.errors import FewbitsError
from fewbits.export.integer.grids import Refusal, table_of, within
from fewbits.export.integer.operations import LAYOUT
from fewbits.export.integer.program import Grid, IntegerProgram, Op, Port
from fewbits.export.integer.values import FLOATING, NO_QUANTIZER, Values, integer
from fewbits.export.layers import Layer
from fewbits.graph import record
from fewbits.graph.constants import layer_constants, norm_constants
from fewbits.graph.operands import canonical, operand
from fewbits.graph.ops import ACTIVATIONS, CREATION, IDENTITY, MATMUL
from fewbits.graph.record import without_cache
from fewbits.graph.requantize import is_average, is_fixed
from fewbits.graph.results import relu_kind
from fewbits.graph.types import CASTS, Call
from fewbits.kernels import fixed_point
from fewbits.kernels.integer_ops import add_factors, check_depth

#: The methods that translate calls known by name alone.
BY_NAME = {
    "add": "_add", "mul": "_multiply", "cat": "_concatenate", "batch_norm": "_norm", "max_pool1d": "_max_pool",
    "max_pool2d": "_max_pool", "max_pool3d": "_max_pool",
}  # fmt: skip
#: Bits that the accumulators of `channels` may take up.
_CHANNEL_BITS = 29
_SHOWN = 6


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


class Builder(Values):
    """Walks the recorded calls once. What a call that cannot be built makes is missing; why is told at the end."""

    def program(self) -> IntegerProgram:
        for call in self.graph.calls:
            if call.index in self.placement.fused or call.op in CREATION or not self.graph.flow.concerns(call):
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
            placed = any(reason.endswith((NO_QUANTIZER, FLOATING)) for reason in self.refused)
            hint = "; the recipe jacob-integer-only puts quantizers where integers need them" if placed else ""
            raise FewbitsError(
                f"no integer-only form of {self.graph.model_class}: {shown or 'no output is on a grid'}{hint}"
            )
        return IntegerProgram(self.ports, _needed(self.ops, outputs), outputs)

    # -- operations --------------------------------------------------------------------------------------------------
    def _emit(self, call: Call) -> None:
        op, flow = call.op, self.graph.flow
        if op in IDENTITY or op in CASTS:
            value = flow.reads[call.index][0]
            if value in self.held:
                self.held[call.outputs[0]] = self.held[value]
            elif not self._from_input(value):
                raise Refusal("" if self.refused else f"{self._name(call)} {FLOATING}")
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
        if op not in BY_NAME:
            raise Refusal(f"{self._name(call)}: {op} has no integer form here")
        translate: Callable[[Call], None] = getattr(self, BY_NAME[op])
        return translate

    def _output(self, call: Call, step: Tensor, name: str) -> tuple[Grid | None, dict[str, int], dict[str, Tensor]]:
        """What brings the accumulator of a chain, in units of `step`, to bytes: grid, clamp and tensors."""
        end = self.placement.chains.get(call.index, [call])[-1]
        grid = self._grid_after(end)
        kind = relu_kind(end) if end is not call else None
        if grid is None:
            if kind is not None:
                raise Refusal(f"{name} {NO_QUANTIZER}")
            return None, {}, {}
        multiplier = fixed_point.decompose(step.float() / torch.tensor(grid.scale))
        low, high = within(grid, kind)
        tensors = {"mantissa": multiplier.mantissa, "shift": multiplier.shift, "zero": integer(grid.zero)}
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
        tensors = {"weight": codes, "zero_w": zero, "zero_x": integer(grid.zero)}
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
            raise Refusal(f"{name} {NO_QUANTIZER}")
        zeros = {"zero_a": integer(a.zero), "zero_b": integer(b.zero)}
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
            raise Refusal(f"{name} {NO_QUANTIZER}")
        tensors = {"weight": weight, "bias": bias, "zero_x": integer(grid.zero)}
        self.held[end.outputs[0]] = self._put("channels", name, (register,), clamp, tensors | ending), out

    def _concatenate(self, call: Call) -> None:
        grid = self._grid_after(call)
        name = self._chain(call)[1]
        if grid is None:
            raise Refusal(f"{name} {NO_QUANTIZER}")
        registers = []
        for ref in call.refs():
            registers.append(self._on(ref.value, grid, f"{self._name(call)}.input")[0])
        axis = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
        self.held[call.outputs[0]] = self._put("concatenate", name, tuple(registers), {"axis": int(axis)}), grid

    def _average(self, call: Call) -> None:
        register, grid = self._read(call)
        value = self.graph.flow.reads[call.index][0]
        before, after = self.graph.values[value].shape, self.graph.values[call.outputs[0]].shape
        tensors = {"zero_x": integer(grid.zero)}
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
            raise Refusal(f"{self._name(call)}.output {NO_QUANTIZER}")
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
            raise Refusal("" if self.refused else f"{self._name(call)} {FLOATING}")
        register, grid = self.held[value]
        if isinstance(grid.scale, tuple):
            raise Refusal(f"{self._name(call)}: accumulators with a scale per channel cannot be moved; quantize them")
        for part, out in enumerate(call.outputs):
            self.held[out] = self._layout(call, register, part, grid), grid

    def _settle(self, call: Call, register: int, grid: Grid) -> None:
        """What keeps the grid of its input, brought to that of its own quantizer where there is another."""
        site = self._site(call, "output")
        own = self._quantizer_grid(site)
        if own is not None and own != grid and site is not None:
            register, grid = self._rescale(register, grid, own, site.name), own
        self.held[call.outputs[0]] = register, grid


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
