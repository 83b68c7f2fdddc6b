"""A recipe as a target can run it."""

from __future__ import annotations

import dataclasses

from fewbits.recipe import Recipe
from fewbits.targets import load_profile


def plan(recipe: Recipe, target: str) -> Recipe:
    """The recipe with grids of the target's policies; what cannot be fitted is refused when the sites are known.

    Where the target has no parameters that are fitted on every call, activations are calibrated instead, which needs
    data. Raises `FewbitsError` for an unknown target.
    """
    profile = load_profile(target)
    planned = dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, target=target))
    return planned if any(grid.dynamic is not False for grid in profile.activations) else calibrated(planned)


def calibrated(recipe: Recipe) -> Recipe:
    """The recipe with a step that also finds fixed parameters of activations, where its own finds none."""
    from fewbits.steps.calibrate import AttachDynamic, CalibrateActivations

    steps = tuple(CalibrateActivations() if isinstance(step, AttachDynamic) else step for step in recipe.steps)
    return dataclasses.replace(recipe, steps=steps)
