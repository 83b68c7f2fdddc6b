"""The benchmark: a matrix is checked before it runs, runs once, survives a kill; tables say what the rows say."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewbits.bench.leaderboard import leaderboard
from fewbits.bench.matrix import Cell, load_matrix
from fewbits.bench.run import ROWS, read_rows, run_cell, run_matrix
from fewbits.bench.tables import cost_table, entries, markdown
from fewbits.errors import FewbitsError

MATRIX = """
title: a try
seeds: [0, 1]
groups:
  - family: vision
    models: {digits: "demo:digits"}
    calib: "${place}:calibration"
    eval: "demo:digits:evaluation"
    eval_samples: 64
    samples: 16
    bits: [W8A8, W2A16]
    recipes: [rtn, {recipe: gptq, bits: [W2A16], seeds: [1], set: {act_order: true}}]
"""


def _matrix(tmp_path: Path, text: str = MATRIX) -> Path:
    file = tmp_path / "matrix.yaml"
    file.write_text(text)
    return file


def test_a_matrix_is_every_recipe_at_its_bits_on_every_model_with_every_seed(tmp_path: Path) -> None:
    matrix = load_matrix(_matrix(tmp_path), {"place": "demo:digits"})
    assert [(c.label, c.bits, c.seed) for c in matrix.cells] == [
        ("rtn", "W8A8", 0), ("rtn", "W8A8", 1), ("rtn", "W2A16", 0), ("rtn", "W2A16", 1),
        ("gptq act_order=true", "W2A16", 1),
    ]  # fmt: skip
    assert matrix.cells[0].calib == "demo:digits:calibration" and matrix.cells[0].samples == 16
    assert len({cell.key for cell in matrix.cells}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rtn, ", "rnt, "), "unknown recipe"),
        (("W8A8", "W8Z8"), "bits"),
        (("${place}", "${nowhere}"), "--var"),
        (("bits: [W8A8, W2A16]", "bit: [W8A8]"), "unknown key 'bit'"),
        (("recipes: [rtn,", "recipes: [rtn, rtn,"), "listed twice"),
        (("seeds: [0, 1]", "seeds: []"), "at least one"),
        (("{digits:", "[{digits:"), "YAML|mapping"),
    ],
)
def test_a_wrong_matrix_is_refused_before_anything_runs(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(FewbitsError, match=message) as error:
        load_matrix(_matrix(tmp_path, MATRIX.replace(*change)), {"place": "demo:digits"})
    assert "matrix.yaml" in str(error.value) or "recipe" in str(error.value) or "bits" in str(error.value)


def test_a_matrix_runs_once_and_a_failed_cell_is_a_row(tmp_path: Path) -> None:
    text = MATRIX.replace(
        "[rtn, {", "[{recipe: rtn, bits: [W8A8]}, {recipe: rtn, bits: [W2A16], calib: nowhere.txt}, {"
    )
    matrix = load_matrix(_matrix(tmp_path, text.replace("seeds: [0, 1]", "seeds: [0]")), {"place": "demo:digits"})
    seen: list[tuple[str, int, int]] = []
    rows = run_matrix(matrix, tmp_path / "out", jobs=2, on_row=lambda row, n, of: seen.append((row["label"], n, of)))
    assert [n for _, n, _ in seen] == [1, 2, 3] and seen[0][2] == 3
    fine, failed, gptq = rows
    assert "nowhere.txt" in failed["error"] and "metric" not in failed
    assert fine["metric"] == "top1" and fine["metric_after"] > 90 and fine["needs_data"] and not gptq["needs_gradients"]
    assert 8 < fine["size"]["bits_per_weight"] < 10 and 2 < gptq["size"]["bits_per_weight"] < 4
    for name in ("bytes_after", "seconds", "peak_memory_bytes", "seed", "machine", "calibration", "versions"):
        assert fine[name] is not None
    # the float model is measured once, and what was kept is used
    (kept,) = (tmp_path / "out" / "float").iterdir()
    held = json.loads(kept.read_text())
    held["measured"]["value"] = 12.5
    kept.write_text(json.dumps(held))
    cell = matrix.cells[-1]
    assert run_cell(cell, "cpu", str(tmp_path / "out" / "float"))["metric_before"] == 12.5
    assert run_cell(replace(cell, eval_samples=32), "cpu", str(tmp_path / "out" / "float"))["metric_before"] > 90
    again = run_matrix(matrix, tmp_path / "out", on_row=lambda *_: pytest.fail("ran again"))
    assert again == rows
    retried: list[Any] = []
    run_matrix(matrix, tmp_path / "out", retry=True, on_row=lambda row, *_: retried.append(row["error"]))
    assert len(retried) == 1 and len(read_rows(tmp_path / "out" / ROWS)) == 3


def test_the_command_is_killed_goes_on_and_writes_its_tables(tmp_path: Path) -> None:
    text = MATRIX.replace("recipes: [rtn, {", "recipes: [{recipe: rtn, bits: [W2A16]}, {")
    line = [sys.executable, "-m", "fewbits", "bench", str(_matrix(tmp_path, text)), "--out", str(tmp_path / "out")]
    line += ["--var", "place=demo:digits"]
    rows = tmp_path / "out" / ROWS
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not read_rows(rows) and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = read_rows(rows)
    assert 1 <= len(before) < 3
    with rows.open("a") as handle:
        handle.write('{"cut short')
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "3 rows, 0 failed" in " ".join(done.stderr.split())
    assert read_rows(rows)[: len(before)] == before and len(read_rows(rows)) == 3
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| rtn |" in table and "gptq act_order=true" in table and "±" in table
    (tmp_path / "out" / "table.md").unlink()
    subprocess.run([*line, "--table-only"], check=True, capture_output=True)
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_the_same_rows_come_from_a_ray_cluster(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:  # not imported here: `_ray` sets what Ray reads on import
        pytest.skip("ray is not installed")
    text = MATRIX.replace("seeds: [0, 1]", "seeds: [0]").replace("seeds: [1], ", "")
    matrix = load_matrix(_matrix(tmp_path, text.replace("[W8A8, W2A16]", "[W2A16]")), {"place": "demo:digits"})
    here = run_matrix(matrix, tmp_path / "here")
    there = run_matrix(matrix, tmp_path / "there", ray_address="local")
    assert not [row["error"] for row in (*here, *there) if "error" in row]
    exact = ("key", "metric_after", "size", "bytes_after", "seed")
    assert [[row[name] for name in exact] for row in here] == [[row[name] for name in exact] for row in there]


def _row(label: str, bits: str, seed: int, after: float | None, **more: Any) -> dict[str, Any]:
    cell = Cell("vision", "a<b>", "ref", label.split()[0], label, bits, seed)
    if after is None:
        return {**cell.to_dict(), "key": cell.key, "error": "it broke"}
    return {
        **cell.to_dict(), "key": cell.key, "metric": "top1", "metric_before": 90.0, "metric_after": after,
        "higher_is_better": True, "bytes_before": 100, "bytes_after": 20, "size": {"bits_per_weight": 4.5},
        "seconds": 1.0 + seed, "peak_memory_bytes": 10**9, "needs_data": False, "needs_gradients": False,
        "calibration": None, "machine": "here", **more,
    }  # fmt: skip


def test_tables_put_seeds_together_and_keep_losers_and_failures() -> None:
    rows = [
        _row("rtn", "W4A4", 0, 80.0), _row("rtn", "W4A4", 1, 80.2), _row("good", "W4A4", 0, 85.0),
        _row("good", "W4A4", 1, 86.0), _row("bad", "W4A4", 0, 70.0), _row("broken", "W4A4", 0, None),
        _row("rtn", "W8A8", 0, 89.0),
    ]  # fmt: skip
    found = entries(rows)
    good = next(entry for entry in found if entry.label == "good")
    assert good.after == 85.5 and good.spread == 1.0 and good.delta == -4.5 and good.loss == 4.5
    table = markdown(rows)
    assert "| recipe | W8A8 | W4A4 |" in table
    assert "| rtn | **89.00** | 80.10 ±0.10 |" in table
    assert "| good |  | **85.50** ±0.50 |" in table
    assert "| bad |  | 70.00 ↓ |" in table
    assert "| broken |  | failed |" in table and "it broke" in table
    cost = cost_table(rows)
    assert "| rtn | 3 | 1.0, 2.0 | 1.00 GB | none | no | W8 4.50, W4 4.50 |" in cost


def test_the_leaderboard_is_one_file_and_names_are_data() -> None:
    page = leaderboard([_row("rtn", "W4A4", 0, 80.0), _row("</script><b>", "W4A4", 0, 81.0)], "t")
    assert "http://" not in page and "https://" not in page and page.count("</script>") == 1
    inside = page.split("const data = ", 1)[1].split(";\n", 1)[0]
    assert [row["recipe"] for row in json.loads(inside)["rows"]] == ["rtn", "</script><b>"]


def test_the_filters_work_in_a_browser(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine")
    rows = [_row("rtn", "W8A8", 0, 80.0), _row("rtn", "W4A4", 0, 70.0), _row("free", "W4A4", 0, 75.0)]
    rows[1]["needs_data"] = True
    file = tmp_path / "leaderboard.html"
    file.write_text(leaderboard(rows))
    for view, shown in (("", 3), ("#bits=W4A4", 2), ("#bits=W4A4&datafree=on", 1), ("#seconds=0.5", 0)):
        line = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        ran = subprocess.run([*line, "--dump-dom", file.as_uri() + view], capture_output=True, text=True, timeout=120)
        assert f"{shown} of 3 rows" in ran.stdout, view
        assert ran.stdout.count("<tr") == shown + 1


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"key": 1}\nbroken\n{"key": 2}\n')
    with pytest.raises(FewbitsError, match="line 2"):
        read_rows(tmp_path / "r.jsonl")
