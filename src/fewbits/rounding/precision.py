"""Full float32 matrix products, whatever the process-wide settings say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside: no TF32 or bfloat16 passes in float32 products, and no autocast. The previous settings come back.

    Second-order solvers amplify the 1e-3 relative error of TF32 into wrong codes, so they never run under it.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The process uses torch's newer per-backend switch; the two may not be mixed, so stay with the one in use.
        switch = torch.backends.cuda.matmul
        chosen = switch.fp32_precision
        switch.fp32_precision = "ieee"
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            switch.fp32_precision = chosen
        return
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
