"""`fewbits export DIR --to onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.export.base import Obstacle, Subject, Target
from fewbits.export.onnx.weights import PRODUCTS
from fewbits.hub.models import save_companions

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "model.onnx"
#: Tensors above this size go into a file beside the graph: one protobuf message holds 2 GB.
_LARGE = 1_500_000_000
_OPSETS = range(18, 24)


class Export(Target):
    """`model.onnx`: uint8 activations, int8 weights, groups and weight-only layers in MatMulNBits.

    Activation codes of signed grids are moved to uint8, which is the same grid. Weights with one scale a row (or one in
    all) and quantized inputs are int8 tensors with a DequantizeLinear, whatever their bits; weights in groups, and all
    weights of matrix products with floating-point inputs, are `com.microsoft::MatMulNBits` of 2, 4 or 8 bits. Language
    models come out as they are called, or with a cache of keys and values as one step of generation; see `cached`.
    """

    name: ClassVar[str] = "onnx"
    about: ClassVar[str] = "ONNX with integer weights, for onnxruntime and OpenVINO"
    profile_name: ClassVar[str] = "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    holds: ClassVar[frozenset[str]] = frozenset({"factors", "replacements", "columns", "order"})

    def obstacles(self, subject: Subject) -> list[Obstacle]:
        """Also columns and reordered groups at anything but matrix products."""
        found = super().obstacles(subject)
        attachment = subject.attachment
        if not any(quantizer.enabled for _, quantizer in attachment.items()):
            found.append(Obstacle("the model", "nothing is quantized in it"))
        for name in {*attachment.parts, *attachment.group_index}:
            if attachment.sites[name].op not in PRODUCTS:
                found.append(Obstacle(name, "ONNX holds kept columns and reordered groups in matrix products only"))
        return found

    def write(self, subject: Subject, folder: Path, **options: Any) -> dict[str, Any]:
        """Options.

        opset: of the standard operators, 20 by default (21 where a convolution's weights are in groups).
        accuracy_level: how MatMulNBits computes in onnxruntime: 0 with float32 activations as the simulation does; 4
        rounds them to 8 bits, several times as fast. cache: whether a causal language model of transformers takes and
        returns keys and values, for generation token by token; false by default.
        """
        chosen = _options(options)
        import onnx_ir as ir

        from fewbits.export.onnx.rewrite import Rewriter, finish

        planned = _planned(subject)
        model, axes = (_step if chosen["cache"] else _forward)(subject, chosen["opset"])
        writer = Rewriter(model.graph, *planned, accuracy_level=chosen["accuracy_level"])
        writer.run()
        finish(model)
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        ir.save(model, folder / FILE, external_data=f"{FILE}.data" if size > _LARGE else None)
        save_companions(subject.loaded, folder)
        return {
            "file": FILE,
            "opset": model.opset_imports[""],
            "accuracy_level": chosen["accuracy_level"],
            "inputs": [value.name for value in model.graph.inputs],
            "outputs": [value.name for value in model.graph.outputs],
            "free_axes": axes,
            "sites": dict(sorted(writer.counts.items())),
            "cache": chosen["cache"],
        }

    def check(self, subject: Subject, folder: Path) -> list[dict[str, Any]]:
        """Structure first, then answers in every runtime that is installed.

        A file with a cache answers in steps, a file without one at once. The codes that onnxruntime makes of the
        simulation's inputs at every activation quantizer are compared too: `quantizers`, see `codes.Codes.report`.

        Reports also hold `precise` (whether the runtimes' modes for CPUs without VNNI were used), `relative` (norm of
        the difference over that of the outputs), and `distance` and `simulated_distance` (the same from the model with
        floating-point activations, in the runtime and in the simulation).
        """
        from fewbits.export.onnx.check import check_structure, compare, judge
        from fewbits.export.onnx.codes import Codes
        from fewbits.export.onnx.runtimes import installed, saturates

        file = folder / FILE
        layers, activations = _planned(subject)
        counts = check_structure(file, layers, activations)
        call, tensors = _call(subject)
        with torch.no_grad():
            call.run(*tensors)
        batches = [call.tensors(batch) for batch in subject.inputs()]
        batches = _as_the_file_takes_them(file, call.inputs, batches)
        codes = Codes(file, {name: quantizer for name, (_, quantizer) in activations.items()})
        reports = compare(file, call, subject.attachment, codes, batches, installed())
        level = _accuracy_level(file)
        for report in reports:
            report["structure"] = counts
            if report["runtime"] == "onnxruntime":
                report["quantizers"] = codes.report()
            report["precise"] = bool(activations) and saturates()
            judge(
                report,
                quantized=bool(activations),
                real=bool(subject.batches),
                int8_products=level is not None and (level == 4 or report["runtime"] == "openvino"),
            )
        return reports


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The options with their defaults. Raises `FewbitsError` for an unknown one or a value that cannot be."""
    chosen = {"opset": 20, "accuracy_level": 0, "cache": False, **given}
    unknown = sorted(set(chosen) - {"opset", "accuracy_level", "cache"})
    if unknown:
        raise FewbitsError(f"onnx has no option {unknown[0]!r}; it has opset, accuracy_level and cache")
    read = {str(number): number for number in (*_OPSETS, 0, 4)}  # the command line gives text
    opset, level = (read.get(str(chosen[name])) for name in ("opset", "accuracy_level"))
    if opset not in _OPSETS:
        raise FewbitsError(f"opset {chosen['opset']!r}: an integer from {_OPSETS[0]} to {_OPSETS[-1]} is needed")
    if level not in (0, 4):
        raise FewbitsError(f"accuracy_level {chosen['accuracy_level']!r}: choose 0 (float32) or 4 (8-bit integers)")
    cache = {"false": False, "true": True}.get(str(chosen["cache"]).lower())
    if cache is None:
        raise FewbitsError(f"cache {chosen['cache']!r}: choose true or false")
    return {"opset": opset, "accuracy_level": level, "cache": cache}


def _forward(subject: Subject, opset: int) -> tuple[ir.Model, list[str]]:
    """The model as it is called, traced; see `trace.traced`."""
    from fewbits.export.onnx.trace import traced

    call, tensors = _call(subject)
    with torch.no_grad():
        call.run(*tensors)  # names the outputs
    model, axes = traced(call, subject.attachment, tensors, opset)
    if tensors[0].shape[0] > 1 and not any(axis.endswith("[batch]") for axis in axes):
        tensors = [value[:1] if value.dim() else value for value in tensors]
        model, axes = traced(call, subject.attachment, tensors, opset)
    return model, axes


def _step(subject: Subject, opset: int) -> tuple[ir.Model, list[str]]:
    """One step of generation, traced; see `cached`."""
    from fewbits.export.onnx.cached import CachedCall
    from fewbits.export.onnx.trace import traced

    call = CachedCall.of(subject.loaded.model.float())
    model, axes = traced(call, subject.attachment, call.example(), opset)
    call.finish(model, axes)
    return model, axes


def _planned(subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights, activations) by site: what the file must hold."""
    items = [(site, quantizer) for site, quantizer in subject.attachment.items() if quantizer.enabled]
    active = {site.name for site, _ in items}
    layers = {layer.site.name: layer for layer in subject.layers if layer.site.name in active}
    return layers, {site.name: (site, quantizer) for site, quantizer in items if site.role != "weight"}


def _call(subject: Subject) -> tuple[Any, list[Tensor]]:
    """How the model is called, and tensors to trace it with: two samples, so that torch does not take the number of
    samples for a constant."""
    from fewbits.export.onnx.trace import Call

    subject.loaded.model.float()  # files are float32; decoded weights are so anyway
    batch = subject.inputs()[0]
    call = Call.of(subject.loaded, batch)
    tensors = call.tensors(batch)
    count = tensors[0].shape[0] if tensors[0].dim() else 0
    if count == 1:
        tensors = [torch.cat([value, value]) if value.dim() and value.shape[0] == 1 else value for value in tensors]
    elif count > 2:
        tensors = [value[:2] if value.dim() and value.shape[0] == count else value for value in tensors]
    return call, tensors


def _as_the_file_takes_them(file: Path, names: list[str], batches: list[list[Tensor]]) -> list[list[Tensor]]:
    """The batches, cut into samples where the file has a fixed number of them."""
    from fewbits.export.onnx.runtimes import input_shapes

    size = input_shapes(file)[names[0]][0]
    if not isinstance(size, int):
        return batches
    cut = []
    for tensors in batches:
        count = tensors[0].shape[0]
        for at in range(0, count - size + 1, size):
            rows = slice(at, at + size)
            cut.append([value[rows] if value.dim() and value.shape[0] == count else value for value in tensors])
    return cut


def _accuracy_level(file: Path) -> int | None:
    """Of the file's MatMulNBits; None where it has none."""
    import onnx

    for node in onnx.load(str(file), load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            return next((item.i for item in node.attribute if item.name == "accuracy_level"), 0)
    return None
