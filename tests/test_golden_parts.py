"""Golden cases of rounding, reconstruction and transforms against the papers' official code."""

from __future__ import annotations

import pytest

from golden import cases, load
from golden_handlers_parts import HANDLERS


def _known(slug: str) -> list:
    """The cases of this file's handlers; the whole folders are covered by the test that joins all handlers."""
    return [case for case in cases(slug) if case.values[0] is None or case.values[0].startswith(tuple(HANDLERS[slug]))]


@pytest.mark.parametrize(
    ("slug", "case"), [pytest.param(slug, *c.values, id=c.id, marks=c.marks) for slug in HANDLERS for c in _known(slug)]
)
def test_golden_parts(slug: str, case: str) -> None:
    (handle,) = [handle for prefix, handle in HANDLERS[slug].items() if case.startswith(prefix)]
    handle(load(slug, case))
