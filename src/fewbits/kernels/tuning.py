"""Choosing a kernel's configuration: the fastest of a few, measured once a shape (rows rounded up to a power of two).

Configurations are timed in CUDA graphs, as a model runs that is in a hurry, with nothing of the operands in a cache.
`FEWBITS_TUNE=0` takes the first that suits instead, the same on every run.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fewbits.kernels.choose import milliseconds

INTERPRETED = bool(getattr(triton.knobs.runtime, "interpret", False))
#: Bytes read before each timed call: more than any cache holds. What is written instead goes out to memory while the
#: kernel reads, and slows some configurations more than others.
FLUSH = 1 << 28
#: Of a kernel that may begin early, in a graph, of which the first ones tell little.
LAUNCHES = 24
#: How often each configuration is timed.
ROUNDS = 7
_chosen: dict[tuple[Any, ...], Any] = {}


def tuned(
    key: tuple[Any, ...], configs: Sequence[Any], run: Callable[[Any], Tensor],
    others: Callable[[], Sequence[Callable[[Any], Tensor]]] | None = None,
) -> Tensor:  # fmt: skip
    """`run` with the configuration that is fastest for what `key` stands for; its first call measures.

    others: makes functions that do the same with so many other operands that none is in a cache when its turn comes,
    for a kernel that may begin before the one before it has ended.
    """
    config = _chosen.get(key)
    if config is None:
        if not INTERPRETED and torch.cuda.is_current_stream_capturing():
            return run(configs[0])
        config = _chosen[key] = _fastest(configs, run, others)
    return run(config)


def copies(words: Tensor) -> list[Tensor]:
    """As many of a weight as no cache holds."""
    return [words.clone() for _ in range(min(32, max(2, FLUSH // 2 // words.nbytes)))]


def _fastest(
    configs: Sequence[Any], run: Callable[[Any], Tensor],
    others: Callable[[], Sequence[Callable[[Any], Tensor]]] | None = None,
) -> Any:  # fmt: skip
    if INTERPRETED or len(configs) == 1 or os.environ.get("FEWBITS_TUNE", "1") == "0":
        return configs[0]
    if others is None:
        cache = torch.zeros(FLUSH // 4, dtype=torch.float32, device="cuda")
        turns = [lambda _: cache.sum(), run] * 5
    else:
        turns = list(others())
        turns *= -(-LAUNCHES // len(turns))
    graphs: list[tuple[int, torch.cuda.CUDAGraph]] = []
    for place, config in enumerate(configs):
        try:
            graphs.append((place, _captured([functools.partial(turn, config) for turn in turns])))
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory or registers than this GPU has
    if not graphs:
        raise RuntimeError("no configuration of this kernel fits this GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    times: dict[int, list[float]] = {place: [] for place, _ in graphs}
    for _ in range(ROUNDS):  # in turns, since a GPU is slower when it is warm
        for place, graph in graphs:
            times[place].append(milliseconds(graph.replay, device, 0.0, 3))
    return configs[min(times, key=lambda place: (statistics.median(times[place]), place))]


def _captured(turns: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """These calls in a CUDA graph: launching a kernel from Python takes longer than a short one runs."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # not `torch.cuda.graph`, which collects garbage and returns all unused memory each time
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for turn in turns:
                turn()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
