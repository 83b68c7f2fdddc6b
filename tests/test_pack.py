"""`fewbits.pack`: packed layers give what the simulation gave, in less memory, and say what was not packed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fewbits
import zoo_tiny
from engine_models import encoder, images, skipnet, tokens
from fewbits.attach import Attachment, attachment_of
from fewbits.errors import FewbitsError
from fewbits.kernels import native
from fewbits.packed import PackResult, pack
from fewbits.packed import weight as weight_room
from fewbits.packed.float8 import Float8Linear
from fewbits.packed.int8 import Int8Linear
from fewbits.packed.modules import CodesLinear, Packed, TorchInt4Linear
from fewbits.packed.swap import held_bytes
from fewbits.quantizer import Quantizer

ZOO = os.environ.get("FEWBITS_ZOO")


def quantized(make: Any, recipe: str, bits: str, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """(quantized model, batch, its outputs)."""
    model = make()
    data = tokens(8) if make is encoder else images(8)
    fewbits.quantize(model, recipe, data, bits=bits, options=options)
    return model, data[0], run(model, data[0])


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _forgotten_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel is fastest on these tiny layers is chance: `kernel` says which a test is about."""
    monkeypatch.setattr("fewbits.kernels.choose._choices", {})


CASES: list[tuple[str, str, dict[str, Any], type[Packed]]] = [
    ("rtn", "W4A16", {}, CodesLinear),
    ("rtn", "W8A16", {}, CodesLinear),
    ("gptq", "W3A16g32", {}, CodesLinear),
    ("gptq", "W4A16g32", {"act_order": True}, CodesLinear),
    ("squeezellm", "W3A16", {}, CodesLinear),
    ("owq", "W3A16", {}, CodesLinear),
    ("awq", "W2A16g32", {}, CodesLinear),
    ("smoothquant", "W8A8", {}, Int8Linear),
    ("smoothquant", "W6A8", {"activations": "tensor"}, Int8Linear),
    ("smoothquant", "W8A8", {"activations": "tensor_static"}, Int8Linear),
    ("rtn", "W8A8", {}, Int8Linear),
    ("rtn", "W4A8", {}, CodesLinear),
]


@pytest.mark.parametrize(("recipe", "bits", "options", "kind"), CASES)
def test_packed_gives_what_the_simulation_gave(
    recipe: str, bits: str, options: dict[str, Any], kind: type[Packed]
) -> None:
    model, x, expected = quantized(encoder, recipe, bits, **options)
    other = copy.deepcopy(model)
    result = fewbits.pack(model, kernel="reference")
    assert distance(run(model, x), expected) < 1e-5
    packed = {path: module for path, module in model.named_modules() if isinstance(module, Packed)}
    assert set(packed) == set(result.layers) and len(packed) >= 18
    assert all(type(module) is kind for module in packed.values())
    before, after = 0, 0
    for path, module in packed.items():
        codes = result.layers[path].bits if kind is CodesLinear else 8
        rows, columns = module.out_features, module.in_features
        held = module._buffers["words"] if kind is CodesLinear else module._buffers["codes"]
        assert held is not None
        assert held.nbytes == (-(-columns // 32) * 32 * codes * rows // 8 if kind is CodesLinear else rows * columns)
        before += result.layers[path].bytes_before
        after += result.layers[path].bytes_after
    assert result.bytes_before - result.bytes_after >= before - after > 0
    assert result.bytes_after == held_bytes(model)
    named = {layer.kernel for layer in fewbits.pack(other, kernel="auto").layers.values()}
    assert named <= ({"native", "reference"} if kind is CodesLinear else {"torch_int_mm", "native", "reference"})
    assert distance(run(other, x), expected) < 1e-5


@pytest.mark.parametrize("inputs", ["none", "token", "tensor static"])
@pytest.mark.parametrize("rows", ["channel", "tensor"])
def test_eight_bit_floats(inputs: str, rows: str) -> None:
    from fewbits.formats import Float8, PerChannel, PerTensor, PerToken
    from fewbits.kernels.needs import _scales_rows_on_cpu
    from fewbits.ranges import AbsMax
    from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme
    from fewbits.steps.calibrate import CalibrateActivations
    from fewbits.steps.nearest import RoundNearest

    weights = QSpec(Float8(), PerChannel(0) if rows == "channel" else PerTensor(), AbsMax())
    entering = {
        "token": QSpec(Float8(), PerToken(-1), AbsMax(), dynamic=True),
        "tensor static": QSpec(Float8(), PerTensor(), AbsMax()),
    }.get(inputs)
    scheme = Scheme(
        (Rule(weights, roles=("weight",), without=frozenset({"embedding"})),),
        (Rule(entering, roles=("input",), tags=frozenset({"layer_input"})),) if entering else (),
    )
    steps = (CalibrateActivations(), RoundNearest())
    model = encoder(width=32, vocabulary=32)
    fewbits.quantize(model, Recipe("fp8", Bits(8, 8), scheme, steps, Calibration(samples=8)), tokens(8))
    x = tokens(8)[0]
    expected = run(model, x)
    other = copy.deepcopy(model)
    if inputs != "none" and not _scales_rows_on_cpu():
        pytest.skip("this build of torch gives a matrix of 8-bit floats one scale on a CPU, not one a row")
    wanted = "reference" if inputs == "none" else "torch_scaled_mm"
    for packed, kernel in ((model, wanted), (other, "reference")):
        result = pack(packed, kernel=kernel)
        assert {layer.kernel for layer in result.layers.values()} == {kernel} and len(result.layers) == 19
        assert attachment_of(packed) is None
        assert distance(run(packed, x), expected) < 2e-5
        layer = next(module for module in packed.modules() if isinstance(module, Float8Linear))
        assert layer.codes.dtype == torch.float8_e4m3fn
        one = x[:1, :1]
        assert run(packed, one).shape == (1, 1, 32)


def test_bytes_really_fall_where_layers_are_wide() -> None:
    model = encoder(width=128)
    fewbits.quantize(model, "rtn", tokens(4), bits="W4A16g64")
    result = pack(model, kernel="reference")
    layers = result.layers.values()
    # 4 bits of code and 40 of scale and zero point for every 64 columns, of 32; biases stay
    share = sum(layer.bytes_after for layer in layers) / sum(layer.bytes_before for layer in layers)
    assert 0.14 < share < 0.165


def test_torch_int4_is_the_same_product() -> None:
    model = encoder(width=64)
    fewbits.quantize(model, "rtn", tokens(4), bits="W4A16g32")
    x = tokens(4)[0]
    expected = run(model, x)
    narrow, _, _ = quantized(encoder, "rtn", "W4A16")
    with pytest.raises(FewbitsError, match="kernel torch_int4 cannot multiply this weight: it takes groups of 32"):
        pack(narrow, kernel="torch_int4")
    result = pack(model, kernel="torch_int4")
    assert {layer.kernel for layer in result.layers.values()} == {"torch_int4"}
    assert distance(run(model, x), expected) < 1e-5
    layers = [module for module in model.modules() if isinstance(module, TorchInt4Linear)]
    assert len(layers) == 18
    y = torch.randn(5, 64)
    for layer in layers[:2]:
        torch.testing.assert_close(layer(y), y @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_packed_is_named() -> None:
    model, x, expected = quantized(skipnet, "rtn", "W4A8")
    result = pack(model)
    assert list(result.layers) == ["head"]
    assert "this one is of conv2d" in result.skipped["stem.weight"]
    assert attachment_of(model) is not None  # activations of the convolutions go on in simulation
    assert "stays in simulation" in result.skipped["stem.input"]
    assert distance(run(model, x), expected) < 1e-5


def test_the_rest_is_detached_where_nothing_acts() -> None:
    model, x, expected = quantized(skipnet, "rtn", "W4A16")
    pack(model)
    assert attachment_of(model) is None and not model._forward_pre_hooks
    assert distance(run(model, x), expected) < 1e-6


def test_errors_before_anything_is_changed() -> None:
    with pytest.raises(FewbitsError, match="no quantizers attached"):
        pack(encoder())
    model, x, expected = quantized(encoder, "rtn", "W4A16")
    with pytest.raises(FewbitsError, match="choose auto or one of"):
        pack(model, kernel="warp")
    with pytest.raises(FewbitsError, match="rows must be at least 1"):
        pack(model, rows=0)
    assert torch.equal(run(model, x), expected)
    bare = encoder()
    fewbits.quantize(bare, "rtn", tokens(2), bits="W16A8")
    with pytest.raises(FewbitsError, match=r"nothing in this model can be packed \(no weight is quantized"):
        pack(bare)


def test_a_shared_or_computed_weight_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(self.b(self.a(x)))
            return out

    torch.manual_seed(0)
    model = Tied()
    x = torch.randn(3, 8)
    fewbits.quantize(model, "rtn", [x], bits="W4A16")
    expected = run(model, x)
    result = pack(model)
    assert list(result.layers) == ["c"] and "also read as" in result.skipped["a.weight"]
    assert distance(run(model, x), expected) < 1e-6


@pytest.mark.parametrize("name", ["hf-llama", "hf-opt", "hf-gpt2"])
@pytest.mark.parametrize(("recipe", "bits"), [("rtn", "W4A16"), ("smoothquant", "W8A8")])
def test_generate_goes_on(name: str, recipe: str, bits: str) -> None:
    model, _, kwargs = zoo_tiny.MODELS[name]()
    fewbits.quantize(model, recipe, [kwargs], bits=bits)
    with torch.no_grad():
        expected = model(**kwargs).logits
        said = model.generate(**kwargs, max_new_tokens=5, do_sample=False)
        result = pack(model)
        found = model(**kwargs).logits
        assert torch.equal(model.generate(**kwargs, max_new_tokens=5, do_sample=False), said)
    assert distance(found, expected) < 1e-4
    wanted = {"hf-llama": 14, "hf-opt": 12, "hf-gpt2": 8}[name]
    assert len(result.layers) == wanted, (sorted(result.layers), result.skipped)


def test_state_dict_goes_through_safetensors(tmp_path: Path) -> None:
    model, x, expected = quantized(encoder, "squeezellm", "W3A16")
    pack(model, kernel="reference")
    packed = run(model, x)
    save_file(model.state_dict(), tmp_path / "packed.safetensors")
    other, _, _ = quantized(encoder, "squeezellm", "W3A16")
    pack(other, kernel="reference")
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(load_file(tmp_path / "packed.safetensors"))
    assert torch.equal(run(other, x), packed) and distance(packed, expected) < 1e-5


def test_a_packed_model_compiles_whole_and_is_copied() -> None:
    model, x, expected = quantized(encoder, "smoothquant", "W8A8")
    pack(model, kernel="reference")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(run(compiled, x), expected) < 1e-5  # type: ignore[arg-type]
    assert torch.equal(run(copy.deepcopy(model), x), run(model, x))
    torch._dynamo.reset()


def test_a_level_near_zero_does_not_keep_a_table_from_half_the_memory() -> None:
    table = torch.tensor([[-0.5, 0.25], [3e-6, 1e-7], [0.31, 0.7]])
    near = weight_room._half(table, weight_room.LEVEL_ERROR * table.abs().amax(0))
    assert near.dtype == torch.float16 and bool(((near - table).abs() <= 2.0**-10 * table.abs() + 2.0**-20).all())
    assert weight_room._half(table, 0.0).dtype == torch.float32  # a scale so small would be another one
    assert weight_room._half(table * 1e-4, weight_room.LEVEL_ERROR * 1e-4 * table.abs().amax(0)).dtype == torch.float32


def test_half_precision_models_keep_small_scales() -> None:
    model = encoder().half()
    fewbits.quantize(model, "rtn", tokens(4), bits="W4A16")
    x = tokens(4)[0]
    expected = run(model, x)
    pack(model, kernel="reference")
    layer = next(module for module in model.modules() if isinstance(module, CodesLinear))
    assert layer.scale.dtype == torch.float16 and layer.zero.dtype == torch.uint8
    assert distance(run(model, x).float(), expected.float()) < 5e-3


@pytest.mark.parametrize("kernel", ["reference", "native"])
def test_a_packed_layer_says_what_its_weight_is(kernel: str) -> None:
    if kernel == "native" and native.unavailable():
        pytest.skip("no C compiler on this machine")
    model, _, _ = quantized(encoder, "gptq", "W4A16g32", act_order=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    pack(model, kernel=kernel)
    for path, module in model.named_modules():
        if isinstance(module, Packed):
            torch.testing.assert_close(module.weight, before[f"{path}.weight"], rtol=1e-5, atol=1e-6)
            assert "kernel=" in repr(module)


def test_factors_and_output_quantizers_move_along() -> None:
    from fewbits.formats import PerTensor, symmetric
    from fewbits.graph import record
    from fewbits.ranges import AbsMax, MinMax
    from fewbits.recipe import QSpec

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(5, 8)
    graph = record(model, x)
    attachment = Attachment(model, graph.sites, {call.key for call in graph.calls if call.key is not None})
    spec = QSpec(symmetric(8), PerTensor(), AbsMax())
    for name, value in (("0.weight", model[0].weight), ("0.output", run(model[0], x))):
        made = Quantizer(QSpec(symmetric(4), PerTensor(), MinMax()) if name == "0.weight" else spec, name)
        made.calibrate(value.detach())
        attachment.set_quantizer(name, made)
    attachment.set_factor("0.input", torch.rand(8) + 0.5)
    expected = run(model, x)
    result = pack(model)
    assert list(result.layers) == ["0"] and attachment_of(model) is None
    assert model[0].factor is not None and model[0].output_quantizer is not None
    torch.testing.assert_close(run(model, x), expected, rtol=1e-5, atol=1e-6)


def test_result_is_json_able() -> None:
    import json

    model, _, _ = quantized(encoder, "rtn", "W4A16")
    result: PackResult = pack(model)
    assert json.loads(json.dumps(result.to_dict()))["bytes_after"] == result.bytes_after


@pytest.mark.skipif(ZOO is None, reason="FEWBITS_ZOO is not set")
def test_a_trained_checkpoint_is_loaded_and_packed(tmp_path: Path) -> None:
    folder = tmp_path / "opt-w4"
    fewbits.quantize_reference(f"{ZOO}/opt", "rtn", "W4A16g64", out=folder)
    loaded = fewbits.load(folder)
    ids = torch.randint(5, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded.model(ids).logits
        said = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
        result = pack(loaded.model)
        assert distance(loaded.model(ids).logits, expected) < 1e-4
        assert torch.equal(loaded.model.generate(ids, max_new_tokens=8, do_sample=False), said)
    layers = result.layers.values()
    assert sum(layer.bytes_after for layer in layers) < 0.17 * sum(layer.bytes_before for layer in layers)
