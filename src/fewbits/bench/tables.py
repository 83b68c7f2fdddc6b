"""Tables from rows alone: markdown for a README, and what the leaderboard shows. Losing and failed rows stay in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

BASELINE = "rtn"
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """The seeds of one model, recipe and bits put together. `spread` is the largest metric minus the smallest."""

    family: str
    model: str
    label: str
    bits: str
    metric: str
    higher_is_better: bool
    before: float
    after: float
    spread: float
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    failed: str | None = None

    @property
    def delta(self) -> float:
        """Quantized minus float, in the metric's units."""
        return self.after - self.before

    @property
    def loss(self) -> float:
        """How much worse than float; negative where better."""
        return -self.delta if self.higher_is_better else self.delta


def entries(rows: Iterable[Row]) -> list[Entry]:
    """Rows grouped over seeds, in the order of their first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["model"], row["label"], row["bits"]), []).append(row)
    out: list[Entry] = []
    for (family, model, label, bits), found in groups.items():
        fine = [row for row in found if "error" not in row and row["metric_after"] is not None]
        broken = next((row.get("error", "the metric is not finite") for row in found if row not in fine), None)
        values = [row["metric_after"] for row in fine] or [float("nan")]
        first = fine[0] if fine else found[0]
        out.append(
            Entry(
                family,
                model,
                label,
                bits,
                first.get("metric") or "",
                bool(first.get("higher_is_better")),
                first.get("metric_before") or float("nan"),
                fmean(values),
                max(values) - min(values),
                tuple(row["seed"] for row in fine),
                tuple(found),
                broken,
            )
        )
    return out


def markdown(rows: Sequence[Row]) -> str:
    """One table a model: recipes down, bits across, mean over the seeds and their spread.

    The best recipe of a column is bold, one that loses to round-to-nearest by more than both spreads is marked with an
    arrow down.
    """
    found = entries(rows)
    parts: list[str] = []
    for family in dict.fromkeys(entry.family for entry in found):
        if family:
            parts.append(f"### {family[:1].upper()}{family[1:]}")
        for model in dict.fromkeys(entry.model for entry in found if entry.family == family):
            parts.append(_table([entry for entry in found if (entry.family, entry.model) == (family, model)]))
    errors = [f"- {e.model}, {e.label}, {e.bits}: {e.failed}" for e in found if e.failed]
    if errors:
        parts.append("\n".join(["Not run, or without a number:", "", *errors]))
    return "\n\n".join(parts) + "\n"


def _table(found: list[Entry]) -> str:
    bits = sorted(dict.fromkeys(entry.bits for entry in found), key=_by_width)
    first = next((entry for entry in found if entry.metric), found[0])
    measure = {"top1": "top-1, %", "accuracy": "accuracy, %"}.get(first.metric, first.metric)
    arrow = "higher is better" if first.higher_is_better else "lower is better"
    lines = [f"**{first.model}** ({measure}; {arrow}; float {first.before:.2f})", ""]
    lines += [f"| recipe | {' | '.join(bits)} |", f"| --- |{' ---: |' * len(bits)}"]
    at = {(entry.label, entry.bits): entry for entry in found}
    best = {
        b: min((e.loss for e in found if e.bits == b and e.loss == e.loss), default=float("nan")) for b in bits
    }  # NaN is unequal to itself
    for label in dict.fromkeys(entry.label for entry in found):
        cells = [_cell(at.get((label, b)), best[b], at.get((BASELINE, b))) for b in bits]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(entry: Entry | None, best: float, baseline: Entry | None) -> str:
    if entry is None:
        return ""
    if entry.after != entry.after:
        return "failed"
    text = f"{entry.after:.2f}" if abs(entry.after) < 1e5 else f"{entry.after:.2g}"
    if entry.loss <= best:
        text = f"**{text}**"
    if len(entry.seeds) > 1:
        text += f" ±{entry.spread / 2:.2f}" if entry.spread < 1e4 else f" ±{entry.spread / 2:.1g}"
    if baseline is not None and entry.loss - baseline.loss > max(entry.spread, baseline.spread) + 1e-9:
        text += " ↓"
    return text


def _by_width(bits: str) -> tuple[int, ...]:
    """Widest first, weights that keep their activations before those that do not."""
    numbers = [int(number) for number in re.findall(r"\d+", bits)]
    weight, activation = [*numbers, 16][:2]
    return (activation < 16, -weight, -activation)


def cost_table(rows: Sequence[Row]) -> str:
    """What each recipe costs: seconds and peak memory over its runs, data and gradients needed, bits per weight."""
    lines = [
        "| recipe | runs | seconds, median and most | peak memory | calibration data | gradients | bits per weight |",
        "| --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    fine = [row for row in rows if "error" not in row]
    for label in dict.fromkeys(row["label"] for row in fine):
        mine = [row for row in fine if row["label"] == label]
        seconds = sorted(row["seconds"] for row in mine)
        needs = {row["needs_data"] for row in mine}
        widths: dict[str, list[float]] = {}
        for row in mine:
            width = (row.get("size") or {}).get("bits_per_weight")
            if width is not None:
                widths.setdefault(row["bits"].split("A")[0], []).append(width)
        texts = [
            f"{name} {min(held):.2f}" + (f" to {max(held):.2f}" if max(held) - min(held) >= 0.005 else "")
            for name, held in sorted(widths.items(), key=lambda pair: _by_width(pair[0]))
        ]
        lines.append(
            f"| {label} | {len(mine)} | {seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f} "
            f"| {max(row['peak_memory_bytes'] for row in mine) / 1e9:.2f} GB | {_NEED[frozenset(needs)]} "
            f"| {'yes' if any(row['needs_gradients'] for row in mine) else 'no'} | {', '.join(texts)} |"
        )
    return "\n".join(lines) + "\n"


_NEED = {
    frozenset({True}): "yes",
    frozenset({False}): "none",
    frozenset({True, False}): "for activations",
}
