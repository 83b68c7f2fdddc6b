"""Optional packages: imported when a reference needs them, with a message that says what to install."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

from fewbits.errors import FewbitsError

#: package -> the extra of fewbits that brings it
EXTRAS = {
    "plotly": "report",
    "timm": "vision",
    "torchvision": "vision",
    "PIL": "vision",
    "transformers": "language",
    "diffusers": "diffusion",
    "datasets": "data",
    "pyarrow": "data",
    "compressed_tensors": "compressed",
    "gguf": "gguf",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
}


def require(package: str, purpose: str) -> ModuleType:
    """The imported package, or a FewbitsError saying which extra brings it.

    `purpose` completes the sentence "<purpose> needs the package ...".
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        root = package.partition(".")[0]
        if (error.name or "").partition(".")[0] != root:
            raise
        raise FewbitsError(
            f"{purpose} needs the package {root!r}, which is not installed: pip install 'fewbits[{EXTRAS[root]}]'"
        ) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean a, b?"` with up to three close names, or an empty string."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close += [k for k in known if name and k.startswith(name) and k not in close][: 3 - len(close)]
    return f"; did you mean {', '.join(close)}?" if close else ""
