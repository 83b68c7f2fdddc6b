"""What `fewbits inspect` shows: units with their sites, relations, and what could not be seen, as a tree or as
plain data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from rich.markup import escape
from rich.tree import Tree
from torch import nn

from fewbits.graph.types import Graph, Site, Unit
from fewbits.graph.units import unit_needs

_ROLES = frozenset(("weight", "input", "output"))
_KINDS = {"block": "green", "module": "cyan", "op": "blue"}


def describe(graph: Graph) -> dict[str, Any]:
    """The graph as JSON-able data: model, units (with sites and needs), sites outside of units, relations, reports."""
    needs = unit_needs(graph)
    relations, missing = _relations(graph)
    held = {site.name for unit in graph.units for site in graph.sites_of(unit)}
    return {
        "model": graph.model_class,
        "calls": len(graph.calls),
        "units": [
            {
                "name": unit.name,
                "kind": unit.kind,
                "class": graph.module_classes.get(unit.name, ""),
                "uses": unit.uses,
                "needs": sorted(needs[unit.name]),
                "sites": [_site(site) for site in graph.sites_of(unit)],
            }
            for unit in graph.units
        ],
        "outside": [_site(site) for site in graph.sites.values() if site.name not in held],
        "relations": relations,
        "relations_missing": missing,
        "opaque": list(graph.opaque),
        "unowned": list(graph.unowned),
        "opened": dict(graph.opened),
    }


def render(graph: Graph, model: nn.Module | None = None) -> Tree:
    """The graph as a `rich` tree. Units that look alike are shown once; the model, if given, adds parameter counts."""
    blocks = sum(unit.kind == "block" for unit in graph.units)
    head = f"[bold]{escape(graph.model_class)}[/]  {len(graph.units)} units ({blocks} blocks), {len(graph.sites)} sites"
    if model is not None:
        head += f", {_count(sum(p.numel() for p in model.parameters()))} parameters"
    tree = Tree(head)
    for first, others in _alike(graph):
        _add_unit(tree, graph, first, model)
        if others:
            names = others[0].name if len(others) == 1 else f"{others[0].name} .. {others[-1].name}"
            tree.add(f"[dim]... {len(others)} more like it: {escape(names)}[/]")
    held = {site.name for unit in graph.units for site in graph.sites_of(unit)}
    outside = [site for site in graph.sites.values() if site.name not in held]
    if outside:
        _add_sites(tree.add(f"[bold]outside of units[/]  {len(outside)} sites"), outside, "")
    _add_relations(tree, graph)
    reports: tuple[tuple[str, Iterable[str]], ...] = (
        ("opaque calls: nothing inside them can be quantized", graph.opaque),
        ("weights in no unit: not touched by unit steps", graph.unowned),
        ("opened, because they cannot be run again alone", (f"{name}: {why}" for name, why in graph.opened.items())),
    )
    for title, lines in reports:
        lines = list(lines)
        if lines:
            branch = tree.add(f"[yellow]{title}[/]")
            for line in lines:
                branch.add(escape(line))
    return tree


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
    except ImportError as error:
        return [], f"not available: {error}"
    except ValueError as error:
        return [], str(error)
    return [{"name": str(r.name), "kind": str(r.kind), "tags": sorted(map(str, r.tags))} for r in found], None


def _alike(graph: Graph) -> list[tuple[Unit, list[Unit]]]:
    """Units in order, each with the units right after it that have the same sites."""
    groups: list[tuple[Unit, list[Unit]]] = []
    last: Any = None
    for unit in graph.units:
        sites = graph.sites_of(unit)
        look = (
            unit.kind,
            unit.uses,
            graph.module_classes.get(unit.name),
            tuple((_below(site.name, unit.name), site.op, site.shape, site.uses) for site in sites),
        )
        if groups and look == last:
            groups[-1][1].append(unit)
        else:
            groups.append((unit, []))
        last = look
    return groups


def _below(name: str, unit: str) -> str:
    return name.removeprefix(unit).removeprefix(".") if unit else name


def _add_unit(tree: Tree, graph: Graph, unit: Unit, model: nn.Module | None) -> None:
    sites = graph.sites_of(unit)
    kind_of = escape(graph.module_classes.get(unit.name, ""))
    line = f"[bold {_KINDS[unit.kind]}]{escape(unit.name or '(model)')}[/]  {kind_of}, {unit.kind}"
    if unit.uses > 1:
        line += f", runs {unit.uses} times"
    if model is not None:
        with suppress(AttributeError):  # a wrapped model: its module paths carry a prefix
            line += f", {_count(sum(p.numel() for p in model.get_submodule(unit.name).parameters()))} parameters"
    _add_sites(tree.add(line), sites, unit.name)


def _add_sites(branch: Tree, sites: list[Site], unit: str) -> None:
    """One line per op: its operands and output with shapes and tags."""
    ops: dict[str, list[Site]] = {}
    for site in sites:
        base = site.name.rpartition(".")[0]
        ops.setdefault(base, []).append(site)
    for base, group in ops.items():
        first = group[0]
        label = _below(base, unit) or first.op
        text = escape(label) if label == first.op else f"{escape(label)}  [dim]{first.op}[/]"
        for site in group:
            text += f"  {site.role} [dim]{'x'.join(map(str, site.shape)) or 'scalar'}[/]"
            tags = sorted(site.tags - _ROLES)
            if tags:
                text += f" [magenta]{' '.join(tags)}[/]"
        notes = []
        if first.uses != 1:
            notes.append(f"{first.uses} uses" if first.uses else "not reached by this input")
        shared = sorted({name for site in group for name in site.used_by})
        if shared:
            notes.append("weight shared with " + ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else ""))
        if notes:
            text += f"  [yellow]{escape('; '.join(notes))}[/]"
        branch.add(text)


def _add_relations(tree: Tree, graph: Graph) -> None:
    relations, missing = _relations(graph)
    if missing is not None:
        tree.add(f"[bold]relations[/]  [yellow]{escape(missing)}[/]")
        return
    branch = tree.add(f"[bold]relations[/]  {len(relations)}")
    patterns: dict[tuple[str, str, tuple[str, ...]], int] = {}
    for relation in relations:
        key = (re.sub(r"\d+", "*", relation["name"]), relation["kind"], tuple(relation["tags"]))
        patterns[key] = patterns.get(key, 0) + 1
    singles = {(re.sub(r"\d+", "*", r["name"])): r["name"] for r in relations}
    for (name, kind, tags), count in patterns.items():
        text = escape(name if count > 1 else singles[name]) + f"  [dim]{escape(kind)}[/]"
        if tags:
            text += f" [magenta]{escape(' '.join(tags))}[/]"
        branch.add(text + (f"  x{count}" if count > 1 else ""))


def _count(n: int) -> str:
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= size:
            return f"{n / size:.1f}{suffix}"
    return str(n)
