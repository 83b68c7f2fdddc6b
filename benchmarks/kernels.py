"""The kernel table of one GPU: `python benchmarks/kernels.py [--out FILE.jsonl] [--only NAME]`.

Each line is checked against float64 before it is timed, on weights that rotate so that none is found in the L2 cache,
under CUDA graphs, medians. Limits are measured in the same run: a copy for what is bound by memory, a bf16 product for
what is bound by arithmetic, in turns with what it is compared with. A target that is missed is printed as a miss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels import ops, reference
from fewbits.kernels.choose import milliseconds
from fewbits.kernels.external import PackageError, missing
from fewbits.kernels.fragments import unpack_fragments
from fewbits.kernels.operands import Beside, PackedWeight
from fewbits.kernels.words import pack_words
from fewbits.outliers.parts import Sparse
from fewbits.packed.forms import LAID_OUT
from fewbits.packed.weight import KernelWeight

SIZE, GROUP, ROTATION = 8192, 128, 8
LAPS = 4  # of the rotating weights in a graph: its start counts little then, as in a model's
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # of a LLaMA-8B block: qkv, o, gate and up, down
BLOCKS = 32
#: Other packages, bits and rows of their lines.
PACKAGED = (
    *(("humming", bits, rows) for bits, rows in ((4, 1), (4, 8), (3, 1), (2, 1))),
    *(("gemlite", bits, rows) for bits, rows in ((4, 1), (4, 8), (2, 1))),
)


def graph_time(runs: list[Callable[[], Any]], laps: int = LAPS) -> float:
    """Median microseconds of one of `runs`, all of which are captured one after another in one graph, `laps` times."""
    graph = captured(runs * laps)
    return 1e3 * milliseconds(graph.replay, torch.device("cuda"), 0.0, 30) / (len(runs) * laps)


def in_turns(*runs: Callable[[], Any], rounds: int = 15) -> list[float]:
    """Median microseconds of each of `runs`, a graph each. They take turns: a GPU that is warm is slower, and gets warm
    by some more than by others."""
    graphs, device = [captured([run]) for run in runs], torch.device("cuda")
    times = [[milliseconds(graph.replay, device, 0.0, 3) for graph in graphs] for _ in range(rounds)]
    return [1e3 * statistics.median(taken) for taken in zip(*times, strict=True)]


def captured(runs: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """These calls in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in dict.fromkeys(runs):
            run()
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def weight(bits: int, outputs: int, inputs: int, *, table: bool = False, sparse: float = 0.0) -> PackedWeight:
    """A weight for `fragment_matmul`, of random codes: every pattern of bits is one."""
    shape = (outputs // 16, inputs // 64, 32 * bits)
    made = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
    beside = Beside()
    if sparse:
        kept = torch.rand(outputs, inputs) < sparse
        part = Sparse.from_dense(torch.randn(outputs, inputs) * 0.1, kept)
        beside = Beside(starts=part.rows.cuda(), places=part.columns.cuda(), entries=part.values.half().cuda())
    if table:
        levels = (torch.randn(outputs, 1 << bits, device="cuda") * 0.02).sort(1).values.half().T
        return PackedWeight(made, None, None, levels, bits, inputs, outputs, beside)
    groups = -(-inputs // GROUP)
    scale = (torch.rand(groups, outputs, device="cuda") * 0.01 + 0.001).half()
    zero = torch.randint(0, 1 << bits, (groups, outputs), device="cuda", dtype=torch.uint8)
    return PackedWeight(made, scale, zero, None, bits, GROUP, outputs, beside)


def size_of(given: PackedWeight) -> int:
    return sum(held.nbytes for held in given.flat() if isinstance(held, Tensor))


def right(x: Tensor, given: PackedWeight) -> float:
    """Relative distance of a product from the one in float64; raises where it is not half precision's."""
    codes = unpack_fragments(given.words, given.bits, given.outputs, nibbles=given.table is not None)
    exact = PackedWeight.of([
        held.double() if isinstance(held, Tensor) and held.is_floating_point() else held for held in given.flat()
    ])  # fmt: skip
    expected = reference.packed_matmul(x.double(), exact._replace(words=pack_words(codes, given.bits)))
    found = ops.fragment_matmul(x, *given.flat()).double()
    distance = float((found - expected).norm() / expected.norm())
    if not distance < 2e-3:
        raise AssertionError(f"wrong result: relative distance {distance:.3g} from float64")
    return distance


def vector(name: str, copy: float, target: float | None, *, rows: int = 1, **options: Any) -> dict[str, Any]:
    """A product SIZE x SIZE with one row of activations, or a few."""
    weights = [weight(outputs=SIZE, inputs=SIZE, **options) for _ in range(ROTATION)]
    x = torch.randn(rows, SIZE, device="cuda", dtype=torch.float16)
    distance = right(x, weights[0])
    took = graph_time([lambda given=given: ops.run_fragment_matmul(x, given) for given in weights])
    limit = size_of(weights[0]) / copy * 1e6
    return line(name, took, limit, target, f"distance {distance:.1e}", ratio=limit / took)


def line(name: str, took: float, limit: float, target: float | None, note: str, *, ratio: float) -> dict[str, Any]:
    """One row. ratio: what the target is about, the share of the limit or a speed-up."""
    met = None if target is None else ratio >= target
    row = {"name": name, "us": took, "limit_us": limit, "ratio": ratio, "target": target, "met": met, "note": note}
    said = "" if met is None else f"target {target:g}: {'met' if met else 'MISSED'}"
    print(f"{name:34} {took:10.1f} us  limit {limit:8.1f} us  ratio {ratio:5.2f}  {said:22} {note}", flush=True)
    return row


def int8_product(flops: float) -> list[dict[str, Any]]:
    """8192^3 with 8-bit activations against bf16: quantizing the rows is part of it."""
    n = SIZE
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    codes = torch.randint(-127, 128, (n, n), dtype=torch.int8, device="cuda")
    ones, zeros = torch.rand(n, device="cuda"), torch.zeros(n, device="cuda")
    sums = codes.sum(-1, dtype=torch.int32)

    def run(x: Tensor = a) -> Tensor:
        rows = ops.quantize_rows(x, None, None, -127, 127, True, 1e-5)
        return ops.int8_matmul(rows[0], codes, *rows[1:], ones, zeros, sums, None, torch.bfloat16, True)

    few = a[:64]
    rows = ops.quantize_rows(few, None, None, -127, 127, True, 1e-5)
    expected = (rows[0].double() * rows[1].double()[:, None]) @ (codes.double() * ones.double()[:, None]).T
    if not float((run(few).double() - expected).norm() / expected.norm()) < 4e-3:
        raise AssertionError("wrong int8 product")
    limit = 2 * n**3 / (2 * flops) * 1e6  # twice the bf16 rate
    eight = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    plain, took, other, fp8 = in_turns(
        lambda: a @ b.t(),
        run,
        lambda: torch._int_mm(codes, codes.t()),
        lambda: torch._scaled_mm(*eight, one, one, out_dtype=torch.bfloat16),
    )
    return [
        line("bf16 8192^3", plain, 2 * n**3 / flops * 1e6, None, "", ratio=1.0),
        line("W8A8 int8 8192^3, rows quantized", took, limit, 1.6, "times bf16", ratio=plain / took),
        line("torch _int_mm 8192^3", other, limit, None, "times bf16; product alone", ratio=plain / other),
        line("torch _scaled_mm fp8 8192^3", fp8, limit, 1.6, "times bf16; product alone", ratio=plain / fp8),
    ]


def decoding(copy: float) -> list[dict[str, Any]]:
    """The linear layers of a LLaMA-8B-shape model at batch 1, W4A16 and bf16, one graph each."""
    packed = [weight(4, n, k) for _ in range(BLOCKS) for n, k in LAYERS]
    inputs = {k: torch.randn(1, k, device="cuda", dtype=torch.float16) for _, k in LAYERS}
    right(inputs[LAYERS[0][1]], packed[0])
    shapes = [shape for _ in range(BLOCKS) for shape in LAYERS]
    runs = [lambda g=g, x=inputs[k]: ops.run_fragment_matmul(x, g) for g, (_, k) in zip(packed, shapes, strict=True)]
    ours = graph_time(runs, 1) * len(runs)
    read = sum(size_of(given) for given in packed)
    del packed, runs
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for n, k in shapes]
    wide = {k: x.to(torch.bfloat16) for k, x in inputs.items()}
    plain_runs = [lambda w=w, x=wide[w.shape[1]]: x @ w.t() for w in dense]
    plain = graph_time(plain_runs, 1) * len(dense)
    whole = sum(w.nbytes for w in dense)
    return [
        line("LLaMA-8B linears, bf16, a token", plain, whole / copy * 1e6, None, "", ratio=1.0),
        line("LLaMA-8B linears, W4A16, a token", ours, read / copy * 1e6, 3.0, "times bf16", ratio=plain / ours),
    ]


def torch_int4(copy: float) -> dict[str, Any]:
    """The 4-bit product that torch brings."""
    x = torch.randn(1, SIZE, device="cuda", dtype=torch.bfloat16)
    held = []
    for _ in range(ROTATION):
        codes = torch.randint(0, 256, (SIZE, SIZE // 2), dtype=torch.uint8, device="cuda")
        pair = torch.rand(SIZE // GROUP, SIZE, 2, dtype=torch.bfloat16, device="cuda")
        held.append((torch._convert_weight_to_int4pack(codes, 8), pair))
    run = torch.ops.aten._weight_int4pack_mm
    took = graph_time([lambda w=w, s=s: run(x, w, GROUP, s) for w, s in held])
    limit = (held[0][0].nbytes + held[0][1].nbytes) / copy * 1e6
    return line("torch int4 8192^2 g128, batch 1", took, limit, None, "", ratio=limit / took)


def packaged(name: str, copy: float, bits: int, rows: int) -> dict[str, Any] | None:
    """The same product by another package, where that is installed, without zero points: what suits it best."""
    if missing(name) is not None:
        return None
    label = f"{name} W{bits}A16 g{GROUP} 8192^2, batch {rows}"
    groups = SIZE // GROUP
    codes = torch.randint(0, 1 << bits, (SIZE, SIZE), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(groups, SIZE, device="cuda") * 0.01 + 0.001).half()
    zero = torch.full((groups, SIZE), 1 << (bits - 1), dtype=torch.uint8, device="cuda")
    x = torch.randn(rows, SIZE, device="cuda", dtype=torch.float16)
    try:
        first = LAID_OUT[name](KernelWeight(codes, bits, GROUP, scale, zero), None, x.dtype, x.device)
        expected = x.double() @ first.decoded().double().T
        distance = float((first.product(x).double() - expected).norm() / expected.norm())
        if not distance < 2e-3:
            raise AssertionError(f"wrong result: relative distance {distance:.3g} from float64")
        layers = [first, *(deepcopy(first) for _ in range(ROTATION - 1))]
        took = graph_time([lambda layer=layer: layer.product(x) for layer in layers])
    except PackageError as error:  # another package's failure is a line of this table
        print(f"{label}: {error}")
        return None
    limit = SIZE * SIZE * (bits / 8 + 2 / GROUP) / copy * 1e6
    return line(label, took, limit, None, f"distance {distance:.1e}", ratio=limit / took)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the rows there, one JSON line each")
    parser.add_argument("--only", choices=["vector", "int8", "decode"], help="a part of the table")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("this table needs a CUDA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    from fewbits.speed.machine import measure

    machine = measure(torch.device("cuda"), torch.bfloat16)
    print(f"{machine.name}: copy {machine.copy / 1e12:.2f} TB/s, bf16 {machine.flops / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    if asked.only in (None, "vector"):
        rows += [
            vector("W4A16 g128 8192^2, batch 1", machine.copy, 0.8, bits=4),
            vector("W3A16 g128 8192^2, batch 1", machine.copy, 0.8, bits=3),
            vector("W2A16 g128 8192^2, batch 1", machine.copy, None, bits=2),
            vector("LUT 4 bits 8192^2, batch 1", machine.copy, 0.8, bits=4, table=True),
            vector("LUT 3 bits 8192^2, batch 1", machine.copy, 0.8, bits=3, table=True),
            vector("LUT 3 bits + 0.45 % sparse", machine.copy, None, bits=3, table=True, sparse=0.0045),
            vector("W4A16 g128 8192^2, batch 8", machine.copy, None, bits=4, rows=8),
            torch_int4(machine.copy),
        ]
        rows += [row for case in PACKAGED if (row := packaged(case[0], machine.copy, *case[1:])) is not None]
    if asked.only in (None, "int8"):
        rows += int8_product(machine.flops)
    if asked.only in (None, "decode"):
        rows += decoding(machine.copy)
    if asked.out is not None:
        where = {"machine": f"{machine.name}, copy {machine.copy / 1e12:.2f} TB/s", "torch": torch.__version__}
        asked.out.write_text("".join(json.dumps(row | where) + "\n" for row in rows))
    missed = [row["name"] for row in rows if row["met"] is False]
    print(f"{len(missed)} targets missed{': ' + ', '.join(missed) if missed else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
