"""Every export target: quantize, export, reload in the real runtime, compare, and say how large the files are.

    python benchmarks/deploy.py --zoo ZOO --data DATA --out deploy.jsonl
    python benchmarks/deploy.py --out deploy.jsonl --table

ZOO and DATA are folders of trained models and data in the standard layouts. One JSON line per run; a run that is in the
file is not repeated. The comparison is the target's own (`fewbits export`), on samples of the test data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

IMAGES = ("cifar10/calibration.parquet", "cifar10/test.parquet")
TEXT = ("docs-text/calibration.jsonl", "docs-text/test.jsonl")
SENTENCES = ("sst2/dev.tsv", "sst2/test.tsv")
#: target, model, recipe, bits, recipe options, target options, data
RUNS: list[tuple[str, str, str, str, dict[str, str], dict[str, str], tuple[str, str]]] = [
    ("compressed-tensors", "opt", "smoothquant", "W8A8", {}, {}, TEXT),
    ("compressed-tensors", "opt", "gptq", "W4A16g32", {}, {}, TEXT),
    ("compressed-tensors", "llama", "gptq", "W4A8g32", {}, {}, TEXT),
    ("gptq", "opt", "gptq", "W4A16g32", {}, {}, TEXT),
    ("gptq", "llama", "gptq", "W3A16g32", {"act_order": "true"}, {}, TEXT),
    ("awq", "opt", "awq", "W4A16g32", {}, {}, TEXT),
    ("gguf", "llama", "gptq", "W4A16g32", {}, {}, TEXT),
    ("gguf", "llama", "rtn", "W8A16g32", {}, {}, TEXT),
    ("onnx", "resnet10t_w32", "rtn", "W8A8", {}, {}, IMAGES),
    ("onnx", "mobilenetv2_050", "brecq", "W8A8", {"iters_w": "50", "iters_a": "50"}, {}, IMAGES),
    ("onnx", "vit_tiny", "gptq", "W8A8", {}, {}, IMAGES),
    ("onnx", "bert_sst2", "rtn", "W8A8", {}, {}, SENTENCES),
    ("onnx", "opt", "gptq", "W4A16g32", {}, {}, TEXT),
    ("torch", "vit_tiny", "rtn", "W8A8", {}, {}, IMAGES),
    ("torch", "opt", "gptq", "W4A16g32", {}, {}, TEXT),
    ("integer", "resnet10t_w32", "jacob-integer-only", "W8A8", {}, {}, IMAGES),
]
#: The profile that a target's checkpoints are planned for, where it is not of the target's name.
PROFILES = {"onnx": "onnxruntime", "integer": ""}


def run(*words: object) -> dict[str, Any]:
    """One command of the command line; its JSON."""
    ran = subprocess.run([sys.executable, "-m", "fewbits", *map(str, words), "--json"], capture_output=True, text=True)
    if ran.returncode:
        return {"error": ran.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace, place: tuple[Any, ...]) -> dict[str, Any]:
    """Quantize for one target, export and compare."""
    target, model, recipe, bits, settings, more, (calibration, test) = place
    samples = options.windows if test.endswith(".jsonl") else options.samples
    row = {"target": target, "model": model, "recipe": recipe, "bits": bits, "samples": samples}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "quantized"
        profile = PROFILES.get(target, target)
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        made = run(
            "quantize", options.zoo / model, "--recipe", recipe, "--bits", bits, "--out", out, *words,
            "--calib", options.data / calibration, "--samples", 64, *(["--target", profile] if profile else []),
        )  # fmt: skip
        if "error" in made:
            return {**row, **made}
        words = [word for key, value in more.items() for word in ("--set", f"{key}={value}")]
        left = run("export", out, "--to", target, "--data", options.data / test, "--samples", samples, *words)
    if "error" in left:
        return {**row, **left}
    row |= {"bytes_float": made["bytes_before"], "bytes": left["bytes"], "comparison": left["comparison"]}
    return {**row, "written": left["written"], "versions": made["versions"]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown, failures included."""
    lines = ["| target | model | recipe | float MB | files MB | runtime | same top-1 | largest difference, of |"]
    lines.append("|---|---|---|---:|---:|---|---:|---:|")
    for row in rows:
        head = f"| {row['target']} | {row['model']} | {row['recipe']} {row['bits']} |"
        if "error" in row:
            lines.append(f"{head} | | {row['error']} | | |")
            continue
        sizes = f" {row['bytes_float'] / 1e6:.2f} | {row['bytes'] / 1e6:.2f} |"
        for found in row["comparison"]:
            same = "" if found.get("agreement") is None else f"{100 * found['agreement']:.2f} %"
            far = f"{found['difference']:.2g}, {found['scale']:.3g}"
            lines.append(f"{head}{sizes} {found['runtime']} | {same} | {far} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--samples", type=int, default=256, help="images or sentences to compare on")
    parser.add_argument("--windows", type=int, default=8, help="token windows to compare on")
    parser.add_argument("--only", help="one target")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if not options.table:
        done = {(row["target"], row["model"], row["recipe"], row["bits"]) for row in rows if "error" not in row}
        for place in RUNS:
            if place[:4] in done or options.only not in (None, place[0]):
                continue
            row = measure(options, place)
            rows.append(row)
            with options.out.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
