"""Integers in place of the marks that `trace` left: QuantizeLinear, DequantizeLinear and MatMulNBits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnx_ir.convenience import replace_all_uses_with
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.export.onnx.trace import MARK, MARK_DOMAIN
from fewbits.export.onnx.weights import FOLDED, Integers, blocks, canonical_shape, integers, operand_shape
from fewbits.formats import Uniform

if TYPE_CHECKING:
    from fewbits.export.layers import Layer
    from fewbits.graph.types import Site
    from fewbits.quantizer import Quantizer

MICROSOFT = "com.microsoft"
#: The first opset whose DequantizeLinear takes groups.
BLOCKS_OPSET = 21


@dataclass
class Rewriter:
    """One graph, rewritten in place. `counts` says how many sites took which form."""

    graph: ir.Graph
    layers: dict[str, Layer]
    activations: dict[str, tuple[Site, Quantizer]]
    accuracy_level: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    held: dict[str, ir.Value] = field(default_factory=dict)  # initializers by name
    seen: Counter[str] = field(default_factory=Counter)  # marks of a site so far: a module may be called several times

    def run(self) -> None:
        """Raises `FewbitsError`, naming the site, for a weight in a place that no form fits."""
        marks = [node for node in self.graph if node.domain == MARK_DOMAIN and node.op_type == MARK]
        for node in marks:
            name = str(node.attributes["site"].value)
            if name in self.layers:
                self._weight(node, self.layers[name])
            else:
                self._activation(node, *self.activations[name])
        for node in list(self.graph):
            if node.op_type == "BatchNormalization":
                self._fold_norm(node)
            elif node.op_type == "Transpose":
                self._transpose_first(node)

    # -- making nodes ------------------------------------------------------------------------------------------------
    def place(self, site: str) -> str:
        """A name for the nodes of a site's next mark: the site's for the first."""
        self.seen[site] += 1
        return site if self.seen[site] == 1 else f"{site}@{self.seen[site] - 1}"

    def constant(self, name: str, value: Tensor) -> ir.Value:
        """An initializer; the same one for the same name."""
        if name not in self.held:
            array = np.ascontiguousarray(value.detach().cpu().numpy()) if value.dim() else value.cpu().numpy()
            made = ir.val(name, const_value=ir.tensor(array, name=name))
            self.graph.register_initializer(made)
            self.held[name] = made
        return self.held[name]

    def node(
        self,
        before: ir.Node,
        op: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        name: str | None = None,
        like: ir.Value | None = None,
    ) -> ir.Value:
        """The output of a new node placed before another; of the type and shape of `like`."""
        made = ir.node(op, inputs, attributes, domain=domain, name=name)
        out = made.outputs[0]
        if like is not None:
            out.type, out.shape = like.type, like.shape
        self.graph.insert_before(before, made)
        return out

    # -- activations -------------------------------------------------------------------------------------------------
    def _activation(self, mark: ir.Node, site: Site, quantizer: Quantizer) -> None:
        """QuantizeLinear to uint8 and back. Grids narrower than 0 to 255 are clipped to their ends first."""
        fmt = quantizer.spec.format
        assert isinstance(fmt, Uniform)
        params = quantizer.params
        scale = fmt.scale_of(params).detach().float().cpu().reshape(())
        shift = 2 ** (fmt.bits - 1) if fmt.signed else 0
        zero = params.get("zero_point", torch.zeros(())).detach().float().cpu().reshape(()) + shift
        x = mark.inputs[0]
        assert x is not None
        ends = [end + shift for end in (fmt.q_min, fmt.q_max)]
        name, place = site.name, self.place(site.name)
        if ends != [0, 255]:
            low, high = ((end - zero) * scale for end in ends)
            limits = [self.constant(f"{name}.low", low), self.constant(f"{name}.high", high)]
            x = self.node(mark, "Clip", [x, *limits], name=f"{place}.clip", like=x)
        grid = [self.constant(f"{name}.scale", scale), self.constant(f"{name}.zero", zero.to(torch.uint8))]
        codes = self.node(mark, "QuantizeLinear", [x, *grid], name=f"{place}.quantize")
        values = self.node(mark, "DequantizeLinear", [codes, *grid], name=place, like=mark.outputs[0])
        replace_all_uses_with(mark.outputs[0], values, replace_graph_outputs=True)
        self.counts["activations"] += 1

    # -- weights -----------------------------------------------------------------------------------------------------
    def _weight(self, mark: ir.Node, layer: Layer) -> None:
        readers = _products(mark.outputs[0], layer)
        grouped = layer.quantizer.spec.granularity.kind == "group"
        if readers is not None and (grouped or layer.input is None):
            self._packed(layer, readers)
            return
        if layer.parts or layer.group_index is not None:
            raise FewbitsError(
                f"{layer.site.name}: full-precision columns and reordered groups are held in matrix products of "
                "floating-point inputs or groups only; exclude the site or take another target"
            )
        self._dequantized(mark, layer, readers)

    def _packed(self, layer: Layer, readers: list[ir.Node]) -> None:
        """Every product with the weight as MatMulNBits."""
        name = layer.site.name
        held = blocks(layer)
        stored: list[ir.Value | None] = [
            self.constant(f"{name}.codes", held.codes), self.constant(f"{name}.scale", held.scale.reshape(-1))
        ]  # fmt: skip
        if held.zero is not None:
            stored.append(self.constant(f"{name}.zero", held.zero))
        rows, columns = held.shape
        attributes = {
            "K": columns, "N": rows, "bits": held.bits, "block_size": held.block,
            "accuracy_level": self.accuracy_level,
        }  # fmt: skip
        for reader in readers:
            x = reader.inputs[0]
            given = x
            if held.order is not None:
                given = self.node(reader, "Gather", [x, self.constant(f"{name}.order", held.order)], {"axis": -1})
            place = self.place(name)
            out = self.node(
                reader, "MatMulNBits", [given, *stored], attributes, domain=MICROSOFT, name=place,
                like=reader.outputs[0],
            )  # fmt: skip
            if held.kept is not None and held.kept_values is not None:
                kept = self.node(reader, "Gather", [x, self.constant(f"{name}.kept", held.kept)], {"axis": -1})
                extra = self.node(reader, "MatMul", [kept, self.constant(f"{name}.columns", held.kept_values)])
                out = self.node(reader, "Add", [out, extra], like=out)
            if reader.op_type == "Gemm" and len(reader.inputs) > 2 and reader.inputs[2] is not None:
                out = self.node(reader, "Add", [out, reader.inputs[2]], like=out)
            replace_all_uses_with(reader.outputs[0], out, replace_graph_outputs=True)
            self.graph.remove(reader, safe=True)
        self.counts[f"weights of {held.bits} bits in MatMulNBits"] += 1

    def _dequantized(self, mark: ir.Node, layer: Layer, readers: list[ir.Node] | None) -> None:
        """An int8 tensor and its DequantizeLinear in place of the weight."""
        form = integers(layer)
        turned = (
            readers is not None
            and not form.canonical
            and layer.site.layout == "oi"
            and all(use.node.op_type == "Transpose" for use in mark.outputs[0].uses())
        )
        if turned:  # products read it the other way round: store it so
            form = Integers(form.codes.T.contiguous(), form.scale, form.zero, None if form.axis is None else 1)
        read = [mark.outputs[0]]
        if turned:
            read = [use.node.outputs[0] for use in mark.outputs[0].uses()]
        for value in read:
            for use in list(value.uses()):
                use.node.replace_input_with(use.idx, self._dequantize(mark, layer, form))
        self.counts["weights in int8"] += 1

    def _dequantize(self, mark: ir.Node, layer: Layer, form: Integers) -> ir.Value:
        # tensors of its own for each reader: onnxruntime's precise mode rewrites them one by one, and fails twice
        name = self.place(layer.site.name)
        inputs: list[ir.Value | None] = [
            self.constant(f"{name}.codes", form.codes), self.constant(f"{name}.scale", form.scale)
        ]  # fmt: skip
        # zeros are written out too: onnxruntime's precise mode for CPUs without VNNI needs them
        inputs.append(self.constant(f"{name}.zero", form.zero))
        attributes = {} if form.axis is None else {"axis": form.axis}
        if form.block is not None:
            attributes["block_size"] = form.block
        out = self.node(mark, "DequantizeLinear", inputs, attributes, name=name)
        if not form.canonical:
            out.type, out.shape = mark.outputs[0].type, ir.Shape(form.codes.shape)
            return out
        return self._restored(mark, layer, form, out)

    def _restored(self, mark: ir.Node, layer: Layer, form: Integers, matrix: ir.Value) -> ir.Value:
        """The operand from its canonical matrix [out, columns]: `operands.restore` as nodes."""
        site, shape = layer.site, operand_shape(layer)

        def reshape(value: ir.Value, sizes: tuple[int, ...]) -> ir.Value:
            wanted = self.constant(f"{site.name}.shape{len(sizes)}", torch.tensor(sizes))
            return self.node(mark, "Reshape", [value, wanted])

        def transpose(value: ir.Value, order: list[int]) -> ir.Value:
            return self.node(mark, "Transpose", [value], {"perm": order})

        full = canonical_shape(layer)
        columns = layer.codes.shape[1]
        if form.codes.shape[1] != columns:
            ends = [self.constant(f"{site.name}.slice{at}", torch.tensor([at])) for at in (0, columns, 1)]
            matrix = self.node(mark, "Slice", [matrix, *ends])
        if site.layout == "io":
            return transpose(matrix, [1, 0])
        if site.layout == "expert_io":
            return transpose(reshape(matrix, (shape[0], shape[2], shape[1])), [0, 2, 1])
        if site.layout == "io_conv":
            rank = len(full)
            if site.groups == 1:
                return transpose(reshape(matrix, full), [1, 0, *range(2, rank)])
            split = reshape(matrix, (site.groups, full[0] // site.groups, *full[1:]))
            return reshape(transpose(split, [0, 2, 1, *range(3, rank + 1)]), shape)
        return matrix if len(shape) == 2 else reshape(matrix, shape)

    # -- batch norms -------------------------------------------------------------------------------------------------
    def _fold_norm(self, norm: ir.Node) -> None:
        """A batch norm behind a convolution with int8 weights, into its scales and bias.

        The codes stay. Runtimes multiply in integers only where nothing lies between the convolution and the next
        quantizer. A norm with a negative factor stays: scales are positive.
        """
        conv = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if conv is None or conv.op_type != "Conv" or len(conv.outputs[0].uses()) != 1:
            return
        weight = conv.inputs[1].producer() if conv.inputs[1] is not None else None
        if weight is None or weight.op_type != "DequantizeLinear" or len(weight.outputs[0].uses()) != 1:
            return
        constants = [_array(value) for value in norm.inputs[1:5]]
        bias = _array(conv.inputs[2]) if len(conv.inputs) > 2 else None
        if any(value is None for value in constants) or (bias is None and len(conv.inputs) > 2):
            return
        gamma, beta, mean, var = (torch.from_numpy(np.array(value)).double() for value in constants)
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
        factor = gamma / torch.sqrt(var + epsilon)
        scale_of = weight.inputs[1]
        scale = _array(scale_of)
        axis = weight.attributes["axis"].as_int() if "axis" in weight.attributes else None
        if scale is None or not bool((factor > 0).all()) or axis not in (None, 0) or "block_size" in weight.attributes:
            return
        name = str(weight.name)
        new_scale = (torch.from_numpy(np.array(scale)).double() * factor).float()
        new_bias = beta + ((0 if bias is None else torch.from_numpy(np.array(bias)).double()) - mean) * factor
        weight.replace_input_with(1, self.constant(f"{name}.scale.folded", new_scale))
        if axis is None:
            weight.attributes["axis"] = ir.AttrInt64("axis", 0)
            if (zero := _array(weight.inputs[2])) is not None:
                spread = torch.from_numpy(np.array(zero)).expand(len(factor)).contiguous()
                weight.replace_input_with(2, self.constant(f"{name}.zero.folded", spread))
        weight.metadata_props[FOLDED] = "batch norm"
        made = self.constant(f"{name}.bias", new_bias.float())
        if bias is None:
            conv.resize_inputs(3)
        conv.replace_input_with(2, made)
        replace_all_uses_with(norm.outputs[0], conv.outputs[0], replace_graph_outputs=True)
        self.graph.remove(norm, safe=True)
        self.counts["batch norms folded into scales"] += 1

    def _transpose_first(self, transpose: ir.Node) -> None:
        """The factor and offset of a norm over channels, [channels, 1], behind the transpose that follows them.

        The same values. In the other order OpenVINO's CPU device merges them into the next quantizer along the wrong
        axis.
        """
        steps: list[ir.Node] = []
        value = transpose.inputs[0]
        for op in ("Add", "Mul"):
            step = value.producer() if value is not None else None
            if step is None or step.op_type != op or len(step.outputs[0].uses()) != 1:
                return
            held = _array(step.inputs[1])
            if held is None or held.ndim != 2 or held.shape[1] != 1:
                return
            steps.insert(0, step)
            value = step.inputs[0]
        if _ints(transpose, "perm") != [0, 2, 1]:
            return
        out = self.node(transpose, "Transpose", [value], {"perm": [0, 2, 1]})
        for step in steps:
            held = step.inputs[1]
            assert held is not None
            row = self.constant(f"{held.name}.row", torch.from_numpy(np.array(_array(held))).reshape(-1))
            out = self.node(transpose, step.op_type, [out, row], like=transpose.outputs[0])
        replace_all_uses_with(transpose.outputs[0], out, replace_graph_outputs=True)
        self.graph.remove([transpose, *reversed(steps)], safe=True)


def _products(weight: ir.Value, layer: Layer) -> list[ir.Node] | None:
    """The matrix products that read a weight as [columns, out], through transposes; None where something else does."""
    if len(operand_shape(layer)) != 2 or layer.site.layout not in ("oi", "io"):
        return None
    found: list[ir.Node] = []
    frontier = [(weight, layer.site.layout == "io")]
    while frontier:
        value, columns_first = frontier.pop()
        if value.is_graph_output():
            return None
        for use in value.uses():
            node, place = use.node, use.idx
            if node.op_type == "Transpose" and _ints(node, "perm") in (None, [1, 0]):
                frontier.append((node.outputs[0], not columns_first))
            elif place == 1 and node.op_type == "MatMul" and columns_first:
                found.append(node)
            elif place == 1 and node.op_type == "Gemm" and columns_first != bool(_int(node, "transB", 0)):
                plain = _int(node, "transA", 0) == 0 and all(
                    node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in node.attributes
                )
                if not plain:
                    return None
                found.append(node)
            else:
                return None
    return found or None


def finish(model: ir.Model) -> None:
    """Drop what nothing reads any more, the marks among it, and give every value a name."""
    graph = model.graph
    for run in (passes.RemoveUnusedNodesPass(), passes.NameFixPass(), passes.RemoveUnusedOpsetsPass()):
        run(model)
    assert all(node.domain != MARK_DOMAIN for node in graph)
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports[MICROSOFT] = 1
    if any("block_size" in node.attributes for node in graph if node.op_type == "DequantizeLinear"):
        model.opset_imports[""] = max(model.opset_imports[""], BLOCKS_OPSET)  # what else is used is the same in both


def _array(value: ir.Value | None) -> Any:
    """The contents of an initializer, or None."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _ints(node: ir.Node, name: str) -> list[int] | None:
    return list(node.attributes[name].as_ints()) if name in node.attributes else None
