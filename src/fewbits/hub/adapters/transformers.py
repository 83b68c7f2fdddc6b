"""transformers models: `hf:NAME` from the hub (or its cache) and local directories. Remote code is never run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.hub.loaded import LoadedModel, loading, plain
from fewbits.hub.references import ModelRef, check_weights
from fewbits.hub.requires import nearest, require

# transformers keeps a mapping from model type to class for every task; the one that lists the class tells the domain.
# The first hit wins.
_DOMAINS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "text-generation",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "text-classification",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES": "object-detection",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": "image-segmentation",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES": "image-segmentation",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "fill-mask",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "text-to-text",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "token-classification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "question-answering",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES": "depth-estimation",
}


def load(ref: ModelRef, dtype: torch.dtype) -> LoadedModel:
    """Through `from_pretrained` of the class that the configuration names.

    Raises:
        FewbitsError: weights missing, truncated or not fitting the configuration (the library would fill in random
            ones), a model that is quantized already, a class transformers does not have.
    """
    transformers = require("transformers", f"model {ref.text!r}")
    source = str(ref.folder or ref.name)
    if ref.folder is not None:
        check_weights(ref.folder)
    with loading(f"model {ref.text!r}"), quiet(transformers):
        config = transformers.AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None):
        raise FewbitsError(
            f"model {ref.text!r} is quantized already (its configuration has a quantization_config); take the original"
        )
    if getattr(config, "auto_map", None):
        raise FewbitsError(
            f"model {ref.text!r} needs code from its repository, which is not run; load it yourself and call "
            "fewbits.quantize"
        )
    cls = _model_class(transformers, config, ref.text)
    with loading(f"model {ref.text!r}"), quiet(transformers):
        model, info = cls.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    problems = sorted(map(str, info.get("missing_keys") or ())) + sorted(
        str(k) for k in info.get("mismatched_keys") or ()
    )
    if problems:
        raise FewbitsError(
            f"model {ref.text!r}: {len(problems)} weights of {cls.__name__} are missing or of another shape in "
            "the files: "
            f"{', '.join(problems[:3])}"
        )
    spec = {
        "class": cls.__name__,
        "config": config.to_dict(),
        "dtype": dtype,
        "attention": getattr(config, "_attn_implementation", None),
    }
    domain = _domain(cls.__name__)
    tokenizer, preprocessing = None, None
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        preprocessing = _image_processor(transformers, source)
    else:
        tokenizer = _tokenizer(transformers, source)
    return LoadedModel(
        ref.text, "transformers", model.eval(), domain, plain(config.to_dict()), plain(spec), preprocessing, tokenizer
    )


def _model_class(transformers: Any, config: Any, what: str) -> Any:
    names = list(getattr(config, "architectures", None) or ())
    if not names:
        raise FewbitsError(f"model {what!r}: its configuration names no class under 'architectures'")
    cls = getattr(transformers, names[0], None)
    if cls is None:
        known = [n for n in dir(transformers) if n.endswith(names[0][-8:])]
        raise FewbitsError(
            f"model {what!r}: this version of transformers has no class {names[0]!r}{nearest(names[0], known)}"
        )
    return cls


def _domain(name: str) -> str:
    from transformers.models.auto import modeling_auto

    for mapping, domain in _DOMAINS.items():
        for classes in getattr(modeling_auto, mapping, {}).values():
            if name == classes or (isinstance(classes, (tuple, list)) and name in classes):
                return domain
    return "other"


def _tokenizer(transformers: Any, source: str) -> Any:
    """The tokenizer, or None where the model comes without one (text data then asks for it)."""
    with quiet(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            if Path(source).is_dir() and any(Path(source).glob("tokenizer*")):
                raise FewbitsError(f"{source}: the tokenizer files cannot be read") from None
            return None


def _image_processor(transformers: Any, source: str) -> dict[str, Any] | None:
    with quiet(transformers):
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError, KeyError):
            return None
    return plain({"kind": "transformers", **processor.to_dict(), "image_processor_type": type(processor).__name__})


@contextlib.contextmanager
def quiet(transformers: Any) -> Any:
    """No progress bars and notes of the library while loading; errors stay."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def rebuild(spec: dict[str, Any]) -> nn.Module:
    """The architecture with fresh weights."""
    transformers = require("transformers", "this checkpoint")
    data = dict(spec["config"])
    config = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
    if spec.get("attention"):
        config._attn_implementation = spec["attention"]
    return _model_class(transformers, config, spec["class"])(config)


def save_companions(loaded: LoadedModel, folder: Path) -> None:
    """Write the tokenizer into `folder/tokenizer`."""
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder / "tokenizer")


def load_companions(folder: Path) -> Any:
    """The tokenizer that `save_companions` wrote, or None."""
    transformers = require("transformers", "this checkpoint")
    if not (folder / "tokenizer").is_dir():
        return None
    with loading(f"tokenizer of {folder}"):
        return _tokenizer(transformers, str(folder / "tokenizer"))
