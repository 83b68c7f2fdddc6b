"""What a model reference says, told from the string and from the files of a directory alone (no model library, no
torch).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.hub.requires import EXTRAS, nearest, require

#: File that marks a directory written by fewbits.
CHECKPOINT_FILE = "fewbits.json"

PREFIXES = ("timm", "torchvision", "hf", "demo", "module")
_CODE = re.compile(r"(?P<file>.+?\.py):(?P<function>[A-Za-z_]\w*)(?::(?P<argument>.+))?", re.DOTALL)
_DOTTED = re.compile(r"(?P<file>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)(?::(?P<argument>.+))?", re.DOTALL)
_HELP = (
    "a model reference is timm:NAME, torchvision:NAME, hf:NAME, demo:NAME, module:FILE.py:FUNCTION[:ARGUMENT] "
    "or a local directory of timm, torchvision, transformers, diffusers or fewbits"
)


@dataclass(frozen=True)
class ModelRef:
    """A parsed reference: which adapter reads it, the name or directory, and for `module` the code to call."""

    text: str
    kind: str  # "timm" | "torchvision" | "transformers" | "diffusers" | "demo" | "module" | "fewbits"
    name: str  # name within the library, or empty
    folder: Path | None = None
    code: str = ""  # FILE.py or dotted module
    function: str = ""
    argument: str | None = None
    config: dict[str, Any] = field(default_factory=dict)  # the directory's config.json


def parse_model_ref(ref: str | Path, code_module: str | None = None) -> ModelRef:
    """Tell what `ref` refers to. Reads at most one small JSON file; loads nothing.

    `code_module` is `FILE.py:FUNCTION` (or `package.module:FUNCTION`); `ref` is then the argument that the function
    is called with.

    Raises:
        FewbitsError: empty or unknown reference, missing or foreign directory, unreadable config.json.
    """
    text = str(ref).strip()
    if not text:
        raise FewbitsError(f"the model reference is empty: {_HELP}")
    if code_module:
        code, function, argument = _parse_code(code_module)
        if argument is not None:
            raise FewbitsError(f"code {code_module!r}: give FILE.py:FUNCTION only; the model reference is its argument")
        stripped = text.removeprefix("module:")
        if stripped != text:
            raise FewbitsError(f"model {text!r} already names its code; leave out the separate code {code_module!r}")
        return _with_code(text, code, function, text)
    prefix, colon, rest = text.partition(":")
    if colon and prefix in PREFIXES:
        if not rest:
            raise FewbitsError(f"model {text!r} names nothing after {prefix!r}: {_HELP}")
        if prefix == "module":
            return _with_code(text, *_parse_code(rest))
        return ModelRef(text, "transformers" if prefix == "hf" else prefix, rest)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _parse_folder(text, folder)
    if folder.is_file():
        raise FewbitsError(f"model {text!r} is a file: {_HELP}")
    looks_local = colon == "" and (len(folder.parts) > 2 or text.startswith((".", "~", "/")))
    if looks_local:
        raise FewbitsError(f"model directory {text!r} does not exist")
    raise FewbitsError(f"model {text!r} is neither a directory here nor a known kind of reference: {_HELP}")


def _parse_code(text: str) -> tuple[str, str, str | None]:
    match = _CODE.fullmatch(text) or _DOTTED.fullmatch(text)
    if match is None:
        raise FewbitsError(
            f"code {text!r} is not of the form FILE.py:FUNCTION[:ARGUMENT] or package.module:FUNCTION[:ARGUMENT]"
        )
    return match["file"], match["function"], match["argument"]


def _with_code(text: str, code: str, function: str, argument: str | None) -> ModelRef:
    if code.endswith(".py") and not Path(code).expanduser().is_file():
        raise FewbitsError(f"model {text!r}: the code file {code!r} does not exist")
    return ModelRef(text, "module", "", code=code, function=function, argument=argument)


def _parse_folder(text: str, folder: Path) -> ModelRef:
    if (folder / CHECKPOINT_FILE).is_file():
        return ModelRef(text, "fewbits", "", folder)
    if (folder / "model_index.json").is_file():
        return ModelRef(text, "diffusers", "", folder, config=read_json(folder / "model_index.json"))
    if not (folder / "config.json").is_file():
        raise FewbitsError(
            f"{text!r} is not a model directory: it holds neither {CHECKPOINT_FILE} nor config.json nor "
            "model_index.json"
        )
    config = read_json(folder / "config.json")
    library = str(config.get("library", ""))
    if library.endswith(".py"):
        raise FewbitsError(
            f"{text!r} is loaded by the code {library!r}, which is not run unasked: "
            f"give module:PATH/{library}:FUNCTION:{text}"
        )
    if "_class_name" in config:
        kind = "diffusers"
    elif library in ("timm", "torchvision", "transformers", "diffusers"):
        kind = library
    elif "model_type" in config:
        kind = "transformers"
    elif "architecture" in config:
        kind = "timm"
    else:
        raise FewbitsError(
            f"{folder / 'config.json'} is of no kind known here: expected a key 'architecture' (timm; torchvision with "
            "\"library\": \"torchvision\"), 'model_type' (transformers) or '_class_name' (diffusers)"
        )
    return ModelRef(text, kind, "", folder, config=config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FewbitsError naming the file where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FewbitsError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise FewbitsError(f"{path} does not hold a JSON object")
    return data


def check_weights(folder: Path) -> list[Path]:
    """The folder's safetensors files, each with a header that fits its size; reads the headers only.

    Raises:
        FewbitsError: there is none (weights in another format are not read), or one is truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    found = sorted(folder.glob("*.safetensors"))
    if not found:
        others = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(ending))
        held = f" ({', '.join(others[:3])} is not read: convert it to safetensors)" if others else ""
        raise FewbitsError(f"{folder} holds no weights: no *.safetensors file{held}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(wanted - {p.name for p in found})
        if missing:
            raise FewbitsError(f"{folder} lacks {len(missing)} of the files its index names: {', '.join(missing[:3])}")
    for path in found:
        try:
            with safe_open(path, framework="np") as file:
                empty = not list(file.keys())
        except (SafetensorError, OSError) as error:
            raise FewbitsError(f"{path} is truncated or no safetensors file: {error}") from None
        if empty:
            raise FewbitsError(f"{path} holds no tensors")
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether fewbits wrote this directory."""
    return (folder / CHECKPOINT_FILE).is_file()


def check_demo(name: str) -> None:
    """FewbitsError unless there is a demo of that name."""
    from fewbits import demo

    if name not in demo.names():
        raise FewbitsError(
            f"there is no demo {name!r}{nearest(name, demo.names())} (there are: {', '.join(demo.names())})"
        )


def check_model_ref(ref: str | Path, code_module: str | None = None) -> ModelRef:
    """Everything about a reference that can be told without loading it: form, directory, package, headers of the
    weights.

    Raises:
        FewbitsError: as `fewbits.hub.models.load_model` would, only sooner.
    """
    parsed = parse_model_ref(ref) if is_checkpoint(Path(str(ref)).expanduser()) else parse_model_ref(ref, code_module)
    if parsed.kind in EXTRAS and find_spec(parsed.kind) is None:
        require(parsed.kind, f"model {parsed.text!r}")
    if parsed.folder is not None and parsed.kind in ("timm", "torchvision", "transformers"):
        check_weights(parsed.folder)
    if parsed.kind == "demo":
        check_demo(parsed.name)
    return parsed
