"""The table of GPU measurements says what the stored rows say, and measures nothing that is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "benchmarks"
if not HERE.is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "gpu.py"), *arguments], capture_output=True, text=True, timeout=120
    )


def test_every_stored_row_is_a_line_and_misses_are_said(tmp_path: Path) -> None:
    for part in ("kernels", "packed_block", "quantizing"):
        shutil.copy(HERE / f"{part}.jsonl", tmp_path)
    shown = run("--table", str(tmp_path)).stdout
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        line = next(line for line in shown.splitlines() if line.startswith(f"| {row['name']} |"))
        assert f"| {row['us']:.1f} |" in line
        assert ("missed" in line) == (row["met"] is False) and ("met" in line) == (row["met"] is True)
    again = run("--out", str(tmp_path))  # all parts are there: nothing is measured, so no GPU is needed
    assert again.returncode == 0 and again.stdout == shown


def test_what_the_readme_says_of_the_gpu_is_in_the_table() -> None:
    readme = (HERE.parent / "README.md").read_text("utf-8")
    rows = {row["name"]: row for row in map(json.loads, (HERE / "kernels.jsonl").read_text("utf-8").splitlines())}
    for name in ("W4A16 g128 8192^2, batch 1", "LUT 4 bits 8192^2, batch 1"):
        assert f" {rows[name]['us']:.1f} us, {100 * rows[name]['ratio']:.0f} %" in readme
    int8 = rows["W8A8 int8 8192^3, rows quantized"]
    assert f"{int8['us']:.0f} us, {int8['ratio']:.2f} times" in readme
