"""`fewbits speed`: what it measures hangs together, and it says plainly where there is no gain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fewbits
import zoo_tiny
from fewbits import quantize
from fewbits.attach import attachment_of
from fewbits.cli import app
from fewbits.errors import FewbitsError
from fewbits.hub.loaded import LoadedModel
from fewbits.packed.modules import Packed
from fewbits.speed.compare import GAIN, _verdict, compare, speed_reference, weight_bytes
from fewbits.speed.machine import Machine, cache_bytes, measure
from fewbits.speed.phases import Phase, phases


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits are not measured for every test, and a figure takes a few runs."""
    machine = Machine("a machine", 10e9, 1e12, 1 << 20, 1)
    monkeypatch.setattr("fewbits.speed.machine.measure", lambda device, dtype: machine)
    monkeypatch.setattr("fewbits.speed.phases.SECONDS", 0.01)
    monkeypatch.setattr(Phase.time, "__defaults__", (0.01,))


def llama() -> LoadedModel:
    model, _, _ = zoo_tiny.MODELS["hf-llama"]()
    return LoadedModel("here", "transformers", model, "text-generation", {}, {})


def test_language_models_are_timed_reading_and_writing() -> None:
    loaded = llama()
    quantize(loaded.model, "rtn", [loaded.example_batch(1)], bits="W4A16")
    ids = torch.randint(64, (1, 5))
    with torch.no_grad():
        expected = loaded.model(ids).logits
    report = compare(loaded, batch=2, seqlen=6)
    assert [phase["phase"] for phase in report["phases"]] == ["prefill 6", "decode"]
    assert [phase["rows"] for phase in report["phases"]] == [12, 2]
    prefill, decode = report["phases"]
    for phase in report["phases"]:
        assert phase["float_ms"] > 0 and phase["speedup"] == phase["float_ms"] / phase["packed_ms"]
        assert phase["gain"] == (phase["speedup"] >= GAIN)
        share = report["weights"]["packed_bytes"] / (phase["packed_ms"] / 1e3) / 10e9
        assert phase["packed_of_bandwidth"] == pytest.approx(share)
        assert phase["float_of_gemm"] == pytest.approx(phase["flops"] / (phase["float_ms"] / 1e3) / 1e12)
    # twice the multiply-adds of the linear layers, and of attention where torch's counter sees it
    linear = 2 * sum(m.weight.numel() for m in llama().model.modules() if isinstance(m, torch.nn.Linear))
    assert linear * 12 <= prefill["flops"] < 2 * linear * 12 and linear * 2 <= decode["flops"]
    weights, memory = report["weights"], report["memory"]
    assert weights["packed_bytes"] < weights["float_bytes"] < memory["float_bytes"]
    assert weights["float_exceed_cache"] is False and memory["float_peak"] is None
    # what was measured is the packed model, and it is still right
    assert sum(isinstance(module, Packed) for module in loaded.model.modules()) == len(report["layers"]) == 14
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    json.dumps(report)


def test_decoding_steps_are_all_alike() -> None:
    loaded = llama()
    _, decode = phases(loaded, 1, 5)
    with torch.no_grad():
        first = decode.run(loaded.model).logits.clone()
        for _ in range(3):
            assert torch.equal(decode.run(loaded.model).logits, first)
        ids = torch.cat([decode.run.prompt, decode.run.token], 1)  # type: ignore[attr-defined]
        torch.testing.assert_close(loaded.model(ids).logits[:, -1:], first)


def test_the_float_model_is_timed_without_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = llama()
    quantize(loaded.model, "rtn", [loaded.example_batch(1)], bits="W4A8")
    hooked: list[bool] = []
    real = Phase.time

    def watched(self: Phase, model: Any, device: Any, seconds: float = 0.01) -> float:
        hooked.append(any(module._forward_pre_hooks for module in model.modules()))
        return real(self, model, device, seconds)

    monkeypatch.setattr(Phase, "time", watched)
    report = compare(loaded, seqlen=4)
    assert hooked == [False, False, True, True]  # products of attention go on in simulation
    assert attachment_of(loaded.model) is not None
    assert any("go on in simulation" in note for note in report["notes"])
    assert any("attn" in site for site in report["skipped"])


def test_no_gain_is_said_plainly() -> None:
    def said(speedup: float) -> str:
        return _verdict({"phase": "decode", "speedup": speedup, "gain": speedup >= GAIN})

    assert said(1.6) == "decode: packed is 1.60 times as fast"
    assert said(1.02).startswith("decode: no gain in speed")
    assert said(0.5) == "decode: no gain in speed, packed is slower (0.50 times); it saves memory only"


def test_tables_do_not_count_as_read() -> None:
    model = llama().model
    everything = sum(p.nbytes for p in model.parameters())
    table = model.get_input_embeddings().weight.nbytes  # type: ignore[operator]
    buffers = sum(b.nbytes for b in model.buffers())
    assert weight_bytes(model) == everything - table + buffers
    model.lm_head.weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr, assignment]
    assert weight_bytes(model) == everything - table + buffers


def test_bad_input_is_refused_before_anything_is_measured() -> None:
    loaded = llama()
    with pytest.raises(FewbitsError, match="no quantizers are attached"):
        compare(loaded)
    with pytest.raises(FewbitsError, match="reads 1 to 31 tokens"):
        phases(loaded, 1, 32)
    with pytest.raises(FewbitsError, match="at least 1"):
        speed_reference("demo:digits", batch=0)
    with pytest.raises(FewbitsError, match="choose auto or one of"):
        speed_reference("demo:digits", kernel="warp")
    with pytest.raises(FewbitsError, match="there is nothing to pack"):
        speed_reference("demo:digits", bits="W16A8")


def test_float_models_are_rounded_to_bits_that_quantize_activations_too() -> None:
    report = speed_reference("demo:digits", bits="W8A8")
    assert report["layers"] and "rounded to nearest at W8A8" in report["notes"][0]


def test_command_prints_json_and_a_table() -> None:
    command = ["speed", "demo:digits", "--bits", "W4A16g32"]
    run = CliRunner().invoke(app, [*command, "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["phases"][0]["phase"] == "forward" and report["layers"] and report["verdict"]
    assert "rounded to nearest at W4A16g32" in report["notes"][0]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "speed-up" in shown.stdout and "measured limits" in shown.stdout
    assert report["verdict"][0].split(":")[0] in shown.stdout


def test_a_checkpoint_is_timed_as_it_was_made(tmp_path: Path) -> None:
    fewbits.quantize_reference("demo:digits", "gptq", "W3A16g32", out=tmp_path / "w3", calib="demo:digits", samples=8)
    report = speed_reference(tmp_path / "w3", kernel="reference")
    assert {layer["bits"] for layer in report["layers"].values()} == {3} and report["kernels"].keys() == {"reference"}
    assert not report["notes"] and report["memory"]["packed_bytes"] < report["memory"]["float_bytes"]


def test_limits_of_this_machine() -> None:
    found = cache_bytes(torch.device("cpu"))
    assert found is None or found > 1 << 15


def test_measuring_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.speed.machine._COPY", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr("fewbits.speed.machine._MATRIX", {"cpu": 64, "cuda": 64})
    machine = measure(torch.device("cpu"), torch.float32)
    assert 1e7 < machine.copy < 1e13 and 1e6 < machine.flops < 1e15
    assert machine.threads == torch.get_num_threads()
    json.dumps(machine.to_dict())
