"""Reports on the terminal: one function a kind of report, taking the JSON-able report and a rich console."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from fewbits.report.words import decibels, number, signed_bytes, size

if TYPE_CHECKING:
    from rich.console import Console


def quantized(report: dict[str, Any], console: Console) -> None:
    """Before and after, what it cost, and the notes."""
    from rich.table import Table

    console.print(
        f"{report['model']}: {report['recipe']} {report['bits']}", soft_wrap=True, highlight=False, markup=False
    )
    table = Table()
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    if report["metric"]:
        table.add_row(report["metric"], number(report["metric_before"]), number(report["metric_after"]))
    table.add_row("size", size(report["bytes_before"]), size(report["bytes_after"]))
    console.print(table)
    console.print(
        f"{report['seconds']:.1f} s to quantize, {report['seconds_total']:.1f} s in all, peak memory "
        f"{size(report['peak_memory_bytes'])}, "
        f"seed {report['seed']}, written to {report['out']}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if report.get("page"):
        console.print(f"where the accuracy went: {report['page']}", soft_wrap=True, highlight=False, markup=False)
    for note in report["notes"]:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)


def exported(report: dict[str, Any], console: Console) -> None:
    """Where the files lie, and how the runtime that loads them answers."""
    lines = [f"{report['checkpoint']} as {report['target']}: {size(report['bytes'])}, written to {report['out']}"]
    for found in report["comparison"] or ():
        agreement = found.get("agreement")
        same = "" if agreement is None else f"same top-1 answer {100 * agreement:.2f} %, "
        lines.append(
            f"{found['runtime']}: {same}outputs differ by at most {number(found['difference'])} of "
            f"{number(found['scale'])}, on {found['samples']} samples"
        )
        codes = found.get("quantizers")
        if codes and codes["sites"]:
            worst = "all" if codes["worst"] is None else f"{100 * codes['equal']:.3f} % at the worst, {codes['worst']},"
            lines.append(f"codes at {len(codes['sites'])} activation quantizers: {worst} equal for the same inputs")
    if report["comparison"] is None:
        lines.append("not reloaded (--no-check)")
    lines += [f"note: {note}" for note in report.get("written", {}).get("notes", ())]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def diagnosed(found: dict[str, Any], console: Console) -> None:
    """The sites that hurt most, then what to do about them."""
    from rich.table import Table

    output, metric, data = found["output"], found["metric"], found["data"]
    lines = [
        f"{found['model']}: {found['recipe']} {found['bits']}, run on {data['samples']} samples of {data['data']}",
        f"output error ({'KL divergence, nats' if output['measure'] == 'kl' else 'relative squared error'}): "
        f"{number(output['quantized'])}",
    ]
    if metric is not None:
        lines.append(f"{metric['name']}: {number(metric['float'])} float, {number(metric['quantized'])} quantized")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    by_name = {site["site"]: site for site in found["sites"]}
    table = Table(title="sites that hurt most", title_justify="left")
    for column in ("#", "site", "grid", "expected gain", "error alone", "tensor", "layer", "in the whole"):
        table.add_column(column, justify="left" if column == "site" else "right", overflow="fold")
    for place, name in enumerate(found["ranking"][:10], start=1):
        site = by_name[name]
        table.add_row(
            str(place), escape(name), f"{site['format']} {site['bits']}", number(site["gain"]), number(site["alone"]),
            *(decibels(site[key]) for key in ("tensor_db", "layer_db", "accumulated_db")),
        )  # fmt: skip
    console.print(table)
    name = metric["name"] if metric else "metric"
    for title, key in (("what to do", "suggestions"), ("the same place in every block", "patterns")):
        if found[key]:
            console.print(title, style="bold")
        for place, item in enumerate(found[key], start=1):
            about = "" if item["predicted"] is None else f", {name} about {number(item['predicted'])}"
            console.print(
                f"{place:2}. {', '.join(item['globs'])}: {item['says']}; should take off {item['share'] or 0:.0%} "
                f"(± {item['share_spread'] or 0:.0%}) of the error{about}, {signed_bytes(item['extra_bytes'])}",
                soft_wrap=True, highlight=False, markup=False,
            )  # fmt: skip
            console.print(f"    --set {shlex.quote(item['option'])}", style="dim", soft_wrap=True, markup=False)
    if not found["suggestions"]:
        console.print("no change of a single site that was tried takes a noticeable part of the error away")
    for several in found["together"][-1:]:
        about = "" if several["predicted"] is None else f", {name} about {number(several['predicted'])}"
        console.print(
            f"the first {several['count']} together: should take off {several['share'] or 0:.0%} "
            f"(± {several['share_spread'] or 0:.0%}) of the error{about}, {signed_bytes(several['extra_bytes'])}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
    for note in found["notes"]:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)


def measured(measured: dict[str, Any], console: Console) -> None:
    """A metric and what it was measured on."""
    where = f"{measured['data']} ({measured['subset']}"
    if "window" in measured:
        where += f", window {measured['window']}, stride {measured['stride']}"
    console.print(f"{measured['model']} on {where})", soft_wrap=True, highlight=False, markup=False)
    for name, value in measured["metrics"].items():
        console.print(f"  {name} {number(value)}", highlight=False)


def inspected(seen: dict[str, Any], console: Console) -> None:
    """Units with their sites as a tree, then relations."""
    from fewbits.report.tree import render

    if not console.is_terminal:  # in a pipe or file one op is one line, however long
        console.width = 10_000
    console.print(render(seen, seen["model"], seen["parameters"]))


def papers(listed: dict[str, Any], console: Console) -> None:
    """One table a family."""
    from rich.table import Table

    from fewbits.papers.catalogue import FAMILIES

    for family, entries in listed["families"].items():
        table = Table(title=f"{FAMILIES[family][0]} ({family})", title_justify="left", expand=False)
        for column in ("", "name", "paper", "venue"):
            table.add_column(column)
        for entry in entries:
            venue = f"{entry.get('venue') or ''} {entry.get('year') or ''}".strip()
            table.add_row("[green]✓[/]" if entry["implemented"] else "", entry["slug"], entry["title"], venue)
        console.print(table)
    console.print(
        f"{listed['implemented']} of {listed['papers']} implemented (✓); fewbits papers show NAME tells more",
        highlight=False,
    )


def paper(entry: dict[str, Any], console: Console, lang: str) -> None:
    """Entry and recipe of one paper, in English or Chinese."""
    console.print(f"[bold]{entry['title']}[/]", highlight=False)
    keys = ("venue", "institutions", "models", "bits", "needs", "link", "code_url", "contribution", "recipe", "missing")
    words = {
        "en": "venue|institutions|models|bits|needs|link|code|contribution|recipe|not implemented yet",
        "zh": "发表|机构|模型|位宽|需要|链接|代码|贡献|配方|尚未实现",
    }
    labels = dict(zip(keys, words[lang].split("|"), strict=True))
    entry = {
        **entry,
        "contribution": entry.get(f"contribution_{lang}"),
        "venue": f"{entry.get('venue') or ''} {entry.get('year') or ''}".strip(),
    }
    for key in keys[:-2]:
        value = entry.get(key)
        if value:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            console.print(f"{labels[key]}: {shown}", soft_wrap=True, highlight=False, markup=False)
    recipe = entry["recipe"]
    if recipe is None:
        console.print(labels["missing"], style="yellow")
        return
    console.print(f"{labels['recipe']}: --recipe {entry['slug']}", highlight=False, markup=False)
    for step in recipe["steps"]:
        given = ", ".join(f"{key}={value}" for key, value in step.items() if key != "step")
        console.print(f"  {step['step']}({given})", soft_wrap=True, highlight=False, markup=False)
    for key, value in recipe["options"].items():
        console.print(f"  --set {key}={value}", soft_wrap=True, highlight=False, markup=False)
