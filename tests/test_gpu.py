"""The engine on a GPU: recipes run there, and a checkpoint made there loads anywhere. One skipped line without one."""

from __future__ import annotations

import pytest
import torch

from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

CASES = {
    "gptq": ("W3A8", {}, encoder, tokens),
    "smoothquant+gptq": ("W4A8", {}, encoder, tokens),
    "repq-vit": ("W4A4", {}, encoder, tokens),
    "brecq": ("W3A4", {"iters_w": 20, "iters_a": 10}, skipnet, images),
    "adaround": ("W3A8", {"iterations": 20}, skipnet, images),
}


@pytest.mark.parametrize("recipe", CASES)
def test_runs_on_the_gpu_and_gives_nearly_what_the_cpu_gives(recipe: str) -> None:
    bits, options, make, data = CASES[recipe]
    outputs = []
    for device in ("cpu", "cuda"):
        model = make()
        result = quantize(model, recipe, data(8), bits=bits, options=options, device=device)
        assert result.peak_bytes > 0
        with torch.no_grad():
            outputs.append(model(data(8)[0].to(device)).cpu())
        if device == "cuda":
            assert all(p.is_cuda for p in model.parameters())
            model.cpu()
            with torch.no_grad():
                again = model(data(8)[0])
            torch.testing.assert_close(again, outputs[-1], rtol=1e-3, atol=1e-3)
    # Rounding ties and the order of sums may flip single codes.
    difference = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert difference < 0.2, f"relative difference {float(difference):.3f}"


def test_same_bits_twice_on_one_gpu() -> None:
    found = []
    for _ in range(2):
        model = skipnet()
        quantize(model, "brecq", images(8), bits="W3A4", options={"iters_w": 10, "iters_a": 5}, device="cuda")
        found.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
