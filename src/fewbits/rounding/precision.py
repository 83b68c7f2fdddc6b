"""The precision of float32 matrix products, whatever the process-wide settings say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside: no TF32 or bfloat16 passes in float32 products, and no autocast. The previous settings come back.

    For the solve of second-order methods, where one column's error is the next one's input. The Hessians they start
    from are sums over many tokens and bear less (`rounding.hessian`).
    """
    with _products(device, "highest"):
        yield


@contextmanager
def tensor_core_float32(device: torch.device) -> Iterator[None]:
    """Inside: float32 products of a GPU may round their inputs to TF32 (10 bits behind the point); no autocast."""
    with _products(device, "high" if device.type == "cuda" else "highest"):
        yield


@contextmanager
def _products(device: torch.device, precision: str) -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The process uses torch's newer per-backend switch; the two may not be mixed, so stay with the one in use.
        switch = torch.backends.cuda.matmul
        chosen = switch.fp32_precision
        switch.fp32_precision = "ieee" if precision == "highest" else "tf32"
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            switch.fp32_precision = chosen
        return
    if before != precision:
        torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != precision:
            torch.set_float32_matmul_precision(before)
