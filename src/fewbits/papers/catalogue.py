"""The catalogue: what every paper is, implemented or not. Plain data, read without torch."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import resources
from typing import Any

from fewbits.errors import FewbitsError

#: Families in the order in which they are listed, with their names in English and Chinese.
FAMILIES = {
    "cnn": ("Convolutional networks", "卷积网络"),
    "vit": ("Vision transformers", "视觉 Transformer"),
    "llm": ("Language models", "语言模型"),
    "diffusion": ("Diffusion models", "扩散模型"),
    "detection": ("Object detection", "目标检测"),
    "point-cloud": ("Point clouds", "点云"),
    "super-resolution": ("Super-resolution", "超分辨率"),
}


@dataclass(frozen=True)
class PaperInfo:
    """One paper.

    Attributes:
        slug: short name in lower case and hyphens; also the name of its recipe.
        title, short_name: of the paper and of its method.
        venue, year: where it appeared, and the year in which it is listed.
        institutions: of its authors.
        models: what the paper quantizes.
        family: a key of `FAMILIES`.
        bits: the settings the paper reports, such as "W4A8".
        needs: calibration data, labels, gradients.
        contribution_en, contribution_zh: what it brings, in English and in Chinese.
        link: the paper; code_url: the authors' code. None where there is none.
        implemented: whether there is a recipe of that name.
    """

    slug: str
    title: str
    short_name: str
    venue: str
    year: int
    institutions: tuple[str, ...]
    models: tuple[str, ...]
    family: str
    bits: tuple[str, ...]
    needs: str
    contribution_en: str
    contribution_zh: str
    link: str | None
    code_url: str | None
    implemented: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def catalogue() -> list[PaperInfo]:
    """All papers, by family, then year, then slug."""
    return list(_catalogue())


def paper_info(slug: str) -> PaperInfo:
    """The entry of a paper.

    Raises:
        FewbitsError: there is none of that name; names the nearest.
    """
    known = {paper.slug: paper for paper in _catalogue()}
    if slug in known:
        return known[slug]
    near = difflib.get_close_matches(slug.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`fewbits papers` lists them"
    raise FewbitsError(f"no paper {slug!r} in the catalogue; {hint}")


@lru_cache(maxsize=1)
def _catalogue() -> tuple[PaperInfo, ...]:
    from fewbits.papers.registry import implemented

    entries = json.loads(resources.files("fewbits.papers").joinpath("catalogue.json").read_text(encoding="utf-8"))
    done = implemented()
    papers = [_entry(entry, entry.get("slug") in done) for entry in entries]
    order = list(FAMILIES)
    return tuple(sorted(papers, key=lambda paper: (order.index(paper.family), paper.year, paper.slug)))


def _entry(data: dict[str, Any], done: bool) -> PaperInfo:
    """An entry whose keys and types are checked: a slip in the data file is an error here, not a strange line in a
    list.
    """
    where = f"catalogue entry {data.get('slug')!r}"
    expected = [field.name for field in fields(PaperInfo) if field.name != "implemented"]
    if sorted(data) != sorted(expected):
        raise FewbitsError(f"{where}: keys {sorted(set(data) ^ set(expected))} are missing or unknown")
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key in ("institutions", "models", "bits"):
            right = isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)
            values[key] = tuple(value) if right else value
        elif key == "year":
            right, values[key] = isinstance(value, int), value
        elif key in ("link", "code_url"):
            right, values[key] = (
                value is None or (isinstance(value, str) and value.startswith(("https://", "http://"))),
                value,
            )
        else:
            right, values[key] = isinstance(value, str) and bool(value.strip()), value
        if not right:
            raise FewbitsError(f"{where}: {key} = {value!r} is not what the catalogue holds there")
    if data["family"] not in FAMILIES:
        raise FewbitsError(f"{where}: family {data['family']!r} is none of {', '.join(FAMILIES)}")
    return PaperInfo(**values, implemented=done)
