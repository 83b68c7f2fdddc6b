"""Does following the diagnosis help? Quantize, diagnose, follow the first advice, measure on data not seen before.

    python benchmarks/diagnose.py --zoo ZOO --data DATA --out diagnose.jsonl

ZOO and DATA are folders of trained models and data in the standard layouts. The diagnosis sees the calibration data
only; every number in the table is measured on the test data. One JSON line per model; a model that is already in the
file is not repeated. `--table` prints the markdown table of what the file holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGES = ("cifar10/calibration.parquet", "cifar10/test.parquet")
TEXT = ("docs-text/calibration.jsonl", "docs-text/test.jsonl")
#: model, recipe, bits, data
RUNS: list[tuple[str, str, str, tuple[str, str]]] = [
    ("vit_tiny", "rtn", "W4A4", IMAGES),
    ("swin_mini", "rtn", "W4A4", IMAGES),
    ("mobilenetv2_050", "rtn", "W4A8", IMAGES),
    ("resnet10t_w32", "rtn", "W3A8", IMAGES),
    ("opt", "rtn", "W3A16", TEXT),
    ("opt", "gptq", "W3A16", TEXT),
]


def run(*words: object) -> dict[str, Any]:
    """One command of the command line; its JSON."""
    ran = subprocess.run([sys.executable, "-m", "fewbits", *map(str, words), "--json"], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, model: str, recipe: str, bits: str, data: tuple[str, str]) -> dict[str, Any]:
    """One model: as it is quantized, the diagnosis, and quantized again with each advice."""
    started = time.monotonic()
    shared: list[object] = ["--device", options.device]
    if options.eval_samples:
        shared += ["--eval-samples", options.eval_samples]
    with tempfile.TemporaryDirectory() as scratch:

        def quantize(name: str, change: str | None) -> dict[str, Any]:
            extra: list[object] = ["--set", change] if change else []
            return run(
                "quantize", options.zoo / model, "--recipe", recipe, "--bits", bits, "--calib", options.data / data[0],
                "--eval", options.data / data[1], "--out", Path(scratch) / name, *shared, *extra,
            )  # fmt: skip

        plain = quantize("plain", None)
        wanted = ["--samples", options.samples] if options.samples else []
        found = run("diagnose", Path(scratch) / "plain", "--device", options.device, *wanted)
        advice = {"first": found["suggestions"][:1], "pattern": found["patterns"][:1], "together": found["together"]}
        row: dict[str, Any] = {
            "model": model,
            "recipe": recipe,
            "bits": bits,
            "metric": plain["metric"],
            "higher_is_better": plain["higher_is_better"],
            "float": plain["metric_before"],
            "quantized": plain["metric_after"],
            "samples": plain["evaluation"]["after"]["samples"],
            "bytes": plain["bytes_after"],
            "diagnosed_on": found["data"]["samples"],
        }
        for name, items in advice.items():
            if items:
                item = items[-1]
                made = quantize(name, item["option"])
                row[name] = {
                    "option": item["option"],
                    "predicted": item["predicted"],
                    "metric": made["metric_after"],
                    "bytes": made["bytes_after"],
                }
    return {**row, "wall": round(time.monotonic() - started, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | recipe | float | quantized | first suggestion | predicted | followed | size | first five |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        first, several = row.get("first"), row.get("together")
        told = ["none", "", "", ""]
        if first:
            told = [
                f"`{first['option'].removeprefix('sites=')}`",
                f"{first['predicted']:.2f}",
                f"{first['metric']:.2f}",
                f"{(first['bytes'] - row['bytes']) / 1000:+.1f} KB",
            ]
        lines.append(
            f"| {row['model']} | {row['recipe']} {row['bits']} | {row['float']:.2f} | {row['quantized']:.2f} "
            f"| {' | '.join(told)} | {'' if several is None else format(several['metric'], '.2f')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=None, help="of the diagnosis; by default 64, of windows 8")
    parser.add_argument("--eval-samples", type=int, default=None)
    parser.add_argument("--only", default="", help="run only models whose name starts so")
    parser.add_argument("--out", type=Path, default=Path("diagnose.jsonl"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if not options.table:
        done = {(row["model"], row["recipe"], row["bits"]) for row in rows}
        for model, recipe, bits, data in RUNS:
            if model.startswith(options.only) and (model, recipe, bits) not in done:
                row = measure(options, model, recipe, bits, data)
                with options.out.open("a") as handle:
                    handle.write(json.dumps(row) + "\n")
                rows.append(row)
                print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
