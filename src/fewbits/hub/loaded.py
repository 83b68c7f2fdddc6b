"""A loaded model with what is needed to feed it and to build it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError


@dataclass
class LoadedModel:
    """A model in eval mode and its surroundings.

    Attributes:
        ref: the reference as given.
        kind: the library it came through: "timm", "torchvision", "transformers", "diffusers", "demo" or "module".
        model: the module, in eval mode.
        domain: what goes in and comes out: "image", "text-generation", "text-classification", "diffusion", or one of
            the further domains of `transformers` ("fill-mask", "object-detection", ...); "other" where nothing is
            known.
        config: the model's configuration, JSON-able.
        rebuild_spec: JSON-able; `fewbits.hub.models.rebuild` makes the architecture from it and
            `fewbits.hub.models.from_spec` a LoadedModel, both without the original weights.
        preprocessing: how raw data becomes input, JSON-able, or None where nothing is known.
        tokenizer: for text models, the library's tokenizer, or None.
    """

    ref: str
    kind: str
    model: nn.Module
    domain: str
    config: dict[str, Any]
    rebuild_spec: dict[str, Any]
    preprocessing: dict[str, Any] | None = None
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)

    def example_batch(self, batch_size: int = 1) -> Any:
        """A small synthetic batch in the model's input format, for recording a forward.

        The same values on every call.
        """
        from fewbits.hub.examples import example_batch

        return example_batch(self, batch_size)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model's first parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))


def plain(value: Any) -> Any:
    """The value as JSON holds it.

    Tuples as lists, enums as their value, dtypes as their name; what JSON has no word for as text.
    """

    def other(item: Any) -> Any:
        if isinstance(item, torch.dtype):
            return dtype_name(item)
        if isinstance(item, (set, frozenset)):
            return sorted(item)
        if hasattr(item, "to_dict"):
            return item.to_dict()
        return getattr(item, "value", None) if hasattr(item, "value") else str(item)

    return json.loads(json.dumps(value, default=other))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """A floating-point dtype from its name ("float32", "bfloat16"); FewbitsError otherwise."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FewbitsError(f"dtype {name!r} is not a floating-point type: use float32, bfloat16 or float16")
    return dtype


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a library raises while loading into one FewbitsError naming the reference."""
    try:
        yield
    except (FewbitsError, KeyboardInterrupt, MemoryError):
        raise
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:3]) or type(error).__name__
        raise FewbitsError(f"{what} could not be loaded: {reason[:400]}") from error
