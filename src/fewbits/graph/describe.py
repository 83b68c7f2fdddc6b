"""What fewbits sees in a model, as plain data: units with their sites, relations, and what could not be seen."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewbits.errors import FewbitsError
from fewbits.graph.types import Graph, Site
from fewbits.graph.units import unit_needs


def describe(graph: Graph, model: nn.Module | None = None, *, relations: bool = True) -> dict[str, Any]:
    """The graph as JSON-able data. The recorded model, if given, adds parameter counts of the units."""
    needs = unit_needs(graph)
    held = {site.name for unit in graph.units for site in graph.sites_of(unit)}
    found, missing = _relations(graph) if relations else ([], None)
    return {
        "class": graph.model_class,
        "calls": len(graph.calls),
        "sites": len(graph.sites),
        "units": [
            {
                "name": unit.name,
                "kind": unit.kind,
                "class": graph.module_classes.get(unit.name, ""),
                "uses": unit.uses,
                "needs": sorted(needs[unit.name]),
                "parameters": None if model is None else _parameters(model, unit.name),
                "sites": [_site(site) for site in graph.sites_of(unit)],
            }
            for unit in graph.units
        ],
        "outside_units": [_site(site) for site in graph.sites.values() if site.name not in held],
        "relations": found,
        "relations_missing": missing,
        "opaque": list(graph.opaque),
        "unowned": list(graph.unowned),
        "opened": dict(graph.opened),
    }


def _parameters(model: nn.Module, path: str) -> int | None:
    try:
        return sum(p.numel() for p in model.get_submodule(path).parameters())
    except AttributeError:  # a wrapped model: its module paths carry a prefix
        return None


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "op": site.op,
        "role": site.role,
        "shape": list(site.shape),
        "tags": sorted(site.tags),
        "param": site.param,
        "uses": site.uses,
        "used_by": list(site.used_by),
    }


def _relations(graph: Graph) -> tuple[list[dict[str, Any]], str | None]:
    """(relations, None), or ([], why there are none to show)."""
    try:
        found = graph.relations
    except FewbitsError as error:
        return [], str(error)
    return [
        {"name": r.name, "kind": r.kind, "channels": r.size, "permits": sorted(r.permits), "tags": sorted(r.tags)}
        for r in found
    ], None
