"""Running a matrix: every cell in a process of its own, one after another, several at a time, or on Ray."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import Any

from fewbits.bench.matrix import Cell, Matrix
from fewbits.errors import FewbitsError

Row = dict[str, Any]
ROWS = "rows.jsonl"
_TAKEN = (
    "kind", "metric", "metric_before", "metric_after", "higher_is_better", "bytes_before", "bytes_after", "size",
    "seconds", "seconds_total", "peak_memory_bytes", "needs_data", "needs_gradients", "calibration", "notes",
    "versions",
)  # fmt: skip


def run_cell(cell: Cell, device: str, kept: str | None = None) -> Row:
    """Quantize and measure in a fresh process; what went wrong is a row too.

    A process of its own gives an honest peak of memory, and a crash costs one row. `kept` is a folder for the float
    models' metrics, each of which is measured once.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as folder:
        line = [sys.executable, "-m", "fewbits", "quantize", cell.ref, "--recipe", cell.recipe, "--bits", cell.bits]
        line += ["--seed", str(cell.seed), "--device", device, "--out", str(Path(folder) / "out"), "--json"]
        for flag, value in (
            ("--calib", cell.calib), ("--eval", cell.eval_data), ("--samples", cell.samples),
            ("--eval-samples", cell.eval_samples), ("--seqlen", cell.seqlen),
        ):  # fmt: skip
            if value is not None:
                line += [flag, str(value)]
        if kept is not None and cell.eval_data is not None:
            place = (cell.ref, cell.eval_data, cell.eval_samples, cell.seqlen, device.partition(":")[0])
            name = hashlib.sha256(repr(place).encode()).hexdigest()[:16]
            line += ["--float-metric", str(Path(kept) / f"{name}.json")]
        for key, value in cell.options.items():
            line += ["--set", f"{key}={value}"]
        ran = subprocess.run(line, capture_output=True, text=True, check=False)
    row: Row = {**cell.to_dict(), "key": cell.key, "machine": machine(device)}
    row["wall_seconds"] = round(time.monotonic() - started, 1)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        error = next((text for text in reversed(lines) if text.strip()), lines[-1])
        return {**row, "error": error.strip().removeprefix("error: ")}
    found = json.loads(ran.stdout.splitlines()[-1])
    return {**row, **{name: found[name] for name in _TAKEN}}


def machine(device: str) -> str:
    """The kind of machine: processor or card, and cores."""
    cores = f"{os.cpu_count()} CPU cores"
    if device.startswith("cuda"):
        import torch

        return f"{torch.cuda.get_device_name(device)}, {cores}"
    return f"{platform.machine()}, {cores}"


def read_rows(file: Path) -> list[Row]:
    """The rows of a file. A last line cut short by a kill is dropped; any other damage raises `FewbitsError`."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    rows: list[Row] = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                break
            raise FewbitsError(f"{file}: line {number + 1} is damaged; delete that line and resume") from error
    return rows


def run_matrix(
    matrix: Matrix,
    out: Path,
    *,
    jobs: int = 1,
    ray_address: str | None = None,
    retry: bool = False,
    on_row: Callable[[Row, int, int], None] | None = None,
) -> list[Row]:
    """Run what is not yet in `out/rows.jsonl`; returns all rows of the matrix, in its order.

    The matrix' device may be several, `cuda:0,cuda:1`: cells are then dealt out among them.
    jobs: cells at a time on this machine. ray_address: "local" starts a cluster here, anything else joins one ("auto").
    Then Ray places the cells, `jobs` of them to a machine's cores or card; references must be readable there. retry:
    run failed cells again. on_row: called after each cell with (row, done, of). An interrupt loses the cells in flight.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / ROWS
    kept = {row["key"]: row for row in read_rows(file) if not (retry and "error" in row)}
    _write_rows(file, kept.values())
    todo = [cell for cell in matrix.cells if cell.key not in kept]
    done = len(matrix.cells) - len(todo)
    todo.sort(key=_short)  # what takes long starts first, so that nothing long is left alone at the end
    floats = str((out / "float").absolute())
    if ray_address is None:
        place = _local(todo, matrix.device, jobs, floats)
    else:
        place = _ray(todo, matrix.device, jobs, floats, ray_address)
    with file.open("a", encoding="utf-8") as handle:
        for row in place:
            kept[row["key"]] = row
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
            done += 1
            if on_row is not None:
                on_row(row, done, len(matrix.cells))
    return [kept[cell.key] for cell in matrix.cells]


def _short(cell: Cell) -> bool:
    """Whether a cell trains nothing. One whose recipe cannot be built says so when it runs."""
    from fewbits.papers import build_recipe

    try:
        recipe = build_recipe(cell.recipe, bits=cell.bits, options=dict(cell.options))
    except FewbitsError:
        return True
    return not any(step.gradients for step in recipe.steps)


def _write_rows(file: Path, rows: Iterable[Row]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, file)


def _local(cells: list[Cell], device: str, jobs: int, floats: str) -> Iterator[Row]:
    free: Queue[str] = Queue()
    devices = device.split(",")
    for number in range(max(jobs, len(devices))):
        free.put(devices[number % len(devices)])

    def work(cell: Cell) -> Row:
        taken = free.get()
        try:
            return run_cell(cell, taken, floats)
        finally:
            free.put(taken)

    pool = ThreadPoolExecutor(free.qsize())
    try:
        for future in as_completed([pool.submit(work, cell) for cell in cells]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ray(cells: list[Cell], device: str, jobs: int, floats: str, address: str) -> Iterator[Row]:
    # Under `uv run` Ray would start its workers by the same command in a copy of the folder; this environment is all
    # they need. Ray reads the variable when it is imported.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError as error:
        raise FewbitsError("--ray needs Ray: install fewbits[bench]") from error
    if "," in device:
        raise FewbitsError(f"device {device!r}: Ray deals out the cards itself; give `cuda`")
    share = {"num_gpus": 1 / jobs, "num_cpus": 0} if device.startswith("cuda") else {"num_cpus": 1}
    started = not ray.is_initialized()
    if started:
        ray.init(
            address=None if address == "local" else address, logging_level=logging.WARNING, log_to_driver=False,
            include_dashboard=False if address == "local" else None,
        )  # fmt: skip
    try:
        remote = ray.remote(max_retries=2, **share)(run_cell)
        waiting = [remote.remote(cell, device, floats) for cell in cells]
        while waiting:
            ready, waiting = ray.wait(waiting)
            for reference in ready:
                yield ray.get(reference)
    finally:
        if started:
            ray.shutdown()
