"""Round every weight to the nearest level of its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewbits.engine.context import UnitContext
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.recipe import Step


def fitted(unit: UnitContext, site: Site) -> Quantizer:
    """The scheme's quantizer for a weight, with parameters.

    They are those that a step found at the layer's output, where the scheme says so; else the range is fitted to the
    weight as it is now.
    """
    spec = unit.spec(site)
    assert spec is not None
    held = unit.quantizer(site)
    if spec.range.at_output and held is not None and held.spec == spec and held.ready:
        return held
    quantizer = Quantizer(spec, site.name)
    quantizer.calibrate(unit.weight(site))
    return quantizer


def round_nearest(unit: UnitContext, site: Site) -> None:
    """Commit a weight's nearest codes on the grid of `fitted`."""
    quantizer = fitted(unit, site)
    unit.quantize_weight(site, quantizer.encode(unit.weight(site)), quantizer.params)


@dataclass(frozen=True)
class RoundNearest(Step):
    """Round-to-nearest on the range the scheme fits to each weight."""

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40

    def apply(self, unit: UnitContext) -> None:
        for site in unit.weights():
            round_nearest(unit, site)
