"""Plain PyTorch: the simulated model as one program of `torch.export`, weights packed, in `model.pt2`.

    model = torch.export.load("model.pt2").module()
    model(**inputs)

Nothing but torch is needed to run it: neither fewbits nor the library the model came from. Whatever the simulation
does is in the graph (quantizers, factors, replaced ops, parts of weights); weights are decoded in it from bit planes:
bit k of eight codes in a byte. The archive is JSON and raw tensors. torch would add the example inputs as a pickle;
they are left out, and the archive is searched for pickles before it counts as written.
"""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fewbits.attach import Attachment
from fewbits.engine.tree import as_call, tensors
from fewbits.errors import FewbitsError
from fewbits.export.base import Subject, Target
from fewbits.export.comparison import answers, compared, insist
from fewbits.formats.packing import pack_codes
from fewbits.graph.operands import read
from fewbits.graph.record import without_cache
from fewbits.outliers.parts import Part, Sparse

FILE = "model.pt2"
#: Of the largest answer; the arithmetic is the simulation's own.
TOLERANCE = 1e-4


class Export(Target):
    """`dynamic`: whether the number of samples (and of tokens) may differ from the example's."""

    name = "torch"
    about = "a program of torch.export for plain PyTorch"
    profile_name = "torch"
    holds = frozenset({"factors", "replacements", "columns", "sparse", "order"})

    def write(self, subject: Subject, folder: Path, *, dynamic: bool | str = True) -> dict[str, Any]:  # type: ignore[override]
        wanted = str(dynamic).lower() in ("1", "true", "yes", "on")
        example = subject.loaded.example_batch(2) if not subject.batches else subject.batches[0]
        program, moving = _program(subject, example, wanted)
        _prune(program)
        program.example_inputs = None
        for node in program.graph.nodes:  # traces of this machine's stack, several times the size of the graph
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)
        file = folder / FILE
        torch.export.save(program, file)
        _check_plain(file)
        return {
            "file": FILE,
            "operations": sum(node.op == "call_function" for node in program.graph.nodes),
            "dynamic": moving,
            "load": f'torch.export.load("{FILE}").module()',
        }

    def check(self, subject: Subject, folder: Path) -> list[dict[str, Any]]:
        program = torch.export.load(folder / FILE)
        batches = subject.inputs()
        if not program.range_constraints:  # no axis may vary
            batches = [batch for batch in batches if _sizes(batch) == _sizes(batches[0])]
        with without_cache(subject.loaded.model):
            expected = answers(subject.loaded.model, batches)
        entry = compared(f"torch {torch.__version__}", expected, answers(program.module(), batches))
        insist(entry, TOLERANCE)
        return [entry]


def _sizes(batch: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in tensors(as_call(batch))]


# -- building --------------------------------------------------------------------------------------------------------
class _Answering(nn.Module):
    """The model with outputs that every torch knows: tensors in lists, tuples and dicts."""

    def __init__(self, model: nn.Module, attachment: Attachment) -> None:
        super().__init__()
        self.model = model
        # in the hierarchy, so that their tensors are the program's own
        self.quantizers = attachment.quantizers
        self.packed = nn.ModuleDict()

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Give the forward the names of these arguments, as torch.export cannot vary shapes in `**kwargs`."""
        own = list(inspect.signature(self.model.forward).parameters)
        names = [*own[: len(args)], *kwargs]

        def forward(*given: Any, **named: Any) -> Any:
            with _without_regions():
                return _plain(self.model(*given, **named))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward
        return names


class _Nothing(ContextDecorator, nullcontext):
    """A context that changes nothing."""


def _without_regions() -> Any:
    """A context in which `torch.no_grad` does nothing: everything runs without gradients already.

    torch.export makes a region of every such block, in time that grows with their square.
    """
    return patch.object(torch, "no_grad", _Nothing)


def _plain(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "keys"):
        return {str(key): _plain(output[key]) for key in output if _holds_tensors(output[key])}
    if isinstance(output, (tuple, list)):
        return [_plain(item) for item in output if _holds_tensors(item)]
    raise FewbitsError(f"the model returns {type(output).__name__}, which a program of torch.export cannot")


def _holds_tensors(value: Any) -> bool:
    return next(tensors(dict(value) if hasattr(value, "keys") else value), None) is not None


class _BitPlanes(nn.Module):
    """Codes [out, columns]: bit k of eight codes in each byte of plane k. 8 bits and more are kept as they are."""

    planes: Tensor

    def __init__(self, codes: Tensor, bits: int, lowest: int) -> None:
        super().__init__()
        self.shape, self.bits, self.lowest, self.dtype = tuple(codes.shape), bits, lowest, codes.dtype
        if bits >= 8:
            planes = codes
        else:
            digits = codes.to(torch.int32) - lowest
            planes = torch.stack([pack_codes((digits >> k) & 1, 1) for k in range(bits)])
        self.register_buffer("planes", planes.clone())

    def forward(self) -> Tensor:
        if self.bits >= 8:
            return self.planes
        places = torch.arange(8, dtype=torch.uint8, device=self.planes.device)
        digits = (self.planes.unsqueeze(-1) >> places) & 1
        weights = torch.arange(self.bits, dtype=torch.uint8, device=self.planes.device).view(-1, 1)
        count = self.shape[0] * self.shape[1]
        codes = (digits.flatten(1)[:, :count] << weights).sum(0).view(self.shape)
        return (codes + self.lowest).to(self.dtype)


class _Codes(dict[str, Tensor]):
    """Codes by site, unpacked when they are asked for."""

    def __init__(self, modules: dict[str, _BitPlanes]) -> None:
        super().__init__(dict.fromkeys(modules))  # type: ignore[arg-type]
        self.modules = modules
        self.unpacked: dict[str, Tensor] = {}  # of one trace

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.unpacked:
            self.unpacked[site] = self.modules[site]()
        return self.unpacked[site]


@dataclass(frozen=True)
class _Placed(Part):
    """A sparse part with the row of each entry spelled out, which needs no shape that depends on values."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    def apply(self, dense: Tensor) -> Tensor:
        return dense.index_put((self.rows, self.columns), self.values.to(dense.dtype), accumulate=True)

    def storage_bits(self) -> int:
        raise NotImplementedError

    def check(self, shape: Any, where: str) -> None:
        raise NotImplementedError


def _placed(part: Part) -> Part:
    if not isinstance(part, Sparse):
        return part
    counts = part.rows.long().diff()
    return _Placed(torch.repeat_interleave(torch.arange(len(counts)), counts), part.columns.long(), part.values)


@contextmanager
def _from_codes(attachment: Attachment, wrapped: _Answering) -> Iterator[_Codes]:
    """Let every quantized weight be decoded in the forward, from bit planes, while the context lasts."""
    weights = [(site, held) for site, held in attachment.items() if site.role == "weight"]
    modules: dict[str, _BitPlanes] = {}
    for site, quantizer in weights:
        codes = attachment.codes.get(site.name)
        if codes is None and site.view is not None:
            codes = quantizer.encode(read(attachment.model, site).flatten(1))
        if codes is not None:
            fmt = quantizer.spec.format
            modules[site.name] = _BitPlanes(codes, fmt.code_bits, fmt.code_min)
            wrapped.packed[site.name.replace(".", "/")] = modules[site.name]
    codes_before, parts_before, frozen = attachment.codes, attachment.parts, set(attachment.frozen)
    attachment.codes = packed = _Codes(modules)
    attachment.parts = {name: tuple(map(_placed, parts)) for name, parts in parts_before.items()}
    try:
        for name in frozen:
            attachment.thaw(name)
        yield packed
    finally:
        attachment.codes, attachment.parts = codes_before, parts_before
        for name in frozen:
            attachment.freeze(name)


def _program(subject: Subject, example: Any, dynamic: bool) -> tuple[torch.export.ExportedProgram, bool]:
    """The program, and whether its first axes (and those of tokens) may vary."""
    model = subject.loaded.model
    args, kwargs = as_call(example)
    wrapped = _Answering(model, subject.attachment).eval()
    names = wrapped.takes(args, kwargs)
    axes = dict(zip(names, map(_axes, (*args, *kwargs.values())), strict=True))
    with _from_codes(subject.attachment, wrapped) as packed, without_cache(model), torch.no_grad():
        for moving in (True, False) if dynamic else (False,):
            packed.unpacked.clear()
            shapes = axes if moving else None
            try:
                return torch.export.export(wrapped, args, kwargs, dynamic_shapes=shapes, strict=False), moving
            except Exception as error:
                if moving:
                    continue
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise FewbitsError(f"torch.export cannot trace {subject.loaded.ref}: {lines[0][:300]}") from error
    raise AssertionError


def _axes(tree: Any) -> Any:
    """Which axes of the tensors in an argument may vary: samples, and tokens where integers have two axes."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        count = 2 if leaf.dim() == 2 and not leaf.is_floating_point() else 1
        return dict.fromkeys(range(min(count, leaf.dim())), torch.export.Dim.AUTO)

    return pytree.tree_map(of, tree)


def _prune(program: torch.export.ExportedProgram) -> None:
    """Take out the parameters and constants that nothing reads: the float weights behind the packed ones."""
    signature = program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    held = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    dead = [spec for spec in signature.input_specs if spec.kind in held and not nodes[spec.arg.name].users]
    for spec in dead:
        program.graph.erase_node(nodes[spec.arg.name])
        for table in (program.state_dict, program.constants):
            table.pop(spec.target, None)
    signature.input_specs = [spec for spec in signature.input_specs if spec not in dead]
    program.graph_module.recompile()


def _check_plain(file: Path) -> None:
    """Raises `FewbitsError` where an archive holds a pickle."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name, pickled = entry.filename, entry.filename.endswith((".pt", ".pkl")) and entry.file_size > 0
            if name.endswith("_config.json"):
                held = json.loads(archive.read(name)).get("config", {})
                pickled = any(described.get("use_pickle") for described in held.values())
            if pickled:
                raise FewbitsError(f"torch.export would pickle {name.rpartition('/')[2]}; the model is not written")
