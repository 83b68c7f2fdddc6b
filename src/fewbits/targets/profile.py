"""A target's abilities: which grids it holds at weights and at activations, on which ops, and how it rounds.

    profile = load_profile("onnxruntime")
    profile.reason(site, spec)   # why the target cannot hold this grid there, or None
    profile.fit(spec, site)      # the same quantizer with the policies the target has; FewbitsError where it has none

`fewbits quantize --target NAME` plans a recipe with `fit`: symmetry, zero point, granularity and rounding of uniform
grids follow the target, so that the simulation computes what the target will. Another kind of grid (log2, twin, a
codebook) is what its paper is about; it is never exchanged, only refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.formats import Format, Granularity
    from fewbits.graph.types import Graph, Site
    from fewbits.recipe import QSpec

_FOLDER = Path(__file__).parent
_ZEROS = ("none", "middle", "integer", "unsigned")
#: A kind of grid, and the kind that it becomes where scales must be powers of two.
_UNIFORM = ("uniform", "power_of_two")


@dataclass(frozen=True)
class Grid:
    """One kind of grid that a target holds.

    format: kind of number grid ("power_of_two": uniform with such scales), or "any". variant: of an 8-bit float. bits:
    widths. zero: where zero may lie: "none" (signed codes, code 0), "middle" (unsigned, 2^(b-1)), "integer" (any code),
    "unsigned" (code 0 of unsigned codes). granularity: kinds; groups: sizes, empty for any. dynamic: whether parameters
    may, or must not, be fitted on every call; None for either. weight_only: weights of layers whose input stays
    floating point. fallback: held, but planned only where no other grid will do.
    """

    format: str = "uniform"
    variant: str = ""
    bits: tuple[int, ...] = (8,)
    zero: tuple[str, ...] = ("none",)
    granularity: tuple[str, ...] = ("tensor",)
    groups: tuple[int, ...] = ()
    dynamic: bool | None = False
    weight_only: bool = False
    fallback: bool = False

    def lacks(self, spec: QSpec) -> str | None:
        """What this grid has not of a quantizer's; None where it holds it."""
        found, fine = spec.format, spec.granularity
        if self.format == "any":
            return None
        if found.kind != self.format:
            return "free scales" if (found.kind, self.format) == _UNIFORM else f"{found.kind} grids"
        if found.bits not in self.bits:
            return f"{found.bits} bits"
        if self.variant and getattr(found, "variant", self.variant) != self.variant:
            return f"the {getattr(found, 'variant', '')} variant"
        if self.format in _UNIFORM:
            if _zero(found) not in self.zero:
                return _ZERO_WORDS[_zero(found)]
            if getattr(found, "rounding", "half_even") == "floor":
                return "rounding down"
        if fine.kind not in self.granularity:
            return f"parameters per {fine.kind}"
        if fine.kind == "group" and self.groups and getattr(fine, "size", 0) not in self.groups:
            return f"groups of {getattr(fine, 'size', 0)}"
        if self.dynamic is not None and spec.dynamic != self.dynamic:
            return "parameters fitted on every call" if spec.dynamic else "parameters fixed by calibration"
        return None

    def adapt(self, spec: QSpec, site: Site) -> QSpec | None:
        """The quantizer with the policies of this grid, or None where more than policies would have to change."""
        if self.format == "any":
            return spec
        snapped = (spec.format.kind, self.format) == _UNIFORM
        if (spec.format.kind != self.format and not snapped) or spec.format.bits not in self.bits:
            return None
        dynamic = spec.dynamic if self.dynamic is None else self.dynamic
        fine = self._granularity(spec.granularity, site)
        if fine is None:
            return None
        fmt = self._format(spec.format)
        if snapped:
            from fewbits.formats import PowerOfTwo

            policies = {key: value for key, value in fmt.to_dict().items() if key != "kind"}
            fmt = PowerOfTwo(**policies, snap="ceil")
        changed = dataclasses.replace(spec, format=fmt, granularity=fine, dynamic=dynamic)
        return changed if self.lacks(changed) is None else None

    def _format(self, fmt: Format) -> Format:
        from fewbits.formats import Uniform, affine, symmetric

        if not isinstance(fmt, Uniform):
            return fmt
        if _zero(fmt) in self.zero:
            return dataclasses.replace(fmt, rounding="half_even")
        if "integer" in self.zero:
            return affine(fmt.bits)
        if "none" in self.zero:
            return symmetric(fmt.bits)
        return Uniform(bits=fmt.bits, symmetric=True, zero_point="middle", step="positive")

    def _granularity(self, fine: Granularity, site: Site) -> Granularity | None:
        from fewbits.formats import PerChannel, PerGroup, PerTensor, PerToken

        size = getattr(fine, "size", 0)
        if fine.kind in self.granularity and (fine.kind != "group" or not self.groups or size in self.groups):
            return fine
        weight = site.role == "weight"
        if weight and "group" in self.granularity and self.groups and fine.kind == "group":
            return PerGroup(min(self.groups, key=lambda group: (abs(group - size), group)), -1)
        if weight and "channel" in self.granularity and fine.kind in ("tensor", "group"):
            return PerChannel(0)
        if "tensor" in self.granularity and not (weight and fine.kind == "group"):
            return PerTensor()
        if "token" in self.granularity and not weight:
            return PerToken(-1)
        return None


@dataclass(frozen=True)
class Profile:
    """What one target can hold and run.

    ops: weighted ops whose weight it stores in low bits ("*": all). roles: activation operands it quantizes.
    requantizes: calls whose result it brings to a grid of their own; passes: calls that leave the grid of what they
    read; other calls do not run there ("*": all do). weights, activations: grids, the preferred first. accumulator:
    bits of the sums that products of codes go to. recipe: the one that places quantizers as the target does, joined to
    any other; "" where inputs of ops will do.
    """

    name: str
    about: str
    ops: tuple[str, ...] = ("*",)
    roles: tuple[str, ...] = ("input", "lhs", "rhs")
    requantizes: tuple[str, ...] = ("*",)
    passes: tuple[str, ...] = ()
    weights: tuple[Grid, ...] = ()
    activations: tuple[Grid, ...] = ()
    accumulator: int = 32
    recipe: str = ""

    def grids(self, site: Site) -> tuple[Grid, ...]:
        return self.weights if site.role == "weight" else self.activations

    def foreign(self, graph: Graph) -> list[str]:
        """The calls of a recorded model that the target does not run, each with its module and the reason."""
        from fewbits.graph.ops import CREATION
        from fewbits.graph.requantize import find_placement

        if "*" in self.requantizes:
            return []
        known = {*self.requantizes, *self.passes, *CREATION}
        fused = find_placement(graph).fused  # done in one go with what comes before them
        return [
            f"{call.module or graph.model_class}: {self.name} runs no {call.op}"
            for call in graph.calls
            if call.op not in known and call.index not in fused and graph.flow.concerns(call)
        ]

    def reason(self, site: Site, spec: QSpec, *, weight_only: bool | None = None) -> str | None:
        """Why the target cannot hold this quantizer at this site, or None.

        weight_only: of a weight, whether the layer's input stays floating point; None where that is not known yet.
        """
        why = self._where(site)
        if why is not None:
            return why
        grids = [grid for grid in self.grids(site) if not (grid.weight_only and weight_only is False)]
        lacking = [grid.lacks(spec) for grid in grids]
        if None in lacking:
            return self._overflow(site, spec)
        wants = " or ".join(dict.fromkeys(text for text in lacking if text)) or "quantized values"
        return f"{self.name} has no {wants} there"

    def fit(self, spec: QSpec, site: Site, *, weight_only: bool | None = None) -> QSpec:
        """The quantizer as the target holds it. Raises `FewbitsError`, naming the site, where it has none.

        weight_only: see `reason`.
        """
        why = self._where(site)
        if why is None:
            grids = [grid for grid in self.grids(site) if not (grid.weight_only and weight_only is False)]
            grids.sort(key=lambda grid: (grid.fallback, grid.lacks(spec) is not None))
            fitted = next((found for grid in grids if (found := grid.adapt(spec, site)) is not None), None)
            why = self.reason(site, spec, weight_only=weight_only) if fitted is None else self._overflow(site, fitted)
            if fitted is not None and why is None:
                return fitted
        raise FewbitsError(f"{site.name}: {why}")

    def _overflow(self, site: Site, spec: QSpec) -> str | None:
        """Whether the sums of a layer may leave the accumulator, at the widest activations that the target has."""
        widest = max((bits for grid in self.activations for bits in grid.bits), default=0)
        if site.role != "weight" or not widest or site.op == "embedding" or spec.format.kind not in _UNIFORM:
            return None
        depth = site.shape[-2] if site.layout == "io" else math.prod(site.shape[1:])
        largest = max(abs(spec.format.code_min), abs(spec.format.code_max)) * (2**widest - 1)
        if depth * largest < 2 ** (self.accumulator - 1):
            return None
        return f"{depth} products of up to {largest} may overflow the {self.accumulator}-bit sums of {self.name}"

    def _where(self, site: Site) -> str | None:
        if site.role == "weight":
            if "*" not in self.ops and site.op not in self.ops:
                return f"{self.name} keeps the weights of {site.op} in floating point"
        elif site.role not in self.roles:
            return (
                f"{self.name} quantizes {', '.join(self.roles) or 'no activations'}, not the {site.role} of {site.op}"
            )
        return None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Profile:
        """Raises `FewbitsError` for an unknown key or a value of the wrong kind."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown or not {"name", "about"} <= set(data):
            raise FewbitsError(f"profile {data.get('name', '?')}: {_complaint(unknown, known)}")
        made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        for key in ("weights", "activations"):
            made[key] = tuple(_grid(item, data["name"]) for item in data.get(key, ()))
        return cls(**made)


def profile_names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@cache
def load_profile(name: str) -> Profile:
    """The profile of that name, or of a YAML file of the same form. Raises `FewbitsError` for an unknown one."""
    from fewbits.hub.requires import nearest

    file = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise FewbitsError(
            f"there is no target {name!r}{nearest(name, profile_names())} (there are: {', '.join(profile_names())})"
        )
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise FewbitsError(f"{file}: not readable as YAML ({error})") from error
    if not isinstance(data, dict):
        raise FewbitsError(f"{file}: a profile is a mapping with name, about, weights and activations")
    return Profile.from_dict(data)


def refusals(profile: Profile, specs: Sequence[tuple[Site, QSpec]], graph: Graph) -> str:
    """What the target cannot be fitted to, naming sites and the targets that can; an empty text where it can."""

    def unfit(other: Profile) -> list[str]:
        found = other.foreign(graph)
        for site, spec in specs:
            try:
                other.fit(spec, site)
            except FewbitsError as error:
                found.append(str(error))
        return found

    lines = unfit(profile)
    if not lines:
        return ""
    able = [name for name in profile_names() if name != profile.name and not unfit(load_profile(name))]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    keep = "" if profile.foreign(graph) else "keep these sites in floating point (--set exclude=GLOB) or "
    advice = f"{keep}take a target that can: {', '.join(able) or 'there is none'}"
    return f"{'; '.join(lines[:3])}{more}. {advice[0].upper()}{advice[1:]}"


def _grid(data: dict[str, Any], where: str) -> Grid:
    known = {field.name for field in dataclasses.fields(Grid)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise FewbitsError(f"profile {where}: {_complaint(unknown, known)}")
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    grid = Grid(**made)
    wrong = [zero for zero in grid.zero if zero not in _ZEROS]
    if wrong:
        raise FewbitsError(f"profile {where}: zero: {wrong[0]!r} is none of {', '.join(_ZEROS)}")
    return grid


def _complaint(unknown: list[str], known: set[str]) -> str:
    if unknown:
        return f"unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}"
    return "name and about are needed"


_ZERO_WORDS = {
    "none": "grids without a zero point",
    "middle": "zero points fixed in the middle",
    "integer": "asymmetric grids",
    "unsigned": "unsigned grids without a zero point",
    "real": "real zero points",
    "unclamped": "zero points outside the codes",
}


def _zero(fmt: Format) -> str:
    """Where a uniform grid has its zero, as `Grid.zero` says it."""
    kind = getattr(fmt, "zero_point", "none")
    if kind == "none":
        return "none" if getattr(fmt, "signed", False) else "unsigned"
    if kind in ("integer", "centre"):
        # a range widened to contain zero has its zero point among the codes
        inside = getattr(fmt, "clamp_zero_point", True) or getattr(fmt, "include_zero", True)
        return "integer" if inside else "unclamped"
    return str(kind)
