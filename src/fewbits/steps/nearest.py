"""Round every weight to the nearest level of its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewbits.engine.context import UnitContext
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.recipe import Step


def round_nearest(unit: UnitContext, site: Site) -> None:
    """Fit the scheme's range to the weight as it is now and commit the nearest codes."""
    spec = unit.spec(site)
    assert spec is not None
    quantizer = Quantizer(spec, site.name)
    weight = unit.weight(site)
    quantizer.calibrate(weight)
    unit.quantize_weight(site, quantizer.encode(weight), quantizer.params)


@dataclass(frozen=True)
class RoundNearest(Step):
    """Round-to-nearest on the range the scheme fits to each weight."""

    part: ClassVar[str] = "rounding"
    stage: ClassVar[int] = 40

    def apply(self, unit: UnitContext) -> None:
        for site in unit.weights():
            round_nearest(unit, site)
