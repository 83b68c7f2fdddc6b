"""Calls recorded as a CUDA graph, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def replays(run: Callable[[], Tensor], times: int = 3) -> Iterator[Tensor]:
    """What `run` gives when it is recorded once, after a call that sets up, and replayed over a cleared output."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(times):
        out.zero_()
        graph.replay()
        yield out
