"""timm models: `timm:NAME` (pretrained, through timm's hub; `timm:hf-hub:ORG/NAME` too) and local timm directories."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.hub.loaded import LoadedModel, loading, plain
from fewbits.hub.references import ModelRef, check_weights
from fewbits.hub.requires import nearest, require


def load(ref: ModelRef, dtype: torch.dtype) -> LoadedModel:
    """Through `timm.create_model`, with weights."""
    timm = require("timm", f"model {ref.text!r}")
    if ref.folder is not None:
        check_weights(ref.folder)
        name, args = f"local-dir:{ref.folder}", dict(ref.config.get("model_args") or {})
    else:
        name, args = ref.name, _hub_args(timm, ref)
    with loading(f"model {ref.text!r}"):
        model = timm.create_model(name, pretrained=True)
    model = model.eval().to(dtype)
    pretrained_cfg = {
        key: value for key, value in model.pretrained_cfg.items() if key not in ("file", "source", "state_dict", "url")
    }
    preprocessing = plain({"kind": "timm", **timm.data.resolve_model_data_config(model)})
    spec = {
        "architecture": pretrained_cfg.get("architecture", ref.config.get("architecture")),
        "model_args": args,
        "pretrained_cfg": pretrained_cfg,
    }
    config = plain({**spec, "num_classes": model.num_classes, "label_names": pretrained_cfg.get("label_names")})
    return LoadedModel(ref.text, "timm", model, "image", config, plain(spec), preprocessing)


def _hub_args(timm: Any, ref: ModelRef) -> dict[str, Any]:
    source, _, rest = ref.name.partition(":")
    if source in ("hf-hub", "hf_hub"):
        with loading(f"model {ref.text!r}"):
            return dict(timm.models.load_model_config_from_hf(rest)[2] or {})
    architecture = ref.name.partition(".")[0]
    if not timm.is_model(architecture):
        raise FewbitsError(f"timm has no model {ref.name!r}{nearest(architecture, timm.list_models())}")
    tags = [name for name in timm.list_pretrained(f"{architecture}*") if name.partition(".")[0] == architecture]
    if not tags or ("." in ref.name and ref.name not in tags):
        raise FewbitsError(f"timm has no pretrained weights {ref.name!r}{nearest(ref.name, tags)}")
    return {}


def rebuild(spec: dict[str, Any]) -> nn.Module:
    """The architecture with fresh weights."""
    timm = require("timm", "this checkpoint")
    return timm.create_model(
        spec["architecture"], pretrained=False, pretrained_cfg=dict(spec["pretrained_cfg"]), **spec["model_args"]
    )
