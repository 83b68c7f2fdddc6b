"""`fewbits.quantize`: the engine with recipes by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewbits.engine import QuantizeResult
from fewbits.engine import quantize as run_recipe
from fewbits.engine.tree import Batch
from fewbits.errors import FewbitsError
from fewbits.recipe import Recipe


def quantize(
    model: nn.Module,
    recipe: Recipe | str,
    calibration: Sequence[Batch] = (),
    *,
    bits: str | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Quantize `model` in place by a `Recipe`, or by a name such as "gptq" or "smoothquant+gptq" at `bits` ("W4A8").

    `options` are the recipe's (`fewbits papers show NAME`); `settings` those of `fewbits.engine.quantize`: example,
    seed, device, work_dir, resume, progress, budget, units, source. Raises `FewbitsError` for bad input.
    """
    if isinstance(recipe, str):
        from fewbits.papers import build_recipe

        if bits is None:
            raise FewbitsError(f'recipe {recipe!r} by name needs bits, for example bits="W4A16"')
        recipe = build_recipe(recipe, bits=bits, options=options or {})
    elif bits is not None or options:
        raise FewbitsError("bits and options belong to a recipe given by name; a Recipe object already has its own")
    return run_recipe(model, recipe, calibration, **settings)
