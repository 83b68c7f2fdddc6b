"""What could be done about a site: changes to try, from free ones to costly ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.changes import Change
from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, PerTensor, Uniform, storage_bits
from fewbits.graph.types import Site
from fewbits.ranges import AbsMax, MinMax
from fewbits.recipe import QSpec

#: Weights with fewer columns are not worth groups.
_GROUP = 64


@dataclass(frozen=True)
class Candidate:
    """A change to try. `words` as `fewbits.changes` writes them."""

    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return "+".join(self.words)

    @property
    def says(self) -> str:
        """The change as a sentence."""
        return " and ".join(_says(word) for word in self.words)

    def spec(self, spec: QSpec, site: Site) -> QSpec | None:
        """The changed grid; raises `FewbitsError` where the change does not fit."""
        return Change(site.name, self.words).apply(spec, site)


def candidates(site: Site, spec: QSpec) -> list[Candidate]:
    """Changes that fit a site on this grid, cheapest first: same bits, then 8 bits, then floating point."""
    weight = site.role == "weight"
    words: list[str] = []
    plain_range = isinstance(spec.range, (MinMax, AbsMax))
    if "post_softmax" in site.tags and isinstance(spec.format, Uniform):
        words += ["logsqrt2", "log2"]
    if plain_range and not spec.dynamic:
        words.append("mse")
        if not weight:
            words.append("percentile99.9")
    if weight and isinstance(spec.granularity, PerTensor):
        words.append("channel")
    if weight and isinstance(spec.granularity, (PerTensor, PerChannel)) and _columns(site) >= 2 * _GROUP:
        words.append(f"group{_GROUP}")
    if not weight and not spec.dynamic and isinstance(spec.granularity, PerTensor) and not site.op.startswith("conv"):
        words.append("token")
    if spec.format.bits < 8:
        words.append("8")
    words.append("float")
    return [Candidate((word,)) for word in words if _fits(word, spec, site)]


def _columns(site: Site) -> int:
    shape = site.shape
    return shape[-2] if site.layout in ("io", "expert_io") else math.prod(shape[1:])


def _fits(word: str, spec: QSpec, site: Site) -> bool:
    try:
        Change(site.name, (word,)).apply(spec, site)
    except FewbitsError:
        return False
    return True


def extra_bits(before: QSpec, after: QSpec | None, shape: tuple[int, ...], float_bits: int) -> int:
    """Stored bits that a weight of `shape` (out, columns) costs more on another grid, or in floating point."""
    held = storage_bits(before.format, before.granularity, shape)
    if after is None:
        return math.prod(shape) * float_bits - held
    return storage_bits(after.format, after.granularity, shape) - held


def _says(word: str) -> str:
    if word.isdecimal():
        return f"use {word} bits"
    if word.startswith("group"):
        return f"give every {word.removeprefix('group')} columns a scale of their own"
    if word.startswith("percentile"):
        return f"clip the range at the {word.removeprefix('percentile')}th percentile"
    return {
        "float": "keep it in floating point",
        "uniform": "use a uniform grid",
        "symmetric": "use a symmetric grid",
        "log2": "use a base-2 log grid",
        "logsqrt2": "use a log grid with two steps an octave",
        "tensor": "use one range for the tensor",
        "channel": "give every output channel a scale of its own",
        "token": "fit the range token by token as it runs",
        "minmax": "use the whole range",
        "mse": "choose the range with the least squared error",
        "dynamic": "fit the range as it runs",
        "static": "fix the range from calibration data",
    }[word]
