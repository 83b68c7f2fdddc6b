"""The model's forward as an ONNX graph with a mark at every quantized site."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbits.engine.tree import as_call
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    import onnx_ir as ir

    from fewbits.attach import Attachment
    from fewbits.graph.types import Site
    from fewbits.hub.loaded import LoadedModel

#: Domain and name of the node that stands for a quantizer; its attribute `site` is the site's name.
MARK_DOMAIN, MARK = "fewbits", "Quantized"
CLASSES = ("image", "text-classification", "text-generation", "fill-mask", "token-classification")


class Traceable(Protocol):
    """A model with tensors in and tensors out, as `traced` writes it.

    `inputs` and `outputs` are their names; `run` takes one tensor per input and returns one per output. `free` names
    the axes of an input that may have any size in the file.
    """

    model: nn.Module

    @property
    def inputs(self) -> list[str]: ...

    @property
    def outputs(self) -> list[str]: ...

    def free(self, name: str, tensor: Tensor) -> dict[int, str]: ...

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...


@dataclass
class Call:
    """How a model is called with its tensors alone: names of inputs and outputs, and what else it is given.

    `run` calls the model with one tensor per input name and returns one per output name. `outputs` is filled by the
    first run.
    """

    model: nn.Module
    domain: str
    inputs: list[str]
    spec: Any
    leaves: list[Any]  # constants in place, None where a tensor goes
    places: list[int]  # of the tensors among the leaves
    outputs: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, loaded: LoadedModel, batch: Any) -> Call:
        """Raises `FewbitsError` for a batch without tensors."""
        args, kwargs = as_call(batch)
        flat, spec = pytree.tree_flatten_with_path((args, kwargs))
        parameters = list(inspect.signature(loaded.model.forward).parameters)
        names, places = [], []
        for place, (path, leaf) in enumerate(flat):
            if isinstance(leaf, Tensor):
                names.append(_input_name(path, parameters))
                places.append(place)
        if not names:
            raise FewbitsError("the model is given no tensor; pass batches with tensors")
        leaves = [None if isinstance(leaf, Tensor) else leaf for _, leaf in flat]
        return cls(loaded.model, loaded.domain, names, spec, leaves, places)

    def tensors(self, batch: Any) -> list[Tensor]:
        """The tensors of a batch of the same structure, in the order of the inputs; floats as float32.

        Raises `FewbitsError` where it has another structure.
        """
        leaves, spec = pytree.tree_flatten(as_call(batch))
        if spec != self.spec:
            raise FewbitsError(
                f"the batches to compare on differ in structure; the exported model takes {', '.join(self.inputs)}"
            )
        found = [leaves[place] for place in self.places]
        return [value.float() if value.is_floating_point() else value for value in found]

    def free(self, name: str, tensor: Tensor) -> dict[int, str]:
        """The first axis of every input, and the second of integer ones (tokens)."""
        names = ("batch",) if tensor.is_floating_point() else ("batch", "sequence")
        return dict(enumerate(names[: tensor.dim()]))

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        found = dict(_outputs(self.model(*args, **kwargs), "logits" if self.domain in CLASSES else "output"))
        self.outputs = list(found)
        if not found:
            raise FewbitsError("the model returns no tensor")
        return tuple(found.values())


class _Flat(nn.Module):
    """The model with tensors in and tensors out."""

    def __init__(self, call: Traceable) -> None:
        super().__init__()
        self.model = call.model
        self.call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call.run(*tensors)


def traced(
    call: Traceable, attachment: Attachment | None, tensors: list[Tensor], opset: int
) -> tuple[ir.Model, list[str]]:
    """(model, axes that follow the input): the forward on `tensors` as an ONNX graph, nothing quantized in it yet.

    A node `MARK` stands where each enabled quantizer of the attachment is; without one, the float model is traced. The
    `free` axes of an input may have any size in the file where the forward does not fix them. Raises `FewbitsError`
    where torch cannot export the model.
    """

    def mark(site: Site, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{MARK_DOMAIN}::{MARK}", (x,), {"site": site.name}, dtype=x.dtype, shape=x.shape, version=1
        )

    free = [call.free(name, tensor) for name, tensor in zip(call.inputs, tensors, strict=True)]
    moving = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in free)
    marking = contextlib.nullcontext() if attachment is None else attachment.emitting(mark)
    with _quiet(), torch.no_grad(), marking:
        try:
            program = torch.export.export(_Flat(call), tuple(tensors), dynamic_shapes={"tensors": moving}, strict=False)
        except FewbitsError:
            raise
        except Exception as error:
            raise FewbitsError(f"torch cannot export this model: {_first_line(error)}") from error
    program.example_inputs = (
        None  # with them torch puts its conditions on shapes into the graph, which ONNX cannot hold
    )
    with _quiet():
        try:
            made: Any = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
        except Exception as error:
            raise FewbitsError(f"torch cannot turn this model into ONNX: {_cause(error)}") from error
    model = made.model
    return model, _name_ends(model, call, free)


def _name_ends(model: ir.Model, call: Traceable, free: list[dict[int, str]]) -> list[str]:
    """Give inputs, outputs and their free axes their names; returns these axes as INPUT[AXIS]."""
    graph = model.graph
    outputs = [f"{name}_out" if name in call.inputs else name for name in call.outputs]
    for values, names in ((graph.inputs, call.inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")
    called: dict[str, str] = {}
    axes = []
    for value, axis_names in zip(graph.inputs, free, strict=True):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                symbol = str(size.value)
                called.setdefault(symbol, axis_names.get(axis, f"{value.name}_{axis}"))
                axes.append(f"{value.name}[{called[symbol]}]")
    for value in (*graph.inputs, *graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                value.shape[axis] = called.get(str(size.value), f"{value.name}_{axis}")
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output() and value.shape is not None:
                value.shape = None if any(not isinstance(size, int) for size in value.shape) else value.shape
    return axes


def _input_name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """A name from where a tensor lies in (args, kwargs): its parameter's, with what lies inside that appended."""
    side, *inner = [getattr(key, "idx", getattr(key, "key", "")) for key in path]
    head: Any = inner[0]
    if side == 0:
        head = parameters[head] if head < len(parameters) else f"input_{head}"
    head = "input" if head == "x" else head
    return "_".join(str(part) for part in (head, *inner[1:]))


def _outputs(output: Any, alone: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a model returns with their names; objects such as caches are left out."""
    if isinstance(output, Tensor):
        yield alone, output
    elif isinstance(output, dict):
        for name, value in output.items():
            yield from _outputs(value, str(name))
    elif isinstance(output, (tuple, list)):
        for place, value in enumerate(output):
            yield from _outputs(value, alone if len(output) == 1 else f"{alone}_{place}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's progress lines and warnings about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _cause(error: BaseException) -> str:
    """The innermost reason: the exporter wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)
