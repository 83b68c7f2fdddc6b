"""Papers: one file each. `build_recipe` turns their names into a recipe; `catalogue` lists them all."""

from fewbits.papers.registry import build_recipe, implemented, options_of, recipe_names

__all__ = ["build_recipe", "catalogue", "implemented", "options_of", "paper_info", "recipe_names"]


def __getattr__(name: str) -> object:
    if name in ("catalogue", "paper_info"):
        from fewbits.papers import catalogue as module

        return getattr(module, name)
    raise AttributeError(name)
