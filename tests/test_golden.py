"""Every golden case of every implemented paper. Cases are found by listing the folder; one that no handler takes fails."""

from __future__ import annotations

import golden
import golden_handlers_engine
import golden_handlers_formats
import golden_handlers_parts
import pytest

from fewbits.papers import implemented


def _handlers() -> dict[str, dict]:
    merged: dict[str, dict] = {}
    for module in (golden_handlers_engine, golden_handlers_formats, golden_handlers_parts):
        for slug, handlers in module.HANDLERS.items():
            merged.setdefault(slug, {}).update(handlers)
    return merged


def _cases() -> list:
    found = []
    for slug in sorted(implemented()):
        for case in golden.cases(slug):
            found.append(pytest.param(slug, *case.values, id=case.id, marks=case.marks))
    return found


@pytest.mark.parametrize(("slug", "case"), _cases())
def test_golden(slug: str, case: str) -> None:
    golden.handler(slug, case, _handlers().get(slug, {}))(golden.load(slug, case))
