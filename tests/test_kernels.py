"""Kernels of packed weights against float64: Triton (interpreted where there is no GPU) and plain torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import PerTensor, PerToken, affine, symmetric
from fewbits.kernels import native, ops, reference
from fewbits.kernels.choose import choose, milliseconds
from fewbits.kernels.needs import Case, unable
from fewbits.kernels.operands import Beside, Int8Matrix, PackedWeight, RowGrid
from fewbits.kernels.reference import padded_int_mm
from fewbits.kernels.words import pack_words
from fewbits.outliers.parts import Sparse
from fewbits.quantizer import Quantizer
from fewbits.ranges import AbsMax, MinMax
from fewbits.recipe import QSpec

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weight(
    bits: int, outputs: int, inputs: int, group: int, *, table: bool = False, extras: bool = False
) -> PackedWeight:
    """A weight for `packed_matmul`, with a bias, float32."""
    codes = torch.randint(0, 1 << bits, (outputs, inputs))
    groups = -(-inputs // group)
    scale, zero = torch.rand(groups, outputs) * 0.1 + 0.01, torch.rand(groups, outputs) * (1 << bits)
    levels = torch.randn(1 << bits, outputs)
    grid = [None, None, levels] if table else [scale, zero, None]
    beside = Beside(torch.randn(outputs))
    if extras:
        kept = torch.rand(outputs, inputs) < 0.05
        kept[0] = False  # a row without entries
        sparse = Sparse.from_dense(torch.randn(outputs, inputs), kept)
        columns = torch.randperm(inputs)[:3], torch.randn(3, outputs)
        beside = Beside(beside.bias, *columns, sparse.rows, sparse.columns, sparse.values)
    made = PackedWeight(pack_words(codes, bits), *grid, bits, group, outputs, beside)
    return PackedWeight.of([held.to(DEVICE) if isinstance(held, Tensor) else held for held in made.flat()])


def dense(given: PackedWeight, inputs: int) -> tuple[Tensor, Tensor | None]:
    """(weight [out, in], bias) in float64, worked out entry by entry from the pieces."""
    words, scale, zero, table, bits, group, outputs, bias, index, columns, starts, places, entries = (
        held.double().cpu() if isinstance(held, Tensor) and held.is_floating_point() else held for held in given.flat()
    )
    words = words.cpu()
    out = torch.empty(outputs, inputs, dtype=torch.float64)
    for k in range(inputs):
        run, nth = divmod(k, 32)
        word, bit = divmod(nth * bits, 32)
        pair = words[run * bits + word].long() & 0xFFFFFFFF
        if word + 1 < bits:
            pair = pair | ((words[run * bits + word + 1].long() & 0x7FFFFFFF) << 32)
        code = (pair >> bit) & ((1 << bits) - 1)
        out[:, k] = (
            table[code, torch.arange(outputs)] if table is not None else (code - zero[k // group]) * scale[k // group]
        )
    if index is not None:
        for at, column in enumerate(index.tolist()):
            out[:, column] += columns[at]
        for row in range(outputs):
            for at in range(int(starts[row]), int(starts[row + 1])):
                out[row, int(places[at])] += entries[at]
    return out, bias


CASES = [
    # bits, rows, outputs, inputs, group, table, extras
    (4, 1, 70, 200, 64, False, False),
    (4, 1, 33, 2080, 128, False, True),  # the input axis is split
    (3, 1, 70, 200, 200, False, True),
    (3, 2, 5, 70, 32, False, False),
    (2, 1, 64, 129, 128, False, False),
    (8, 1, 20, 64, 32, False, False),
    (3, 1, 70, 200, 200, True, True),
    (4, 1, 31, 65, 65, True, False),
    (4, 9, 70, 100, 32, False, True),
    (3, 17, 40, 100, 64, False, False),
    (2, 5, 16, 33, 33, False, False),
    (4, 5, 40, 64, 64, True, True),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("bits", "rows", "outputs", "inputs", "group", "table", "extras"), CASES)
def test_packed_product_is_the_float64_product(
    bits: int, rows: int, outputs: int, inputs: int, group: int, table: bool, extras: bool, backend: str
) -> None:
    given = weight(bits, outputs, inputs, group, table=table, extras=extras)
    x = torch.randn(rows, inputs, device=DEVICE)
    expected = F.linear(x.cpu().double(), *dense(given, inputs))
    found = ops.packed_matmul(x, *given.flat(), backend=backend).cpu().double()
    # one row in Triton: codes as mantissas, see triton_words.mantissas
    tolerance = 1e-4 if backend == "triton" and rows <= 4 and not table else 2e-6
    assert (found - expected).norm() <= tolerance * expected.norm()
    again = ops.packed_matmul(x, *given.flat(), backend=backend).cpu().double()
    assert torch.equal(found, again)


@pytest.mark.skipif(native.unavailable() is not None, reason="no C compiler on this machine")
@pytest.mark.parametrize(("bits", "rows", "outputs", "inputs", "group", "table", "extras"), [
    *CASES,
    *((bits, 1, 9, 100, 64, False, False) for bits in (1, 5, 6, 7)),
    (4, 21, 33, 70, 70, True, True),
    (8, 13, 7, 70, 32, False, True),
])  # fmt: skip
def test_compiled_c_is_the_float64_product(
    bits: int, rows: int, outputs: int, inputs: int, group: int, table: bool, extras: bool
) -> None:
    given = PackedWeight.of([held.cpu() if isinstance(held, Tensor) else held for held in weight(
        bits, outputs, inputs, group, table=table, extras=extras
    ).flat()])  # fmt: skip
    words, scale, zero, levels, *rest = given.flat()
    offset = None if table else scale * zero
    rows_first = [None if held is None else held.T.contiguous() for held in (scale, offset, levels)]
    x = torch.randn(rows, inputs)
    expected = F.linear(x.double(), *dense(given, inputs))
    arguments = (x, native.packed_rows(words), *rows_first, *rest)
    found = ops.native_matmul(*arguments)
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        if rows <= native.FLY_ROWS:
            assert torch.equal(ops.native_matmul(*arguments), found)  # however many threads
    finally:
        torch.set_num_threads(threads)
    torch.library.opcheck(ops.native_matmul, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(native.unavailable() is not None, reason="no C compiler on this machine")
def test_compiled_c_is_kept_and_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    native._library()
    (kept,) = (tmp_path / "fewbits").iterdir()
    native._library.cache_clear()
    made = kept.stat().st_mtime_ns
    native._library()
    assert kept.stat().st_mtime_ns == made and (tmp_path / "fewbits").stat().st_mode & 0o077 == 0
    native._library.cache_clear()
    monkeypatch.setenv("FEWBITS_NATIVE", "0")
    assert "switches it off" in str(unable("native", CASE))
    monkeypatch.delenv("FEWBITS_NATIVE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(native, "_compiler", lambda: "false")
    with pytest.raises(RuntimeError, match=r"cannot compile native\.c"):
        native._library()
    assert not list((tmp_path / "other" / "fewbits").iterdir())


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (1, torch.float16),
        (6, torch.float16),
        (1, torch.bfloat16),
        pytest.param(
            6,
            torch.bfloat16,
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no bfloat16 dot"),
        ),
    ],
)
def test_half_precision_rounds_once(rows: int, dtype: torch.dtype) -> None:
    given = weight(4, 40, 96, 32, extras=True)
    x = torch.randn(rows, 96, device=DEVICE).to(dtype)
    expected = F.linear(x.cpu().double(), *dense(given, 96))
    found = ops.packed_matmul(x, *given.flat(), backend="triton")
    assert found.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps  # weights of the tile kernel are rounded too
    assert (found.cpu().double() - expected).norm() <= bound * expected.norm()


@given(
    bits=st.integers(1, 8), outputs=st.integers(1, 9), inputs=st.integers(1, 140),
    groups=st.sampled_from([32, 64, 999]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=25)
def test_decoding_in_torch_is_exact(bits: int, outputs: int, inputs: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    given = weight(bits, outputs, inputs, min(groups, inputs))
    assert given.scale is not None
    found = reference.decode(given._replace(scale=given.scale.double()), inputs)
    torch.testing.assert_close(found.T.cpu(), dense(given, inputs)[0], rtol=1e-12, atol=1e-12)


def spec(fmt: Any, grain: Any, found: Any, dynamic: bool) -> Quantizer:
    return Quantizer(QSpec(fmt, grain, found, dynamic=dynamic), "x")


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", ["token symmetric", "token affine", "tensor affine", "tensor symmetric", "four bits"])
@pytest.mark.parametrize("rows", [1, 6])
def test_quantized_rows_are_those_of_the_formats(kind: str, backend: str, rows: int) -> None:
    x = torch.randn(rows, 77) * 3
    x[2:3] = 0
    quantizer, symmetric_rows, floor = {
        "token symmetric": (spec(symmetric(8), PerToken(-1), AbsMax(), True), True, 1e-5),
        "token affine": (spec(affine(8), PerToken(-1), MinMax(), True), False, 0.0),
        "tensor affine": (spec(affine(8), PerTensor(), MinMax(), False), False, 0.0),
        "tensor symmetric": (spec(symmetric(8), PerTensor(), AbsMax(), False), False, 0.0),
        "four bits": (spec(affine(4), PerToken(-1), MinMax(), True), False, 0.0),
    }[kind]
    fmt: Any = quantizer.spec.format
    scale = zero = None
    if not quantizer.spec.dynamic:
        quantizer.calibrate(x * 0.7)  # some values clip
        scale = quantizer.params["scale"].to(DEVICE)
        zero = quantizer.params.get("zero_point", torch.zeros(())).to(DEVICE)
    codes, scales, zeros, sums = (
        held.cpu()
        for held in ops.quantize_rows(
            x.to(DEVICE), scale, zero, fmt.q_min, fmt.q_max, symmetric_rows, floor, backend=backend
        )
    )
    assert torch.equal(codes.int() + (128 if fmt.q_max > 127 else 0), quantizer.encode(x).int())
    torch.testing.assert_close((codes.float() - zeros[:, None]) * scales[:, None], quantizer(x))
    assert torch.equal(sums, codes.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("centred", [False, True])
def test_norm_and_quantize_in_one(centred: bool) -> None:
    x, scale, bias = (
        torch.randn(5, 77, device=DEVICE) * 2,
        torch.rand(77, device=DEVICE),
        torch.randn(77, device=DEVICE),
    )
    expected = F.layer_norm(x, (77,), scale, bias, 1e-5) if centred else F.rms_norm(x, (77,), scale, 1e-5)
    found = {}
    for backend in ("triton", "reference"):
        codes, scales, zeros, _ = ops.norm_quantize(
            x, scale, bias if centred else None, 1e-5, centred, None, None, -127, 127, True, 1e-5, backend=backend
        )
        value = (codes.float() - zeros[:, None]) * scales[:, None]
        assert ((value - expected).abs() <= 0.5001 * scales[:, None] + 1e-5).all()
        found[backend] = codes
    assert (found["triton"].int() - found["reference"].int()).abs().max() <= 1


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 33, 77), (19, 40, 256), (5, 7, 1500), (300, 520, 272), (128, 256, 128), (140, 130, 1040)]
)
@pytest.mark.parametrize("zero_weights", [False, True])
def test_int8_product_is_exact_in_integers(m: int, n: int, k: int, zero_weights: bool, backend: str) -> None:
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scales, zeros = torch.rand(m) + 0.1, torch.randint(-128, 128, (m,)).float()
    scales_b, zeros_b = torch.rand(n) + 0.1, torch.randint(-9, 9, (n,)).float() * zero_weights
    bias = torch.randn(n)
    real = (a.double() - zeros[:, None]) @ (b.double() - zeros_b[:, None]).T
    expected = real * scales.double()[:, None] * scales_b.double() + bias
    given = (a, b, scales, zeros, a.sum(-1).int(), scales_b, zeros_b, b.sum(-1).int(), bias)
    found = ops.int8_matmul(*(held.to(DEVICE) for held in given), torch.float32, not zero_weights, backend=backend)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.skipif(native.unavailable() is not None, reason="no C compiler on this machine")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 77), (7, 40, 256), (5, 7, 1500)])
def test_int8_in_c_and_by_torch_is_exact(m: int, n: int, k: int) -> None:
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    expected = (a.long() @ b.long().T).int()
    assert torch.equal(ops.native_int8_product(a, b), expected)
    assert torch.equal(padded_int_mm(a, b), expected)
    torch.library.opcheck(ops.native_int8_product, (a, b), test_utils=("test_schema", "test_faketensor"))


def test_empty_batches_and_leading_axes() -> None:
    given = weight(4, 12, 64, 32)
    assert ops.packed_matmul(torch.empty(0, 64, device=DEVICE), *given.flat()).shape == (0, 12)
    x = torch.randn(2, 3, 64, device=DEVICE)
    flat = ops.packed_matmul(x.view(6, 64), *given.flat(), backend="reference")
    assert torch.equal(ops.packed_matmul(x, *given.flat(), backend="reference"), flat.view(2, 3, 12))


def test_ops_have_right_fakes_and_compile_whole() -> None:
    given = weight(3, 12, 64, 32, extras=True)
    x = torch.randn(2, 64, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.packed_matmul, (x, *given.flat()), {"backend": "reference"}, test_utils=checks)
    rows = (x, None, None, -127, 127, True, 1e-5, "reference")
    torch.library.opcheck(ops.quantize_rows, rows, test_utils=checks)
    codes, *scaling = ops.quantize_rows(*rows)
    b = torch.randint(-5, 5, (7, 64), dtype=torch.int8, device=DEVICE)
    ones = torch.ones(7, device=DEVICE)
    product = (codes, b, *scaling, ones, ones, b.sum(-1).int(), None, torch.float16, False, "reference")
    torch.library.opcheck(ops.int8_matmul, product, test_utils=checks)
    norm = (x, x[0].clone(), None, 1e-5, True, None, None, 0, 255, False, 0.0, "reference")
    torch.library.opcheck(ops.norm_quantize, norm, test_utils=checks)

    def run(value: Tensor) -> Tensor:
        return F.relu(ops.packed_matmul(value, *given.flat(), backend="reference")) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))


def test_ops_take_the_pieces_of_a_weight_by_its_names() -> None:
    fields = (*PackedWeight._fields[:-1], *Beside._fields)
    for op, options in ((ops.packed_matmul, ["backend"]), (ops.fragment_matmul, []), (ops.native_matmul, [])):
        assert [held.name for held in op._opoverload._schema.arguments] == ["x", *fields, *options]
    given = weight(4, 12, 64, 32, extras=True)
    pieces = given.flat()
    assert PackedWeight.of(pieces) == given
    assert PackedWeight.of(pieces[:8]).beside == Beside(given.beside.bias)
    assert PackedWeight.of(pieces[:7]).beside.empty and not given.beside.empty
    x = torch.randn(3, 64, device=DEVICE)
    whole = ops.multiply(ops.run_packed_matmul, ops.packed_matmul, x, given, backend="reference")
    assert torch.equal(ops.packed_matmul(x, *pieces, backend="reference"), whole)
    named = dict(zip(fields, pieces, strict=True))
    assert torch.equal(ops.packed_matmul(x, **named, backend="reference"), whole)


def test_ops_of_int8_are_those_that_saved_graphs_name() -> None:
    grid, norm = ["scale", "zero", "low", "high", "symmetric", "floor"], ["weight", "bias", "eps", "centred"]
    beside = ["scales_a", "zeros_a", "sums_a", "scales_b", "zeros_b", "sums_b", "bias", "dtype", "symmetric_b"]
    for op, names in (
        (ops.quantize_rows, ["x", *grid, "backend"]),
        (ops.norm_quantize, ["x", *norm, *grid, "backend"]),
        (ops.int8_matmul, ["a", "b", *beside, "backend"]),
    ):
        assert [held.name for held in op._opoverload._schema.arguments] == names


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("low", [-127, 0])
def test_int8_matrices_go_whole_through_ops_as_around_them(low: int, backend: str) -> None:
    x, dense = torch.randn(5, 64, device=DEVICE), torch.randn(7, 64, device=DEVICE)
    bias = torch.randn(7, device=DEVICE)
    given = RowGrid(None, None, low, 255 if low == 0 else 127, low < 0, 1e-5)
    weight = ops.run_quantize_rows(dense, RowGrid(None, None, -127, 127, True), backend)._replace(symmetric=True)

    def run(value: Tensor) -> Tensor:
        return ops.multiply_int8(ops.quantize(value, given, backend), weight, bias, torch.float32, backend)

    made = ops.run_quantize_rows(x, given, backend)
    assert Int8Matrix.of(ops.quantize_rows(x, *given, backend)).flat()[0].equal(made.codes)
    expected = (made.codes.double() - made.zeros[:, None]) * made.scales[:, None].double()
    expected = expected @ (weight.codes.double() * weight.scales[:, None]).T + bias
    assert (made.zeros != 0).any() == (low == 0)
    torch.testing.assert_close(run(x).double(), expected, rtol=1e-6, atol=1e-5)
    if backend == "reference":
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
    differentiated = run(x.clone().requires_grad_())
    assert torch.equal(differentiated, run(x))
    assert differentiated.requires_grad, "an op without a derivative says so; a result without one would hide it"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(FewbitsError, match="choose one of auto, triton, reference"):
        ops.packed_matmul(torch.randn(1, 64), *weight(4, 4, 64, 64).flat(), backend="magic")


CASE = Case("codes", 4, 64, 32, 64, 1, torch.float32, torch.device("cpu"))


@pytest.fixture
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's time is what its function returns: a clock would make these tests chance."""
    monkeypatch.setattr("fewbits.kernels.choose._choices", {})
    monkeypatch.setattr("fewbits.kernels.choose.milliseconds", lambda run, *_: run())
    monkeypatch.setenv("FEWBITS_NATIVE", "0")


@pytest.mark.usefixtures("_told")
def test_choice_says_why_and_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []

    def make(name: str) -> Any:
        def run(rows: int) -> float:
            ran.append((name, rows))
            return {"torch_int4": 1.0, "reference": 9.0}[name]

        return run

    chosen = choose(CASE, make)
    assert chosen.kernel == "torch_int4" and set(chosen.milliseconds) == {"torch_int4", "reference"}
    assert "fastest at 1 rows" in chosen.why and "not triton: it needs a GPU" in chosen.why
    assert all(rows == 1 for _, rows in ran)  # the other is out of the question
    before = list(ran)
    assert choose(CASE, make) is chosen and ran == before  # kept
    assert choose(CASE, make, "reference").kernel == "reference"
    monkeypatch.setenv("FEWBITS_KERNEL", "reference")
    assert choose(CASE, make).why == "asked for" and ran == before
    with pytest.raises(FewbitsError, match="kernel triton cannot multiply this weight: it needs a GPU"):
        choose(CASE, make, "triton")
    with pytest.raises(FewbitsError, match="choose auto or one of"):
        choose(CASE, make, "fastest")
    assert choose(CASE, make, "torch_int_mm").kernel == "reference"


@pytest.mark.usefixtures("_told")
def test_a_prompt_decides_between_kernels_that_are_close() -> None:
    def make(name: str) -> Any:
        one, prompt = {"torch_int4": (1.0, 500.0), "reference": (1.5, 2.0)}[name]
        return lambda rows: one if rows == 1 else prompt

    chosen = choose(CASE, make)
    assert chosen.kernel == "reference" and "with a prompt of 128" in chosen.why
    assert chosen.milliseconds == {"torch_int4": 1.0, "reference": 1.5}


def test_time_is_the_median() -> None:
    import time

    naps = iter([0.0, 0.0, 0.03, 0.01, 0.01, 0.01, 0.01])
    assert 9 < milliseconds(lambda: time.sleep(next(naps)), torch.device("cpu"), 0.0, 5) < 500


def test_kernels_refuse_what_they_cannot_do() -> None:
    from dataclasses import replace

    assert unable("torch_int4", CASE) is None and unable("reference", CASE) is None
    for changed in (
        {"bits": 3}, {"table": True}, {"extras": True}, {"group": 96}, {"outputs": 33},
        {"device": torch.device("meta")}, {"device": torch.device("cuda")},
    ):  # fmt: skip
        assert unable("torch_int4", replace(CASE, **changed)), changed
    assert unable("torch_int_mm", replace(CASE, kind="int8", device=torch.device("cuda"), inputs=65))


def test_triton_is_imported_only_where_it_runs() -> None:
    code = "import sys, fewbits.kernels.ops, fewbits.kernels.choose; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_one() -> None:
    """Every kernel becomes machine code for sm_90; the vector kernel spends about one integer mask a code."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "masks a code" in run.stdout
