"""The bias of rounding to nearest taken out of every weight channel, in its scale and offset."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from fewbits.correction.weight_moments import moment_correction, moved_grid, with_real_offset
from fewbits.engine.context import UnitContext
from fewbits.graph.types import Site
from fewbits.recipe import Step


@dataclass(frozen=True)
class CorrectWeightMoments(Step):
    """Give every block of a weight that was rounded to nearest the mean, and with `deviation` the spread, it had.

    Codes stay; scale and offset move. Weights that a solver rounded otherwise are left alone: it weighed the shifts of
    their means against everything else the layer's output depends on.
    """

    mean: bool = True
    deviation: bool = False

    part: ClassVar[str] = "correction"
    stage: ClassVar[int] = 41  # what tunes quantizers or corrects outputs later finds the corrected weights
    activations: ClassVar[bool | None] = None
    float_weights: ClassVar[bool] = True

    def apply(self, unit: UnitContext) -> None:
        solved: list[str] = []
        for site in unit.weights():
            reason = self._correct(unit, site)
            if reason == "solved":
                solved.append(site.name)
            elif reason:
                unit.note(f"{site.name}: its mean is not corrected, {reason}")
        if solved:
            unit.note("weights that a solver rounded keep their means; only those of nearest rounding are corrected")

    def _correct(self, unit: UnitContext, site: Site) -> str:
        """Correct one weight; why not, where it cannot be."""
        attachment = unit.attachment
        quantizer = unit.quantizer(site)
        if quantizer is None or site.name not in attachment.codes:
            return "it has no committed codes"
        spec = quantizer.spec
        fmt = with_real_offset(spec.format)
        if fmt is None:
            return f"a {spec.format.kind} grid has no offset to take it"
        weight, codes = unit.float_weight(site), attachment.codes[site.name].to(unit.device)
        if site.name in attachment.group_index or attachment.parts.get(site.name):
            return "solved"
        if not torch.equal(quantizer.encode(weight), codes):
            return "solved"
        factor, shift = moment_correction(
            weight, quantizer.decode(codes), spec.granularity, mean=self.mean, deviation=self.deviation
        )
        params = moved_grid(quantizer.params, factor, shift)
        unit.quantize_weight(site, codes, params, spec=dataclasses.replace(spec, format=fmt))
        return ""
