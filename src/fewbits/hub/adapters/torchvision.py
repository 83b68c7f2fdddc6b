"""torchvision models: `torchvision:NAME` with its default weights, and local directories.

A local directory holds `model.safetensors` (the state dict) and `config.json` with `"library": "torchvision"`,
`architecture` (a name torchvision registers), `model_args` (keyword arguments of its builder) and the preprocessing
(`input_size`, `mean`, `std`, `interpolation`, `crop_pct`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.hub.loaded import LoadedModel, loading, plain
from fewbits.hub.preprocess import plain_preprocessing
from fewbits.hub.references import ModelRef, check_weights
from fewbits.hub.requires import nearest, require

# torchvision registers its models by sub-package; the sub-package of a model's class says what it does.
_DOMAINS = {
    "detection": "object-detection",
    "segmentation": "image-segmentation",
    "optical_flow": "optical-flow",
    "video": "video",
}


def load(ref: ModelRef, dtype: torch.dtype) -> LoadedModel:
    """Through `torchvision.models.get_model`."""
    torchvision = require("torchvision", f"model {ref.text!r}")
    name = ref.name or str(ref.config.get("architecture", ""))
    _check_name(torchvision, name)
    spec: dict[str, Any]
    if ref.folder is not None:
        spec = {"architecture": name, "model_args": dict(ref.config.get("model_args") or {})}
        model = _build(torchvision, spec)
        _load_weights(model, ref)
        preprocessing, config = plain_preprocessing(ref.config), dict(ref.config)
    else:
        with loading(f"model {ref.text!r}"):
            weights = torchvision.models.get_model_weights(name).DEFAULT
            model = torchvision.models.get_model(name, weights=weights)
        args = {"num_classes": len(weights.meta["categories"])} if "categories" in weights.meta else {}
        spec = {"architecture": name, "model_args": {**args, **_built_with(model)}}
        preprocessing = {"kind": "torchvision", "weights": str(weights)}
        crop = getattr(weights.transforms(), "crop_size", None)
        if crop:
            preprocessing["input_size"] = [3, *(list(crop) * 2)[:2]]
        config = {
            **spec,
            "label_names": weights.meta.get("categories"),
            "input_size": preprocessing.get("input_size", [3, 224, 224]),
        }
    parts = type(model).__module__.split(".")
    domain = next((_DOMAINS[part] for part in parts if part in _DOMAINS), "image")
    return LoadedModel(
        ref.text, "torchvision", model.eval().to(dtype), domain, plain(config), plain(spec), preprocessing
    )


def _check_name(torchvision: Any, name: str) -> None:
    known = torchvision.models.list_models()
    if name not in known:
        raise FewbitsError(f"torchvision has no model {name!r}{nearest(name, known)}")


def _built_with(model: nn.Module) -> dict[str, Any]:
    """Plain constructor arguments that the model keeps as attributes of the same name (`aux_logits`,
    `transform_input`): pretrained builders set them differently from the defaults."""
    names = inspect.signature(type(model).__init__).parameters
    return {
        name: getattr(model, name)
        for name in names
        if isinstance(getattr(model, name, None), bool) and name != "training"
    }


def _build(torchvision: Any, spec: dict[str, Any]) -> nn.Module:
    builder = torchvision.models.get_model_builder(spec["architecture"])
    args = dict(spec["model_args"])
    if "weights_backbone" in inspect.signature(builder).parameters:
        args["weights_backbone"] = None  # the default would download
    if "init_weights" in inspect.signature(builder).parameters:
        args["init_weights"] = False
    with loading(f"torchvision model {spec['architecture']!r}"):
        return builder(weights=None, **args)


def _load_weights(model: nn.Module, ref: ModelRef) -> None:
    from safetensors.torch import load_file

    assert ref.folder is not None
    files = check_weights(ref.folder)
    if len(files) > 1:
        raise FewbitsError(f"{ref.folder} holds {len(files)} safetensors files; one is expected: model.safetensors")
    with loading(f"model {ref.text!r}"):
        model.load_state_dict(load_file(files[0]))


def rebuild(spec: dict[str, Any]) -> nn.Module:
    """The architecture with fresh weights."""
    torchvision = require("torchvision", "this checkpoint")
    _check_name(torchvision, spec["architecture"])
    return _build(torchvision, spec)
