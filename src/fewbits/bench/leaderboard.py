"""The leaderboard: one self-contained HTML page of all rows, with filters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from fewbits.bench.tables import Row, entries


def leaderboard(rows: Sequence[Row], title: str = "") -> str:
    """The page. Every name is data in it, never markup."""
    found = [
        {
            "family": e.family,
            "model": e.model,
            "recipe": e.label,
            "bits": e.bits,
            "metric": e.metric,
            "higher": e.higher_is_better,
            "float": _finite(e.before),
            "value": _finite(e.after),
            "spread": _finite(e.spread),
            "delta": _finite(e.delta),
            "seeds": list(e.seeds),
            "failed": e.failed,
            **_costs(e.rows),
        }
        for e in entries(rows)
    ]
    page = resources.files("fewbits.bench").joinpath("leaderboard.html").read_text(encoding="utf-8")
    # "</script>" inside a string would end the script element; "<" never needs to be written as itself in JSON
    data = json.dumps({"title": title or "fewbits leaderboard", "rows": found}, ensure_ascii=False)
    return page.replace("/*DATA*/null", data.replace("<", "\\u003c"))


def _costs(rows: Sequence[Row]) -> dict[str, Any]:
    fine = [row for row in rows if "error" not in row]
    if not fine:
        return {}
    first = fine[0]
    calibration = first.get("calibration") or {}
    size = first.get("size") or {}
    return {
        "bytes": first["bytes_after"],
        "bytes_float": first["bytes_before"],
        "bpw": size.get("bits_per_weight"),
        "seconds": max(row["seconds"] for row in fine),
        "memory": max(row["peak_memory_bytes"] for row in fine),
        "data_free": not first["needs_data"],
        "gradients": first["needs_gradients"],
        "calibration": f"{calibration.get('data', 'none')}" + (f", {calibration['subset']}" if calibration else ""),
        "machine": first.get("machine", ""),
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
