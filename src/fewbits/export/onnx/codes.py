"""Codes at every activation quantizer: what onnxruntime makes of the inputs that the simulation's quantizers get.

End-to-end answers cannot tell a wrong grid from a code that fell to the other side of a tie and grew on its way through
the model. Here every quantizer of the file meets the simulation's own tensors, so that nothing adds up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Uniform

if TYPE_CHECKING:
    import onnx

    from fewbits.quantizer import Quantizer

#: Codes may differ by one, at values that lie between two of them up to this part of a step (or of themselves, where
#: they are larger), and at no more than this share of a site's values; one value always may.
APART, TIE, SHARE = 1, 1e-5, 1e-3


@dataclass
class _Counts:
    """Codes of one site so far: how many were compared, how many differ (astray: at no tie), by how much at most."""

    values: int = 0
    different: int = 0
    astray: int = 0
    apart: int = 0

    @property
    def equal(self) -> float:
        """Share of equal codes."""
        return 1 - self.different / max(self.values, 1)

    @property
    def wrong(self) -> bool:
        """Whether rounding alone does not explain the differences."""
        return self.apart > APART or self.astray > 0 or self.different > max(1, SHARE * self.values)


class Codes:
    """Compares while the simulation runs under `Attachment.observing(codes.observers())`.

    quantizers: of the file's activation sites, by name; each must have its QuantizeLinear in the file (see
    `check.check_structure`). Where a site is passed several times in a forward, its nodes take turns.
    """

    def __init__(self, file: Path, quantizers: dict[str, Quantizer]) -> None:
        self.quantizers = quantizers
        self.counts = {name: _Counts() for name in quantizers}
        self._runs = _runs(file, set(quantizers))
        self._calls = dict.fromkeys(quantizers, 0)

    def observers(self) -> dict[str, list[Callable[[Tensor], None]]]:
        """One for each site, given the tensor that its quantizer is about to get."""

        def observer(name: str) -> Callable[[Tensor], None]:
            return lambda x: self._compare(name, x)

        return {name: [observer(name)] for name in self.quantizers}

    def _compare(self, name: str, x: Tensor) -> None:
        quantizer, counts = self.quantizers[name], self.counts[name]
        fmt = quantizer.spec.format
        assert isinstance(fmt, Uniform)
        x = x.detach().float()
        runs = self._runs[name]
        run = runs[self._calls[name] % len(runs)]
        self._calls[name] += 1
        shift = 2 ** (fmt.bits - 1) if fmt.signed else 0  # codes of signed grids are stored as unsigned ones
        gap = (quantizer.encode(x).cpu().int() + shift - run(x.cpu()).int()).abs()
        counts.values += gap.numel()
        differ = gap > 0
        if differ.any():
            steps = x[differ.to(x.device)].double() / fmt.scale_of(quantizer.params).double().reshape(())
            tie = (steps - steps.floor() - 0.5).abs() <= TIE * steps.abs().clamp_min(1)
            counts.different += int(differ.sum())
            counts.astray += int((~tie).sum())
            counts.apart = max(counts.apart, int(gap.max()))

    def judge(self) -> None:
        """Raises `FewbitsError`, naming the worst site, where codes differ by more than one, at no tie, or often."""
        for name, counts in sorted(self.counts.items(), key=lambda item: (-item[1].apart, item[1].equal)):
            if counts.wrong:
                fmt = self.quantizers[name].spec.format
                other = isinstance(fmt, Uniform) and fmt.rounding != "half_even"
                advice = (
                    "; ONNX rounds ties to even: quantize with --target onnxruntime, which does too" if other else ""
                )
                raise FewbitsError(
                    f"onnxruntime makes other codes than the simulation of the same tensor at {name}: "
                    f"{counts.different} of {counts.values} differ, by {counts.apart} at most, {counts.astray} of them "
                    f"at values that do not lie between two codes (by {APART} at {100 * SHARE:g} % is allowed, at "
                    f"values that do){advice}"
                )

    def report(self) -> dict[str, Any]:
        """JSON-able: values (codes compared), different, apart (largest difference of codes), equal (smallest share of
        equal codes at a site), worst (that site; None where all are equal), sites (share of equal codes by name)."""
        shares = {name: counts.equal for name, counts in self.counts.items()}
        worst = min(shares, key=lambda name: shares[name], default=None)
        lowest = 1.0 if worst is None else shares[worst]
        return {
            "values": sum(counts.values for counts in self.counts.values()),
            "different": sum(counts.different for counts in self.counts.values()),
            "apart": max((counts.apart for counts in self.counts.values()), default=0),
            "equal": lowest,
            "worst": worst if lowest < 1 else None,
            "sites": shares,
        }


# -- the file's quantizers alone -------------------------------------------------------------------------------------
def _runs(file: Path, sites: set[str]) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """By site: what each of its QuantizeLinear nodes, with a Clip of its own before it, makes of a float32 tensor."""
    import onnx

    model = onnx.load(str(file))
    producers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {name: [] for name in sites}
    for node in model.graph.node:
        place = node.name.removesuffix(".quantize")
        site = place if place in sites else place.rpartition("@")[0]
        if node.op_type != "QuantizeLinear" or place == node.name or site not in sites:
            continue
        before = producers.get(node.input[0])
        clipped = before is not None and before.name == f"{place}.clip"
        found[site].append(_alone(model, [before, node] if clipped else [node]))
    return found


def _alone(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> Callable[[Tensor], Tensor]:
    """A chain of nodes as a function, run by onnxruntime."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    read = {name for node in nodes for name in node.input[1:]}
    source, made = nodes[0].input[0], nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "quantizer",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(made, TensorProto.UINT8, None)],
        [item for item in model.graph.initializer if item.name in read],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # a session for every quantizer: no pool of threads for each
    options.log_severity_level = 3
    small = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = ort.InferenceSession(small.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run([made], {source: x.contiguous().numpy()})[0])
