"""The demo models are what the README says: lossless at 8 bits, hurt by rounding at 4 and fewer; small; their data
honest.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewbits import demo
from fewbits.errors import FewbitsError

LIMIT = 4_000_000  # bytes of weights and data inside the package


@torch.no_grad()
def loss(model: nn.Module, data: demo.DemoData, samples: int) -> float:
    """Mean cross-entropy in nats over the first samples."""
    logits = model(data.inputs[:samples]).float()
    return float(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), data.labels[:samples].reshape(-1)))


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Every linear layer in a block at the nearest of 2^bits levels between its rows' extremes."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            low = module.weight.amin(1, keepdim=True).clamp(max=0)
            scale = (module.weight.amax(1, keepdim=True).clamp(min=0) - low) / (2**bits - 1)
            zero = torch.round(-low / scale)
            codes = (torch.round(module.weight / scale) + zero).clamp(0, 2**bits - 1)
            module.weight.copy_((codes - zero) * scale)
    return model


@pytest.fixture(scope="module")
def text() -> tuple[nn.Module, demo.DemoData]:
    return demo.load("text")[0], demo.data("text", "evaluation")


def test_names_need_no_torch() -> None:
    code = "import sys; from fewbits import demo; print(demo.names(), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['digits', 'text'] False"


@pytest.mark.parametrize("name", demo.names())
def test_load(name: str) -> None:
    model, spec = demo.load(name)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert json.loads(json.dumps(spec)) == spec
    assert spec["domain"] in {"image", "text-generation"}
    inputs = demo.data(name, "calibration").inputs[:2]
    again, _ = demo.load(name)
    assert torch.equal(model(inputs), again(inputs))


@pytest.mark.parametrize("name", demo.names())
def test_data(name: str) -> None:
    splits = [demo.data(name, split) for split in ("calibration", "evaluation")]
    seen = [{item.numpy().tobytes() for item in split.inputs} for split in splits]
    assert not seen[0] & seen[1], "a calibration sample is evaluated on"
    for split in splits:
        assert len(split) == len(split.inputs) == len(split.labels) >= 256
        first, label = split[0]
        assert torch.equal(first, split.inputs[0]) and torch.equal(label, split.labels[0])
        assert len(split[2:5]) == 3 and len(list(split)) == len(split)
        with pytest.raises(IndexError):
            split[len(split)]
    assert torch.equal(demo.data(name, "eval").inputs, splits[1].inputs)


def test_text_labels_are_the_next_bytes() -> None:
    data = demo.data("text", "evaluation")
    assert data.inputs.shape == (256, 256) and data.inputs.dtype == torch.int64
    assert torch.equal(data.inputs[:, 1:], data.labels[:, :-1])


def test_unknown_names() -> None:
    with pytest.raises(FewbitsError, match="digits, text"):
        demo.load("txt")
    with pytest.raises(FewbitsError, match="digits, text"):
        demo.data("txt", "evaluation")
    with pytest.raises(FewbitsError, match="calibration, evaluation"):
        demo.data("text", "train")


def test_size() -> None:
    folder = Path(demo.__file__).parent
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= LIMIT


def test_text_is_causal() -> None:
    model, _ = demo.load("text")
    ids = demo.data("text", "evaluation").inputs[:1, :32]
    changed = ids.clone()
    changed[0, 20] ^= 1
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20], b[:, 20])


def test_text_quality(text: tuple[nn.Module, demo.DemoData]) -> None:
    """Windows of held-out source at about 1.1 bits a byte; 8 bits cost under 0.2 per cent, 4 bits over 5, 3 bits over
    40.
    """
    model, data = text
    whole = loss(model, data, 32)
    assert whole / 0.6931 < 1.3
    assert abs(loss(rounded(model, 8), data, 32) - whole) < 0.002 * whole
    assert loss(rounded(model, 4), data, 32) > 1.05 * whole
    assert loss(rounded(model, 3), data, 32) > 1.4 * whole


def test_digits_quality() -> None:
    """98 per cent right; 8 bits change nothing that matters, 3 and 2 bits do."""
    model, _ = demo.load("digits")
    data = demo.data("digits", "evaluation")

    @torch.no_grad()
    def accuracy(candidate: nn.Module) -> float:
        return float((candidate(data.inputs).argmax(1) == data.labels).double().mean())

    whole = accuracy(model)
    assert whole > 0.97
    assert abs(accuracy(rounded(model, 8)) - whole) < 0.002
    assert accuracy(rounded(model, 3)) < whole - 0.005
    assert accuracy(rounded(model, 2)) < whole - 0.03


@pytest.mark.parametrize("name", demo.names())
def test_stated_figures(name: str) -> None:
    """The metadata's float figure is what the shipped weights give."""
    model, spec = demo.load(name)
    data = demo.data(name, "evaluation")
    stated = spec["measured"]["float"]
    if name == "digits":
        with torch.no_grad():
            assert float((model(data.inputs).argmax(1) == data.labels).double().mean()) == pytest.approx(
                stated, abs=1e-9
            )
    else:
        assert loss(model, data, len(data)) / 0.693147 == pytest.approx(stated, rel=1e-4)
