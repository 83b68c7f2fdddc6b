"""The catalogue is complete, strict and readable without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources

import pytest

from fewbits.errors import FewbitsError
from fewbits.papers import implemented
from fewbits.papers.catalogue import FAMILIES, PaperInfo, _entry, catalogue, paper_info

HAN = re.compile(r"[\u4e00-\u9fff]")


def raw() -> list[dict]:
    return json.loads(resources.files("fewbits.papers").joinpath("catalogue.json").read_text(encoding="utf-8"))


def test_every_entry_once_and_sorted() -> None:
    papers = catalogue()
    slugs = [paper.slug for paper in papers]
    assert len(papers) == len(raw()) >= 60 and len(set(slugs)) == len(slugs)
    assert len({paper.title.lower() for paper in papers}) == len(papers)
    order = list(FAMILIES)
    keys = [(order.index(paper.family), paper.year, paper.slug) for paper in papers]
    assert keys == sorted(keys)
    assert {paper.family for paper in papers} == set(FAMILIES)


@pytest.mark.parametrize("paper", catalogue(), ids=lambda paper: paper.slug)
def test_entry(paper: PaperInfo) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.slug)
    assert 2015 <= paper.year <= 2026
    assert HAN.search(paper.contribution_zh) and len(paper.contribution_zh) > 30
    assert not HAN.search(paper.contribution_en) and len(paper.contribution_en) > 60
    assert paper.link, "a reader must be able to find the paper"
    for text in (paper.title, paper.venue, paper.needs, *paper.institutions, *paper.models, *paper.bits):
        assert text == text.strip() and "\n" not in text and "  " not in text
        assert text.count("(") == text.count(")"), text
    assert json.loads(json.dumps(paper.to_dict()))["slug"] == paper.slug


def test_implemented_follows_the_recipes() -> None:
    done = {paper.slug for paper in catalogue() if paper.implemented}
    assert done == implemented(), "a recipe without an entry, or the other way round"
    assert "gptq" in done


def test_lookup() -> None:
    assert paper_info("gptq").title.startswith("GPTQ")
    with pytest.raises(FewbitsError, match="did you mean gptq"):
        paper_info("gptk")
    with pytest.raises(FewbitsError, match="did you mean smoothquant"):
        paper_info("SmoothQuant")
    with pytest.raises(FewbitsError, match="fewbits papers"):
        paper_info("zzzzzz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"year": "2023"}, "year"),
        ({"models": "OPT"}, "models"),
        ({"models": []}, "models"),
        ({"bits": [4]}, "bits"),
        ({"link": "arxiv.org"}, "link"),
        ({"title": " "}, "title"),
        ({"family": "rnn"}, "family"),
        ({"stars": 5}, "stars"),
    ],
)
def test_slips_in_the_data_are_errors(change: dict, message: str) -> None:
    entry = raw()[0]
    _entry(entry, False)
    with pytest.raises(FewbitsError, match=message):
        _entry({**entry, **change}, False)
    entry.pop("venue")
    with pytest.raises(FewbitsError, match="venue"):
        _entry(entry, False)


def test_no_torch() -> None:
    code = "import sys; from fewbits.papers import catalogue; catalogue(); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
