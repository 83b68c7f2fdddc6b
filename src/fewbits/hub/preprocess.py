"""Raw images to model input, from a model's own preprocessing description. No augmentation anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.hub.requires import require

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]
_PLAIN_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


def plain_preprocessing(config: dict[str, Any]) -> dict[str, Any] | None:
    """The preprocessing that a config.json states in timm's words, None where it states no `input_size`.

    `mean` and `std` are required with it; `interpolation` defaults to bilinear, `crop_pct` to 1.
    """
    if "input_size" not in config:
        return None
    missing = [key for key in ("mean", "std") if key not in config]
    if missing:
        raise FewbitsError(f"the model's config.json states input_size but not {' and '.join(missing)}")
    return {"kind": "plain", "interpolation": "bilinear", "crop_pct": 1.0} | {
        k: config[k] for k in _PLAIN_KEYS if k in config
    }


def image_transform(spec: dict[str, Any]) -> Transform:
    """A function from a PIL image to a float32 tensor [channels, height, width], by the library that the description
    belongs to.
    """
    makers = {
        "timm": _timm,
        "torchvision": _torchvision,
        "transformers": _transformers,
        "plain": _plain,
        "diffusion": _diffusion,
    }
    if spec.get("kind") not in makers:
        raise FewbitsError(f"unknown preprocessing kind {spec.get('kind')!r}; known: {', '.join(makers)}")
    return makers[spec["kind"]](spec)


def input_range(spec: dict[str, Any] | None) -> tuple[Tensor, Tensor] | None:
    """What black and white pixels become, per channel: (smallest, largest), float64 [C]. None where nothing says so."""
    if spec is None:
        return None
    kind, black, white = spec.get("kind"), 0.0, 1.0
    mean, std = spec.get("mean"), spec.get("std")
    if kind == "torchvision":
        preset = _torchvision(spec)
        mean, std = getattr(preset, "mean", None), getattr(preset, "std", None)
    elif kind == "transformers":
        white = 255.0 * float(spec.get("rescale_factor") or 1 / 255) if spec.get("do_rescale", True) else 255.0
        normal = spec.get("do_normalize", True)
        mean, std = (spec.get("image_mean"), spec.get("image_std")) if normal else (0.0, 1.0)
    if mean is None or std is None:  # a diffusion model's input is noise for the most part
        return None
    centre, width = (torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in (mean, std))
    return (black - centre) / width, (white - centre) / width


def channels(spec: dict[str, Any]) -> int:
    """Colour channels of the input."""
    return int((spec.get("input_size") or (3,))[0])


def _timm(spec: dict[str, Any]) -> Transform:
    data = require("timm.data", "preprocessing of timm models")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items() if key != "kind"}
    return data.create_transform(**options, is_training=False)


def _torchvision(spec: dict[str, Any]) -> Transform:
    models = require("torchvision.models", "preprocessing of torchvision models")
    return models.get_weight(spec["weights"]).transforms()


def _transformers(spec: dict[str, Any]) -> Transform:
    transformers = require("transformers", "preprocessing of transformers models")
    settings = {key: value for key, value in spec.items() if key != "kind"}
    cls = getattr(transformers, settings["image_processor_type"], None)
    if cls is None:
        raise FewbitsError(f"this version of transformers has no image processor {settings['image_processor_type']!r}")
    processor = cls.from_dict(settings)
    return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]


def _plain(spec: dict[str, Any]) -> Transform:
    """Short side to `size / crop_pct`, centre crop, to [0, 1], normalise: the usual evaluation pipeline."""
    _, height, width = spec["input_size"]
    pil = require("PIL.Image", "reading images")
    names = {
        "bilinear": pil.Resampling.BILINEAR,
        "bicubic": pil.Resampling.BICUBIC,
        "nearest": pil.Resampling.NEAREST,
        "lanczos": pil.Resampling.LANCZOS,
    }
    if spec["interpolation"] not in names:
        raise FewbitsError(f"unknown interpolation {spec['interpolation']!r}; known: {', '.join(names)}")
    mean, std = (torch.tensor(spec[key], dtype=torch.float32).view(-1, 1, 1) for key in ("mean", "std"))

    def transform(image: Image) -> Tensor:
        scale = max(
            math.floor(height / spec["crop_pct"]) / image.height, math.floor(width / spec["crop_pct"]) / image.width
        )
        # the longer side is cut to whole pixels, as the usual libraries do (and not by the last bit of a product)
        size = (max(width, int(image.width * scale + 1e-6)), max(height, int(image.height * scale + 1e-6)))
        if size != image.size:
            image = image.resize(size, names[spec["interpolation"]])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return (_to_tensor(image.crop((left, top, left + width, top + height))) - mean) / std

    return transform


def _diffusion(spec: dict[str, Any]) -> Transform:
    """Pixels in [-1, 1], as pixel-space diffusion models are trained."""
    half = [0.5] * channels(spec)
    return _plain({**spec, "interpolation": "bilinear", "crop_pct": 1.0, "mean": half, "std": half})


def _to_tensor(image: Image) -> Tensor:
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1)).permute(2, 0, 1).contiguous()
