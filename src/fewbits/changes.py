"""Changes at named sites, whatever recipe runs: `blocks.0.mlp.fc2.input:8,blocks.*.attn.matmul_1.lhs:log2`.

A change is a glob of site names and, behind a colon, words joined by `+`, applied in order to the grid that the recipe
puts there:

| word | meaning |
| --- | --- |
| `float` | keep the site in floating point |
| `2` .. `16` | so many bits |
| `uniform`, `symmetric`, `log2`, `logsqrt2` | another number grid of the same bits |
| `tensor`, `channel`, `group32`, `token` | how finely the parameters vary (`channel`, `group`: weights; `token`: activations) |
| `minmax`, `mse`, `percentile99.9` | how the range is found |
| `dynamic`, `static` | activations: fitted on every call, or once from calibration data |
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.graph.types import Site
    from fewbits.recipe import QSpec

_WORD = re.compile(
    r"float|uniform|symmetric|log2|logsqrt2|tensor|channel|group[1-9]\d*|token|minmax|mse|dynamic|static"
    r"|percentile\d+(\.\d+)?|[1-9]\d?"
)
_WORDS = (
    "float, a number of bits, uniform, symmetric, log2, logsqrt2, tensor, channel, group32, token, minmax, mse, "
    "percentile99.9, dynamic, static"
)


@dataclass(frozen=True)
class Change:
    """What differs from the recipe at the quantized sites that the glob `sites` names."""

    sites: str
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.sites or not self.words:
            raise FewbitsError(f"change {str(self).strip(':')!r}: write GLOB:WORD, as in blocks.0.mlp.*:8")
        for word in self.words:
            if not _WORD.fullmatch(word):
                raise FewbitsError(f"change {str(self)!r}: {word!r} is none of {_WORDS}")
        if "float" in self.words and len(self.words) > 1:
            raise FewbitsError(f"change {str(self)!r}: a site in floating point has no grid to change further")

    def __str__(self) -> str:
        return f"{self.sites}:{'+'.join(self.words)}"

    def covers(self, site: Site) -> bool:
        return fnmatch.fnmatchcase(site.name, self.sites)

    def apply(self, spec: QSpec, site: Site) -> QSpec | None:
        """The changed grid at a site, None for floating point.

        Raises `FewbitsError`, naming the site, where a word does not fit the site or its format.
        """
        if self.words == ("float",):
            return None
        for word in self.words:
            try:
                spec = _apply(word, spec, site.role == "weight")
            except FewbitsError as error:
                raise FewbitsError(f"{site.name}: cannot become {word!r}: {error}") from error
        return spec

    def to_dict(self) -> dict[str, Any]:
        return {"sites": self.sites, "words": list(self.words)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Change:
        return cls(str(data["sites"]), tuple(map(str, data["words"])))


def parse_changes(text: str) -> tuple[Change, ...]:
    """The changes of a text like the one in the module's first line. Raises `FewbitsError` for anything else."""
    changes = []
    for item in (part.strip() for part in text.split(",")):
        if item:
            glob, _, words = item.rpartition(":")
            changes.append(Change(glob.strip(), tuple(word.strip() for word in words.split("+") if word.strip())))
    return tuple(changes)


def _apply(word: str, spec: QSpec, weight: bool) -> QSpec:
    from fewbits import formats, ranges

    bits = spec.format.bits
    if word.isdecimal():
        return spec.at_bits(int(word))
    if word in ("uniform", "symmetric"):
        return dataclasses.replace(spec, format=formats.affine(bits) if word == "uniform" else formats.symmetric(bits))
    if word in ("log2", "logsqrt2"):
        log = formats.Log2 if word == "log2" else formats.LogSqrt2
        if weight:
            raise FewbitsError("a log grid holds no negative values; it is for activations such as attention maps")
        return dataclasses.replace(spec, format=log(bits, zero_code=True))
    if word == "tensor":
        return dataclasses.replace(spec, granularity=formats.PerTensor())
    if word == "channel" or word.startswith("group"):
        if not weight:
            raise FewbitsError("it is for weights; activations can be per tensor or per token")
        size = word.removeprefix("group")
        fine = formats.PerChannel(0) if word == "channel" else formats.PerGroup(int(size), -1)
        return dataclasses.replace(spec, granularity=fine)
    if word in ("token", "dynamic", "static"):
        if weight:
            raise FewbitsError("it is for activations; a weight never changes")
        if word == "token":
            return dataclasses.replace(spec, granularity=formats.PerToken(-1), dynamic=True)
        return dataclasses.replace(spec, dynamic=word == "dynamic")
    if word == "minmax":
        return dataclasses.replace(spec, range=ranges.MinMax())
    if word == "mse":
        return dataclasses.replace(spec, range=ranges.ShrinkSearch(p=2.0))
    return dataclasses.replace(spec, range=ranges.Percentile(round(float(word.removeprefix("percentile")) / 100, 12)))
