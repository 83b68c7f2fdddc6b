"""Recorded tiny models, shared by the graph tests (each model is built and recorded once per process)."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

import zoo_tiny
from fewbits.graph import Graph, record

NAMES = tuple(zoo_tiny.MODELS)


@cache
def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return zoo_tiny.MODELS[name]()


@cache
def recorded(name: str) -> Graph:
    model, args, kwargs = build(name)
    return record(model, *args, **kwargs)
