"""The table of one GPU: products with packed weights, a packed block, and how long quantizing takes.

    python benchmarks/gpu.py --out OUT             # measures what OUT does not hold yet, about seven minutes on an H200
    python benchmarks/gpu.py --table benchmarks    # the table of stored rows, with no GPU

Each part is a script beside this one (`kernels.py`, `packed_block.py`, `quantizing.py`), whose rows, JSON lines, end in
OUT; a part that is there already is not measured again. The table has what was measured, the limit (of copying the
same bytes, or of bfloat16 products in the same run), the target, and what other packages take, measured beside ours or
reported on such a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantizing import ANCHORS, MEMORY

HERE = Path(__file__).parent
PARTS = ("kernels", "packed_block", "quantizing")


def rows_of(folder: Path, part: str) -> list[dict[str, Any]]:
    path = folder / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def measured(folder: Path, part: str) -> bool:
    """Run a part whose rows are missing; whether it succeeded. Rows appear whole or not at all."""
    if rows_of(folder, part):
        return True
    begun = folder / f"{part}.part"
    begun.unlink(missing_ok=True)
    if subprocess.run([sys.executable, str(HERE / f"{part}.py"), "--out", str(begun)], check=False).returncode:
        return False
    begun.replace(folder / f"{part}.jsonl")
    return True


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def kernel_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| product | us | limit, us | share of the limit, or times bf16 | target |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        times = "times bf16" in row["note"]
        ratio = f"{row['ratio']:.2f} times" if times else f"{100 * row['limit_us'] / row['us']:.0f} %"
        wanted = ""
        if row["target"] is not None:
            wanted = f"{row['target']:g} times" if times else f"{100 * row['target']:.0f} %"
            wanted += f", {verdict(row['met'])}"
        lines.append(f"| {row['name']} | {row['us']:.1f} | {row['limit_us']:.1f} | {ratio} | {wanted} |")
    return lines


def block_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| block in W8A8 | ms | times float |", "| --- | ---: | ---: |"]
    for row in rows:
        name = f"{row['dtype']}, {row['tokens']} tokens, {row['block']}"
        lines.append(f"| {name} | {row['ms']:.3f} | {row['times float']:.2f} |")
    return lines


def quantizing_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| quantizing | s | first unit, median, last unit | target | GB | target | others |",
        "| --- | ---: | --- | --- | ---: | --- | --- |",
    ]
    for row in rows:
        taken = row.get("seconds_for_32_layers", row["seconds"])
        (target, _), *others = ANCHORS[row["recipe"]]
        units, peak = row["units"], row["peak_memory_bytes"] / 1e9
        most = MEMORY.get(row["recipe"])
        room = f"{most:g} GB, {verdict(peak <= most)}" if most else ""
        beside = "; ".join(f"{figure:g} ({what})" for figure, what in others)
        middle = sorted(units)[len(units) // 2]
        lines.append(
            f"| {row['run']} | {taken:.1f} | {units[0]:.2f}, {middle:.2f}, {units[-1]:.2f} | {target:g} s, "
            f"{verdict(taken <= target)} | {peak:.2f} | {room} | {beside} |"
        )
    return lines


def table(folder: Path) -> str:
    made: list[str] = []
    for part, lines in zip(PARTS, (kernel_lines, block_lines, quantizing_lines), strict=True):
        if rows := rows_of(folder, part):
            machines = dict.fromkeys(f"{row['machine']}, torch {row['torch']}" for row in rows)
            made += [*lines(rows), "", f"({'; '.join(machines)})", ""]
    return "\n".join(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder of the rows")
    where.add_argument("--table", type=Path, help="print the table of the rows in this folder, and measure nothing")
    asked = parser.parse_args()
    done = True
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            if not measured(asked.out, part):
                print(f"{part} failed; its rows are missing", file=sys.stderr)
                done = False
    print(table(asked.out or asked.table))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
