"""MATRIX.yaml: which models, recipes and bits are run, and on what data.

    seeds: [0, 1]
    groups:
      - family: vision transformers
        models: {vit: "${zoo}/vit_tiny"}
        calib: "${data}/cifar10/calibration.parquet"
        eval: "${data}/cifar10/test.parquet"
        bits: [W8A8, W4A4]
        recipes: [rtn, {recipe: brecq, set: {iters_w: 500}, bits: [W4A4], samples: 256}]

A group runs every recipe at every one of its bits on every model with every seed. A recipe may narrow `bits`, `seeds`
and `models`, and set options and `samples`. `${name}` is replaced by a variable given beside the file, or of the
environment.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fewbits.errors import FewbitsError

_TOP = {"seeds", "groups", "device", "eval_samples", "title"}
_GROUP = {"family", "models", "calib", "eval", "bits", "recipes", "seeds", "samples", "eval_samples", "seqlen"}
_RECIPE = {"recipe", "label", "set", "bits", "seeds", "models", "samples", "calib"}


@dataclass(frozen=True)
class Cell:
    """One run: a model, a recipe at some bits, a seed, and the data."""

    family: str
    model: str
    ref: str
    recipe: str
    label: str
    bits: str
    seed: int
    calib: str | None = None
    eval_data: str | None = None
    samples: int | None = None
    eval_samples: int | None = None
    seqlen: int | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the run, whatever the folders are called on this machine."""
        data = asdict(self)
        for place in ("ref", "family", "label"):
            del data[place]
        for name in ("calib", "eval_data"):
            data[name] = None if data[name] is None else Path(data[name]).name
        return json.dumps(data, sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Matrix:
    """All cells, in the file's order, and the device they run on."""

    cells: tuple[Cell, ...]
    title: str = ""
    device: str = "cpu"


def load_matrix(file: Path | str, variables: Mapping[str, str] | None = None, device: str | None = None) -> Matrix:
    """Read a matrix. Raises `FewbitsError` naming the file and the entry that is wrong, before anything runs."""
    file = Path(file)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FewbitsError(f"{file}: not a readable YAML file ({' '.join(str(error).split())})") from error
    _check(data, _TOP, f"{file}", needed=("groups",))
    known = {**os.environ, **(variables or {})}
    cells: list[Cell] = []
    for number, group in enumerate(_list(data["groups"], f"{file}: groups")):
        where = f"{file}: group {number + 1}"
        _check(group, _GROUP, where, needed=("models", "bits", "recipes"))
        cells += _cells({**{k: data[k] for k in ("seeds", "eval_samples") if k in data}, **group}, known, where)
    twice = [cell for place, cell in enumerate(cells) if cell.key in {other.key for other in cells[:place]}]
    if twice:
        cell = twice[0]
        raise FewbitsError(f"{file}: {cell.model} {cell.recipe} {cell.bits} seed {cell.seed} is listed twice")
    return Matrix(tuple(cells), str(data.get("title", "")), device or str(data.get("device", "cpu")))


def _cells(group: dict[str, Any], known: Mapping[str, str], where: str) -> Iterator[Cell]:
    from fewbits.papers.registry import check_name
    from fewbits.recipe import Bits

    def filled(value: Any) -> str | None:
        if value is None:
            return None
        try:
            return string.Template(str(value)).substitute(known)
        except (KeyError, ValueError) as error:
            raise FewbitsError(f"{where}: {value!r} needs a variable {error}; give it with --var NAME=VALUE") from error

    models = group["models"]
    if not isinstance(models, dict) or not models:
        raise FewbitsError(f"{where}: models must map names to references")
    for entry in _list(group["recipes"], f"{where}: recipes"):
        entry = entry if isinstance(entry, dict) else {"recipe": entry}
        _check(entry, _RECIPE, f"{where}: recipe {entry.get('recipe', '?')}", needed=("recipe",))
        recipe = str(entry["recipe"])
        check_name(recipe)
        options = {str(key): _text(value) for key, value in dict(entry.get("set") or {}).items()}
        label = str(entry.get("label") or " ".join([recipe, *(f"{k}={v}" for k, v in options.items())]))
        wanted = _list(entry.get("models", list(models)), f"{where}: models of {recipe}")
        for name in wanted:
            if name not in models:
                raise FewbitsError(f"{where}: recipe {recipe} names model {name!r}, which the group does not have")
            for bits in _list(entry.get("bits", group["bits"]), f"{where}: bits"):
                Bits.parse(str(bits))
                for seed in _list(entry.get("seeds", group.get("seeds", [0])), f"{where}: seeds"):
                    yield Cell(
                        str(group.get("family", "")), str(name), filled(models[name]) or "", recipe, label, str(bits),
                        int(seed), filled(entry.get("calib", group.get("calib"))), filled(group.get("eval")),
                        entry.get("samples", group.get("samples")), group.get("eval_samples"), group.get("seqlen"),
                        options,
                    )  # fmt: skip


def _check(data: Any, known: set[str], where: str, needed: tuple[str, ...]) -> None:
    if not isinstance(data, dict):
        raise FewbitsError(f"{where}: must be a mapping of {', '.join(sorted(known))}")
    unknown = [key for key in data if key not in known]
    if unknown:
        raise FewbitsError(f"{where}: unknown key {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    missing = [key for key in needed if key not in data]
    if missing:
        raise FewbitsError(f"{where}: {missing[0]!r} is missing")


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    raise FewbitsError(f"{where} must be a list with at least one entry")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
