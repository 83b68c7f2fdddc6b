"""What vLLM is compared with: the simulation's answers, as `scripts/vllm_runs.py simulate` keeps them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent.parent / "scripts" / "vllm_runs.py"
if not SCRIPT.is_file():
    pytest.skip("no scripts beside these tests", allow_module_level=True)


@pytest.mark.skipif(
    not (os.environ.get("FEWBITS_ZOO") and os.environ.get("FEWBITS_DATA")),
    reason="FEWBITS_ZOO or FEWBITS_DATA is not set",
)
def test_answers_are_the_models(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, text = Path(os.environ["FEWBITS_ZOO"]) / "opt", Path(os.environ["FEWBITS_DATA"]) / "docs-text/test.jsonl"
    command = [sys.executable, str(SCRIPT), "simulate", str(folder), "--data", str(text), "--answers", str(tmp_path)]
    ran = subprocess.run([*command, "--windows", "2", "--tokens", "17"], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["recipe"] == "floating point"
    kept = load_file(tmp_path / "opt.safetensors")
    assert kept["tokens"].shape == (2, 17) and kept["best"].shape == (2, 16)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(kept["tokens"]).logits[:, :-1].log_softmax(-1)
    assert torch.equal(kept["best"], logprobs.argmax(-1))
    torch.testing.assert_close(kept["next_logprob"], logprobs.gather(-1, kept["tokens"][:, 1:, None])[..., 0])
    assert (kept["second_logprob"] <= kept["best_logprob"]).all()
