"""The engine on a GPU: recipes run there, and a checkpoint made there loads anywhere. One skipped line without one."""

from __future__ import annotations

import pytest
import torch

import fewbits
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.packed.modules import Packed

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


PACKED = {
    "rtn": ("W4A16g32", {}),
    "gptq": ("W3A16g32", {}),
    "squeezellm": ("W3A16", {}),
    "owq": ("W3A16", {}),
    "smoothquant": ("W8A8", {}),
}


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("recipe", PACKED)
def test_packed_on_the_gpu_gives_what_the_simulation_gave(recipe: str, kernel: str) -> None:
    bits, options = PACKED[recipe]
    model = encoder(width=64).cuda()
    quantize(model, recipe, tokens(8), bits=bits, options=options, device="cuda")
    x = tokens(8)[0].cuda()
    with torch.no_grad():
        expected = model(x)
        result = fewbits.pack(model, kernel=kernel)
        found = model(x)
    # codes become mantissas of float32 in the vector kernel, and sums have another order
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    assert result.bytes_after < result.bytes_before
    if kernel == "triton":
        assert {layer.kernel for layer in result.layers.values()} == {"triton"}


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_packed_layer_is_captured_in_a_graph_and_gives_the_same_bits(rows: int) -> None:
    model = encoder(width=128).cuda().half()
    quantize(model, "gptq", tokens(8), bits="W4A16g64", device="cuda")
    fewbits.pack(model, kernel="triton")
    layer = next(module for module in model.modules() if isinstance(module, Packed))
    x = torch.randn(rows, layer.in_features, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = layer(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        for _ in range(3):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)
    reference = x.double() @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
    assert (expected.double() - reference).norm() <= 2e-3 * reference.norm()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-2, atol=1e-2)
