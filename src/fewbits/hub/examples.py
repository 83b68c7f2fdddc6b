"""Synthetic inputs in a model's format, from its preprocessing, its configuration and its forward's signature."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.hub.loaded import LoadedModel

TEXT_LENGTH = 32
IMAGE_SIZE = 224


def example_batch(loaded: LoadedModel, batch_size: int = 1) -> Any:
    """The batch, on the model's device, floats in its dtype. Seeded: two calls give equal batches.

    Raises:
        FewbitsError: nothing known about the model says what its input looks like.
    """
    if batch_size < 1:
        raise FewbitsError(f"batch size {batch_size}: at least 1 is needed")
    draw = _Draw(loaded)
    if loaded.kind == "transformers":
        return _transformers(loaded, batch_size, draw)
    if loaded.domain == "diffusion":
        return _diffusion(loaded, batch_size, draw)
    if loaded.domain == "text-generation":
        vocabulary, length = int(loaded.config["vocab_size"]), int(loaded.config["max_length"])
        return draw.integers(vocabulary, batch_size, min(TEXT_LENGTH, length))
    shape = (loaded.preprocessing or {}).get("input_size") or loaded.config.get("input_size")
    if shape is None:
        raise FewbitsError(
            f"model {loaded.ref!r}: its configuration states no 'input_size' ([channels, height, width])"
        )
    if loaded.domain == "object-detection" and loaded.kind == "torchvision":
        return (([draw.uniform(*shape) for _ in range(batch_size)],), {})
    return draw.normal(batch_size, *shape)


class _Draw:
    """Random tensors on the CPU from one seed, moved to where the model is."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.dtype = loaded.device, loaded.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def _transformers(loaded: LoadedModel, batch_size: int, draw: _Draw) -> dict[str, Any]:
    config: Any = loaded.model.config
    parameters = inspect.signature(loaded.model.forward).parameters
    main: str = getattr(loaded.model, "main_input_name", "input_ids")
    batch: dict[str, Any] = {}
    if main == "pixel_values":
        batch[main] = draw.normal(batch_size, *_image_shape(loaded, config))
    elif main == "input_ids":
        text = config.get_text_config()
        length = min(TEXT_LENGTH, max_length(loaded) or TEXT_LENGTH)
        ids = draw.integers(int(text.vocab_size), batch_size, length)
        if getattr(text, "pad_token_id", None) is not None and loaded.domain != "text-generation":
            ids = torch.where(ids == text.pad_token_id, (ids + 1) % int(text.vocab_size), ids)
        eos = getattr(text, "eos_token_id", None)
        if getattr(config, "is_encoder_decoder", False) and isinstance(eos, int):
            ids = torch.where(ids == eos, (ids + 1) % int(text.vocab_size), ids)  # pooled at eos: one each, at the end
            ids[:, -1] = eos
        batch[main] = ids
        if loaded.domain != "text-generation":
            batch["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            batch["decoder_input_ids"] = ids.clone()
    else:
        raise FewbitsError(
            f"model {loaded.ref!r}: no example is known for its input {main!r}; pass batches of your own"
        )
    if "use_cache" in parameters:
        batch["use_cache"] = False
    return batch


def _image_shape(loaded: LoadedModel, config: Any) -> tuple[int, int, int]:
    spec: Any = loaded.preprocessing or {}
    size: Any = getattr(config, "image_size", None) or spec.get("crop_size") or spec.get("size") or IMAGE_SIZE
    height: Any
    width: Any
    if isinstance(size, dict):
        edge = size.get("shortest_edge", IMAGE_SIZE)
        height, width = size.get("height", edge), size.get("width", edge)
    elif isinstance(size, (tuple, list)):
        height, width = size[-2:]
    else:
        height = width = size
    colours: Any = getattr(config, "num_channels", None) or 3
    return int(colours), int(height), int(width)


def max_length(loaded: LoadedModel) -> int | None:
    """The longest text in tokens that the model takes.

    The smallest of what its configuration and tokenizer state; None if neither does.
    """
    if loaded.kind != "transformers":
        return loaded.config.get("max_length")
    config: Any = loaded.model.config
    text = config.get_text_config()
    # every name the library's configurations use for the number of positions
    stated = [
        getattr(text, name, None)
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    ]
    stated.append(getattr(loaded.tokenizer, "model_max_length", None))
    lengths = [int(value) for value in stated if isinstance(value, int) and 0 < value < 10**7]
    return min(lengths) if lengths else None


def _diffusion(loaded: LoadedModel, batch_size: int, draw: _Draw) -> dict[str, Any]:
    """Arguments that diffusers' denoisers share, by the names in the forward's signature."""
    config: Any = dict(loaded.model.config)  # type: ignore[arg-type]
    names = inspect.signature(loaded.model.forward).parameters
    size = config.get("sample_size")
    if size is None or "in_channels" not in config:
        raise FewbitsError(
            f"model {loaded.ref!r}: its configuration states no sample_size and in_channels; pass batches of your own"
        )
    height, width = (size, size) if isinstance(size, int) else size
    first = next((name for name in ("sample", "hidden_states") if name in names), None)
    if first is None:
        raise FewbitsError(
            f"model {loaded.ref!r}: its forward takes neither 'sample' nor 'hidden_states'; pass batches of your own"
        )
    batch: dict[str, Any] = {first: draw.normal(batch_size, int(config["in_channels"]), int(height), int(width))}
    if "timestep" in names:
        batch["timestep"] = draw.integers(1000, batch_size)
    context = config.get("cross_attention_dim")
    if "encoder_hidden_states" in names and context:
        width_of = context if isinstance(context, int) else context[0]
        batch["encoder_hidden_states"] = draw.normal(batch_size, 77, int(config.get("encoder_hid_dim") or width_of))
    if "class_labels" in names:
        classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        if classes:
            batch["class_labels"] = draw.integers(int(classes), batch_size)
    if config.get("addition_embed_type") == "text_time":
        pooled = int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])
        batch["added_cond_kwargs"] = {
            "text_embeds": draw.normal(batch_size, pooled),
            "time_ids": draw.uniform(batch_size, 6),
        }
    return batch
