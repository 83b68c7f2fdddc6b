"""fewbits: post-training quantization of PyTorch models.

    loaded = fewbits.load_model("timm:vit_small_patch16_224")
    data = fewbits.load_data("calibration.parquet", loaded, samples=128)
    result = fewbits.quantize(loaded.model, fewbits.build_recipe("gptq", bits="W4A16"), list(data.batches()))

Names are looked up when they are used: importing fewbits imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits import papers
    from fewbits.api import quantize
    from fewbits.diagnosis.workflow import diagnose_reference, report_reference
    from fewbits.engine import QuantizeResult
    from fewbits.errors import FewbitsError
    from fewbits.hub.checkpoint import load
    from fewbits.hub.data import load_data
    from fewbits.hub.models import LoadedModel, load_model
    from fewbits.packed import PackResult, pack
    from fewbits.papers import build_recipe
    from fewbits.recipe import Recipe
    from fewbits.tasks import evaluate
    from fewbits.workflow import evaluate_reference, inspect_reference, quantize_reference

_HOMES = {
    "FewbitsError": "errors",
    "LoadedModel": "hub.models",
    "PackResult": "packed",
    "QuantizeResult": "engine",
    "Recipe": "recipe",
    "build_recipe": "papers",
    "diagnose_reference": "diagnosis.workflow",
    "evaluate": "tasks",
    "evaluate_reference": "workflow",
    "inspect_reference": "workflow",
    "load": "hub.checkpoint",
    "load_data": "hub.data",
    "load_model": "hub.models",
    "pack": "packed",
    "quantize": "api",
    "quantize_reference": "workflow",
    "report_reference": "diagnosis.workflow",
}

__all__ = [
    "FewbitsError",
    "LoadedModel",
    "PackResult",
    "QuantizeResult",
    "Recipe",
    "build_recipe",
    "diagnose_reference",
    "evaluate",
    "evaluate_reference",
    "inspect_reference",
    "load",
    "load_data",
    "load_model",
    "pack",
    "papers",
    "quantize",
    "quantize_reference",
    "report_reference",
]


def __getattr__(name: str) -> Any:
    if name == "papers":
        return importlib.import_module("fewbits.papers")
    if name == "__version__":
        from importlib.metadata import version

        return version("fewbits")
    if name not in _HOMES:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fewbits.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
