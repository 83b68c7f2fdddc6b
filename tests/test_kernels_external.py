"""Kernels of other packages: what they are asked for, what their layers hold, and that their failures are theirs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fewbits
from cuda_graphs import replays
from engine_models import encoder, tokens
from fewbits.errors import FewbitsError
from fewbits.kernels import external
from fewbits.kernels.choose import choose
from fewbits.kernels.needs import Case, unable
from fewbits.kernels.words import unpack_words
from fewbits.packed.external import GemliteLinear, HummingLinear
from fewbits.packed.forms import LAID_OUT
from fewbits.packed.modules import Packed
from fewbits.packed.weight import KernelWeight

CUDA = torch.device("cuda", 0)
CASE = Case("codes", 4, 128, 256, 512, 1, torch.float16, CUDA)


def weight(bits: int, group: int, *, middle: bool = False, outputs: int = 256, inputs: int = 512) -> KernelWeight:
    generator = torch.Generator().manual_seed(bits * group)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(inputs // group, outputs, generator=generator) * 0.02 + 0.01).half()
    zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8, generator=generator)
    return KernelWeight(codes, bits, group, scale, torch.full_like(zero, 1 << (bits - 1)) if middle else zero)


def meant(given: KernelWeight, dtype: torch.dtype = torch.float16) -> Tensor:
    """The float64 weight [out, in], from scales of a type."""
    assert given.scale is not None and given.zero is not None
    scale, zero = (
        held.T.double().repeat_interleave(given.group, 1) for held in (given.scale.to(dtype), given.zero.long())
    )
    return (given.codes.double() - zero) * scale


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


# -- what they are asked for ---------------------------------------------------------------------------------------


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "missing", lambda package: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("name", ["humming", "gemlite"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "find_spec", lambda package: None)
    said = unable(name, CASE)
    assert said == f"the package {name} is not installed (pip install 'fewbits[{name}]')"
    assert unable(name, replace(CASE, device=torch.device("cpu"))) == "it needs a GPU"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("both", {"dtype": torch.float32}, "16-bit activations"),
        ("both", {"table": True}, "uniform grid"),
        ("both", {"extras": True}, "no parts beside the codes"),
        ("both", {"group": 96, "inputs": 960}, "groups of a power of two"),
        ("both", {"group": 128, "inputs": 576}, "that divide the row"),
        ("both", {"small": False}, "zero points"),
        ("gemlite", {"bits": 3}, "1, 2, 4 or 8 bits"),
        ("gemlite", {"outputs": 40}, "multiples of 32"),
        ("humming", {"outputs": 192}, "multiples of 128 rows"),
        ("humming", {"inputs": 544, "group": 544}, "64 columns"),
    ],
)
def test_what_they_cannot_hold_is_said(name: str, changes: dict[str, Any], reason: str) -> None:
    for kernel in ("humming", "gemlite") if name == "both" else (name,):
        assert reason in str(unable(kernel, replace(CASE, **changes)))


@pytest.mark.usefixtures("_installed")
def test_what_they_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (1, 2, 4, 8):
        assert unable("gemlite", replace(CASE, bits=bits)) is None
    for bits in range(1, 9):
        assert unable("humming", replace(CASE, bits=bits, dtype=torch.bfloat16)) is None
    whole = replace(CASE, group=11008, inputs=11008)
    assert unable("humming", whole) is None and unable("gemlite", whole) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert unable("humming", CASE) is None and unable("gemlite", CASE) is None
    for name in ("humming", "gemlite"):
        assert "older kind" in str(unable(name, replace(CASE, dtype=torch.bfloat16)))


def test_asked_for_where_they_cannot_run() -> None:
    model = encoder()
    fewbits.quantize(model, "rtn", tokens(2), bits="W4A16")
    for name in ("humming", "gemlite"):
        with pytest.raises(FewbitsError, match=f"kernel {name} cannot multiply this weight: it needs a GPU"):
            fewbits.pack(model, kernel=name)


@pytest.mark.usefixtures("_installed")
def test_choice_goes_on_without_a_package_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.kernels.choose._choices", {})
    monkeypatch.setattr("fewbits.kernels.choose.milliseconds", lambda run, *_: run())
    monkeypatch.setattr("fewbits.kernels.needs.has_triton", lambda: False)
    made: list[str] = []

    def make(name: str) -> Any:
        made.append(name)
        if name == "humming":
            with external._of("humming"):
                raise AssertionError("no compiler\nmore of it")
        return lambda rows: {"gemlite": 1.0, "reference": 9.0}[name]

    chosen = choose(CASE, make)
    assert chosen.kernel == "gemlite" and made == ["humming", "gemlite", "reference"]
    assert "not humming: humming failed: AssertionError: no compiler" in chosen.why and "more of it" not in chosen.why
    made.clear()
    monkeypatch.setenv("FEWBITS_SKIP_KERNELS", "gemlite, humming")
    left = choose(replace(CASE, rows=2), make)
    assert left.kernel == "reference" and made == []
    assert "not gemlite: FEWBITS_SKIP_KERNELS says so" in left.why
    monkeypatch.setenv("FEWBITS_SKIP_KERNELS", "hummus")
    with pytest.raises(FewbitsError, match="kernel 'hummus': choose auto or one of"):
        choose(replace(CASE, rows=3), make)


def test_errors_are_the_packages_but_for_memory() -> None:
    with (
        pytest.raises(external.PackageError, match=r"^gemlite failed: KeyError: 'x'$") as caught,
        external._of("gemlite"),
    ):
        raise KeyError("x")
    assert isinstance(caught.value, FewbitsError) and isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(torch.OutOfMemoryError), external._of("gemlite"):
        raise torch.OutOfMemoryError("full")


# -- what their layers hold, against packages that do what theirs document -----------------------------------------


def module(monkeypatch: pytest.MonkeyPatch, name: str, **held: Any) -> None:
    made = ModuleType(name)
    vars(made).update(held)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def _gemlite(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A gemlite whose kernels take what those of 0.6 do."""
    numbers = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
    kinds = {held: SimpleNamespace(value=number) for held, number in numbers.items()}
    ran: list[str] = []

    def forward(
        x: Tensor, W_q: Tensor, scales: Tensor, zeros: Tensor, scales_x: None, W_nbits: int, group_size: int,
        unpack_mask: int, elements_per_sample: int, input_dtype: int, output_dtype: int, acc_dtype: int,
        meta_dtype: int, channel_scale_mode: int, W_group_mode: int, data_contiguous: bool, type_id: int,
    ) -> Tensor:  # fmt: skip
        assert (channel_scale_mode, W_group_mode, data_contiguous, type_id) == (0, 3, True, 100 + W_nbits)
        assert (input_dtype, acc_dtype, meta_dtype) == (numbers[x.dtype], 0, numbers[scales.dtype])
        assert output_dtype == (numbers[x.dtype] if len(x) >= 64 else 0), "16-bit sums would be added up in memory"
        assert scales.shape == (x.shape[1] // group_size, W_q.shape[1]) and scales.is_contiguous()
        after = scales.untyped_storage().nbytes() - scales.nbytes
        assert after >= 1024 * scales.itemsize, "a block of columns is read past the last one"
        assert zeros.dtype == (torch.int32 if zeros.numel() == 1 else scales.dtype)
        shifts = torch.arange(elements_per_sample) * W_nbits
        codes = ((W_q.long()[:, None] >> shifts[:, None]) & unpack_mask).flatten(0, 1)
        spread = [held if held.numel() == 1 else held.repeat_interleave(group_size, 0) for held in (zeros, scales)]
        out = x.double() @ ((codes - spread[0].double()) * spread[1].double())
        return out.to({number: held for held, number in numbers.items()}[output_dtype])

    def kind(rows: int, bits: int) -> str:
        ran.append("GEMM" if rows >= 64 else "GEMV")
        return ran[-1]

    mapping = dict.fromkeys(("GEMM", "GEMV"), SimpleNamespace(forward=forward))
    module(monkeypatch, "gemlite.core", get_matmul_type=kind, GEMLITE_TRITON_MAPPING=mapping)
    module(monkeypatch, "gemlite.dtypes", TORCH_TO_DTYPE=kinds, DType=SimpleNamespace(FP16=kinds[torch.float16]))
    return ran


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(1, 64), (2, 32), (4, 128), (8, 512)])
def test_gemlite_multiplies_what_the_codes_stand_for(
    _gemlite: list[str], bits: int, group: int, middle: bool, dtype: torch.dtype
) -> None:
    given = weight(bits, group, middle=middle)
    bias = torch.randn(256).to(dtype)
    layer = GemliteLinear(given, bias, dtype, torch.device("cpu"))
    assert layer.zero.ndim == (0 if middle else 1)
    assert torch.equal(layer.decoded().double(), meant(given).float().double())
    for rows in (1, 70):
        x = torch.randn(2, rows, 512).to(dtype)
        found = layer(x)
        assert found.dtype == dtype and found.shape == (2, rows, 256)
        assert distance(found, x.double() @ meant(given).T + bias.double()) < torch.finfo(dtype).eps
    assert layer(x[:, :0]).shape == (2, 0, 256) and _gemlite == ["GEMV", "GEMM"]
    assert layer(x.float()).dtype == torch.float32


@pytest.fixture
def _humming(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A humming whose layout is words by rows, and scales dealt out within runs of eight."""

    def deal(scale: Tensor, on_c: bool) -> Tensor:
        runs = scale.T.reshape(-1, 2, 4) if on_c else scale.T.reshape(-1, 4, 2)
        return runs.transpose(1, 2).reshape(scale.T.shape)

    class Config:
        def __init__(self, group: int, bits: int) -> None:
            self.group, self.bits, self.should_apply_bs_on_c = group, bits, group == 0

        def to_str(self) -> str:
            return f'{{"group": {self.group}, "bits": {self.bits}}}'

    def prepare(
        tensors: dict[str, Tensor],
        shape_n: int,
        shape_k: int,
        weight_schema: Any,
        torch_dtype: torch.dtype,
        device: Any,
    ) -> tuple[Config, dict[str, Tensor]]:
        bits, group = int(weight_schema.b_dtype.removeprefix("uint")), weight_schema.weight_scale_group_size
        groups = shape_k // (group or shape_k)
        assert tensors["weight"].shape == (shape_n, shape_k * bits // 32) and tensors["weight"].is_contiguous()
        assert tensors["weight_scale"].shape == (shape_n, groups) and tensors["weight_scale"].dtype == torch_dtype
        assert weight_schema.has_zero_point == ("zero_point" in tensors)
        if weight_schema.has_zero_point:
            assert tensors["zero_point"].shape == (shape_n * bits // 32, groups)
        return Config(group, bits), {**tensors, "weight_scale": deal(tensors["weight_scale"], group == 0)}

    ran: list[str] = []

    def gemm(
        *, layer_config: str, tuning_config: str, inputs: Tensor, weight: Tensor, weight_scale: Tensor,
        zero_point: Tensor | None, locks: Tensor,
    ) -> Tensor:  # fmt: skip
        config = Config(**json.loads(layer_config))
        assert locks.dtype == torch.int32 and len(locks) == 2048 and not locks.any()
        ran.append(tuning_config)
        n, k = len(weight), inputs.shape[1]
        codes = unpack_words(weight.T.contiguous(), config.bits, k).double()
        order = deal(torch.arange(weight_scale.numel()).view(n, -1), config.should_apply_bs_on_c).flatten()
        scale = torch.empty(n, weight_scale.shape[0], dtype=weight_scale.dtype)
        scale.view(-1)[order] = weight_scale.flatten()
        middle = torch.full((n, 1), 1 << (config.bits - 1))
        zero = middle if zero_point is None else unpack_words(zero_point, config.bits, n).T
        wide = [held.double().repeat_interleave(k // held.shape[1], 1) for held in (zero, scale)]
        return (inputs.double() @ ((codes - wide[0]) * wide[1]).T).to(inputs.dtype)

    module(monkeypatch, "humming.ops", humming_gemm=gemm)
    module(monkeypatch, "humming.schema", HummingWeightSchema=SimpleNamespace)
    module(monkeypatch, "humming.config", LayerConfig=Config)
    module(monkeypatch, "humming.tune", get_heuristics_config=lambda config, shape_m, device: {"rows": shape_m})
    module(
        monkeypatch, "humming.transform", transform_humming_weight_scale=deal,
        prepare_and_transform_humming_tensors=prepare,
    )  # fmt: skip
    return ran


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(1, 64), (3, 32), (4, 128), (8, 512)])
def test_humming_multiplies_what_the_codes_stand_for(
    _humming: list[str], bits: int, group: int, middle: bool, dtype: torch.dtype
) -> None:
    given = weight(bits, group, middle=middle)
    bias = torch.randn(256).to(dtype)
    layer = HummingLinear(given, bias, dtype, torch.device("cpu"))
    assert (layer.zero is None) == middle
    assert torch.equal(layer.decoded().double(), meant(given, dtype).float().double())
    x = torch.randn(2, 3, 512).to(dtype)
    found = layer(x)
    assert found.dtype == dtype and found.shape == (2, 3, 256)
    assert distance(found, x.double() @ meant(given, dtype).T + bias.double()) < torch.finfo(dtype).eps
    assert layer(x[:, :0]).shape == (2, 0, 256)
    assert _humming == ['{"rows": 512}', '{"rows": 6}'], "a kernel is compiled for the rows that there are"


@pytest.mark.parametrize("name", ["humming", "gemlite"])
def test_layers_are_saved_and_loaded(name: str, _gemlite: list[str], _humming: list[str], tmp_path: Path) -> None:
    made = LAID_OUT[name](weight(4, 128), torch.randn(256).half(), torch.float16, torch.device("cpu"))
    x = torch.randn(3, 512).half()
    check_saved(made, LAID_OUT[name](weight(4, 64 * 2), torch.zeros(256).half(), torch.float16, x.device), x, tmp_path)


def check_saved(made: Packed, other: Packed, x: Tensor, folder: Path) -> None:
    """`other`, packed alike but emptied, gives what `made` gave once it has loaded that."""
    expected = made(x)
    save_file(made.state_dict(), folder / "layer.safetensors")
    assert list(made.parameters()) == [] and "locks" not in made.state_dict()
    for value in other.state_dict().values():
        value.zero_()
    assert not other(x).any()
    other.load_state_dict(load_file(folder / "layer.safetensors", device=str(x.device)))
    assert torch.equal(other(x), expected) and torch.equal(other.decoded(), made.decoded())


def test_ops_know_what_comes_out_without_computing_it() -> None:
    x = torch.empty(2, 3, 512, dtype=torch.float16, device="meta")
    words = torch.empty(64, 256, dtype=torch.int32, device="meta")
    table = torch.empty(4 * 256 + 1024, dtype=torch.float16, device="meta")
    found = external.multiply_gemlite(x.requires_grad_(), words, table, table, 4, 128)
    assert found.shape == (2, 3, 256) and found.dtype == torch.float16
    found = external.multiply_humming(x, words.T, table, None, table, "{}", 256)
    assert found.shape == (2, 3, 256) and found.dtype == torch.float16


# -- the packages themselves ---------------------------------------------------------------------------------------


def needs(name: str) -> Any:
    absent = not torch.cuda.is_available() or external.missing(name) is not None
    return pytest.mark.skipif(absent, reason=f"no GPU, or {name} is not installed")


CASES = [
    *(
        pytest.param("humming", *case, marks=needs("humming"))
        for case in (
            (4, 128, True, torch.float16),
            (4, 128, False, torch.bfloat16),
            (3, 64, False, torch.float16),
            (2, 32, False, torch.bfloat16),
            (5, 128, True, torch.bfloat16),
            (8, 512, False, torch.float16),
            (8, 128, True, torch.bfloat16),
            (4, 512, True, torch.float16),
        )
    ),
    *(
        pytest.param("gemlite", *case, marks=needs("gemlite"))
        for case in (
            (4, 128, True, torch.float16),
            (4, 512, False, torch.bfloat16),
            (2, 64, False, torch.float16),
            (8, 32, True, torch.bfloat16),
        )
    ),
]


@pytest.mark.parametrize(("name", "bits", "group", "middle", "dtype"), CASES)
def test_on_a_gpu(name: str, bits: int, group: int, middle: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    given = weight(bits, group, middle=middle)
    layer, other = (LAID_OUT[name](given, torch.randn(256).to(dtype), dtype, CUDA).to(CUDA) for _ in range(2))
    expected = meant(given, dtype if name == "humming" else torch.float16).cuda()
    assert torch.equal(layer.decoded().double(), expected.float().double())
    assert layer.bias is not None
    for rows in (1, 8, 70):
        x = torch.randn(rows, 512, device=CUDA, dtype=dtype)
        found = layer(x)
        assert found.dtype == dtype
        # weights are rounded to the type of the activations on the way, and the sum once
        assert distance(found, x.double() @ expected.T + layer.bias.double()) < 2 * torch.finfo(dtype).eps
    check_saved(layer, other, x, tmp_path)  # 70 rows: gemlite sums fewer in an order of chance


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("humming", "gemlite")])
def test_captured_in_a_graph_and_compiled(name: str) -> None:
    layer = LAID_OUT[name](weight(4, 128), None, torch.float16, CUDA)
    x = torch.randn(1, 512, device=CUDA, dtype=torch.float16)
    with torch.no_grad():
        expected = x.double() @ layer.decoded().double().T
        for out in replays(lambda: layer(x)):
            assert distance(out, expected) < 2e-3
        compiled = torch.compile(layer, fullgraph=True)
        assert distance(compiled(x), expected) < 2e-3


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("humming", "gemlite")])
def test_a_packed_model_gives_what_the_simulation_gave(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).cuda().half()
    x = torch.randn(8, 256, device=CUDA, dtype=torch.float16)
    fewbits.quantize(model, "gptq", [x], bits="W4A16g64", device="cuda")
    with torch.no_grad():
        expected = model(x)
        result = fewbits.pack(model, kernel=name)
        found = model(x)
    assert {layer.kernel for layer in result.layers.values()} == {name} and len(result.layers) == 2
    assert result.bytes_after < 0.4 * result.bytes_before
    assert distance(found, expected.double()) < 8 * torch.finfo(torch.float16).eps
