"""Whether a written file is the model it should be: its integers, and its answers in the runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.export.onnx.cached import Steps, has_cache
from fewbits.export.onnx.rewrite import MICROSOFT
from fewbits.export.onnx.runtimes import LOADERS, Run
from fewbits.export.onnx.trace import CLASSES, Call
from fewbits.export.onnx.weights import FOLDED, blocks
from fewbits.formats import Uniform
from fewbits.formats.packing import unpack_codes

if TYPE_CHECKING:
    import onnx

    from fewbits.attach import Attachment
    from fewbits.export.layers import Layer
    from fewbits.export.onnx.codes import Codes
    from fewbits.graph.types import Site
    from fewbits.quantizer import Quantizer

#: Share of equal top-1 answers that is asked for where there are so many answers or more. A file that has it shows
#: fewer in a sample now and then; one is refused where that would happen to less than one good file in a thousand.
AGREEMENT, ANSWERS, CHANCE = 0.99, 64, 1e-3
#: The file may be this much further from the model with floating-point activations than the simulation is.
FURTHER = 1.25
#: Largest relative difference where nothing but rounding differs; with 8-bit products of packed weights.
RELATIVE, RELATIVE_INT8 = 1e-3, 5e-2


# -- structure -------------------------------------------------------------------------------------------------------
def check_structure(
    file: Path, layers: dict[str, Layer], activations: dict[str, tuple[Site, Quantizer]]
) -> dict[str, int]:
    """Read the file again: every planned site must have its nodes, with the integers and grids of the quantizers.

    Returns how many weights and activations were compared. Raises `FewbitsError` naming the first that differs.
    """
    import onnx

    graph = onnx.load(str(file)).graph
    tensors = {item.name: item for item in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    for name, layer in layers.items():
        node = nodes.get(name)
        if node is None:
            raise FewbitsError(f"{file.name}: nothing stands for the weight {name}")
        same = _same_blocks if node.domain == MICROSOFT else _same_integers
        if not same(node, tensors, layer):
            raise FewbitsError(f"{file.name}: the integers of {name} are not those of the checkpoint")
    for name, (_, quantizer) in activations.items():
        first, second = nodes.get(f"{name}.quantize"), nodes.get(name)
        if first is None or second is None or first.output[0] != second.input[0]:
            raise FewbitsError(f"{file.name}: no QuantizeLinear and DequantizeLinear stand at {name}")
        if not all(_same_grid(node, tensors, quantizer) for node in (first, second)):
            raise FewbitsError(f"{file.name}: the grid at {name} is not the checkpoint's")
    return {"weights": len(layers), "activations": len(activations)}


def _read(tensors: dict[str, onnx.TensorProto], name: str) -> Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(np.array(numpy_helper.to_array(tensors[name])))


def _same_integers(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], layer: Layer) -> bool:
    """Whether a DequantizeLinear reads the layer's codes, in whatever order of axes, and their grid.

    Scales that carry a batch norm are another's: what they compute is seen in the answers.
    """
    codes, zero = layer.signed()
    found = _read(tensors, node.input[0])
    axis = next((item.i for item in node.attribute if item.name == "axis"), None)
    ways = [found.movedim(axis, 0)] if axis is not None and found.dim() != 2 else [found, found.movedim(0, -1)]
    if layer.site.layout == "io_conv" and axis is None:
        ways.append(found.movedim(1, 0))
    if any(item.name == "block_size" for item in node.attribute):
        ways = [found[:, : codes.shape[1]]]
    same = any(way.numel() == codes.numel() and torch.equal(way.reshape(codes.shape), codes) for way in ways)
    folded = any(item.key == FOLDED for item in node.metadata_props)
    grids = [(2, zero)] if folded else [(1, layer.scales()[0]), (2, zero)]
    return same and all(_equal(_read(tensors, node.input[place]), wanted) for place, wanted in grids)


def _equal(held: Tensor, wanted: Tensor) -> bool:
    """Whether a grid's parameters [rows, groups] are held, one for all rows where they are the same."""
    flat = wanted.flatten()
    return bool((held.float().flatten() == (flat if flat.numel() == held.numel() else flat[:1])).all())


def _same_blocks(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], layer: Layer) -> bool:
    """Whether a MatMulNBits reads the layer's codes and scales."""
    held = blocks(layer)
    rows, columns = held.shape
    packed = _read(tensors, node.input[1])
    codes = unpack_codes(packed.flatten(), held.bits, (rows, packed.shape[1] * held.block))[:, :columns]
    wanted = layer.unsigned()[0]
    same = torch.ones(columns, dtype=torch.bool)
    if held.kept is not None:
        same[held.kept] = False
    if held.order is not None:
        wanted, same = wanted[:, held.order], same[held.order]
    scale = _read(tensors, node.input[2]).view(rows, -1)
    return torch.equal(codes[:, same], wanted[:, same]) and torch.equal(scale, layer.scales()[0].expand(scale.shape))


def _same_grid(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], quantizer: Quantizer) -> bool:
    fmt, params = quantizer.spec.format, quantizer.params
    assert isinstance(fmt, Uniform)
    scale, zero = _read(tensors, node.input[1]), _read(tensors, node.input[2])
    lowest = float((fmt.q_min - params.get("zero_point", torch.zeros(()))).reshape(()))
    return (
        zero.dtype == torch.uint8
        and bool(scale == fmt.scale_of(params).float().cpu().reshape(()))
        and float((0 if not fmt.narrow else 1) - zero.float()) == lowest
    )


# -- answers ---------------------------------------------------------------------------------------------------------
@dataclass
class Measured:
    """Sums over the batches for one runtime."""

    answers: int = 0
    agreeing: int = 0
    difference: float = 0.0
    scale: float = 0.0
    samples: int = 0
    apart: float = 0.0  # squared distance to the simulation
    runtime: float = 0.0  # squared distance of the runtime to the reference
    simulated: float = 0.0  # squared distance of the simulation to the reference
    norm: float = 0.0

    def add(self, found: list[Tensor], wanted: list[Tensor], reference: list[Tensor], classes: bool) -> None:
        """One batch: what the runtime and the simulation returned, and the model with floating-point activations."""
        if classes:
            mine, theirs = found[0].argmax(-1), wanted[0].argmax(-1)
            self.answers += theirs.numel()
            self.agreeing += int((mine == theirs).sum())
        self.samples += int(wanted[0].shape[0]) if wanted[0].dim() else 1
        for a, b, c in zip(found, wanted, reference, strict=True):
            a, b, c = a.double(), b.double(), c.double()
            finite = b.isfinite()
            a, b, c = a[finite], b[finite], c[finite]
            if b.numel():
                self.difference = max(self.difference, float((a - b).abs().max()))
                self.scale = max(self.scale, float(b.abs().max()))
            self.apart += float((a - b).square().sum())
            self.runtime += float((a - c).square().sum())
            self.simulated += float((b - c).square().sum())
            self.norm += float(b.square().sum())

    def report(self, runtime: str) -> dict[str, Any]:
        norm = max(self.norm, 1e-300)
        return {
            "runtime": runtime,
            "agreement": round(self.agreeing / self.answers, 6) if self.answers else None,
            "answers": self.answers,
            "difference": self.difference,
            "scale": self.scale,
            "samples": self.samples,
            "relative": (self.apart / norm) ** 0.5,
            "distance": (self.runtime / norm) ** 0.5,
            "simulated_distance": (self.simulated / norm) ** 0.5,
        }


def compare(
    file: Path, call: Call, attachment: Attachment, codes: Codes, batches: list[list[Tensor]], runtimes: list[str]
) -> list[dict[str, Any]]:
    """What each runtime answers beside the simulation, over all batches; `codes` sees the simulation's tensors.

    Raises `FewbitsError` where `codes` finds others than the simulation's.
    """
    wanted, reference = [], []
    with torch.no_grad():
        with attachment.observing(codes.observers()):
            for tensors in batches:
                wanted.append([value.float() for value in call.run(*tensors)])
        codes.judge()
        with attachment.without_activations():
            for tensors in batches:
                reference.append([value.float() for value in call.run(*tensors)])
    answer = Steps(file, call.inputs) if has_cache(file) else _AtOnce(file, call)
    classes = call.domain in CLASSES
    found = []
    for name in runtimes:
        run = LOADERS[name](file)
        measured = Measured()
        for tensors, mine, plain in zip(batches, wanted, reference, strict=True):
            measured.add(answer(run, tensors), mine, plain, classes)
        found.append(measured.report(name))
    return found


@dataclass
class _AtOnce:
    """A file's answers to what the model is called with, in one run."""

    file: Path
    call: Call

    def __call__(self, run: Run, tensors: list[Tensor]) -> list[Tensor]:
        """Raises `FewbitsError` for outputs of another number."""
        given = {name: value.detach().cpu().numpy() for name, value in zip(self.call.inputs, tensors, strict=True)}
        found = [torch.from_numpy(np.array(value)).float() for value in run(given)]
        if len(found) != len(self.call.outputs):
            raise FewbitsError(f"{self.file.name}: it returns {len(found)} tensors, the model {len(self.call.outputs)}")
        return found


def judge(report: dict[str, Any], *, quantized: bool, real: bool, int8_products: bool) -> None:
    """Raises `FewbitsError` where a runtime's answers are not the simulation's.

    quantized: whether activations are. real: whether the batches are data rather than made up. int8_products: whether
    the runtime rounds the activations of packed weights to 8 bits itself.
    """
    runtime, relative = report["runtime"], report["relative"]
    if not np.isfinite(relative):
        raise FewbitsError(f"{runtime} returns values that are not finite where the simulation's are")
    agreement, answers = report["agreement"], report["answers"]
    if real and agreement is not None and answers >= ANSWERS:
        from scipy.stats import binom

        if round((1 - agreement) * answers) > binom.isf(CHANCE, answers, 1 - AGREEMENT):
            raise FewbitsError(
                f"{runtime} gives the simulation's top-1 answer for {100 * agreement:.2f} % of {answers} only "
                f"({100 * AGREEMENT:.0f} % is asked for; relative difference {relative:.2g})"
            )
    if quantized:
        distance, simulated = report["distance"], report["simulated_distance"]
        allowed = FURTHER * simulated + (RELATIVE_INT8 if int8_products else RELATIVE)
        if distance > allowed:
            raise FewbitsError(
                f"{runtime} is {distance:.3g} (relative) from the model with floating-point activations, the "
                f"simulation only {simulated:.3g}"
            )
    elif relative > (RELATIVE_INT8 if int8_products else RELATIVE):
        raise FewbitsError(f"{runtime} differs from the simulation by {relative:.2g} of its outputs")
