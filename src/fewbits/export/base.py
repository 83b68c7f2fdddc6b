"""What every export target has in common: a quantized model in, a folder out, and a comparison in the real runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fewbits.errors import FewbitsError
from fewbits.targets import Profile, load_profile

if TYPE_CHECKING:
    from fewbits.attach import Attachment
    from fewbits.export.layers import Layer
    from fewbits.hub.loaded import LoadedModel


@dataclass(frozen=True)
class Obstacle:
    """One site that a target cannot represent, and why."""

    site: str
    reason: str

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}"


@dataclass
class Subject:
    """What is exported: a loaded checkpoint of fewbits, its quantizers attached.

    description: its `fewbits.json`. batches: inputs to compare on, in the model's own form (dicts of keyword arguments
    or tensors); where none are given, `Target.check` uses `loaded.example_batch`.
    """

    loaded: LoadedModel
    attachment: Attachment
    description: dict[str, Any] = field(default_factory=dict)
    batches: list[Any] = field(default_factory=list)

    @cached_property
    def layers(self) -> list[Layer]:
        """The quantized weights, in the order of the forward."""
        from fewbits.export.layers import layers_of

        return layers_of(self.attachment)

    def inputs(self) -> list[Any]:
        """The batches to compare on."""
        return self.batches or [self.loaded.example_batch(2)]


class Target(ABC):
    """One format that quantized models leave fewbits in.

    name: as `--to` takes it. profile: of `fewbits.targets`. packages: what must be installed, by import name. holds:
    what it can express besides grids, of "factors" (run-time channel factors), "replacements" (other ops in place of
    recorded ones), "columns", "sparse" (parts of weights) and "order" (columns whose groups are not contiguous).
    kinds: libraries whose models it takes; empty for any.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    profile_name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    holds: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[tuple[str, ...]] = ()

    @property
    def profile(self) -> Profile:
        return load_profile(self.profile_name)

    def obstacles(self, subject: Subject) -> list[Obstacle]:
        """Every site that the target cannot represent; empty where it can hold the whole model.

        Targets with further limits (one scheme for all layers, say) add to these.
        """
        attachment, profile = subject.attachment, self.profile
        found: list[Obstacle] = []
        if self.kinds and subject.loaded.kind not in self.kinds:
            return [Obstacle("the model", f"{self.name} holds models of {', '.join(self.kinds)} only")]
        inputs = {(site.key, site.slot) for site, _ in attachment.items() if site.role != "weight"}
        for site, quantizer in attachment.items():
            alone = None
            if site.role == "weight":
                alone = not any(key == site.key and slot != "output" for key, slot in inputs)
            why = profile.reason(site, quantizer.spec, weight_only=alone)
            if why is not None:
                found.append(Obstacle(site.name, why))
        for site_name, parts in attachment.parts.items():
            found += [
                Obstacle(site_name, f"{self.name} holds no {_PARTS[part.kind]}")
                for part in parts
                if part.kind not in self.holds
            ]
        if "order" not in self.holds:
            found += [
                Obstacle(
                    name, f"{self.name} needs the columns of a group side by side (set static_groups or no act_order)"
                )
                for name in attachment.group_index
            ]
        if "factors" not in self.holds:
            found += [
                Obstacle(name, f"{self.name} has no factors per channel at run time") for name in attachment.factors
            ]
        if "replacements" not in self.holds:
            found += [
                Obstacle(".".join(map(str, key)), f"{self.name} runs the model's own ops; here {op} runs instead")
                for key, op in attachment.replacements.items()
            ]
        return found

    @abstractmethod
    def write(self, subject: Subject, folder: Path, **options: Any) -> dict[str, Any]:
        """Fill the empty `folder`; returns JSON-able facts about what was written (formats, counts; `notes`, in
        words, which the command prints too).

        `options` are the target's own keyword arguments. Raises `FewbitsError` for a value that cannot be.
        """

    @abstractmethod
    def check(self, subject: Subject, folder: Path) -> list[dict[str, Any]]:
        """Load `folder` in the runtimes that will run it and compare with the simulation on `subject.inputs()`.

        Returns JSON-able, for each of them: runtime, agreement (share of equal top-1 answers, where that makes sense),
        difference (largest absolute difference of outputs), scale (largest absolute output), samples. Raises
        `FewbitsError` where they differ more than the target allows, saying by how much.
        """


_PARTS = {"columns": "full-precision columns", "sparse": "sparse outliers"}


def refuse(target: Target, obstacles: list[Obstacle], others: list[str]) -> FewbitsError:
    """The error that names what is in the way and which targets would do."""
    shown = "; ".join(str(item) for item in obstacles[:3])
    more = f"; and {len(obstacles) - 3} more" if len(obstacles) > 3 else ""
    able = f"these targets can hold it: {', '.join(others)}" if others else "no target of fewbits can hold it whole"
    return FewbitsError(f"{target.name} cannot hold this model: {shown}{more}. {able[0].upper()}{able[1:]}")
