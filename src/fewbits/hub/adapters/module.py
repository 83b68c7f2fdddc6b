"""Any PyTorch model with a loader of its own: `module:FILE.py:FUNCTION[:ARGUMENT]` (or
`module:package.module:FUNCTION[:ARGUMENT]`).

The function is called with the argument (or with nothing) and returns the model, or `(model, config)`. What
`config`, a JSON-able dict, may state: `input_size` ([channels, height, width]), `mean`, `std`, `interpolation` and
`crop_pct` of image models, `label_names`, and `domain`. The file is ordinary Python and runs with your rights: it is
run only where you name it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.hub.loaded import LoadedModel, loading, plain
from fewbits.hub.preprocess import plain_preprocessing
from fewbits.hub.references import ModelRef
from fewbits.hub.requires import nearest


def load(ref: ModelRef, dtype: torch.dtype) -> LoadedModel:
    """Call the loader that the reference names."""
    model, config = _call(ref)
    preprocessing = plain_preprocessing(config)
    domain = config.get("domain") or ("image" if "input_size" in config else "other")
    argument = ref.argument
    if argument is not None and Path(argument).expanduser().exists():
        argument = str(Path(argument).expanduser().resolve())
    code = str(Path(ref.code).expanduser().resolve()) if ref.code.endswith(".py") else ref.code
    spec = {"code": code, "function": ref.function, "argument": argument}
    return LoadedModel(ref.text, "module", model.eval().to(dtype), domain, plain(config), spec, preprocessing)


def _call(ref: ModelRef) -> tuple[nn.Module, dict[str, Any]]:
    function = _function(ref.code, ref.function, ref.text)
    with loading(f"model {ref.text!r}"):
        made = function() if ref.argument is None else function(ref.argument)
    model, config = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(model, nn.Module) or not isinstance(config, dict):
        raise FewbitsError(
            f"model {ref.text!r}: {ref.function} returned {type(made).__name__}; a torch.nn.Module or (module, "
            "config dict) is expected"
        )
    return model, config


def _function(code: str, name: str, what: str) -> Callable[..., Any]:
    with loading(f"code {code!r} of model {what!r}"):
        if code.endswith(".py"):
            path = Path(code).expanduser().resolve()
            # a stable name: classes defined in the file stay importable (deepcopy, inspect) while the process lives
            module_name = f"fewbits_code_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
            module = sys.modules.get(module_name)
            if module is None:
                spec = importlib.util.spec_from_file_location(module_name, path)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[module_name] = module
                try:
                    spec.loader.exec_module(module)
                except BaseException:
                    del sys.modules[module_name]
                    raise
        else:
            module = importlib.import_module(code)
    function = getattr(module, name, None)
    if not callable(function):
        raise FewbitsError(
            f"model {what!r}: {code} has no function {name!r}{nearest(name, [n for n in dir(module) if n[0] != '_'])}"
        )
    return function


def rebuild(spec: dict[str, Any], code_module: str | None) -> nn.Module:
    """Call the loader again. Code named by a checkpoint is not run unasked: the caller names it.

    Raises:
        FewbitsError: no code given.
    """
    from fewbits.hub.references import parse_model_ref

    if not code_module:
        raise FewbitsError(
            "this model is built by Python code, which is not run unasked: "
            f"give code_module (on the command line --code) {spec['code']}:{spec['function']} if you trust it"
        )
    if spec["argument"] is None:
        return _call(parse_model_ref(f"module:{code_module}"))[0]
    return _call(parse_model_ref(spec["argument"], code_module))[0]
