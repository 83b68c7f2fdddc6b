"""Int8 layers that are given one tensor quantize it once, and the norm that makes the tensor does so as it norms.

Which layers those are is known from the recorded forward (`graph.types.Site.source`); whether they are given one
tensor is seen anew at every run, so a forward that goes another way than the recorded one is slower, never wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from fewbits.kernels.operands import Int8Matrix
from fewbits.packed.int8 import Int8Linear
from fewbits.packed.norms import NormForward, formula
from fewbits.quantizer import Quantizer


@dataclass(frozen=True)
class SharedInput:
    """Paths of packed layers that quantize one input once, and of the norm that does it; "" where a layer does."""

    layers: tuple[str, ...]
    norm: str = ""

    def note(self) -> str:
        """In words, of each of the layers."""
        by = f" by the norm {self.norm}" if self.norm else ""
        return f"quantized once for {len(self.layers)} layers{by}" if len(self.layers) > 1 else f"quantized{by}"


def share(root: nn.Module, sources: Mapping[str, str], busy: Collection[str] = ()) -> list[SharedInput]:
    """Let the int8 layers in `root` that have their input in common quantize it once, in place.

    Args:
        root: a model with packed layers.
        sources: path of a layer -> which tensor enters it (`Site.source`); "" where that is not known.
        busy: paths of modules whose calls something else acts on: these do not become norms that quantize.
    """
    return [made for paths in _groups(root, sources) if (made := _shared(root, sources[paths[0]], paths, busy))]


def _groups(root: nn.Module, sources: Mapping[str, str]) -> list[list[str]]:
    """The paths of int8 layers by their input and how they quantize it."""
    groups: list[list[str]] = []
    first: dict[str, list[int]] = {}  # source -> its groups
    for path, source in sources.items():
        layer = root.get_submodule(path)
        if not source or not isinstance(layer, Int8Linear) or layer.factor is not None:
            continue
        for at in first.setdefault(source, []):
            other = root.get_submodule(groups[at][0])
            if isinstance(other, Int8Linear) and _alike(layer, other):
                groups[at].append(path)
                break
        else:
            first[source].append(len(groups))
            groups.append([path])
    return groups


def _alike(a: Int8Linear, b: Int8Linear) -> bool:
    """Whether two layers make the same codes of a tensor."""
    first, second = a.activations.spec, b.activations.spec
    if (first.format, first.granularity, first.dynamic) != (second.format, second.granularity, second.dynamic):
        return False
    if (a.backend == "reference") != (b.backend == "reference"):  # these may differ in a last bit
        return False
    if first.dynamic:
        return first.range == second.range
    pairs = zip(a.activations.params.values(), b.activations.params.values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def _shared(root: nn.Module, source: str, paths: list[str], busy: Collection[str]) -> SharedInput | None:
    """Connect the layers at `paths`, whose input is `source`; None where there is nothing to gain."""
    layers = [root.get_submodule(path) for path in paths]
    first = layers[0]
    assert isinstance(first, Int8Linear)
    norm, found = None, None
    if not source.startswith("#") and source not in busy:
        norm = root.get_submodule(source)
        found = formula(norm) if _has_kernel(first, norm) else None
    if found is None and len(paths) < 2:
        return None
    shared = Shared(len(paths))
    for layer in layers:
        assert isinstance(layer, Int8Linear)
        layer.shared = Link(shared, layer.activations)
    if norm is not None and found is not None:
        norm.forward = NormForward(norm, found, first)
    shared.bound_to(_around(root, [*paths, source] if found else paths))
    return SharedInput(tuple(paths), source if found else "")


def _has_kernel(layer: Int8Linear, norm: nn.Module) -> bool:
    """Whether one kernel norms and quantizes as the layer does; in plain torch there would be nothing to gain."""
    weight = getattr(norm, "weight", None)
    return layer.grid() is not None and layer.backend != "reference" and isinstance(weight, Tensor) and weight.is_cuda


def _around(root: nn.Module, paths: list[str]) -> nn.Module:
    """The innermost module with all of `paths` inside whose forward runs."""
    common: list[str] = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    module = root.get_submodule(".".join(common))
    while type(module).forward is nn.Module.forward and common:  # a list of modules has none
        common.pop()
        module = root.get_submodule(".".join(common))
    return module


# -- at run time ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Kept:
    """A tensor's quantized rows: of which version of it, made on which stream, and how many layers still want them."""

    tensor: TensorWeakRef
    version: int
    stream: torch.cuda.Stream | None
    rows: Int8Matrix
    left: int


@dataclass(slots=True)
class _Round:
    """One call of the module around the layers. capturing: into a CUDA graph, when it began."""

    capturing: bool
    kept: _Kept | None = None


class _Threads(threading.local):
    """The calls that each thread is in, kept outside the model so that models stay copyable."""

    def __init__(self) -> None:
        self.rounds: dict[Shared, _Round] = {}


_threads = _Threads()


class Shared:
    """The quantized rows of one tensor, kept from the first layer that wants them to the last.

    They are kept within one call of the module around the layers, and one thread: nothing outlives it, also where it
    raises, and what a CUDA graph uses was made in its own capture. They are given for the very tensor that they were
    made of, unchanged since by its version, on the stream that made them. Tensors made in inference mode have no
    version; writing through `.data`, or from a kernel that torch does not know of, does not change it.
    """

    def __init__(self, members: int) -> None:
        self.members = members

    def bound_to(self, module: nn.Module) -> None:
        """Keep rows within calls of `module`."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            _threads.rounds[self] = _Round(_capturing())

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if not torch.compiler.is_compiling():
            _threads.rounds.pop(self, None)

    def open(self, x: Tensor) -> bool:
        """Whether rows of `x`, or of what is made of it here, can be kept."""
        return self._round(x) is not None

    def keep(self, x: Tensor, rows: Int8Matrix) -> None:
        """Keep the rows of `x` for all the layers."""
        if (inside := self._round(x)) is not None:
            inside.kept = self._kept(x, rows)

    def rows(self, x: Tensor, make: Callable[[Tensor], Int8Matrix]) -> Int8Matrix:
        """The rows of `x` for one of the layers: those kept, or what `make` makes of it."""
        inside = self._round(x)
        if inside is None:
            return make(x)
        kept = inside.kept
        if kept is None or not _is(x, kept.tensor(), kept.version) or kept.stream != _stream(x):
            kept = inside.kept = self._kept(x, make(x))
        kept.left -= 1
        if kept.left == 0:
            inside.kept = None
        return kept.rows

    def _kept(self, x: Tensor, rows: Int8Matrix) -> _Kept:
        return _Kept(TensorWeakRef(x), x._version, _stream(x), rows, self.members)

    def _round(self, x: Tensor) -> _Round | None:
        inside = _threads.rounds.get(self)
        if inside is None or x.is_inference() or (x.is_cuda and inside.capturing != _capturing()):
            return None
        return inside


class Link:
    """One layer's tie to what it shares, as long as its quantizer's parameters are those that it was tied with.

    They may change afterwards, when a state dict is loaded: the layer then quantizes by itself.
    """

    def __init__(self, shared: Shared, quantizer: Quantizer) -> None:
        self.shared = shared
        self.quantizer = quantizer
        names = () if quantizer.spec.dynamic else tuple(item.name for item in quantizer.spec.format.param_specs())
        self._values = {name: getattr(quantizer, name).detach().cpu().clone() for name in names}
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._same = True
        self.holds()

    def rows(self, x: Tensor, make: Callable[[Tensor], Int8Matrix]) -> Int8Matrix:
        """The quantized rows of `x`, that `make` makes."""
        return self.shared.rows(x, make) if self.holds() else make(x)

    def holds(self) -> bool:
        """Whether the parameters are unchanged; their values are looked at only where they were written to."""
        now = {name: getattr(self.quantizer, name) for name in self._values}
        if any(value.is_inference() for value in now.values()):  # writes to these leave no trace
            return False
        if any(name not in self._seen or not _is(value, *self._seen[name]) for name, value in now.items()):
            if _capturing():  # nothing can be read from the device
                return False
            self._seen = {name: (value, value._version) for name, value in now.items()}
            self._same = all(torch.equal(value.cpu(), self._values[name]) for name, value in now.items())
        return self._same


def _is(x: Tensor, other: Tensor | None, version: int) -> bool:
    """Whether a tensor is that other one, as it was at a version."""
    return x is other and x._version == version


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _stream(x: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(x.device) if x.is_cuda else None
