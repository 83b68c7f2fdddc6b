"""diffusers directories: a whole pipeline, of which the denoiser is taken, or a single model. `rebuild_spec` keeps
the scheduler's configuration, so that calibration data can be noised the way the model was trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.hub.loaded import LoadedModel, loading, plain
from fewbits.hub.references import ModelRef, check_weights, read_json
from fewbits.hub.requires import require

_DENOISERS = (
    "unet",
    "transformer",
    "prior",
)  # the names diffusers' pipelines give the network that is run at every step


def load(ref: ModelRef, dtype: torch.dtype) -> LoadedModel:
    """The denoiser through its class's `from_pretrained`.

    Raises:
        FewbitsError: a pipeline without a denoiser, missing, truncated or unfitting weights.
    """
    diffusers = require("diffusers", f"model {ref.text!r}")
    assert ref.folder is not None
    folder, scheduler = ref.folder, None
    if (folder / "model_index.json").is_file():
        component = next((name for name in _DENOISERS if isinstance(ref.config.get(name), list)), None)
        if component is None:
            raise FewbitsError(f"{folder / 'model_index.json'} names no denoiser (one of {', '.join(_DENOISERS)})")
        scheduler_file = folder / "scheduler" / "scheduler_config.json"
        scheduler = read_json(scheduler_file) if scheduler_file.is_file() else None
        folder = folder / component
        if not (folder / "config.json").is_file():
            raise FewbitsError(f"{folder}: config.json is missing")
    config = read_json(folder / "config.json")
    cls = _model_class(diffusers, str(config.get("_class_name")), ref.text)
    check_weights(folder)
    with loading(f"model {ref.text!r}"):
        model, info = cls.from_pretrained(
            str(folder), torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    problems = sorted(map(str, info.get("missing_keys") or ())) + sorted(map(str, info.get("mismatched_keys") or ()))
    if problems:
        raise FewbitsError(
            f"model {ref.text!r}: {len(problems)} weights are missing or do not fit: {', '.join(problems[:3])}"
        )
    spec = {"class": cls.__name__, "config": config, "scheduler": scheduler}
    size = config.get("sample_size")
    preprocessing = None
    if isinstance(size, (int, list)) and config.get("in_channels") in (1, 3):
        height, width = (size, size) if isinstance(size, int) else size
        preprocessing = {"kind": "diffusion", "input_size": [config["in_channels"], height, width]}
    return LoadedModel(ref.text, "diffusers", model.eval(), "diffusion", plain(config), plain(spec), preprocessing)


def _model_class(diffusers: Any, name: str, what: str) -> Any:
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise FewbitsError(f"model {what!r}: this version of diffusers has no model class {name!r}")
    return cls


def rebuild(spec: dict[str, Any]) -> nn.Module:
    """The denoiser with fresh weights."""
    diffusers = require("diffusers", "this checkpoint")
    return _model_class(diffusers, spec["class"], spec["class"]).from_config(dict(spec["config"]))
