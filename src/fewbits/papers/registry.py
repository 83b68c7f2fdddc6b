"""From names to recipes. A paper is a file of this folder with a function `recipe(bits, *, option=...) -> Recipe`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.recipe import Recipe

_NOT_PAPERS = {"__init__", "registry", "catalogue", "common", "targeted"}
#: Baselines that no paper is credited for.
BASELINES = {"rtn"}
#: Options every recipe takes.
COMMON_OPTIONS: dict[str, tuple[type, Any, str]] = {
    "exclude": (str, "", "globs of site names kept in floating point, separated by commas"),
    "sites": (str, "", "changes at named sites, GLOB:WORD[+WORD] separated by commas: blocks.0.mlp.*:8"),
    "first_last_bits": (int, 0, "bits of the first and last layer's weights and inputs (0: as the recipe says)"),
    "target": (str, "", "runtime whose grids the recipe is fitted to: onnxruntime, compressed-tensors, gguf ..."),
    "regime": (str, "", "parallel, sequential or true_sequential ('': as the recipe says)"),
    "samples": (int, 0, "calibration samples (0: as the recipe says)"),
}


def recipe_names() -> list[str]:
    """Names of all recipes: implemented papers and baselines. Does not import torch."""
    return sorted(
        path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py") if path.stem not in _NOT_PAPERS
    )


def implemented() -> set[str]:
    """Slugs of the papers that have a recipe."""
    return set(recipe_names()) - BASELINES


def build_recipe(name: str, bits: str, options: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a paper, or of papers joined by `+`, at the given bits.

    `options` are the paper functions' keyword arguments, as values or strings; `slug.option` addresses one of several.
    Raises `FewbitsError` for an unknown name (with the nearest), an unknown option, a value that does not parse, papers
    that cannot be joined, and bits a paper cannot do.
    """
    from fewbits.recipe import Bits, join

    parsed = Bits.parse(bits)
    parts = [part.strip() for part in name.split("+")]
    given = dict(options or {})
    parts += _placed(parts, given)
    common = {
        key: _convert(key, given.pop(key), COMMON_OPTIONS[key][0]) for key in list(given) if key in COMMON_OPTIONS
    }
    built: list[Recipe] = []
    used: set[str] = set()
    for slug in parts:
        known = options_of(slug)
        chosen: dict[str, Any] = {}
        for key, value in given.items():
            owner, _, option = key.rpartition(".")
            if owner not in ("", slug) or option not in known:
                continue
            chosen[option] = _convert(key, value, known[option][0])
            used.add(key)
        made = _module(slug).recipe(parsed, **chosen)
        built.append(
            _named(made, slug, {option: chosen.get(option, default) for option, (_, default, _) in known.items()})
        )
    unknown = [key for key in given if key not in used]
    if unknown:
        available = sorted({option for slug in parts for option in options_of(slug)} | set(COMMON_OPTIONS))
        raise FewbitsError(f"{name} has no option {unknown[0]!r}; it has: {', '.join(available)}")
    recipe = built[0]
    for other in built[1:]:
        recipe = join(recipe, other)
    return _apply_common(recipe, common)


def _placed(parts: list[str], given: dict[str, Any]) -> list[str]:
    """The recipe whose placement a target has, where it is to be joined."""
    if not given.get("target"):
        return []
    from fewbits.targets import load_profile

    recipe = load_profile(str(given["target"])).recipe
    return [recipe] if recipe and recipe not in parts else []


def options_of(slug: str) -> dict[str, tuple[Any, Any, str]]:
    """Option name -> (type, default, ""), from the signature of the paper's function."""
    function = _module(slug).recipe
    hints = typing.get_type_hints(function)
    return {
        parameter.name: (hints.get(parameter.name, str), parameter.default, "")
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def check_name(name: str) -> None:
    """Raises `FewbitsError` for a recipe name with an unknown part, without importing torch."""
    known = recipe_names()
    for slug in (part.strip() for part in name.split("+")):
        if slug not in known:
            near = difflib.get_close_matches(slug, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are: {', '.join(known)}"
            raise FewbitsError(f"unknown recipe {slug!r}{hint}")


def _module(slug: str) -> types.ModuleType:
    check_name(slug)
    return importlib.import_module(f"fewbits.papers.{slug.replace('-', '_')}")


def _named(recipe: Recipe, slug: str, options: dict[str, Any]) -> Recipe:
    import dataclasses

    return dataclasses.replace(recipe, name=slug, options=options)


def _convert(key: str, value: Any, wanted: Any) -> Any:
    """A `--set` string as the type the paper's function declares."""
    origin = typing.get_origin(wanted)
    if origin is typing.Literal:
        choices = typing.get_args(wanted)
        if value not in choices:
            raise FewbitsError(f"option {key}={value!r}: choose one of {', '.join(map(str, choices))}")
        return value
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(wanted) if arg is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _convert(key, value, inner[0])
    if not isinstance(value, str) or wanted is str:
        return value
    try:
        if wanted is bool:
            lowered = value.lower()
            if lowered in ("1", "true", "yes", "on"):
                return True
            if lowered in ("0", "false", "no", "off"):
                return False
            raise ValueError(value)
        return wanted(value)
    except (TypeError, ValueError) as error:
        raise FewbitsError(f"option {key}={value!r} is not a {getattr(wanted, '__name__', wanted)}") from error


def _apply_common(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    import dataclasses

    from fewbits.changes import parse_changes
    from fewbits.papers.common import edge_rules
    from fewbits.papers.targeted import calibrated, plan
    from fewbits.recipe import Rule

    if not options:
        return recipe
    scheme = recipe.scheme
    overrides = list(scheme.overrides)
    bits = options.get("first_last_bits")
    if bits:
        if not 2 <= bits <= 8:
            raise FewbitsError(f"first_last_bits={bits}: choose 2 to 8")
        for field in ("weights", "activations"):
            overrides += edge_rules(getattr(scheme, field), ("first_layer", "last_layer"), bits)
    overrides += [Rule(None, sites=glob.strip()) for glob in options.get("exclude", "").split(",") if glob.strip()]
    calibration = recipe.calibration
    if options.get("regime"):
        calibration = dataclasses.replace(calibration, regime=options["regime"])
    if options.get("samples"):
        calibration = dataclasses.replace(calibration, samples=options["samples"])
    changes = parse_changes(options.get("sites", ""))
    changed = dataclasses.replace(
        recipe,
        scheme=dataclasses.replace(scheme, overrides=tuple(overrides), changes=changes),
        calibration=calibration,
        options={**recipe.options, **options},
    )
    if any("static" in change.words for change in changes):
        changed = calibrated(changed)
    return plan(changed, options["target"]) if options.get("target") else changed
