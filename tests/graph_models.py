"""Recorded tiny models, shared by the graph tests (each model is built and recorded once per process)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import zoo_tiny
from torch import nn

from fewbits.graph import Graph, record

NAMES = tuple(zoo_tiny.MODELS)


@lru_cache(maxsize=None)
def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return zoo_tiny.MODELS[name]()


@lru_cache(maxsize=None)
def recorded(name: str) -> Graph:
    model, args, kwargs = build(name)
    return record(model, *args, **kwargs)
