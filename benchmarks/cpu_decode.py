"""Decoding on a CPU: `python benchmarks/cpu_decode.py [--out FILE.json] [--threads N] [--size N] [--layers N]`.

A chain of square layers, in floating point and packed, at batch 1 and 8, as ratios of one run. The chain is longer than
the cache is large, so weights come from memory as they do in a model; the kernels take turns, so that what else runs on
the machine meets them all alike. Each is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.formats import PerToken, symmetric
from fewbits.kernels import native
from fewbits.packed.int8 import Int8Linear
from fewbits.packed.modules import NativeLinear, Packed, TorchInt4Linear
from fewbits.packed.weight import KernelWeight
from fewbits.quantizer import Quantizer
from fewbits.ranges import AbsMax
from fewbits.recipe import QSpec
from fewbits.speed.machine import cache_bytes, measure

CPU = torch.device("cpu")
#: Size of the layers whose results are checked: decoding a large one takes long.
CHECKED = 256


def grid(bits: int, size: int, group: int) -> KernelWeight:
    """Random codes; the scales keep a chain's values from growing or vanishing."""
    groups = size // group
    scale = torch.rand(groups, size) + 0.5
    scale *= 3**0.5 * 2 / (1 << bits) / size**0.5
    zero = torch.full((groups, size), (1 << bits) / 2 - 0.5).round()
    return KernelWeight(torch.randint(0, 1 << bits, (size, size), dtype=torch.uint8), bits, group, scale, zero)


def table(bits: int, size: int) -> KernelWeight:
    levels = torch.randn(1 << bits, size) / size**0.5
    codes = torch.randint(0, 1 << bits, (size, size), dtype=torch.uint8)
    return KernelWeight(codes, bits, size, table=levels)


def tokens() -> Quantizer:
    return Quantizer(QSpec(symmetric(8), PerToken(-1), AbsMax(), dynamic=True))


def chains(size: int, layers: int) -> dict[str, tuple[list[Callable[[Tensor], Tensor]], int]]:
    """By name: the layers, and the bytes of their weights."""
    made: dict[str, tuple[list[Callable[[Tensor], Tensor]], int]] = {}

    def packed(name: str, build: Callable[[int], Packed]) -> None:
        check(name, build(CHECKED), CHECKED)
        first = build(size)
        held = [first, *(copy.deepcopy(first) for _ in range(layers - 1))]
        made[name] = [*held], sum(buffer.nbytes for layer in held for buffer in layer.buffers())

    one = torch.randn(size, size) / size**0.5
    dense = [one.clone() for _ in range(layers)]
    made["float32"] = [lambda x, w=w: F.linear(x, w) for w in dense], sum(w.nbytes for w in dense)
    if native.unavailable() is None:
        for bits, group in ((4, 128), (4, 32), (3, 128), (2, 128), (8, 128)):
            packed(f"native W{bits}A32 g{group}", lambda n, b=bits, g=group: NativeLinear(grid(b, n, g), None))
        for bits in (4, 3):
            packed(f"native LUT {bits} bits", lambda n, b=bits: NativeLinear(table(b, n), None))
        packed("native W8A8 per token", lambda n: Int8Linear(grid(8, n, n), None, "native", tokens()))
    packed("torch int4 W4A32 g128", lambda n: TorchInt4Linear(grid(4, n, 128), None, torch.float32, CPU))
    packed("torch int8 W8A8 per token", lambda n: Int8Linear(grid(8, n, n), None, "torch_int_mm", tokens()))
    return made


def check(name: str, layer: Packed, size: int) -> None:
    x = torch.randn(3, size)
    if isinstance(layer, Int8Linear):
        x = layer.activations(x)
    expected = x.double() @ layer.decoded().double().T
    distance = float((layer(x) - expected).norm() / expected.norm())
    if not distance < 1e-4:
        raise AssertionError(f"{name}: relative distance {distance:.3g} from float64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, not wall time: one thread on a machine that is shared"
    )
    asked = parser.parse_args()
    clock = time.process_time if asked.cpu_time else time.perf_counter
    torch.manual_seed(0)
    torch.set_num_threads(asked.threads)
    machine = measure(CPU, torch.float32)
    print(f"{machine.name}, {asked.threads} threads, copy {machine.copy / 1e9:.1f} GB/s, {asked.layers} layers")
    held = chains(asked.size, asked.layers)
    cache = cache_bytes(CPU)
    rows: list[dict[str, Any]] = []
    for batch in (1, 8):
        x = torch.randn(batch, asked.size)
        times: dict[str, list[float]] = {name: [] for name in held}
        for turn in range(asked.turns + 1):
            for name, (layers, _) in held.items():
                if name.startswith("torch int") and turn > 2:
                    continue  # many times slower than the rest on processors without wide vectors
                before = clock()
                value = x
                for layer in layers:
                    value = layer(value)
                if turn:  # the first is to warm up
                    times[name].append(1e3 * (clock() - before) / len(layers))
        for name, (_, size) in held.items():
            took = statistics.median(times[name])
            row = {
                "batch": batch, "name": name, "ms_per_layer": took, "fastest_ms": min(times[name]),
                "speedup": statistics.median(times["float32"]) / took, "bytes_per_layer": size // asked.layers,
                "bytes_per_second": size / asked.layers / took * 1e3,
                "exceeds_cache": None if cache is None else size > cache,
            }  # fmt: skip
            rows.append(row)
            print(
                f"batch {batch}  {name:28} {took:8.3f} ms a layer (fastest {min(times[name]):.3f})  "
                f"{row['speedup']:5.2f}x  {row['bytes_per_second'] / 1e9:5.1f} GB/s  "
                f"{'exceeds' if row['exceeds_cache'] else 'fits'} the cache", flush=True,
            )  # fmt: skip
    if asked.out is not None:
        asked.out.write_text(json.dumps({"machine": machine.to_dict(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
