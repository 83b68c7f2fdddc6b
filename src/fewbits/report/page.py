"""A diagnosis as one HTML file that needs nothing else: tables as they are, charts drawn by the plotly inside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import Any

from fewbits.hub.output import readable
from fewbits.hub.requires import require
from fewbits.report.words import decibels, metric_text, number, signed_bytes, size

#: Histograms of at most so many sites, the worst first, so that a page of a large model stays a few megabytes.
HISTOGRAMS = 250


def page(diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    """The page for a diagnosis (`diagnosis.study`) of the model that `report` (of its quantization) is about.

    Every name is escaped; nothing is loaded from elsewhere. Raises `FewbitsError` where plotly is not installed.
    """
    offline = require("plotly.offline", "a report")
    template = resources.files("fewbits.report").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": escape(f"{report['recipe']} {report['bits']}: {_short(str(report['model']))}"),
        "HEAD": _head(diagnosis, report),
        "CARDS": _cards(diagnosis, report),
        "SUGGESTIONS": _suggestions(diagnosis, report),
        "PATTERNS": _patterns(diagnosis, report),
        "SITES": _sites(diagnosis),
        "SIZES": _sizes(diagnosis, report),
        "RUN": _run(diagnosis, report),
        "NOTES": _notes(diagnosis, report),
        "DATA": _json(_chart_data(diagnosis)),
        "PLOTLY": offline.get_plotlyjs().replace("</script", "<\\/script"),
    }
    pieces = template.split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        out += [parts[name], rest]
    return "".join(out)


# -- sections ----------------------------------------------------------------------------------------------------------
def _head(diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in (report.get("options") or {}).items())
    return (
        f"<h1>{_name(_short(str(report['model'])))}</h1>"
        f"<p class=lead>{escape(str(report['recipe']))} at {escape(str(report['bits']))}"
        f"{', ' + _name(options) if options else ''}</p>{_verdict(diagnosis)}"
    )


def _verdict(diagnosis: dict[str, Any]) -> str:
    """The answer in a sentence."""
    worst = next((site for site in diagnosis["sites"] if site["rank"] == 1), None)
    whole = diagnosis["output"]["quantized"]
    if worst is None or not whole or not math.isfinite(whole) or not worst["gain"] > 0:
        return ""
    return (
        f"<p>Of {len(diagnosis['sites'])} quantized sites, <b>{_name(worst['site'])}</b> hurts most: in floating point "
        f"it alone would win back {worst['gain'] / whole:.0%} of the output error.</p>"
    )


def _cards(diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    cards = []
    if report.get("metric") and report.get("metric_after") is not None:
        where = (report.get("evaluation") or {}).get("after") or {}
        told = f"{_short(str(where.get('data', '')))}, {where.get('subset', '')}"
        cards.append(
            _card(report["metric"], number(report["metric_before"]), number(report["metric_after"]), escape(told))
        )
    metric, data = diagnosis["metric"], diagnosis["data"]
    if metric is not None and metric["quantized"] is not None:
        told = f"on the {data['samples']} samples diagnosed ({_short(str(data['data']))})"
        cards.append(_card(metric["name"], number(metric["float"]), number(metric["quantized"]), escape(told)))
    output = diagnosis["output"]
    unit = "KL divergence from the float model, nats" if output["measure"] == "kl" else "squared error over power"
    cards.append(_card("output error", number(output["float"]), number(output["quantized"]), unit))
    if report.get("bytes_before") and report.get("bytes_after"):
        share = report["bytes_after"] / report["bytes_before"]
        cards.append(
            _card("size", size(report["bytes_before"]), size(report["bytes_after"]), f"{share:.0%} of what it was")
        )
    return "".join(cards)


def _card(label: str, before: str, after: str, told: str) -> str:
    return (
        f"<div class=card><div class=label>{escape(label)}</div><div class=change><span>{before}</span>"
        f"<span class=arrow>→</span><b>{after}</b></div><div class=dim>{told}</div></div>"
    )


def _suggestions(diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    found = diagnosis["suggestions"]
    if not found:
        return "<p>No change of a single site that was tried takes a noticeable part of the error away.</p>"
    cards = "".join(_suggestion(place, item, diagnosis, report) for place, item in enumerate(found, start=1))
    return f"<ol class=suggestions>{cards}</ol>{_together(diagnosis)}"


def _patterns(diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    found = diagnosis["patterns"]
    if not found:
        return ""
    cards = "".join(_suggestion(place, item, diagnosis, report) for place, item in enumerate(found, start=1))
    return (
        "<h2>The same place in every block</h2><p class=dim>Changes of all like sites at once, by what they win.</p>"
        f"<ol class=suggestions>{cards}</ol>"
    )


def _suggestion(place: int, item: dict[str, Any], diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    names = ", ".join(_name(glob) for glob in item["globs"])
    count = f" <span class=dim>({len(item['sites'])} sites)</span>" if len(item["sites"]) > len(item["globs"]) else ""
    share = max(0.0, min(1.0, item["share"] or 0.0))
    facts = [f"should take off <b>{share:.0%}</b>{_spread(item)} of the output error"]
    if item["predicted"] is not None:
        name = diagnosis["metric"]["name"] if diagnosis["metric"] else report["metric"]
        facts.append(f"{escape(name)} about <b>{number(item['predicted'])}</b>")
    facts.append(signed_bytes(item["extra_bytes"]) if item["extra_bytes"] else "no extra bytes")
    seen = f"on these samples: output error {number(diagnosis['output']['quantized'])} → {number(item['error'])}"
    told = metric_text(diagnosis["metric"], item["metric"])
    if told:
        seen += f", {escape(told)}"
    others = "".join(
        f"<tr><td>{escape(other['change'])}<td>{number(other['gain'])}<td>{signed_bytes(other['extra_bytes'])}"
        for other in item["tried"]
    )
    tried = (
        "<table><thead><tr><th>also tried<th>expected gain<th>size</thead><tbody>" + others + "</tbody></table>"
        if others
        else ""
    )
    first = escape(item["sites"][0], quote=True)
    return (
        f"<li><div class=what><b>{names}</b>{count}: {escape(item['says'])}</div>"
        f"<div class=bar aria-hidden=true><span style=width:{100 * share:.1f}%></span></div>"
        f"<div>{'; '.join(facts)}</div><div class=dim>{seen}</div>"
        f"<div class=actions><details><summary>how to follow it</summary>{_command(item)}{tried}</details>"
        f'<button type=button class=show data-site="{first}">show histogram</button></div></li>'
    )


def _spread(item: dict[str, Any]) -> str:
    return f" ± {item['share_spread']:.0%}" if item["share_spread"] else ""


def _command(item: dict[str, Any]) -> str:
    return f"<pre>{escape(item['command'])}</pre><button type=button class=copy>copy</button>"


def _together(diagnosis: dict[str, Any]) -> str:
    rows = diagnosis["together"]
    if not rows:
        return ""
    body = "".join(
        f"<tr><td>the first {row['count']}<td>{row['share'] or 0:.0%}{_spread(row)}<td>"
        f"{'' if row['predicted'] is None else number(row['predicted'])}<td>{signed_bytes(row['extra_bytes'])}"
        for row in rows
    )
    best = max(rows, key=lambda row: row["gain"] - row["gain_spread"])
    return (
        "<h3>Followed together</h3><div class=scroll><table><thead><tr><th>suggestions<th>takes off"
        f"<th>metric about<th>size</thead><tbody>{body}</tbody></table></div>"
        f"<details><summary>how to follow the first {best['count']}</summary>{_command(best)}</details>"
    )


def _sites(diagnosis: dict[str, Any]) -> str:
    rows = []
    for site in sorted(diagnosis["sites"], key=lambda site: site["rank"]):
        rows.append(
            f'<tr><td>{site["rank"]}<td class=site><button type=button class=show data-site="'
            f'{escape(site["site"], quote=True)}">{_name(site["site"])}</button>'
            f"<td>{number(site['gain'])}<td>{number(site['alone'])}<td>{decibels(site['tensor_db'])}"
            f"<td>{decibels(site['layer_db'])}<td>{decibels(site['accumulated_db'])}"
            f"<td class=grid>{escape(site['format'])} {site['bits']}"
        )
    return "".join(rows)


def _sizes(diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    rows = []
    found = report.get("size") or {}
    if found.get("weights"):
        weights = found["weights"]
        rows += [
            ("quantized weights", f"{weights:,}", ""),
            ("their codes", size(found["code_bits"] / 8), f"{found['code_bits'] / weights:.2f} bits a weight"),
            (
                "scales, zero points, tables",
                size(found["parameter_bits"] / 8),
                f"{found['parameter_bits'] / weights:.2f} bits a weight",
            ),
        ]
        if found.get("part_bits"):
            rows.append(("outliers kept apart", size(found["part_bits"] / 8), ""))
        rows.append(("values left in floating point", f"{found['float_values']:,}", ""))
    if report.get("bytes_before"):
        rows.append(("model before", size(report["bytes_before"]), ""))
    if report.get("bytes_after"):
        rows.append(("checkpoint", size(report["bytes_after"]), ""))
    largest = sorted(diagnosis["sizes"], key=lambda item: -item["bits"])[:10]
    table = "".join(f"<tr><td>{escape(name)}<td>{value}<td class=dim>{told}" for name, value, told in rows)
    weights_table = "".join(
        f"<tr><td class=site>{_name(item['site'])}<td>{item['values']:,}<td>{size(item['bits'] / 8)}"
        f"<td>{item['bits_per_weight']:.2f}"
        for item in largest
    )
    if weights_table:
        weights_table = (
            "<details><summary>the largest weights</summary><div class=scroll><table><thead><tr><th>weight<th>values"
            f"<th>stored<th>bits each</thead><tbody>{weights_table}</tbody></table></div></details>"
        )
    return f"<div class=scroll><table><tbody>{table}</tbody></table></div>{weights_table}"


def _run(diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    calibration = report.get("calibration") or {}
    facts = {
        "model": report["model"],
        "checkpoint": report.get("out"),
        "recipe": f"{report['recipe']} {report['bits']}",
        "calibration": f"{calibration['data']} ({calibration.get('subset', '')})" if calibration else None,
        "diagnosed on": f"{diagnosis['data']['data']} ({diagnosis['data'].get('subset', '')})",
        "seed": report.get("seed"),
        "device": report.get("device"),
        "Hessians added up in": ", ".join(report.get("hessian_arithmetic") or ()),
        "versions": ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items()),
    }
    return "".join(
        f"<dt>{escape(key)}<dd>{_name(str(value))}" for key, value in facts.items() if value not in (None, "")
    )


def _notes(diagnosis: dict[str, Any], report: dict[str, Any]) -> str:
    notes = dict.fromkeys([*diagnosis["notes"], *(report.get("notes") or [])])
    if not notes:
        return ""
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{_name(note)}" for note in notes) + "</ul>"


# -- data for the charts -----------------------------------------------------------------------------------------------
def _chart_data(diagnosis: dict[str, Any]) -> dict[str, Any]:
    keep = ("site", "format", "bits", "dynamic", "rank")
    drawn = ("tensor_db", "layer_db", "accumulated_db", "alone", "gain")
    sites = [
        {
            **{key: site[key] for key in keep},
            **{key: _rounded(site[key]) for key in drawn},
            "fineness": _fineness(site["granularity"]),
            "histogram": _light(site["histogram"]) if site["rank"] <= HISTOGRAMS else None,
        }
        for site in diagnosis["sites"]
    ]
    return {"sites": sites, "ranking": diagnosis["ranking"], "output": diagnosis["output"]}


def _light(histogram: dict[str, Any] | None) -> dict[str, Any] | None:
    if histogram is None:
        return None
    return {**histogram, "low": _rounded(histogram["low"]), "width": _rounded(histogram["width"])}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _json(data: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(readable(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _fineness(granularity: str) -> str:
    """A granularity in words."""
    kind, _, fields = granularity.partition("(")
    if kind == "group":
        return f"one scale per group of {fields.partition('size=')[2].partition(',')[0]}"
    return {"tensor": "one range for the tensor", "channel": "one scale per channel", "token": "one scale per token",
            "head": "one scale per head"}.get(kind, granularity)  # fmt: skip


# -- words -------------------------------------------------------------------------------------------------------------
def _name(text: str) -> str:
    """An escaped name that may break behind its dots and slashes."""
    return _breaking(escape(text), "./_")


def _breaking(text: str, places: Iterable[str]) -> str:
    for place in places:
        text = text.replace(place, place + "<wbr>")
    return text


def _short(ref: str) -> str:
    """The last part of a path; other references as they are."""
    return ref.rstrip("/").rpartition("/")[2] or ref
