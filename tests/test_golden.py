"""Golden cases, found by listing the papers' folders.

Every case of an implemented paper runs, and one that no handler takes fails. Of the papers still to come, the cases run
whose parts exist.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import golden
from fewbits.papers import implemented


def _merged() -> dict[str, dict]:
    merged: dict[str, dict] = {}
    for file in sorted(Path(__file__).parent.glob("golden_handlers_*.py")):
        for slug, handlers in importlib.import_module(file.stem).HANDLERS.items():
            merged.setdefault(slug, {}).update(handlers)
    return merged


HANDLERS = _merged()


def _cases() -> list:
    found = []
    for slug in sorted(implemented() | set(HANDLERS)):
        for case in golden.cases(slug):
            (name,) = case.values
            if slug in implemented() or name is None or name.startswith(tuple(HANDLERS[slug])):
                found.append(pytest.param(slug, name, id=case.id, marks=case.marks))
    return found


@pytest.mark.parametrize(("slug", "case"), _cases())
def test_golden(slug: str, case: str) -> None:
    golden.handler(slug, case, HANDLERS.get(slug, {}))(golden.load(slug, case))
