"""The command line end to end on the demo model: results, one-line errors, nothing half-written, nothing imported
too early.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fewbits
from fewbits.cli import app
from fewbits.errors import FewbitsError
from fewbits.hub.data import load_data
from fewbits.hub.output import dumps
from fewbits.workflow import evaluate_reference, inspect_reference, quantize_reference

DIGITS = {"model": "demo:digits", "recipe": "rtn", "bits": "W4A8", "calib": "demo:digits", "samples": 16}


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args: object, started: bool = False) -> str:
    """The one line of a refused call."""
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr
    assert started or len(lines) == 1  # a run that started has told its memory forecast before
    return lines[-1]


def quantize_args(out: Path, **changes: object) -> list[object]:
    given = {"--recipe": "rtn", "--bits": "W4A8", "--calib": "demo:digits", "--samples": 16, "--out": out}
    given |= {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    return ["quantize", "demo:digits", *(word for pair in given.items() if pair[1] is not None for word in pair)]


# -- imports -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "code",
    [
        "import fewbits",
        "import fewbits.cli",
        "from fewbits.cli import main; import sys; sys.argv[1:] = ['--help']; main()",
        "from fewbits.cli import main; import sys; sys.argv[1:] = ['quantize', '--help']; main()",
        "from fewbits.cli import main; import sys; sys.argv[1:] = ['--version']; main()",
        "from fewbits.cli import main; import sys; sys.argv[1:] = ['papers', '--json']; main()",
        "from fewbits.cli import main; import sys; "
        "sys.argv[1:] = ['quantize', 'x', '--recipe', 'rtm', '--bits', 'W4', '--out', 'o']; main()",
    ],
)
def test_torch_stays_out(code: str) -> None:
    check = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    result = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, check=False)
    assert result.stderr.strip().splitlines()[-1] == "False", result.stderr


def test_import_and_help_are_fast() -> None:
    """Processor time, so that a busy machine does not matter; the best of three."""
    for code in ("import fewbits", "from fewbits.cli import main; import sys; sys.argv[1:] = ['--help']; main()"):
        spent = []
        for _ in range(3):
            before = os.times()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            after = os.times()
            spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert min(spent) < 0.5, (code, spent)


def test_every_exported_name_exists() -> None:
    for name in fewbits.__all__:
        assert getattr(fewbits, name) is not None
    assert set(fewbits.__all__) <= set(dir(fewbits))
    with pytest.raises(AttributeError):
        fewbits.nothing  # noqa: B018


# -- the main job ----------------------------------------------------------------------------------------------------
def test_quantize_eval_and_load(tmp_path: Path) -> None:
    out = tmp_path / "q"
    result = run(*quantize_args(out, eval="demo:digits", eval_samples=200, seed=3), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (
        report["model"] == "demo:digits"
        and report["recipe"] == "rtn"
        and report["bits"] == "W4A8"
        and report["seed"] == 3
    )
    assert report["bytes_after"] < report["bytes_before"] and report["metric"] == "top1"
    assert report["metric_before"] > 90 and report["seconds"] > 0 and report["peak_memory_bytes"] > 1e6
    assert len(report["calibration"]["fingerprint"]) == 64 and report["calibration"]["subset"].endswith(
        "drawn with seed 3"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q"]
    kept = json.loads((out / "report.json").read_text())
    assert {key: kept[key] for key in report} == report

    measured = json.loads(run("eval", out, "--data", "demo:digits", "--samples", 200, "--json").stdout)
    assert (
        measured["value"] == report["metric_after"]
        and measured["fingerprint"] == report["evaluation"]["after"]["fingerprint"]
    )
    plain = run("eval", out, "--data", "demo:digits", "--samples", 20)
    assert plain.exit_code == 0 and "top1" in plain.stdout

    # the loaded model computes what the in-memory one does
    loaded, fresh = fewbits.load(out), fewbits.load_model("demo:digits")
    data = load_data("demo:digits", fresh, samples=16, seed=3, batch_size=kept["calibration"]["samples"])
    quantized = fewbits.quantize(
        fresh.model,
        fewbits.build_recipe("rtn", bits="W4A8"),
        list(data.batches()),
        example=fresh.example_batch(1),
        seed=3,
    )
    with torch.no_grad():
        for batch in load_data("demo:digits", fresh, purpose="evaluation", samples=20).batches():
            assert torch.equal(loaded.model(batch), quantized.model(batch))


def test_human_report(tmp_path: Path) -> None:
    result = run(*quantize_args(tmp_path / "q", eval="demo:digits", eval_samples=50))
    assert result.exit_code == 0 and "before" in result.stdout and "top1" in result.stdout and "KB" in result.stdout
    assert "same data" not in result.stdout or "note" in result.stdout


def test_same_settings_give_the_same_bits(tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_reference(**DIGITS, out=tmp_path / name)  # type: ignore[arg-type]
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_options_reach_the_recipe(tmp_path: Path) -> None:
    report = quantize_reference(**DIGITS, out=tmp_path / "a", options={"first_last_bits": "8"})  # type: ignore[arg-type]
    described = json.loads((tmp_path / "a" / "fewbits.json").read_text())
    assert report["options"] == {"first_last_bits": "8"} and described["recipe"]["options"]["first_last_bits"] == 8


# -- refusals before anything heavy ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": "W4B8"}, "bits 'W4B8'"),
        ({"bits": "W9"}, "weight bits must be"),
        ({"recipe": "rtm"}, "did you mean rtn"),
        ({"recipe": "rtn+"}, "unknown recipe ''"),
        ({"set": "nothing=1"}, "has no option 'nothing'"),
        ({"set": "nothing"}, "not of the form KEY=VALUE"),
        ({"calib": "nowhere.parquet"}, "does not exist"),
        ({"eval": "nowhere.parquet"}, "does not exist"),
        ({"calib": None}, "reads calibration data"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"device": "cuda:77"}, "not there"),
        ({"dtype": "int8"}, "not a floating-point type"),
        ({"samples": 0}, "samples 0"),
        ({"batch_size": -1}, "batch-size -1"),
        ({"task": "nothing"}, "no task 'nothing'"),
    ],
)
def test_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("loaded although the request was wrong")

    monkeypatch.setattr("fewbits.hub.models.load_model", never)
    assert words in refused(*quantize_args(tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_refused_models(tmp_path: Path) -> None:
    quantize_reference(**DIGITS, out=tmp_path / "q")  # type: ignore[arg-type]
    for model, words in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "not a model directory"),
        ("demo:digit", "did you mean"),
        (tmp_path / "q", "quantized checkpoint already"),
    ):
        line = refused("quantize", model, "--recipe", "rtn", "--bits", "W4A16", "--out", tmp_path / "out")
        assert words in line
    assert not (tmp_path / "out").exists()


def test_output_directory_is_respected(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    assert "exists and is not empty" in refused(*quantize_args(tmp_path / "full"))
    assert "holds no checkpoint" in refused(*quantize_args(tmp_path / "full"), "--resume")
    assert "is a file" in refused(*quantize_args(tmp_path / "file"))
    assert "not a directory" in refused(*quantize_args(tmp_path / "file" / "sub"))
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert run(*quantize_args(tmp_path / "empty")).exit_code == 0
    assert "not empty" in refused(*quantize_args(tmp_path / "empty"))
    again = run(*quantize_args(tmp_path / "empty"), "--resume", "--json")  # finished by the same settings: its report
    assert json.loads(again.stdout)["bits"] == "W4A8"
    assert "another recipe" in refused(*quantize_args(tmp_path / "empty", bits="W3A8"), "--resume")


# -- failures on the way ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["fewbits.engine.quantize", "fewbits.tasks.evaluate", "fewbits.hub.checkpoint.save"])
def test_a_failure_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        if where.endswith("save"):  # after half of it is written
            Path(args[0]).mkdir(parents=True)
            (Path(args[0]) / "half.safetensors").write_bytes(b"x")
        raise FewbitsError("broken on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(where, fails)
        assert "broken on purpose" in refused(
            *quantize_args(tmp_path / "out", eval="demo:digits", eval_samples=8), started=True
        )
    assert not (tmp_path / "out").exists()
    left = tmp_path / "out.partial"
    if left.exists():  # finished units are kept, and only on request used
        assert any(left.rglob("sweep*.safetensors"))
        assert "unfinished run" in refused(*quantize_args(tmp_path / "out"))
        assert "another" in refused(*quantize_args(tmp_path / "out", seed=9), "--resume")
    result = run(*quantize_args(tmp_path / "out", eval="demo:digits", eval_samples=8), "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not list((tmp_path / "out").glob("half*"))


def test_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL as soon as the first unit is committed."""
    want, got = tmp_path / "want", tmp_path / "got"
    quantize_reference(**DIGITS, out=want)  # type: ignore[arg-type]
    command = [sys.executable, "-m", "fewbits", *(str(word) for word in quantize_args(got))]
    slow = (
        "import time, fewbits.engine.run as r; w = r.Commits.write\n"
        "def f(*a):\n    w(*a); time.sleep(60)\n"
        "r.Commits.write = f\n"
    )
    code = f"{slow}import sys; sys.argv = {command[2:]!r}; from fewbits.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "got.partial").glob("units/sweep*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert not got.exists()
    assert run(*quantize_args(got), "--resume").exit_code == 0
    for file in want.glob("*.safetensors"):
        assert file.read_bytes() == (got / file.name).read_bytes()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_DEBUG", "1")
    result = run("eval", "demo:nothing", "--data", "demo:digits")
    assert isinstance(result.exception, FewbitsError)


# -- the rest --------------------------------------------------------------------------------------------------------
def test_inspect() -> None:
    seen = json.loads(run("inspect", "demo:digits", "--json").stdout)
    assert seen == json.loads(dumps(inspect_reference("demo:digits")))
    names = [site["name"] for unit in seen["units"] for site in unit["sites"]] + [
        site["name"] for site in seen["outside_units"]
    ]
    assert len(names) == len(set(names)) == seen["sites"] and any(name.endswith("weight") for name in names)
    assert {unit["kind"] for unit in seen["units"]} >= {"block"}
    shown = run("inspect", "demo:digits")
    assert shown.exit_code == 0 and "1 more like it: blocks.1" in shown.stdout
    for unit in seen["units"][:2]:
        for site in unit["sites"]:
            op = site["name"].removesuffix("." + site["role"]).removeprefix(unit["name"]).lstrip(".") or site["op"]
            line = next(line for line in shown.stdout.splitlines() if f"─ {op} " in line)
            assert f"{site['role']} {'x'.join(map(str, site['shape']))}" in line
            assert all(tag in line for tag in site["tags"] if tag not in ("input", "output", "weight"))


def test_papers() -> None:
    listed = json.loads(run("papers", "--json").stdout)
    assert listed == json.loads(run("papers", "list", "--json").stdout)
    assert listed["papers"] == sum(len(group) for group in listed["families"].values()) >= 60
    family = next(iter(listed["families"]))
    assert set(json.loads(run("papers", "list", "--family", family, "--json").stdout)["families"]) == {family}
    assert "gptq" in run("papers").stdout
    entry = json.loads(run("papers", "show", "gptq", "--json").stdout)
    assert (
        entry["recipe"]["steps"] and "percdamp" in entry["recipe"]["options"] and entry["link"].startswith("https://")
    )
    assert entry["contribution_zh"][:10] in run("papers", "show", "gptq", "--lang", "zh").stdout
    waiting = next(
        paper["slug"] for group in listed["families"].values() for paper in group if not paper["implemented"]
    )
    assert json.loads(run("papers", "show", waiting, "--json").stdout)["recipe"] is None
    assert "not implemented" in run("papers", "show", waiting).stdout
    assert "did you mean" in refused("papers", "show", "gptqq")
    assert "no family" in refused("papers", "list", "--family", "nothing")
    assert "choose en or zh" in refused("papers", "show", "gptq", "--lang", "de")


def test_json_stays_strict() -> None:
    assert dumps({"a": float("inf"), "b": [float("nan"), 1.5], "c": (1,)}) == '{"a": null, "b": [null, 1.5], "c": [1]}'


def test_evaluation_from_python() -> None:
    result = evaluate_reference("demo:digits", "demo:digits", samples=32)
    assert result["samples"] == 32 and result["subset"] == "the first 32 of 599" and result["value"] > 80
