"""The demo models that ship with fewbits: `demo:NAME`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbits.hub.loaded import LoadedModel, plain
from fewbits.hub.references import ModelRef, check_demo


def load(ref: ModelRef, dtype: torch.dtype) -> LoadedModel:
    """Model and description from `fewbits.demo`."""
    from fewbits import demo

    check_demo(ref.name)
    model, config = demo.load(ref.name)
    spec = {"name": ref.name}
    return LoadedModel(
        ref.text,
        "demo",
        model.eval().to(dtype),
        config["domain"],
        plain(config),
        spec,
        config.get("preprocessing"),
        demo_tokenizer(config),
    )


def demo_tokenizer(config: dict[str, Any]) -> Any:
    """Demo language models read bytes."""
    return ByteTokenizer() if config["domain"] == "text-generation" else None


class ByteTokenizer:
    """Text as its UTF-8 bytes; the zero byte stands between documents."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())


def rebuild(spec: dict[str, Any]) -> nn.Module:
    """The architecture; the demo's own weights are small enough to be loaded with it."""
    from fewbits import demo

    check_demo(spec["name"])
    return demo.load(spec["name"])[0]
