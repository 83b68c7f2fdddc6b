"""Does each paper's claim show on small trained models? Every method beside round-to-nearest at the same bits.

    python benchmarks/claims.py --zoo ZOO --data DATA --device cuda --jobs 8 --out claims.jsonl

ZOO and DATA are folders of trained models and evaluation data in the standard layouts. One JSON line per run; a run
that is already in the file is not repeated. Several devices (`cuda:0,cuda:1`) share the runs, several seeds (`0,1,2`)
multiply them. `--table` prints the markdown table of what the file holds, with the mean of the seeds and half the
distance of the outermost. Losing rows stay in.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from statistics import fmean
from typing import Any

from fewbits.bench.matrix import Cell
from fewbits.bench.run import run_cell

IMAGES = ("cifar10/calibration.parquet", "cifar10/test.parquet")
TEXT = ("docs-text/calibration.jsonl", "docs-text/test.jsonl")
#: Few steps, so that a CPU can do them.
ADAROUND = "adaround:iterations=600,per_channel=true,samples=512"
#: MobileNetV2's weight of the rounding regulariser is that of the two papers' settings; a quarter of their steps.
MOBILE = ["rtn", "brecq:iters_w=5000,iters_a=1250,round_weight=0.1"]
MOBILE += [f"qdrop:iters=5000,round_weight=0.1{more}" for more in ("", ",keep=1")]
#: The papers' own settings: 20,000 steps a block, 1,024 images.
DROP = ["rtn", "brecq", "qdrop", "qdrop:keep=1"]
#: BRECQ on a transformer: with two steps nothing is learned, what is left are its places and ranges.
VIT = "brecq:iters_w=400,iters_a=200,samples=256"
PLACES = [f"brecq:iters_w=1,iters_a=1,samples=256{more}" for more in ("", ",placement=inputs")]
PLACES += [VIT, f"{VIT},placement=inputs"]
OPT = "brecq:iters_w=300,iters_a=100,samples=128"
ADAROUND_VIT = "adaround:iterations=300,per_channel=true,samples=256"
QDROP_VIT = "qdrop:iters=300,samples=256"
#: model, bits, recipes as recipe[:option=value,...]
RUNS: list[tuple[str, str, list[str]]] = [
    ("opt", "W4A16", ["rtn", "gptq", "gptq:act_order=true"]),
    ("opt", "W3A16", ["rtn", "gptq", "gptq:act_order=true", "gptq:regime=parallel", "brecq:iters_w=2000,samples=128"]),
    ("bloom", "W4A16", ["rtn", "gptq"]),
    ("bloom", "W3A16", ["rtn", "gptq"]),
    ("opt-outliers", "W8A8", ["rtn", "smoothquant", "smoothquant:activations=tensor_static"]),
    ("opt-outliers", "W8A8", ["smoothquant:activations=tensor,weights=tensor"]),
    ("opt-outliers", "W4A8", ["rtn", "smoothquant", "gptq", "smoothquant+gptq"]),
    ("vit_tiny", "W8A8", ["rtn", "smoothquant", "repq-vit"]),
    ("vit_tiny", "W6A6", ["rtn", "smoothquant", "repq-vit"]),
    ("vit_tiny", "W4A4", ["rtn", "smoothquant", "repq-vit", "repq-vit:variant=released"]),
    ("vit_tiny", "W4A4", ["repq-vit+brecq:iters_w=2000,iters_a=1000,samples=256"]),
    ("vit_tiny", "W3A16", ["rtn", "gptq", "brecq:iters_w=2000,samples=512"]),
    ("vit_tiny", "W2A16", ["rtn", "gptq"]),
    ("swin_mini", "W4A4", ["rtn", "repq-vit"]),
    ("resnet10t_w32", "W4A16", ["rtn", "gptq", ADAROUND, "brecq:iters_w=2000"]),
    ("resnet10t_w32", "W3A16", ["rtn", "gptq", ADAROUND, "brecq:iters_w=2000"]),
    ("resnet10t_w32", "W2A16", ["rtn", "gptq", ADAROUND, "brecq:iters_w=2000"]),
    ("resnet10t_w32", "W2A16", ["brecq:iters_w=2000,opt_mode=fisher_diag"]),
    ("resnet10t_w32", "W4A4", ["rtn", "brecq:iters_w=2000,iters_a=1000"]),
    ("mobilenetv2_050", "W4A16", ["rtn", "gptq", ADAROUND, "brecq:iters_w=2000"]),
    ("regnetx_002", "W3A16", ["rtn", "gptq", "brecq:iters_w=2000"]),
    ("resnet10t_w32", "W2A4", DROP),
    ("resnet10t_w32", "W2A2", DROP),
    ("mobilenetv2_050", "W2A4", MOBILE),
    ("vit_tiny", "W4A16", ["rtn", ADAROUND_VIT, VIT]),
    ("vit_tiny", "W16A4", ["rtn", "rtn:samples=256", *PLACES]),
    ("vit_tiny", "W4A4", ["rtn:samples=256", ADAROUND_VIT, *PLACES, QDROP_VIT, f"{QDROP_VIT},placement=inputs"]),
    ("swin_mini", "W4A4", PLACES),
    ("opt", "W8A8", ["rtn", OPT, f"{OPT},placement=inputs"]),
    ("resnet10t_w32", "W3A3", DROP),
    ("mobilenetv2_050", "W3A3", MOBILE),
]  # fmt: skip
#: Of what a run reports, what its row keeps.
KEPT = (
    "metric", "metric_before", "metric_after", "bytes_before", "bytes_after", "seconds", "peak_memory_bytes", "notes",
    "machine", "error",
)  # fmt: skip


def cells(options: argparse.Namespace, seeds: Iterable[int]) -> list[Cell]:
    """The runs whose name starts as `--only` says; those that train first, so that nothing long is left at the end."""
    found = []
    for model, bits, recipes in RUNS:
        calibration, evaluation = TEXT if model.startswith(("opt", "bloom", "llama")) else IMAGES
        for given in recipes:
            if not f"{model} {bits} {given}".startswith(tuple(options.only or [""])):
                continue
            name, _, rest = given.partition(":")
            chosen = dict(pair.split("=", 1) for pair in rest.split(",") if pair)
            found += [
                Cell(
                    "", model, str(options.zoo / model), name, given, bits, seed, str(options.data / calibration),
                    str(options.data / evaluation), eval_samples=options.eval_samples, options=chosen,
                )
                for seed in seeds
            ]  # fmt: skip
    return sorted(found, key=lambda cell: not any(name in cell.recipe for name in ("adaround", "brecq", "qdrop")))


def run(todo: list[Cell], devices: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """The row of each run as it ends; `jobs` at a time, dealt out among the devices."""
    free: Queue[str] = Queue()
    for number in range(max(jobs, len(devices))):
        free.put(devices[number % len(devices)])

    def work(cell: Cell) -> dict[str, Any]:
        device = free.get()
        try:
            row = run_cell(cell, device, floats)
        finally:
            free.put(device)
        named = {"name": cell.model, "bits_given": cell.bits, "recipe_given": cell.label, "seed": cell.seed}
        return {**named, "wall": row["wall_seconds"], **{key: row[key] for key in KEPT if key in row}}

    with tempfile.TemporaryDirectory() as floats, ThreadPoolExecutor(free.qsize()) as pool:
        for future in as_completed([pool.submit(work, cell) for cell in todo]):
            yield future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="one, or several with commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", default="0", help="one, or several with commas")
    parser.add_argument("--out", type=Path, default=Path("claims.jsonl"))
    parser.add_argument("--eval-samples", type=int, default=None)
    parser.add_argument(
        "--only",
        action="append",
        help='run only what starts so: "vit_tiny", "resnet10t_w32 W2A4 qdrop"; may be repeated',
    )
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.table:
        print(table(rows))
        return
    done = {(row["name"], row["bits_given"], row["recipe_given"], row["seed"]) for row in rows}
    wanted = cells(options, [int(seed) for seed in options.seed.split(",")])
    todo = [cell for cell in wanted if (cell.model, cell.bits, cell.label, cell.seed) not in done]
    for row in run(todo, options.device.split(","), options.jobs):
        print(json.dumps(row), flush=True)
        with options.out.open("a") as handle:
            handle.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per model, bits and recipe in the order of `RUNS`."""
    lines = [
        "| model | bits | recipe | float | quantized | size | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, bits, recipes in RUNS:
        for given in recipes:
            held = [r for r in rows if (r["name"], r["bits_given"], r["recipe_given"]) == (model, bits, given)]
            if held:
                lines.append(f"| {model} | {bits} | {given} | {_measured(held)} |")
    return "\n".join(lines)


def _measured(rows: list[dict[str, Any]]) -> str:
    """The last four columns, of the seeds of one run."""
    fine = [row for row in rows if "error" not in row]
    if not fine:
        return f"| failed: {rows[-1]['error']} | | "
    unit = " %" if fine[0]["metric"] in ("top1", "accuracy") else ""
    after = [row["metric_after"] for row in fine]
    spread = f" ±{(max(after) - min(after)) / 2:.2f}" if len(after) > 1 else ""
    share = fine[0]["bytes_after"] / fine[0]["bytes_before"]
    seconds = fmean(row["seconds"] for row in fine)
    return f"{fine[0]['metric_before']:.2f}{unit} | {fmean(after):.2f}{spread}{unit} | {share:.0%} | {seconds:.0f}"


if __name__ == "__main__":
    main()
