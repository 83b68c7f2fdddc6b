"""Numbers in reports as people read them."""

from __future__ import annotations

import math
from typing import Any


def size(count: float | None) -> str:
    """Bytes."""
    if count is None:
        return "?"
    if count < 1e3:
        return f"{count:.0f} B"
    if count < 1e6:
        return f"{count / 1e3:.1f} KB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def signed_bytes(count: int) -> str:
    """What a change adds to the size, or takes off."""
    return f"{'+' if count > 0 else '−' if count < 0 else '±'}{size(abs(count))}"


def number(value: float | None) -> str:
    """Two decimals, or three digits of what is small."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio; "exact" without noise, a dash where nothing was seen."""
    if value is None:
        return "–"
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "lost"


def metric_text(metric: dict[str, Any] | None, value: float | None) -> str:
    """`top1 81.25 → 85.94 on 64 samples`; empty without a metric."""
    if metric is None or value is None:
        return ""
    return f"{metric['name']} {number(metric['quantized'])} → {number(value)}"
