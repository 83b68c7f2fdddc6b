"""Where samples come from.

Files, folders and data sets, as records of an image or a text with its label. Nothing here knows a model.
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.hub.requires import require

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TABLE_ENDINGS = (".tsv", ".csv", ".jsonl", ".json")
FILE_ENDINGS = (".parquet", ".txt", *TABLE_ENDINGS)
_BLOCK = 256  # rows of a parquet file read at once
_HELP = (
    "a data reference is a parquet file, an image folder, a .txt, .jsonl, .tsv or .csv file, a folder of one of these, "
    "hf-dataset:NAME[:CONFIG][:SPLIT] or demo:NAME"
)


@dataclass(frozen=True)
class Record:
    """One sample.

    Image bytes, a PIL image or text, with its label as the source has it (number, class name or None).
    """

    item: Any
    label: int | str | None
    where: str  # for messages: file and row


class Source(ABC):
    """A fixed sequence of records."""

    kind: str  # "images" | "texts" | "text" (one running text)
    label_names: Sequence[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def records(self, indices: Sequence[int]) -> Iterator[Record]:
        """The records at these indices, in this order."""


def open_source(ref: str | Path, *, split: str | None = None, default_split: str = "test") -> Source:
    """The source that a data reference names.

    Args:
        split: which of several files of a folder or splits of a data set; where it is not given and there are
            several, an error.
        default_split: taken for `hf-dataset:` references that name none.

    Raises:
        FewbitsError: nothing there, an unknown kind of file, a corrupt file, no samples.
    """
    text = str(ref).strip()
    if text.startswith("hf-dataset:"):
        source: Source = _hub_source(text, split, default_split)
    else:
        source = _path_source(text, split)
    if not len(source):
        raise FewbitsError(f"data {text!r} holds no samples")
    return source


def check_data_ref(ref: str | Path, split: str | None = None) -> None:
    """What can be told without reading the data: form of the reference, existence, kind of file, package."""
    text = str(ref).strip()
    if text.startswith("hf-dataset:"):
        _parse_hub(text, split)
        _need("datasets", text)
        return
    if text.startswith("demo:"):
        from fewbits.hub.references import check_demo

        check_demo(text.split(":")[1])
        return
    kind, files = _locate(text, split)
    if kind == ".parquet":
        _need("pyarrow", text)
    if kind in (".parquet", "images"):
        _need("PIL", text)
    if kind != "images" and all(file.stat().st_size == 0 for file in files):
        raise FewbitsError(f"data {text!r} holds no samples: the file is empty")


def _need(package: str, text: str) -> None:
    """Look whether a package is there without importing it."""
    if find_spec(package) is None:
        require(package, f"data {text!r}")


def _path_source(text: str, split: str | None) -> Source:
    kind, files = _locate(text, split)
    if kind == "images":
        return ImageFolder(Path(text).expanduser(), files)
    if kind == ".parquet":
        return ParquetSource(files)
    if kind == ".txt":
        return TextFiles(files)
    return TableSource(files)


def _locate(text: str, split: str | None) -> tuple[str, list[Path]]:
    """Kind (a file ending, or "images") and files of a path."""
    if not text:
        raise FewbitsError(f"the data reference is empty: {_HELP}")
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix.lower() in IMAGE_ENDINGS:
            raise FewbitsError(f"data {text!r} is one image; give a folder of images")
        if path.suffix.lower() not in FILE_ENDINGS:
            raise FewbitsError(f"data {text!r}: unknown kind of file {path.suffix!r}: {_HELP}")
        if split is not None:
            raise FewbitsError(f"data {text!r} is one file and has no split {split!r}")
        return path.suffix.lower(), [path]
    if not path.is_dir():
        raise FewbitsError(f"data {text!r} does not exist: {_HELP}")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in FILE_ENDINGS and not p.name.startswith("."))
    if not files:
        return "images", _image_files(path / split if split else path, text)
    return _of_folder(text, files, split)


def _of_folder(text: str, files: list[Path], split: str | None) -> tuple[str, list[Path]]:
    """Files of one split: `test.parquet`, or `test-00000-of-00002.parquet` and its siblings."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(file.stem.split("-00")[0], []).append(file)
    if split is None and len(splits) > 1:
        raise FewbitsError(
            f"data {text!r} holds several files ({', '.join(f.name for f in files[:6])}): name one of them"
        )
    if split is not None and split not in splits:
        raise FewbitsError(f"data {text!r} has no split {split!r}; it has: {', '.join(splits)}")
    chosen = splits[split] if split is not None else files
    if len({file.suffix.lower() for file in chosen}) > 1:
        raise FewbitsError(
            f"data {text!r} holds files of several kinds ({', '.join(f.name for f in chosen[:6])}): name one of them"
        )
    return chosen[0].suffix.lower(), chosen


def _image_files(folder: Path, text: str) -> list[Path]:
    if not folder.is_dir():
        raise FewbitsError(f"data folder {str(folder)!r} does not exist")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
    if not files:
        raise FewbitsError(
            f"data {text!r} holds no samples: no images ({', '.join(IMAGE_ENDINGS)}) and no data files in it"
        )
    return files


class ImageFolder(Source):
    """Images in class sub-folders (the sorted folder names are the classes), or directly in the folder, then without
    labels.

    Classes take turns, so that any prefix is balanced.
    """

    kind = "images"

    def __init__(self, root: Path, files: list[Path]) -> None:
        groups: dict[str | None, list[Path]] = {}
        for file in files:
            inside = file.relative_to(root).parts
            groups.setdefault(inside[-2] if len(inside) > 1 else None, []).append(file)
        if None in groups and len(groups) > 1:
            raise FewbitsError(f"data {str(root)!r} mixes images in class folders with images outside of them")
        self.label_names = None if None in groups else sorted(k for k in groups if k is not None)
        columns = [[(file, name) for file in groups[name]] for name in sorted(groups, key=str)]
        self._items = [c[i] for i in range(max(map(len, columns))) for c in columns if i < len(c)]

    def __len__(self) -> int:
        return len(self._items)

    def records(self, indices: Sequence[int]) -> Iterator[Record]:
        for index in indices:
            file, label = self._items[index]
            yield Record(file.read_bytes(), label, str(file))


class ParquetSource(Source):
    """Parquet in the layout of Hugging Face datasets.

    `image` {`bytes`, `path`} (or plain bytes) with `label`, or text columns.
    """

    def __init__(self, files: list[Path]) -> None:
        require("pyarrow", "reading parquet")
        import pyarrow
        import pyarrow.dataset

        self._files = files
        try:
            self._data = pyarrow.dataset.dataset([str(f) for f in files], format="parquet")
            self._count = self._data.count_rows()
        except (pyarrow.ArrowException, OSError) as error:
            raise FewbitsError(f"{files[0]} is no readable parquet file: {str(error).splitlines()[0]}") from None
        names = self._data.schema.names
        self._item = _pick(names, ("image", "img", "text", "sentence"))
        if self._item is None:
            raise FewbitsError(f"{files[0]} has no column image, img, text or sentence; it has: {', '.join(names)}")
        self.kind = "images" if self._item in ("image", "img") else "texts"
        self._label = _pick(names, ("label", "labels", "fine_label"))
        self.label_names = self._class_names()

    def _class_names(self) -> Sequence[str] | None:
        """Names from the metadata that datasets writes, if it wrote any."""
        try:
            info = json.loads((self._data.schema.metadata or {})[b"huggingface"])["info"]["features"][self._label]
            return list(info["names"])
        except (KeyError, TypeError, ValueError):
            return None

    def __len__(self) -> int:
        return self._count

    def records(self, indices: Sequence[int]) -> Iterator[Record]:
        import pyarrow

        columns = [self._item] + ([self._label] if self._label else [])
        for start in range(0, len(indices), _BLOCK):
            block = list(indices[start : start + _BLOCK])
            try:
                rows = self._data.take(pyarrow.array(block), columns=columns).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise FewbitsError(f"{self._files[0]} cannot be read: {str(error).splitlines()[0]}") from None
            for index, row in zip(block, rows, strict=True):
                where = f"{self._files[0].name} row {index}"
                yield Record(
                    self._content(row[self._item], where), row.get(self._label) if self._label else None, where
                )

    def _content(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            if value.get("bytes"):
                return value["bytes"]
            path = Path(str(value.get("path")))
            file = path if path.is_absolute() else self._files[0].parent / path
            if value.get("path") and file.is_file():
                return file.read_bytes()
            raise FewbitsError(f"{where}: neither image bytes nor an image file at its path")
        if value is None:
            raise FewbitsError(f"{where}: empty")
        return value


class TextFiles(Source):
    """Plain text files: each one running text."""

    kind = "text"

    def __init__(self, files: list[Path]) -> None:
        self._texts = [_read_text(file) for file in files]
        self._texts = [text for text in self._texts if text.strip()]
        self._name = files[0].name

    def __len__(self) -> int:
        return len(self._texts)

    def records(self, indices: Sequence[int]) -> Iterator[Record]:
        for index in indices:
            yield Record(self._texts[index], None, self._name)

    def lines(self) -> ListSource:
        """The non-empty lines, for models that take single sentences."""
        lines = [
            line.strip() for text in self._texts for line in text.replace("\r\n", "\n").split("\n") if line.strip()
        ]
        return ListSource([Record(line, None, f"{self._name} line") for line in lines])


class ListSource(Source):
    """Texts held in memory."""

    kind = "texts"

    def __init__(self, items: list[Record], label_names: Sequence[str] | None = None) -> None:
        self._items, self.label_names = items, label_names

    def __len__(self) -> int:
        return len(self._items)

    def records(self, indices: Sequence[int]) -> Iterator[Record]:
        return (self._items[index] for index in indices)


class TableSource(ListSource):
    """jsonl (fields `text` or `sentence`, and `label`), tsv (`sentence<TAB>label`, no quoting) and csv (quoted).

    A first row whose cells are column names is a header; without one the columns are text and label.
    """

    def __init__(self, files: list[Path]) -> None:
        items: list[Record] = []
        for file in files:
            read = _jsonl if file.suffix.lower() in (".jsonl", ".json") else _separated
            items += list(read(file))
        super().__init__(items)


def _jsonl(file: Path) -> Iterator[Record]:
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file.name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FewbitsError(
                f"{file} line {number} is not JSON: {error.msg}; one JSON object a line is expected"
            ) from None
        field = _pick(row, ("text", "sentence")) if isinstance(row, dict) else None
        if field is None or not isinstance(row[field], str):
            raise FewbitsError(f"{file} line {number} has no string field 'text'")
        yield Record(row[field], row.get("label"), where)


def _separated(file: Path) -> Iterator[Record]:
    text = _read_text(file)
    if file.suffix.lower() == ".tsv":
        rows = [line.split("\t") for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    else:
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if not rows:
        return
    head = [cell.strip().lower() for cell in rows[0]]
    item, label = _pick(head, ("text", "sentence")), _pick(head, ("label", "labels"))
    first = 1 if item is not None else 0
    columns = (head.index(item), head.index(label) if label else None) if item is not None else (0, 1)
    for number, row in enumerate(rows[first:], first + 1):
        wanted = max(c for c in columns if c is not None)
        if len(row) <= wanted and not (first == 0 and len(rows[0]) == 1 and len(row) == 1):
            raise FewbitsError(f"{file} row {number} has {len(row)} columns; text and label are expected")
        value = row[columns[1]].strip() if columns[1] is not None and len(row) > columns[1] else None
        yield Record(
            row[columns[0]],
            int(value) if value is not None and value.lstrip("-").isdigit() else value,
            f"{file.name} row {number}",
        )


class HubDataset(Source):
    """A data set loaded by the datasets library."""

    def __init__(self, data: Any, name: str) -> None:
        import datasets

        self._name, features = name, data.features
        images = [
            key
            for key, feature in features.items()
            if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
        ]
        texts = [
            key for key, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
        ]
        if images:
            self.kind, self._item = "images", images[0]
            if not isinstance(features[images[0]], dict):
                data = data.cast_column(images[0], datasets.Image(decode=False))
        elif texts:
            self.kind, self._item = "texts", _pick(texts, ("text", "sentence")) or texts[0]
        else:
            raise FewbitsError(f"data {name!r} has no image or text column; it has: {', '.join(features)}")
        classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        self._label = _pick(list(features), ("label", "labels")) or (classes[0] if classes else None)
        feature = features.get(self._label) if self._label else None
        self.label_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def records(self, indices: Sequence[int]) -> Iterator[Record]:
        for index in indices:
            row = self._data[int(index)]
            item = row[self._item]
            if isinstance(item, dict):
                item = item["bytes"] or Path(item["path"]).read_bytes()
            yield Record(item, row[self._label] if self._label else None, f"{self._name} row {index}")


def _parse_hub(text: str, split: str | None) -> tuple[str, str | None, str | None]:
    """Name, config and split of `hf-dataset:NAME[:CONFIG][:SPLIT]`.

    One further part is the split, two are config and split.
    """
    parts = text.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise FewbitsError(f"data {text!r} is not of the form hf-dataset:NAME[:CONFIG][:SPLIT]")
    config = parts[1] or None if len(parts) == 3 else None
    stated = parts[-1] or None if len(parts) > 1 else None
    if split and stated and split != stated:
        raise FewbitsError(f"data {text!r} names the split {stated!r}, and split={split!r} another")
    return parts[0], config, stated or split


def _hub_source(text: str, split: str | None, default_split: str) -> Source:
    name, config, chosen = _parse_hub(text, split)
    datasets = require("datasets", f"data {text!r}")
    try:
        data = datasets.load_dataset(name, config, split=chosen)
    except Exception as error:  # the library raises dozens of kinds, network errors among them
        raise FewbitsError(f"data {text!r} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    if isinstance(data, dict):
        if len(data) > 1 and default_split not in data:
            raise FewbitsError(f"data {text!r} has the splits {', '.join(data)}: name one, hf-dataset:NAME:SPLIT")
        data = data[default_split] if default_split in data else next(iter(data.values()))
    return HubDataset(data, text)


def _pick(names: Any, wanted: Sequence[str]) -> Any:
    return next((name for name in wanted if name in names), None)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FewbitsError(f"{file} is not UTF-8 text (byte {error.start})") from None
