"""Interrupted runs, and models larger than memory: real processes that are killed or limited."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kill_and_resume
from engine_models import encoder, tokens
from fewbits import quantize
from fewbits.engine import snapshot
from fewbits.engine.context import UnitContext
from fewbits.engine.statistics import Hessian
from fewbits.errors import FewbitsError
from fewbits.papers import build_recipe
from fewbits.steps.nearest import RoundNearest

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.parametrize("case", kill_and_resume.CASES)
def test_killed_runs_resume_to_the_same_bits(case: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_and_resume.py"), str(tmp_path), case, "3", "4"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 4, "kills must hit runs that had committed units"


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    recipe = build_recipe("gptq", "W4A16")
    quantize(encoder(), recipe, tokens(4), work_dir=tmp_path)
    with pytest.raises(FewbitsError, match="resume it"):
        quantize(encoder(), recipe, tokens(4), work_dir=tmp_path)
    for changed in (
        {"seed": 1},
        {"calibration": tokens(4, seed=2)},
        {"recipe": build_recipe("gptq", "W3A16")},
        {"model": encoder(1)},
    ):
        given = {"model": encoder(), "recipe": recipe, "calibration": tokens(4), "seed": 0, **changed}
        with pytest.raises(FewbitsError, match="another"):
            quantize(
                given.pop("model"),
                given.pop("recipe"),
                given.pop("calibration"),
                work_dir=tmp_path,
                resume=True,
                **given,
            )


def test_a_damaged_commit_is_named(tmp_path: Path) -> None:
    quantize(encoder(), build_recipe("gptq", "W4A16"), tokens(4), work_dir=tmp_path)
    victim = sorted(tmp_path.glob("sweep*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-40])
    with pytest.raises(FewbitsError, match=victim.name):
        quantize(encoder(), build_recipe("gptq", "W4A16"), tokens(4), work_dir=tmp_path, resume=True)


def test_a_resumed_run_knows_how_the_first_one_added_up_hessians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, added = build_recipe("gptq", "W4A16"), Hessian.hessian_arithmetic
    monkeypatch.setattr(Hessian, "hessian_arithmetic", property(lambda self: {"bfloat16x3"}))
    first = quantize(encoder(), recipe, tokens(4), work_dir=tmp_path)
    monkeypatch.setattr(Hessian, "hessian_arithmetic", added)
    units = sorted(tmp_path.glob("sweep*.safetensors"))
    assert first.hessian_arithmetic == ["bfloat16x3"] and len(units) > 1
    units[-2].unlink()  # of the last block; the head behind it stays floating point
    resumed = quantize(encoder(), recipe, tokens(4), work_dir=tmp_path, resume=True)
    assert resumed.hessian_arithmetic == ["bfloat16x3", "float32"], "of finished units as committed, then as done here"
    for unit in units:  # as written before units said it
        tensors, described = snapshot.read(unit)
        del described["hessian_arithmetic"]
        snapshot.write(unit, tensors, described)
    old = quantize(encoder(), recipe, tokens(4), work_dir=tmp_path, resume=True)
    assert old.hessian_arithmetic == ["unrecorded"]
    for other in (resumed, old):
        assert first.attachment.codes.keys() == other.attachment.codes.keys()
        assert all(torch.equal(codes, other.attachment.codes[name]) for name, codes in first.attachment.codes.items())


def test_a_resumed_run_says_what_the_first_one_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noting(RoundNearest):
        def apply(self, unit: UnitContext) -> None:
            super().apply(unit)
            unit.note(f"{unit.name} was rounded")

    recipe = build_recipe("rtn", "W4A16")
    first = quantize(encoder(), replace(recipe, steps=(Noting(),)), tokens(4), work_dir=tmp_path)
    assert sum("was rounded" in note for note in first.notes) > 1
    monkeypatch.setattr(Noting, "apply", RoundNearest.apply)  # units that are done again would say nothing
    resumed = quantize(encoder(), replace(recipe, steps=(Noting(),)), tokens(4), work_dir=tmp_path, resume=True)
    assert resumed.notes == first.notes


@pytest.mark.parametrize("lent", [False, True])
def test_streamed_weights_give_the_bits_of_a_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lent: bool
) -> None:
    from fewbits.engine.source import Streamed

    if lent:
        monkeypatch.setattr("fewbits.engine.source.LARGE", 0)
    whole = encoder()
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, tmp_path / "model.safetensors")
    quantize(whole, build_recipe("smoothquant+gptq", "W4A8"), tokens(8))
    with torch.device("meta"):
        hollow = encoder()
    result = quantize(
        hollow,
        build_recipe("smoothquant+gptq", "W4A8"),
        tokens(8),
        source=Streamed(tmp_path),
        work_dir=tmp_path / "work",
    )
    assert all(p.is_meta for p in hollow.blocks.parameters()), "units are let go when they are done"
    for index in range(len(result.units)):
        stored, _ = snapshot.read(tmp_path / "work" / f"sweep0-unit{index:04d}.safetensors")
        for key, value in stored.items():
            if key.startswith("tensor/"):
                assert torch.equal(value, whole.state_dict()[key.removeprefix("tensor/")]), key


def test_a_model_larger_than_memory_is_quantized_by_streaming(tmp_path: Path) -> None:
    """Under one limit on memory, loading the whole model fails and streaming it succeeds, at the peak forecast."""
    # Freed blocks go back to the system at once, so that the limit counts what is in use and not what malloc keeps for
    # later.
    environment = {**ENVIRONMENT, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(HERE / "limited_memory.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["in_memory"] == "MemoryError" and found["streamed"] == "ok"
    assert found["model_bytes"] > 2 * found["allowed_bytes"]
    assert found["units"] >= 8


def test_streaming_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    from fewbits.engine.source import Streamed

    with pytest.raises(FewbitsError, match="no safetensors"):
        Streamed(tmp_path)
    model = encoder()
    held = {name: value.contiguous() for name, value in model.state_dict().items()}
    del held["blocks.1.q.weight"]
    save_file(held, tmp_path / "model.safetensors")
    with torch.device("meta"):
        hollow = encoder()
    with pytest.raises(FewbitsError, match=r"blocks\.1\.q\.weight"):
        quantize(
            hollow, build_recipe("gptq", "W4A16"), tokens(4), source=Streamed(tmp_path), work_dir=tmp_path / "work"
        )


def test_a_transformers_model_is_streamed_to_the_bits_of_one_in_memory(tmp_path: Path) -> None:
    """Its library asks tensors for values while it makes attention masks, which hollow ones do not have."""
    transformers = pytest.importorskip("transformers")
    from fewbits.engine.source import Streamed

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    whole = transformers.LlamaForCausalLM(config).eval()
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        hollow = transformers.LlamaForCausalLM(config).eval()
    hollow.model.rotary_emb = whole.model.rotary_emb
    batches = [{"input_ids": batch} for batch in tokens(8, vocabulary=64)]
    recipe = build_recipe("gptq", "W4A8g16")
    streamed = quantize(hollow, recipe, batches, source=Streamed(tmp_path), work_dir=tmp_path / "work")
    whole.model.rotary_emb = copy.deepcopy(whole.model.rotary_emb)
    here = quantize(whole, recipe, batches, work_dir=tmp_path / "here")
    assert [site.name for site, _ in streamed.attachment.items()] == [site.name for site, _ in here.attachment.items()]
    for index in range(len(here.units)):
        name = f"sweep0-unit{index:04d}.safetensors"
        ours, theirs = load_file(tmp_path / "work" / name), load_file(tmp_path / "here" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name


def test_units_written_behind_the_work_are_there_in_order_and_errors_are_told(tmp_path: Path) -> None:
    from fewbits.engine.commits import Commits

    described = {"quantizers": {}, "codes": {}, "alias": {}, "coded": {}, "version": 1}
    commits = Commits(tmp_path / "work", {"seed": 0}, resume=False, behind=True)
    for index in range(3):
        commits.write(0, index, {"tensor/x": torch.full((2,), float(index))}, described)
    held, _ = commits.read(0, 2)
    assert [commits.has(0, index) for index in range(4)] == [True, True, True, False]
    assert held["tensor/x"].tolist() == [2, 2]
    commits.folder = tmp_path / "work" / "run.json"  # a file: nothing can be written below it
    commits.write(0, 3, {"tensor/x": torch.ones(2)}, described)
    with pytest.raises(OSError):
        commits.flush()
    commits.close()
