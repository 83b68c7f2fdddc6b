"""The data of `fewbits.graph.describe` as a tree for the terminal. Units that look alike are shown once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.tree import Tree

_ROLES = frozenset(("weight", "input", "output"))
_KINDS = {"block": "green", "module": "cyan", "op": "blue"}


def render(seen: dict[str, Any], title: str = "", parameters: int | None = None) -> Tree:
    """A `rich` tree of a described graph."""
    blocks = sum(unit["kind"] == "block" for unit in seen["units"])
    head = f"[bold]{escape(title or seen['class'])}[/]  {escape(seen['class']) + ', ' if title else ''}"
    head += f"{len(seen['units'])} units ({blocks} blocks), {seen['sites']} sites"
    if parameters is not None:
        head += f", {_count(parameters)} parameters"
    tree = Tree(head)
    for first, others in _alike(seen["units"]):
        _add_unit(tree, first)
        if others:
            names = others[0]["name"] if len(others) == 1 else f"{others[0]['name']} .. {others[-1]['name']}"
            tree.add(f"[dim]... {len(others)} more like it: {escape(names)}[/]")
    outside = seen["outside_units"]
    if outside:
        _add_sites(tree.add(f"[bold]outside of units[/]  {len(outside)} sites"), outside, "")
    _add_relations(tree, seen["relations"], seen["relations_missing"])
    reports: tuple[tuple[str, Iterable[str]], ...] = (
        ("opaque calls: nothing inside them can be quantized", seen["opaque"]),
        ("weights in no unit: not touched by unit steps", seen["unowned"]),
        ("opened, because they cannot be run again alone", (f"{name}: {why}" for name, why in seen["opened"].items())),
    )
    for heading, given in reports:
        lines = list(given)
        if lines:
            branch = tree.add(f"[yellow]{heading}[/]")
            for line in lines:
                branch.add(escape(line))
    return tree


def _alike(units: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Units in order, each with the units right after it that have the same sites."""
    groups: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    last: Any = None
    for unit in units:
        sites = [(_below(s["name"], unit["name"]), s["op"], s["shape"], s["uses"]) for s in unit["sites"]]
        look = (unit["kind"], unit["uses"], unit["class"], sites)
        if groups and look == last:
            groups[-1][1].append(unit)
        else:
            groups.append((unit, []))
        last = look
    return groups


def _below(name: str, unit: str) -> str:
    return name.removeprefix(unit).removeprefix(".") if unit else name


def _add_unit(tree: Tree, unit: dict[str, Any]) -> None:
    line = (
        f"[bold {_KINDS[unit['kind']]}]{escape(unit['name'] or '(model)')}[/]  {escape(unit['class'])}, {unit['kind']}"
    )
    if unit["uses"] > 1:
        line += f", runs {unit['uses']} times"
    if unit["parameters"] is not None:
        line += f", {_count(unit['parameters'])} parameters"
    _add_sites(tree.add(line), unit["sites"], unit["name"])


def _add_sites(branch: Tree, sites: list[dict[str, Any]], unit: str) -> None:
    """One line per op: its operands and output with shapes and tags."""
    ops: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        ops.setdefault(site["name"].rpartition(".")[0], []).append(site)
    for base, group in ops.items():
        op, uses = group[0]["op"], group[0]["uses"]
        label = _below(base, unit) or op
        text = escape(label) if label == op else f"{escape(label)}  [dim]{op}[/]"
        for site in group:
            text += f"  {site['role']} [dim]{'x'.join(map(str, site['shape'])) or 'scalar'}[/]"
            tags = [tag for tag in site["tags"] if tag not in _ROLES]
            if tags:
                text += f" [magenta]{' '.join(tags)}[/]"
        notes = []
        if uses != 1:
            notes.append(f"{uses} uses" if uses else "not reached by this input")
        shared = sorted({name for site in group for name in site["used_by"]})
        if shared:
            notes.append("weight shared with " + ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else ""))
        if notes:
            text += f"  [yellow]{escape('; '.join(notes))}[/]"
        branch.add(text)


def _add_relations(tree: Tree, relations: list[dict[str, Any]], missing: str | None) -> None:
    if missing is not None:
        tree.add(f"[bold]relations[/]  [yellow]{escape(missing)}[/]")
    if not relations:
        return
    branch = tree.add(f"[bold]relations[/]  {len(relations)}")
    patterns: dict[tuple[Any, ...], list[str]] = {}
    for relation in relations:
        pattern = re.sub(r"\d+", "*", relation["name"])
        shown = (relation["kind"], relation["channels"], tuple(relation["permits"]), tuple(relation["tags"]))
        patterns.setdefault((pattern, *shown), []).append(relation["name"])
    for (pattern, kind, channels, permits, tags), names in patterns.items():
        text = f"{escape(pattern if len(names) > 1 else names[0])}  [dim]{escape(kind)}, {channels} channels"
        text += f"; {escape(', '.join(permits))}[/]" if permits else "[/]"
        if tags:
            text += f" [magenta]{escape(' '.join(tags))}[/]"
        branch.add(text + (f"  x{len(names)}" if len(names) > 1 else ""))


def _count(n: int) -> str:
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= size:
            return f"{n / size:.1f}{suffix}"
    return str(n)
