"""Golden cases: inputs and outputs of the papers' official code, found by listing `$FEWBITS_GOLDEN/<slug>/*.npz`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch


def folder(variable: str) -> Path | None:
    """The folder an environment variable points at, or None where it is unset."""
    value = os.environ.get(variable)
    return Path(value) if value else None


def cases(slug: str) -> list:
    """Parameters for `pytest.mark.parametrize("case", cases(slug))`, none for a paper without a folder.

    One skipped line where FEWBITS_GOLDEN is unset; an error where it names a folder without any case.
    """
    root = folder("FEWBITS_GOLDEN")
    if root is None:
        return [pytest.param(None, id=f"golden-{slug}", marks=pytest.mark.skip(reason="FEWBITS_GOLDEN is not set"))]
    if not any(root.glob("*/*.npz")):
        raise RuntimeError(f"FEWBITS_GOLDEN={root} holds no golden cases")
    return [pytest.param(path.stem, id=f"golden-{slug}-{path.stem}") for path in sorted((root / slug).glob("*.npz"))]


def load(slug: str, case: str) -> dict:
    """Arrays of one case: tensors where numeric, Python scalars where 0-d, str where text."""
    root = folder("FEWBITS_GOLDEN")
    assert root is not None
    out: dict = {}
    with np.load(root / slug / f"{case}.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            value = arrays[key]
            if value.dtype.kind in "US":
                out[key] = str(value)
            elif value.ndim == 0:
                out[key] = value.item()
            else:
                out[key] = torch.from_numpy(value.copy())
    return out


def handler(slug: str, case: str, handlers: dict):
    """The handler whose name prefixes the case; a case that nobody handles fails."""
    for prefix in sorted(handlers, key=len, reverse=True):
        if case.startswith(prefix):
            return handlers[prefix]
    pytest.fail(f"golden case {slug}/{case} has no handler; known: {', '.join(sorted(handlers))}")
