"""Golden cases of formats and ranges against the papers' official code."""

from __future__ import annotations

import pytest

from golden import cases, handler, load
from golden_handlers_formats import HANDLERS


def _known(slug: str) -> list:
    """The cases these handlers are for; that every case of a folder has a handler is checked where all handlers
    meet."""
    return [case for case in cases(slug) if case.values[0] is None or case.values[0].startswith(tuple(HANDLERS[slug]))]


@pytest.mark.parametrize(
    ("slug", "case"), [pytest.param(slug, *c.values, id=c.id, marks=c.marks) for slug in HANDLERS for c in _known(slug)]
)
def test_golden_formats(slug: str, case: str) -> None:
    handler(slug, case, HANDLERS[slug])(load(slug, case))
