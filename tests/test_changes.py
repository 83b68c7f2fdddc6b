"""Changes at named sites: what can be written, what it does to a grid, and that every recipe follows it."""

from __future__ import annotations

from typing import Any

import pytest

import fewbits
from engine_models import encoder, tokens
from fewbits import FewbitsError
from fewbits.changes import Change, parse_changes
from fewbits.engine.context import ModelContext
from fewbits.formats import LogSqrt2, PerChannel, PerGroup, PerTensor, PerToken, Uniform, affine
from fewbits.graph.types import Site
from fewbits.papers import build_recipe
from fewbits.ranges import MinMax, Percentile, ShrinkSearch
from fewbits.recipe import QSpec, Recipe, Rule, Scheme, Step

SPEC = QSpec(affine(4), PerTensor(), MinMax())


def site(name: str = "a.0.weight", role: str = "weight") -> Site:
    return Site(name, ("a.0", "linear", 0), "linear", role, role, 0, 0, (8, 16))


def changed(words: str, role: str = "weight") -> QSpec | None:
    (change,) = parse_changes(f"*:{words}")
    return change.apply(SPEC, site(f"a.0.{role}", role))


def test_words() -> None:
    assert changed("float") is None
    found = changed("8+channel+mse")
    assert found is not None and found.format.bits == 8
    assert isinstance(found.granularity, PerChannel) and isinstance(found.range, ShrinkSearch)
    assert changed("group32").granularity == PerGroup(32, -1)  # type: ignore[union-attr]
    assert changed("percentile99.9").range == Percentile(0.999)  # type: ignore[union-attr]
    symmetric = changed("symmetric")
    assert symmetric is not None and isinstance(symmetric.format, Uniform) and symmetric.format.symmetric
    log = changed("logsqrt2", "input")
    assert log is not None and isinstance(log.format, LogSqrt2)
    assert log.format.code_bits == 4  # as many bits as before, the zero code among them
    token = changed("token", "input")
    assert token is not None and token.dynamic and isinstance(token.granularity, PerToken)
    assert changed("tensor") == SPEC and changed("minmax+uniform") == SPEC
    assert changed("dynamic", "lhs").dynamic and not changed("dynamic+static", "lhs").dynamic  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.*", "GLOB:WORD"),
        ("a.*:", "GLOB:WORD"),
        (":8", "GLOB:WORD"),
        ("a.*:none", "none"),
        ("a.*:0", "'0'"),
        ("a.*:float+8", "no grid"),
        ("a:8,b:wide", "wide"),
    ],
)
def test_malformed_text_is_refused(text: str, says: str) -> None:
    with pytest.raises(FewbitsError, match=says.replace("*", r"\*")):
        parse_changes(text)


@pytest.mark.parametrize(
    ("words", "role"),
    [("log2", "weight"), ("token", "weight"), ("channel", "input"), ("group8", "lhs"), ("99", "weight")],
)
def test_what_does_not_fit_a_site_names_it(words: str, role: str) -> None:
    with pytest.raises(FewbitsError, match=rf"a\.0\.{role}: cannot become"):
        changed(words, role)


def test_changes_apply_in_order_over_everything_else() -> None:
    scheme = Scheme(
        weights=(Rule(SPEC, roles=("weight",)),),
        overrides=(Rule(None, sites="b.*"),),
        changes=parse_changes("a.*:8, a.0.*:2, b.*:8"),
    )
    assert scheme.spec(site()).format.bits == 2  # type: ignore[union-attr]
    assert scheme.spec(site("a.1.weight")).format.bits == 8  # type: ignore[union-attr]
    assert scheme.spec(site("b.1.weight")) is None  # excluded stays excluded
    assert scheme.spec(site("c.weight")) == SPEC
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert str(scheme.changes[1]) == "a.0.*:2" and Change.from_dict(scheme.changes[1].to_dict()) == scheme.changes[1]


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "smoothquant"])
def test_recipes_follow_changes(recipe: str) -> None:
    changes = "blocks.0.up.*:8,blocks.*.q.weight:float,blocks.1.down.weight:group4+mse"
    result = fewbits.quantize(encoder(), recipe, tokens(8), bits="W4A8", options={"sites": changes})
    held: dict[str, Any] = {s.name: q.spec for s, q in result.attachment.items()}
    assert held["blocks.0.up.weight"].format.bits == 8 and held["blocks.1.up.weight"].format.bits == 4
    assert held["blocks.0.up.input"].format.bits == 8
    assert not any(f"blocks.{block}.q.weight" in held for block in range(3))
    assert held["blocks.1.down.weight"].granularity == PerGroup(4, -1)
    assert result.recipe.options["sites"] == changes


def test_a_name_that_no_site_has_is_refused() -> None:
    with pytest.raises(FewbitsError, match=r"sites=blocks\.7\.up\.weight:8: rtn quantizes no site.*did you mean"):
        fewbits.quantize(
            encoder(), "rtn", bits="W4A16", example=tokens(1)[0], options={"sites": "blocks.7.up.weight:8"}
        )
    with pytest.raises(FewbitsError, match="quantizes no site"):  # there is such a site, but it is in floating point
        fewbits.quantize(encoder(), "rtn", bits="W4A16", example=tokens(1)[0], options={"sites": "*.up.input:8"})


class _Allocate(Step):
    """Gives every weight two bits."""

    part = "allocation"
    scope = "model"
    stage = -1

    def apply(self, unit: ModelContext) -> None:  # type: ignore[override]
        for weight in unit.weights():
            unit.override(weight, QSpec(affine(2), PerChannel(0), MinMax()))


def test_changes_have_the_last_word_over_allocated_bits() -> None:
    built = build_recipe("rtn", bits="W4A16", options={"sites": "blocks.0.up.weight:8"})
    recipe = Recipe(built.name, built.bits, built.scheme, (_Allocate(), *built.steps), built.calibration)
    result = fewbits.quantize(encoder(), recipe, example=tokens(1)[0])
    held = {s.name: q.spec.format.bits for s, q in result.attachment.items()}
    assert held["blocks.0.up.weight"] == 8 and held["blocks.1.up.weight"] == 2
