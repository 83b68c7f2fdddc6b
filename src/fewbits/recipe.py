"""Scheme, Step, Recipe: what the parts and the engine share, as plain data.

A recipe is a scheme (which sites get which grid) plus an ordered list of steps plus a calibration regime. All of it
prints, saves as JSON beside the quantized model and loads from YAML.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fewbits.changes import Change
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.engine.context import GlueContext, UnitContext
    from fewbits.formats import Format, Granularity
    from fewbits.graph.types import Graph, Site, Unit
    from fewbits.ranges import Range


@dataclass(frozen=True)
class QSpec:
    """What sits at a site: a grid, how finely its parameters vary, and how they are found.

    `dynamic` fits the parameters anew on every call (per-token activations); they are then not stored.
    """

    format: Format
    granularity: Granularity
    range: Range
    dynamic: bool = False

    def at_bits(self, bits: int) -> QSpec:
        """The same quantizer at another width. Raises `FewbitsError` for a format that has only one."""
        from fewbits.formats import format_from_dict

        return replace(self, format=format_from_dict({**self.format.to_dict(), "bits": bits}))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format.to_dict(),
            "granularity": self.granularity.to_dict(),
            "range": self.range.to_dict(),
            "dynamic": self.dynamic,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QSpec:
        from fewbits.formats import format_from_dict, granularity_from_dict
        from fewbits.ranges import range_from_dict

        return cls(
            format_from_dict(data["format"]),
            granularity_from_dict(data["granularity"]),
            range_from_dict(data["range"]),
            bool(data.get("dynamic", False)),
        )


_BITS = re.compile(r"^w(\d+)(?:a(\d+))?(?:g(\d+))?$", re.IGNORECASE)


@dataclass(frozen=True)
class Bits:
    """Bit widths as papers write them: `W4A8`, `W4A16`, `W3`, `W4A16g128` (weight groups of 128 columns).

    `weight` and `activation` are None where the tensors stay floating point (16 or 32 bits, or activations not named).
    """

    weight: int | None
    activation: int | None
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Raises `FewbitsError` for anything but `W<bits>[A<bits>][g<columns>]` with bits 1..8, 16 or 32."""
        match = _BITS.match(text.strip())
        if match is None:
            raise FewbitsError(f"bits {text!r}: write W<bits>A<bits>, as in W8A8, W4A16, W3A16g128")
        weight, activation, group = (int(part) if part else None for part in match.groups())
        for name, value in (("weight", weight), ("activation", activation)):
            if value is not None and value not in (*range(1, 9), 16, 32):
                raise FewbitsError(
                    f"bits {text!r}: {name} bits must be 1 to 8, or 16 or 32 for floating point, not {value}"
                )
        if group == 0:
            raise FewbitsError(f"bits {text!r}: a group needs at least one column")
        return cls(None if weight in (16, 32) else weight, None if activation in (16, 32) else activation, group)

    def __str__(self) -> str:
        text = f"W{self.weight or 16}A{self.activation or 16}"
        return f"{text}g{self.group}" if self.group else text


@dataclass(frozen=True)
class Rule:
    """One line of a scheme: the sites it covers and what sits there (None keeps them floating point).

    A site is covered when its role is one of `roles`, its name matches the glob `sites`, it has every tag in `tags` and
    none in `without`.
    """

    spec: QSpec | None
    roles: tuple[str, ...] = ()
    sites: str = "*"
    tags: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()

    def covers(self, site: Site) -> bool:
        return (
            (not self.roles or site.role in self.roles)
            and fnmatch.fnmatchcase(site.name, self.sites)
            and self.tags <= site.tags
            and not (self.without & site.tags)
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": self.sites,
            "roles": list(self.roles),
            "tags": sorted(self.tags),
            "without": sorted(self.without),
            "spec": None if self.spec is None else self.spec.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rule:
        spec = data.get("spec")
        return cls(
            None if spec is None else QSpec.from_dict(spec),
            tuple(data.get("roles", ())),
            data.get("sites", "*"),
            frozenset(data.get("tags", ())),
            frozenset(data.get("without", ())),
        )


@dataclass(frozen=True)
class Scheme:
    """Which sites get which grid. The last rule that covers a site decides; a site without one stays floating point.

    `changes` are the user's: they modify, in order, whatever grid the rules or a step of the recipe put at a site.
    Last, `target` (a name of `fewbits.targets`) gives each grid the policies that this runtime has.
    """

    weights: tuple[Rule, ...] = ()
    activations: tuple[Rule, ...] = ()
    overrides: tuple[Rule, ...] = ()
    changes: tuple[Change, ...] = ()
    target: str = ""

    def spec(self, site: Site) -> QSpec | None:
        found: QSpec | None = None
        for rule in (*(self.weights if site.role == "weight" else self.activations), *self.overrides):
            if rule.covers(site):
                found = rule.spec
        return self.changed(site, found)

    def changed(self, site: Site, spec: QSpec | None) -> QSpec | None:
        """A grid for the site as the user's changes and the target leave it."""
        for change in self.changes:
            if spec is not None and change.covers(site):
                spec = change.apply(spec, site)
        if spec is not None and self.target:
            from fewbits.targets import load_profile

            spec = load_profile(self.target).fit(spec, site, weight_only=not self.activations)
        return spec

    def to_dict(self) -> dict[str, Any]:
        parts = ("weights", "activations", "overrides", "changes")
        lists = {name: [item.to_dict() for item in getattr(self, name)] for name in parts}
        return {**lists, "target": self.target} if self.target else lists

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        parts: dict[str, Any] = {"weights": Rule, "activations": Rule, "overrides": Rule, "changes": Change}
        lists = {name: tuple(kind.from_dict(item) for item in data.get(name, ())) for name, kind in parts.items()}
        return cls(**lists, target=str(data.get("target", "")))


class Step:
    """One thing a recipe does, to a unit at a time or once to the whole model.

    `part` names the slot the step fills when recipes are joined: `datagen`, `allocation`, `transform`, `activations`,
    `rounding`, `tuning` or `correction`. A step that `makes_data` gives the run calibration data where none is given;
    one with `gradients` differentiates the network or a unit of it.
    Steps run in order of `stage`; one with `new_sweep` starts only after every unit is through the earlier stages.
    `streams` are the prefixes whose outputs it reads (`float`: the float model; `quantized`: what is already
    quantized). With `activations` False the sweep runs with floating-point activations; None is content with either. A
    step that reads `float_weights` finds each weight as it was before it was committed. One that `fits_outputs` rounds
    the weights of a unit together by what the unit puts out. A step that `exclusive`ly fills its part refuses to share
    it.
    """

    part: ClassVar[str] = "rounding"
    scope: ClassVar[str] = "unit"
    stage: ClassVar[int] = 40
    new_sweep: ClassVar[bool] = False
    streams: ClassVar[frozenset[str]] = frozenset()
    activations: ClassVar[bool | None] = True
    float_weights: ClassVar[bool] = False
    fits_outputs: ClassVar[bool] = False
    makes_data: ClassVar[bool] = False
    gradients: ClassVar[bool] = False

    @property
    def logits(self) -> bool:
        """Whether the step needs the float network's outputs, taken before the first sweep."""
        return False

    def prepare(self, graph: Graph, units: list[Unit]) -> None:
        """Look at the whole model before the scheme is read, for tags that a scheme's rules name."""

    def apply(self, unit: UnitContext) -> None:
        """Change one unit (or, with scope "model", the model)."""
        raise NotImplementedError

    def apply_glue(self, glue: GlueContext) -> None:
        """Put quantizers at activation sites between two units, where the step is one that does so."""

    def to_dict(self) -> dict[str, Any]:
        names: list[str] = [field.name for field in fields(self)] if is_dataclass(self) else []
        return {"step": type(self).__name__, **{name: _plain(getattr(self, name)) for name in names}}

    def statistics_bytes(self, graph: Graph, unit: Unit) -> int:
        """Bytes of statistics the step holds at once for a unit, for the memory forecast."""
        return 0


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


@dataclass(frozen=True)
class Calibration:
    """How calibration data is used.

    samples: sequences or images. batch_size: per forward. seqlen: tokens per sequence (language models; capped by the
    model's context). regime: `sequential` (statistics from the quantized prefix), `parallel` (all from the float model)
    or `true_sequential` (as sequential, and linears inside a unit one after another).
    """

    samples: int = 128
    batch_size: int = 16
    seqlen: int = 2048
    regime: str = "sequential"

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise FewbitsError(f"regime {self.regime!r}: choose one of {', '.join(REGIMES)}")
        if self.samples < 1 or self.batch_size < 1 or self.seqlen < 1:
            raise FewbitsError("calibration: samples, batch_size and seqlen must be at least 1")


REGIMES = ("parallel", "sequential", "true_sequential")


@dataclass(frozen=True)
class Recipe:
    """A scheme, ordered steps and a calibration regime. `brings` are the parts that are the paper's own."""

    name: str
    bits: Bits
    scheme: Scheme
    steps: tuple[Step, ...] = ()
    calibration: Calibration = Calibration()
    brings: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict)

    def sweeps(self) -> list[list[Step]]:
        """The unit-scope steps, grouped into passes over the model."""
        groups: list[list[Step]] = []
        for step in sorted((s for s in self.steps if s.scope == "unit"), key=lambda s: s.stage):
            fresh = not groups or (step.new_sweep and step.stage != groups[-1][-1].stage)
            wanted = {other.activations for other in (groups[-1] if groups else [])} | {step.activations}
            if fresh or {True, False} <= wanted:
                groups.append([step])
            else:
                groups[-1].append(step)
        return groups

    def model_steps(self) -> list[Step]:
        """The model-scope steps, in order."""
        return sorted((s for s in self.steps if s.scope == "model"), key=lambda s: s.stage)

    @property
    def needs_data(self) -> bool:
        """Whether calibration data must be given."""
        return any(step.streams for step in self.steps) and not any(step.makes_data for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bits": str(self.bits),
            "options": {key: _plain(value) for key, value in self.options.items()},
            "brings": sorted(self.brings),
            "calibration": asdict(self.calibration),
            "steps": [step.to_dict() for step in self.steps],
            "scheme": self.scheme.to_dict(),
        }


EXCLUSIVE = ("datagen", "allocation", "activations", "weight_grid", "rounding", "tuning")


def join(first: Recipe, second: Recipe) -> Recipe:
    """`first+second`: each part comes from the recipe that brings it, from `first` where neither does.

    Transforms and corrections of both apply, `first`'s before `second`'s. Overrides of weights too; those of
    activations come with the quantizers that they change, as elsewhere they would add quantizers at places that are
    not quantized. Of a recipe that brings only data or bits, nothing else is taken. Raises `FewbitsError` if both bring
    one exclusive part.
    """
    for part in EXCLUSIVE:
        if part in first.brings and part in second.brings:
            raise FewbitsError(
                f"{first.name} and {second.name} cannot be joined: both bring their own {PART_NAMES[part]}; "
                "use one of them, or join each with a recipe that brings something else"
            )

    provides = {"datagen", "allocation"}
    neither = second if first.brings and first.brings <= provides else first

    def source(part: str) -> Recipe:
        return next((recipe for recipe in (first, second) if part in recipe.brings), neither)

    def both(part: str) -> list[Step]:
        steps = [step for step in first.steps if step.part == part]
        known = [step.to_dict() for step in steps]
        return steps + [step for step in second.steps if step.part == part and step.to_dict() not in known]

    # A rounding solver is written for its paper's grid, so the grid follows the solver unless someone brings a grid;
    # and activation quantizers follow who tunes them.
    acting = source("activations")
    if "activations" not in first.brings | second.brings:
        acting = source("tuning")
    grid = source("weight_grid")
    if "weight_grid" not in first.brings | second.brings:
        grid = source("rounding")
    steps = both("transform")
    for part in ("datagen", "allocation", "activations", "rounding", "tuning"):
        owner = acting if part == "activations" else source(part)
        steps += [step for step in owner.steps if step.part == part]
    steps += both("correction")
    calibration = source("rounding").calibration
    overrides = [
        rule
        for recipe in (first, second)
        for rule in recipe.scheme.overrides
        if recipe is acting or not rule.roles or "weight" in rule.roles
    ]
    return Recipe(
        f"{first.name}+{second.name}",
        first.bits,
        Scheme(
            grid.scheme.weights,
            acting.scheme.activations,
            tuple(overrides),
        ),
        tuple(steps),
        calibration,
        first.brings | second.brings,
        {
            **{f"{first.name}.{k}": v for k, v in first.options.items()},
            **{f"{second.name}.{k}": v for k, v in second.options.items()},
        },
    )


PART_NAMES = {
    "datagen": "calibration data",
    "allocation": "bits per layer",
    "activations": "activation quantizers",
    "weight_grid": "weight grid",
    "rounding": "rounding of the weights",
    "tuning": "tuning of the quantizer parameters",
}
