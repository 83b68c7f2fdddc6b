"""Papers: one file each. `build_recipe` turns their names into a recipe; `catalogue` lists them all."""

from fewbits.papers.catalogue import catalogue, paper_info  # the function hides the module of the same name
from fewbits.papers.registry import build_recipe, implemented, options_of, recipe_names

__all__ = ["build_recipe", "catalogue", "implemented", "options_of", "paper_info", "recipe_names"]
