"""Packed int8 layers with an input in common quantize it once, and norms quantize what they make."""

from __future__ import annotations

import copy
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fewbits
import zoo_tiny
from engine_models import Block, encoder, tokens
from fewbits.formats import PerTensor, PerToken, affine, symmetric
from fewbits.formats.power_of_two import PowerOfTwo
from fewbits.kernels import ops, reference
from fewbits.kernels.operands import Int8Matrix, Norm, RowGrid
from fewbits.packed import PackResult, pack, shared
from fewbits.packed.int8 import Int8Linear
from fewbits.packed.norms import formula
from fewbits.ranges import AbsMax, MinMax
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Rule, Scheme
from fewbits.steps.calibrate import CalibrateActivations
from fewbits.steps.nearest import RoundNearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
SPECS = {
    "token symmetric": QSpec(symmetric(8), PerToken(-1), AbsMax(), dynamic=True),
    "token affine": QSpec(affine(8), PerToken(-1), MinMax(), dynamic=True),
    "tensor static": QSpec(affine(8), PerTensor(), MinMax()),
    "tensor dynamic": QSpec(affine(8), PerTensor(), MinMax(), dynamic=True),
    "power of two": QSpec(PowerOfTwo(bits=8), PerTensor(), AbsMax()),
}


def recipe(entering: QSpec) -> Recipe:
    """Weights of 8 bits a row, inputs of linear layers as said."""
    weights = QSpec(symmetric(8), fewbits.formats.PerChannel(0), AbsMax())
    scheme = Scheme(
        (Rule(weights, roles=("weight",), without=frozenset({"embedding"})),),
        (Rule(entering, roles=("input",), tags=frozenset({"layer_input"})),),
    )
    return Recipe("w8a8", Bits(8, 8), scheme, (CalibrateActivations(), RoundNearest()), Calibration(samples=4))


def packed(
    model: nn.Module, data: Any, kind: str = "token symmetric", kernel: str = "reference"
) -> tuple[Any, PackResult]:
    fewbits.quantize(model, recipe(SPECS[kind]), data, device=DEVICE)
    return model, pack(model, kernel=kernel)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
        return out


def layers(model: nn.Module) -> list[Int8Linear]:
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


def alone(model: nn.Module) -> nn.Module:
    """A copy of a packed model in which each layer quantizes its own input, and norms only norm."""
    other = copy.deepcopy(model)
    for layer in layers(other):
        layer.shared = None
    for module in other.modules():
        vars(module).pop("forward", None)
    return other


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """The codes of every tensor that was quantized on its way into layers, weakly."""
    made: list[weakref.ref[Tensor]] = []
    plain = Int8Linear._quantized

    def counted(self: Int8Linear, x: Tensor) -> Int8Matrix:
        rows = plain(self, x)
        made.append(weakref.ref(rows.codes))
        return rows

    monkeypatch.setattr(Int8Linear, "_quantized", counted)
    return made


@pytest.fixture
def fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms quantize on any device: what the kernel does is done in plain torch there."""
    monkeypatch.setattr(shared, "_has_kernel", lambda layer, norm: layer.grid() is not None)


# -- layers that share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
def test_a_common_input_is_quantized_once_to_the_same_bits(kind: str, quantized: list[Any]) -> None:
    model, result = packed(encoder(), tokens(4), kind)
    x = tokens(4)[0].to(DEVICE)
    expected = run(alone(model), x)
    assert len(quantized) == 3 * 6 + 1
    del quantized[:]
    assert torch.equal(run(model, x), expected)
    assert len(quantized) == 3 * 4 + 1  # q, k and v are one
    assert [made.layers for made in result.shared] == [
        tuple(f"blocks.{block}.{name}" for name in "qkv") for block in range(3)
    ]
    assert result.layers["blocks.0.k"].note.endswith("in the kernel, quantized once for 3 layers")
    assert "once" not in result.layers["blocks.0.o"].note
    assert json.loads(json.dumps(result.to_dict()))["shared"][0]["layers"] == ["blocks.0.q", "blocks.0.k", "blocks.0.v"]
    assert not shared._threads.rounds


@pytest.mark.parametrize(("name", "groups"), [("hf-llama", 4), ("hf-opt", 2)])
def test_models_of_a_library_share(name: str, groups: int, quantized: list[Any]) -> None:
    model, _, kwargs = zoo_tiny.MODELS[name]()
    fewbits.quantize(model, "smoothquant", [kwargs], bits="W8A8")
    result = pack(model, kernel="reference")
    assert len(result.shared) == groups
    with torch.no_grad():
        expected = alone(model)(**kwargs).logits
        before = len(quantized)
        del quantized[:]
        assert torch.equal(model(**kwargs).logits, expected)
    assert before - len(quantized) == sum(len(made.layers) - 1 for made in result.shared) > 0


def test_layers_that_quantize_differently_do_not_share() -> None:
    model = encoder(depth=1)
    wanted = recipe(SPECS["token symmetric"])
    other = Rule(SPECS["token affine"], roles=("input",), sites="blocks.0.k.*")
    scheme = Scheme(wanted.scheme.weights, (*wanted.scheme.activations, other))
    fewbits.quantize(model, Recipe("mixed", wanted.bits, scheme, wanted.steps, wanted.calibration), tokens(4))
    result = pack(model, kernel="reference")
    assert [made.layers for made in result.shared] == [("blocks.0.q", "blocks.0.v")]


def test_a_checkpoint_says_which_layers_share(tmp_path: Path) -> None:
    folder = tmp_path / "w8a8"
    fewbits.quantize_reference("demo:text", "rtn", "W8A8", calib="demo:text:calibration", samples=4, out=folder)
    result = pack(fewbits.load(folder).model, kernel="reference")
    assert result.shared and all(len(made.layers) > 1 for made in result.shared)


class Detour(nn.Module):
    """Two layers of one tensor; what happens between them is set when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        left = self.a(h)
        if self.between is not None:
            h = self.between(h)
        out: Tensor = left + self.b(h)
        return out


def boom(x: Tensor) -> Tensor:
    raise ValueError("in between")


@pytest.fixture
def detour() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    return packed(Detour(), [x])[0], x.to(DEVICE)


@pytest.mark.parametrize("change", ["in place", "through a view", "an equal tensor", "another"])
def test_another_tensor_is_quantized_anew(detour: tuple[Any, Tensor], change: str, quantized: list[Any]) -> None:
    model, x = detour
    model.between = {
        "in place": lambda h: h.add_(1),
        "through a view": lambda h: (h[1:].mul_(3), h)[1],
        "an equal tensor": torch.clone,
        "another": lambda h: h + 1,
    }[change]
    expected = run(alone(model), x)
    del quantized[:]
    assert torch.equal(run(model, x), expected) and len(quantized) == 2
    model.between = None
    del quantized[:]
    assert torch.equal(run(model, x), run(alone(model), x)) and len(quantized) == 1 + 2


def test_nothing_is_kept_after_the_last_layer_or_an_exception(detour: tuple[Any, Tensor], quantized: list[Any]) -> None:
    model, x = detour
    alive: list[bool] = []
    model.b.register_forward_hook(lambda module, args, out: alive.append(quantized[-1]() is not None))
    run(model, x)
    assert alive == [False] and not shared._threads.rounds
    model.between = boom
    with pytest.raises(ValueError, match="in between"):
        run(model, x)
    assert quantized[-1]() is None and not shared._threads.rounds
    model.between = None
    other = torch.randn_like(x)
    assert torch.equal(run(model, other), run(alone(model), other))


def test_layers_called_by_themselves_do_not_share(detour: tuple[Any, Tensor], quantized: list[Any]) -> None:
    model, x = detour
    for layer in (model.a, model.b):
        run(layer, x)
    assert len(quantized) == 2


def test_another_stream_does_not_wait_for_the_codes(
    detour: tuple[Any, Tensor], quantized: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = detour
    streams = iter(["one", "two", "two"])
    monkeypatch.setattr(shared, "_stream", lambda x: next(streams))
    run(model, x)
    assert len(quantized) == 2


def test_threads_do_not_meet(detour: tuple[Any, Tensor]) -> None:
    model, _ = detour
    inputs = [torch.randn(5, 8, device=DEVICE) for _ in range(2)]
    expected = [run(alone(model), x) for x in inputs]
    both, found = threading.Barrier(2), [Tensor(), Tensor()]

    def waits(h: Tensor) -> Tensor:
        both.wait(30)
        return h

    model.between = waits

    def work(at: int) -> None:
        for _ in range(20):
            found[at] = run(model, inputs[at])

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_inference_mode_keeps_no_versions_so_nothing_is_shared(
    detour: tuple[Any, Tensor], quantized: list[Any]
) -> None:
    model, x = detour
    model.between = lambda h: h.add_(1)
    with torch.inference_mode():
        found = model(x)
    assert len(quantized) == 2 and torch.equal(found, run(alone(model), x))


def test_compiled_models_do_not_share(quantized: list[Any]) -> None:
    model, _ = packed(encoder(), tokens(4))
    x = tokens(4)[0].to(DEVICE)
    expected = run(model, x)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-5, atol=1e-6)
    assert not shared._threads.rounds
    torch._dynamo.reset()


def test_a_copy_shares_by_itself(detour: tuple[Any, Tensor], quantized: list[Any]) -> None:
    model, x = detour
    other = copy.deepcopy(model)
    assert other.a.shared.shared is other.b.shared.shared is not model.a.shared.shared
    assert torch.equal(run(other, x), run(model, x)) and len(quantized) == 2


@pytest.mark.parametrize("changed", [False, True])
def test_other_scales_that_are_loaded_end_it(changed: bool, quantized: list[Any], tmp_path: Path) -> None:
    model, _ = packed(encoder(), tokens(4), "tensor static")
    x = tokens(4)[0].to(DEVICE)
    save_file(model.state_dict(), tmp_path / "packed.safetensors")
    state = load_file(tmp_path / "packed.safetensors")
    if changed:
        state["blocks.1.k.activations.scale"] *= 1.5
    model.load_state_dict(state)
    expected = run(alone(model), x)
    del quantized[:]
    for _ in range(2):
        assert torch.equal(run(model, x), expected)
    assert len(quantized) == 2 * (3 * 4 + 1 + changed)


# -- norms that quantize -----------------------------------------------------------------------------------------------


class Skewed(nn.Module):
    """An RMS norm in float32, rounded once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        out: Tensor = self.weight * wide / (wide.square().mean(-1, keepdim=True) + self.tiny).sqrt()
        return out.to(x.dtype)


class Clipped(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1, 1)


def hf(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module, _, kind = name.partition(" ")
        library = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
        made: nn.Module = getattr(library, kind)(32)
        return made

    return make


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[float, bool, bool] | None]] = {
    "layer": (lambda: nn.LayerNorm(32), (1e-5, True, False)),
    "layer, no bias": (lambda: nn.LayerNorm(32, eps=1e-6, bias=False), (1e-6, True, False)),
    "rms": (lambda: nn.RMSNorm(32, eps=1e-6), (1e-6, False, False)),
    "llama": (hf("llama LlamaRMSNorm"), (1e-6, False, True)),
    "t5": (hf("t5 T5LayerNorm"), (1e-6, False, True)),
    "olmo2": (hf("olmo2 Olmo2RMSNorm"), (1e-6, False, False)),
    "written out": (lambda: Skewed(32), (1e-5, False, False)),
    "gemma": (hf("gemma GemmaRMSNorm"), None),  # multiplies by 1 + weight
    "clipped": (lambda: Clipped(32), None),
    "two axes": (lambda: nn.LayerNorm((4, 32)), None),
    "no weight": (lambda: nn.LayerNorm(32, elementwise_affine=False), None),
    "batch": (lambda: nn.BatchNorm1d(32).eval(), None),
    "group": (lambda: nn.GroupNorm(4, 32), None),
    "activation": (lambda: nn.PReLU(32), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMS)
def test_which_norm_a_module_is(name: str, dtype: torch.dtype) -> None:
    make, wanted = NORMS[name]
    norm = make().to(DEVICE, dtype)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    found = formula(norm)
    if wanted is not None and dtype == torch.float32:
        wanted = (*wanted[:2], False)  # rounding to its own type changes nothing
    assert found == wanted
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off
@pytest.mark.parametrize("name", ["layer", "rms", "llama"])
def test_the_norm_is_written_out_as_the_module_makes_it(name: str, dtype: torch.dtype, backend: str) -> None:
    pytest.importorskip("triton")
    norm = NORMS[name][0]().to(DEVICE, dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    made = formula(norm.requires_grad_(False))
    assert made is not None
    held = Norm(norm.get_parameter("weight"), norm._parameters.get("bias"), *made)
    x = (torch.randn(9, 32, device=DEVICE) * 3).to(dtype)
    out, grid = torch.full_like(x, 7.0), RowGrid(None, None, -127, 127, True, 1e-5)
    rows = ops.run_norm_quantize(x, held, grid, backend, out)
    expected = run(norm, x)
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert (out == expected).float().mean() > (0.9 if dtype == torch.float16 else 0)
    plain = reference.quantize_rows(out, grid)  # the codes are those of what was written
    assert torch.equal(rows.codes, plain.codes) and torch.equal(rows.sums, plain.sums)
    torch.testing.assert_close(rows.scales, plain.scales)
    silent = ops.run_norm_quantize(x, held, grid, backend)
    assert torch.equal(silent.codes, rows.codes)


@pytest.mark.parametrize("kind", ["token symmetric", "token affine", "tensor static"])
def test_norms_quantize_for_the_layers_behind_them(kind: str, fuses: None, quantized: list[Any]) -> None:
    model, result = packed(encoder(), tokens(4), kind)
    x = tokens(4)[0].to(DEVICE)
    assert {made.norm: len(made.layers) for made in result.shared} == {
        **{f"blocks.{block}.norm1": 3 for block in range(3)},
        **{f"blocks.{block}.norm2": 1 for block in range(3)},
        "norm": 1,
    }
    assert result.sharing() == "9 layers share 3 inputs, quantized once each; 7 norms quantize as they norm"
    assert result.layers["blocks.1.v"].note.endswith("quantized once for 3 layers by the norm blocks.1.norm1")
    assert result.layers["head"].note.endswith("quantized by the norm norm")
    assert all(type(model.get_submodule(made.norm)) is nn.LayerNorm for made in result.shared)
    expected = run(alone(model), x)
    del quantized[:]
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)
    assert len(quantized) == 3 * 2  # o and down
    assert torch.equal(run(copy.deepcopy(model), x), run(model, x))
    assert not shared._threads.rounds


def test_a_library_s_norms_quantize(fuses: None, quantized: list[Any]) -> None:
    model, _, kwargs = zoo_tiny.MODELS["hf-llama"]()
    model = model.to(torch.bfloat16)
    fewbits.quantize(model, "rtn", [kwargs], bits="W8A8")
    result = pack(model, kernel="reference")
    assert sum(bool(made.norm) for made in result.shared) == 4
    with torch.no_grad():
        expected = alone(model)(**kwargs).logits
        del quantized[:]
        found = model(**kwargs).logits
        said = model.generate(**kwargs, max_new_tokens=4, do_sample=False)
    assert len(quantized) >= 4 and float((found - expected).norm() / expected.norm()) < 0.02
    assert said.shape[1] == kwargs["input_ids"].shape[1] + 4


def test_who_does_not_know_of_it_sees_the_float_output(fuses: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, device=DEVICE)
    model, _ = packed(Block(16), [x.cpu()])
    seen: list[Tensor] = []
    model.norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    run(model, x)
    torch.testing.assert_close(seen[0], F.layer_norm(x, (16,), model.norm1.weight, model.norm1.bias))


def test_a_hook_that_changes_the_output_is_heard(fuses: None, quantized: list[Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, device=DEVICE)
    model, _ = packed(Block(16), [x.cpu()])
    model.norm1.register_forward_hook(lambda module, args, out: out * 0.5)
    other = alone(model)
    del quantized[:]
    torch.testing.assert_close(run(model, x), run(other, x), rtol=1e-4, atol=1e-4)
    assert len(quantized) == 3 + 6


@pytest.mark.parametrize(
    "case", ["outside", "grad", "inference", "autocast", "another type", "another width", "keyword", "empty"]
)
def test_where_it_cannot_a_norm_is_what_it_was(case: str, fuses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, device=DEVICE)
    model, _ = packed(Block(16), [x.cpu()])
    norm = model.norm1.requires_grad_()
    if case != "outside":  # as within a call of the block
        shared._threads.rounds[norm.forward.layer.shared.shared] = shared._Round(False)
    fused: list[int] = []
    plain = ops.run_norm_quantize

    def counted(*given: Any) -> Int8Matrix:
        fused.append(1)
        return plain(*given)

    monkeypatch.setattr(ops, "run_norm_quantize", counted)
    refused = {"another type": x.double(), "another width": x[..., :8]}
    x = {**refused, "empty": x[:0]}.get(case, x)
    mode = torch.inference_mode if case == "inference" else torch.enable_grad if case == "grad" else torch.no_grad
    try:
        with mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=case == "autocast"):
            if case in refused:
                with pytest.raises(RuntimeError):
                    norm(x)
            else:
                found = norm(input=x) if case == "keyword" else norm(x)
                assert torch.equal(found, nn.LayerNorm.forward(norm, x))
                assert found.requires_grad == (case == "grad")
            assert not fused
        if case not in ("outside", "empty", *refused):
            assert run(norm, x).shape == x.shape and fused
    finally:
        shared._threads.rounds.clear()


def test_norms_that_something_acts_on_stay(fuses: None) -> None:
    model = encoder(depth=1)
    wanted = recipe(SPECS["token symmetric"])
    entering = Rule(SPECS["token symmetric"], roles=("input",), sites="blocks.0.norm1.*")
    scheme = Scheme(wanted.scheme.weights, (*wanted.scheme.activations, entering))
    fewbits.quantize(model, Recipe("norms", wanted.bits, scheme, wanted.steps, wanted.calibration), tokens(4))
    x = tokens(4)[0]
    expected = run(model, x)
    result = pack(model, kernel="reference")
    assert [made.norm for made in result.shared] == ["", "blocks.0.norm2", "norm"]
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)


def test_models_whose_norms_quantize_compile_whole(fuses: None) -> None:
    model, _ = packed(encoder(), tokens(4))
    x = tokens(4)[0].to(DEVICE)
    expected = run(alone(model), x)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-5, atol=1e-6)
    assert not shared._threads.rounds
    torch._dynamo.reset()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("kind", ["token symmetric", "tensor static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_kernel_gives_what_several_gave(kind: str, dtype: torch.dtype, quantized: list[Any]) -> None:
    model, result = packed(encoder(width=256).to(dtype), tokens(4), kind, "triton")
    assert sum(bool(made.norm) for made in result.shared) == 7
    x = tokens(4)[0].cuda()
    expected = run(alone(model), x)
    del quantized[:]
    found = run(model, x)
    assert len(quantized) == 6 and torch.equal(run(model, x), found)
    assert float((found - expected).norm() / expected.norm()) < (5e-3 if dtype == torch.float32 else 3e-2)


@on_gpu
@pytest.mark.parametrize("norms", [False, True])
def test_captured_in_a_graph_it_reads_the_new_input(norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice on one input, after a run outside of it: no capture may use codes that were made elsewhere."""
    if not norms:
        monkeypatch.setattr(shared, "_has_kernel", lambda layer, norm: False)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64, device="cuda")
    model, _ = packed(Block(64), [x.cpu()], kernel="triton")
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    side = torch.cuda.Stream()
    with torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        model(x)
        for graph in graphs:
            with torch.cuda.graph(graph):
                outs.append(model(x))
        for graph, out in zip(graphs[::-1], outs[::-1], strict=True):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, model(x))


@on_gpu
def test_captures_of_single_layers_do_not_lean_on_each_other() -> None:
    torch.manual_seed(0)
    model, _ = packed(Detour(), [torch.randn(5, 8)], kernel="triton")
    x = torch.randn(5, 8, device="cuda")
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(first):
            model.a(x)
        with torch.cuda.graph(second):
            out = model.b(x)
        x.copy_(torch.randn_like(x))
        second.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, model.b(x))
