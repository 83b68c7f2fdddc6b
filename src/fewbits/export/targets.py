"""The export targets by name. Importing this imports none of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fewbits.errors import FewbitsError
from fewbits.hub.requires import nearest

if TYPE_CHECKING:
    from fewbits.export.base import Target

#: name -> module of this package with a class `Export`
_HOMES = {
    "awq": "awq",
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "gptq": "gptq",
    "integer": "integer.target",
    "onnx": "onnx.target",
    "torch": "torch_export",
}


def target_names() -> list[str]:
    """Names that `fewbits export --to` takes."""
    return sorted(_HOMES)


def check_target(name: str) -> None:
    """Raises `FewbitsError` for an unknown target, without importing torch."""
    if name not in _HOMES:
        raise FewbitsError(
            f"there is no export target {name!r}{nearest(name, _HOMES)} (there are: {', '.join(target_names())})"
        )


def load_target(name: str) -> Target:
    """The target of that name. Raises `FewbitsError` for an unknown one."""
    check_target(name)
    target: Target = importlib.import_module(f"fewbits.export.{_HOMES[name]}").Export()
    return target
