"""The engine on a GPU: recipes run there, and a checkpoint made there loads anywhere. One skipped line without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from cuda_graphs import replays
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.diagnosis.workflow import diagnose_reference
from fewbits.engine.progress import Progress
from fewbits.engine.source import Streamed
from fewbits.formats import gptq_grid
from fewbits.kernels import ops
from fewbits.packed.modules import Packed
from fewbits.ranges import MinMax
from fewbits.ranges.output_clip import _shorter
from fewbits.rounding import HessianAccumulator, gptq

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


@pytest.mark.parametrize(("recipe", "bits"), [("gptq", "W4A16g32"), ("awq", "W4A16g32")])
def test_streamed_weights_and_activations_in_host_memory_give_the_same_bits_resumed_or_not(
    recipe: str, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoder(width=64)
    files = tmp_path / "files"
    files.mkdir()
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, files / "model.safetensors")

    class Stopped(Exception):
        pass

    class Stop(Progress):
        left = 2

        def advance(self) -> None:
            self.left -= 1
            if not self.left:
                raise Stopped

    def run(work: Path, progress: Progress | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            model = encoder(width=64)
        quantize(
            model, recipe, tokens(16), bits=bits, device="cuda", source=Streamed(files), work_dir=work, resume=resume,
            progress=progress,
        )  # fmt: skip
        found = {}
        for path in sorted(work.glob("sweep*.safetensors")):
            found |= {f"{path.name}/{key}": value for key, value in load_file(path).items()}
        return found

    first = run(tmp_path / "a")
    monkeypatch.setattr("fewbits.engine.source.LARGE", 0)  # the embedding too is on the device only while it is read
    again = run(tmp_path / "b")
    with pytest.raises(Stopped):
        run(tmp_path / "c", Stop())
    assert 0 < len(list((tmp_path / "c").glob("sweep*.safetensors"))) < len(list((tmp_path / "a").glob("sweep*")))
    resumed = run(tmp_path / "c", resume=True)
    for other in (again, resumed):
        assert first.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("dtype", "bound", "name"),
    [
        (torch.bfloat16, 2e-5, "bfloat16"),
        (torch.float16, 2e-5, "float16"),
        (torch.float32, 5e-5, "bfloat16x3"),
    ],
)
def test_hessians_from_tensor_cores_are_exact_but_for_the_sum(dtype: torch.dtype, bound: float, name: str) -> None:
    columns = 2500  # more than one panel
    loud = torch.randn(columns, device="cuda").exp()
    accumulator = HessianAccumulator(columns, device="cuda")
    expected = torch.zeros(columns, columns, dtype=torch.float64, device="cuda")
    for _ in range(3):
        x = (torch.randn(2, 300, columns, device="cuda") * loud).to(dtype)
        accumulator.add(x)
        rows = x.double().flatten(0, 1)
        expected += 2 * rows.T @ rows / 6
    found = accumulator.value.double()
    assert torch.equal(found, found.T)
    size = expected.diagonal().sqrt()
    assert float(((found - expected).abs() / size[:, None] / size).max()) < bound
    assert accumulator.arithmetic == {name}


def test_a_large_factor_is_found_in_place_and_the_solve_repeats_bit_for_bit() -> None:
    columns = 3000
    x = torch.randn(4000, columns, device="cuda") * torch.randn(columns, device="cuda").exp()
    hessian, weight = x.T @ x / 2000, torch.randn(64, columns, device="cuda")
    exact = gptq(weight, hessian.double(), gptq_grid(4), MinMax(), group_size=128, dtype=torch.float64)
    before = hessian.clone()
    first, second = (gptq(weight, hessian, gptq_grid(4), MinMax(), group_size=128) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.weight, second.weight)
    assert float((first.codes != exact.codes).float().mean()) < 1e-2
    assert abs(float(first.loss / exact.loss) - 1) < 1e-3
    assert torch.equal(hessian, before), "not spent unless it is said"


@pytest.mark.parametrize(("recipe", "bits"), [("rtn", "W4A4"), ("gptq", "W3A16"), ("repq-vit", "W4A4")])
def test_a_checkpoint_is_diagnosed_on_the_gpu_as_on_the_cpu(recipe: str, bits: str, tmp_path: Path) -> None:
    fewbits.quantize_reference("demo:digits", recipe, bits, out=tmp_path / "made", calib="demo:digits", samples=32)
    cpu, gpu = (diagnose_reference(tmp_path / "made", samples=8, top=1, device=device) for device in ("cpu", "cuda"))
    for key in ("float", "quantized"):  # a value between two levels may fall to the other one
        assert gpu["output"][key] == pytest.approx(cpu["output"][key], rel=0.1, abs=1e-4)
    sites = {site["site"]: site for site in gpu["sites"]}
    assert list(sites) == [site["site"] for site in cpu["sites"]]
    weights = [site for site in cpu["sites"] if site["role"] == "weight"]
    assert weights
    for site in weights:
        assert sites[site["site"]]["tensor_db"] == pytest.approx(site["tensor_db"], abs=1e-2)
    assert bool(gpu["suggestions"]) == bool(cpu["suggestions"])


def test_codes_of_rows_are_those_of_a_division() -> None:
    """Quotients near halves too, where one rounding more would show."""
    for scale in torch.rand(40).exp().mul(0.01).tolist():
        step = torch.tensor(scale, device="cuda")
        middle = (torch.randint(-130, 130, (64, 4096), device="cuda") + 0.5) * step
        upwards = torch.rand(64, 4096, device="cuda") < 0.5
        near = torch.nextafter(middle, torch.where(upwards, torch.inf, -torch.inf))
        for x in (middle, near, torch.randn(64, 4096, device="cuda") * 40 * step):
            found = ops.quantize_rows(x, step, torch.zeros_like(step), -127, 127, True, 0.0, backend="triton")[0]
            assert torch.equal(found, (x / step).round().clamp(-127, 127).to(torch.int8))


@pytest.mark.parametrize("silent", [False, True])
def test_fewer_rows_say_the_same_of_every_direction(silent: bool) -> None:
    x = torch.randn(6, 500, 128, device="cuda") * torch.randn(128, device="cuda").mul(3).exp()
    if silent:
        x[2, :, 40:50] = 0
    short, d = _shorter(x), torch.randn(6, 128, 30, device="cuda")
    assert short.shape == (6, 128, 128)
    found, expected = ((rows.double() @ d.double()).norm(dim=1) for rows in (short, x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


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


HALVES = {"gptq": "W4A16g64", "rtn": "W3A16g64", "squeezellm": "W3A16"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", HALVES)
def test_packed_for_matrix_units_gives_what_the_simulation_gave(recipe: str, dtype: torch.dtype) -> None:
    model = encoder(width=128).cuda().to(dtype)
    quantize(model, recipe, tokens(8), bits=HALVES[recipe], device="cuda")
    x = tokens(8)[0].cuda()
    with torch.no_grad():
        expected = model(x)
        result = fewbits.pack(model, kernel="triton_mma")
        found = model(x)
    assert {layer.kernel for layer in result.layers.values()} == {"triton_mma"}
    # the simulation rounds its weights to the model's type; a matrix unit multiplies codes, or what they decode to
    assert (found - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("kernel", ["triton", "triton_mma"])
def test_a_packed_layer_is_captured_in_a_graph_and_gives_the_same_bits(rows: int, kernel: str) -> None:
    model = encoder(width=128).cuda().half()
    quantize(model, "gptq", tokens(8), bits="W4A16g64", device="cuda")
    fewbits.pack(model, kernel=kernel)
    layer = next(module for module in model.modules() if isinstance(module, Packed))
    x = torch.randn(rows, layer.in_features, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = layer(x)
        for out in replays(lambda: layer(x)):
            assert torch.equal(out, expected)
    reference = x.double() @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
    assert (expected.double() - reference).norm() <= 2e-3 * reference.norm()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-2, atol=1e-2)
