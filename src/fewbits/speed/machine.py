"""What a device can do: the limits that a layer's speed is compared with, measured, and its cache."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.kernels.choose import milliseconds

#: Values copied to measure bandwidth, and rows of the matrices multiplied to measure arithmetic, by device type.
_COPY = {"cuda": 1 << 28, "cpu": 1 << 25}
_MATRIX = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Machine:
    """copy: bytes read and written a second by a copy. flops: of a large matrix product in `dtype`.

    cache: bytes of the last-level cache (on a GPU its L2), None where the system does not say.
    """

    name: str
    copy: float
    flops: float
    cache: int | None
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "copy_bytes_per_second": self.copy,
            "gemm_flops": self.flops,
            "cache_bytes": self.cache,
            "threads": self.threads,
        }


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure `device`; takes about a second."""
    kind = device.type if device.type in _COPY else "cuda"
    source = torch.ones(_COPY[kind], dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copying = milliseconds(functools.partial(target.copy_, source), device, 0.3)
    size = 2 * source.nbytes
    del source, target
    n = _MATRIX[kind]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = milliseconds(lambda: a @ b, device, 0.3)
    return Machine(
        _name(device),
        size / copying * 1e3,
        2 * n**3 / product * 1e3,
        cache_bytes(device),
        torch.get_num_threads() if device.type == "cpu" else None,
    )


def cache_bytes(device: torch.device) -> int | None:
    """Bytes of the last-level cache, or None."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = []
    for place in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", place.read_text().strip())
        if match:
            found.append(int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]])
    return max(found, default=None)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        try:
            text = Path("/proc/cpuinfo").read_text()
        except OSError:
            text = ""
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        return f"{match[1] if match else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"
    return device.type
