"""Does each paper's claim show on small trained models? Every method beside round-to-nearest at the same bits.

    python benchmarks/claims.py --zoo ZOO --data DATA --device cuda --jobs 8 --out claims.jsonl

ZOO and DATA are folders of trained models and evaluation data in the standard layouts. One JSON line per run; a run
that is already in the file is not repeated. `--table` prints the markdown table of what the file holds. Losing rows
stay in.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

IMAGES = ("cifar10/calibration.parquet", "cifar10/test.parquet")
TEXT = ("docs-text/calibration.jsonl", "docs-text/test.jsonl")
#: Few steps, so that a CPU can do them.
ADAROUND = "adaround:iterations=600,per_channel=true,samples=512"
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
]  # fmt: skip


def command(
    zoo: Path, data: Path, model: str, bits: str, recipe: str, seed: int, device: str, out: Path, limit: int | None
) -> list[str]:
    calibration, evaluation = TEXT if model.startswith(("opt", "bloom", "llama")) else IMAGES
    name, _, options = recipe.partition(":")
    given = [pair for pair in options.split(",") if pair]
    line = [sys.executable, "-m", "fewbits", "quantize", str(zoo / model), "--recipe", name, "--bits", bits]
    line += ["--calib", str(data / calibration), "--eval", str(data / evaluation), "--seed", str(seed)]
    line += ["--device", device, "--out", str(out), "--json"]
    for pair in given:
        line += ["--set", pair]
    if limit:
        line += ["--eval-samples", str(limit)]
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("claims.jsonl"))
    parser.add_argument("--eval-samples", type=int, default=None)
    parser.add_argument("--only", default="", help="run only models whose name starts so")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.out.read_text().splitlines()]))
        return
    done = set()
    if options.out.exists():
        done = {
            (r["name"], r["bits_given"], r["recipe_given"], r["seed"])
            for r in map(json.loads, options.out.read_text().splitlines())
        }
    jobs = [
        (m, b, r)
        for m, b, recipes in RUNS
        for r in recipes
        if m.startswith(options.only) and (m, b, r, options.seed) not in done
    ]
    # Long ones first, so that nothing long is left alone at the end.
    jobs.sort(key=lambda job: -("brecq" in job[2]) * 2 - ("adaround" in job[2]))

    def work(job: tuple[str, str, str]) -> dict:
        model, bits, recipe = job
        with tempfile.TemporaryDirectory() as folder:
            line = command(
                options.zoo,
                options.data,
                model,
                bits,
                recipe,
                options.seed,
                options.device,
                Path(folder) / "out",
                options.eval_samples,
            )
            started = time.monotonic()
            ran = subprocess.run(line, capture_output=True, text=True)
            row = {
                "name": model,
                "bits_given": bits,
                "recipe_given": recipe,
                "seed": options.seed,
                "wall": round(time.monotonic() - started, 1),
            }
            if ran.returncode:
                return {**row, "error": ran.stderr.strip().splitlines()[-1:]}
            found = json.loads(ran.stdout.splitlines()[-1])
            keep = (
                "metric",
                "metric_before",
                "metric_after",
                "bytes_before",
                "bytes_after",
                "seconds",
                "peak_memory_bytes",
                "notes",
                "device",
            )
            return {**row, **{key: found[key] for key in keep}}

    with ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            row = future.result()
            print(json.dumps(row), flush=True)
            with options.out.open("a") as handle:
                handle.write(json.dumps(row) + "\n")


def table(rows: list[dict]) -> str:
    order = {(m, b, r): n for n, (m, b, r) in enumerate((m, b, r) for m, b, recipes in RUNS for r in recipes)}
    rows = sorted(rows, key=lambda r: order.get((r["name"], r["bits_given"], r["recipe_given"]), 10**6))
    lines = [
        "| model | bits | recipe | float | quantized | size | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(
                f"| {row['name']} | {row['bits_given']} | {row['recipe_given']} | | failed: {row['error']} | | |"
            )
            continue
        unit = " %" if row["metric"] in ("top1", "accuracy") else ""
        share = row["bytes_after"] / row["bytes_before"]
        lines.append(
            f"| {row['name']} | {row['bits_given']} | {row['recipe_given']} "
            f"| {row['metric_before']:.2f}{unit} | {row['metric_after']:.2f}{unit} "
            f"| {share:.0%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
