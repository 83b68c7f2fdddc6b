"""Products on matrix units: the order of the codes, and every operand in the lane that needs it, against float64.

Without a GPU the instruction is emulated in tensors, so that order and index arithmetic are tested all the same.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import ops
from fewbits.kernels.fragments import pack_fragments, unpack_fragments
from fewbits.kernels.needs import Case, unable
from fewbits.outliers.parts import Sparse
from fewbits.packed.modules import FragmentLinear
from fewbits.packed.weight import KernelWeight

triton = pytest.importorskip("triton")
tl = triton.language
parts = importlib.import_module("fewbits.kernels.triton_operands")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = 4 * torch.finfo(torch.float16).eps


@given(
    bits=st.sampled_from([2, 3, 4]), nibbles=st.booleans(), outputs=st.integers(1, 40), chunks=st.integers(1, 3),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=30)
def test_codes_come_back_from_their_fragments(bits: int, nibbles: bool, outputs: int, chunks: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, 64 * chunks), dtype=torch.uint8)
    words = pack_fragments(codes, bits, nibbles=nibbles)
    assert words.dtype == torch.int32 and words.shape == (-(-outputs // 16), chunks, 32 * bits)  # no bit is wasted
    assert torch.equal(unpack_fragments(words, bits, outputs, nibbles=nibbles), codes)


load_words, raw_operands = parts.load_words, parts.raw_operands


@triton.jit
def raw_kernel(words, out, magic, BITS: tl.constexpr, BFLOAT: tl.constexpr, EMULATED: tl.constexpr):
    lane = tl.arange(0, 32)
    w = load_words(words, lane, BITS, EMULATED)
    for m in tl.static_range(4):
        a = raw_operands(w, m, magic, BITS, BFLOAT)
        for r in tl.static_range(4):
            tl.store(out + (m * 4 + r) * 32 + lane, a[r])


@pytest.mark.parametrize("bfloat", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_masked_codes_are_numbers(bits: int, bfloat: bool) -> None:
    """In the lane and place that the matrix units want, and times what the kernel of one row takes off again."""
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (16, 64), dtype=torch.uint8)
    words = pack_fragments(codes, bits, nibbles=False).to(DEVICE)
    magic = importlib.import_module("fewbits.kernels.triton_fragments").MAGIC[bfloat]
    out = torch.empty(4, 4, 32, dtype=torch.int32, device=DEVICE)
    raw_kernel[(1,)](words, out, magic, BITS=bits, BFLOAT=bfloat, EMULATED=DEVICE == "cpu")
    kind = torch.bfloat16 if bfloat else torch.float16
    numbers = out.cpu().view(kind).double().view(4, 2, 2, 8, 4, 2)  # step, later inputs, h, g, q, which of two
    for m in range(4):
        for h in range(2):
            first = parts.unit(h, bits, bfloat) * (parts.odd(h, bits, bfloat) if m % 2 else 1)
            found = (numbers[m, :, h] - (128 if bfloat else 0)) * first  # later, g, q, two
            expected = codes.double().view(2, 8, 4, 4, 2, 2)[h, :, :, m].permute(2, 0, 1, 3)
            assert torch.equal(found, expected)


def test_what_has_no_fragments_is_refused() -> None:
    for bits, columns in ((5, 64), (4, 96)):
        with pytest.raises(FewbitsError, match="multiples of 64 inputs"):
            pack_fragments(torch.zeros(16, columns, dtype=torch.int64), bits, nibbles=False)


def kernel_weight(bits: int, outputs: int, inputs: int, group: int, table: bool, extras: bool) -> KernelWeight:
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    groups = -(-inputs // group)
    scale, zero = (torch.rand(groups, outputs) * 0.1 + 0.01).half(), torch.randint(0, 1 << bits, (groups, outputs))
    made = KernelWeight(codes, bits, min(group, inputs), scale, zero.to(torch.uint8))
    if table:
        made = KernelWeight(codes, bits, inputs, table=torch.randn(1 << bits, outputs).half())
    if extras:
        kept = torch.rand(outputs, inputs) < 0.02
        kept[0] = False  # a row without entries
        sparse = Sparse.from_dense(torch.randn(outputs, inputs), kept)
        made = replace(
            made, order=torch.randperm(inputs), index=torch.randperm(inputs)[:3],
            columns=torch.randn(3, outputs).half(), starts=sparse.rows, places=sparse.columns,
            entries=sparse.values.half(),
        )  # fmt: skip
    return made


def dense(weight: KernelWeight) -> Tensor:
    """float64 [out, in], written down entry by entry from what the fields mean."""
    codes = weight.codes.long()
    if weight.table is not None:
        made = weight.table.double()[codes, torch.arange(len(codes))[:, None]]
    else:
        assert weight.scale is not None and weight.zero is not None
        group = torch.arange(codes.shape[1]) // weight.group
        made = (codes - weight.zero.T.long()[:, group]) * weight.scale.T.double()[:, group]
    if weight.index is not None and weight.columns is not None:
        made[:, weight.index] += weight.columns.T.double()
    if weight.starts is not None and weight.places is not None and weight.entries is not None:
        for row in range(len(codes)):
            for at in range(int(weight.starts[row]), int(weight.starts[row + 1])):
                made[row, weight.places[at]] += weight.entries[at].double()
    if weight.order is not None:
        made = made[:, torch.argsort(weight.order)]
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "outputs", "inputs", "group", "table", "extras"), [
    (1, 40, 128, 64, False, False),
    (3, 33, 256, 128, False, True),
    (9, 16, 384, 128, False, False),
    (2, 5, 192, 192, False, False),
    (1, 40, 256, 256, True, False),
    (5, 33, 128, 128, True, True),
    (40, 24, 192, 64, False, True),
    (37, 40, 128, 128, True, False),
])  # fmt: skip
def test_product_is_the_float64_product(
    bits: int, rows: int, outputs: int, inputs: int, group: int, table: bool, extras: bool
) -> None:
    weight = kernel_weight(bits, outputs, inputs, group, table, extras)
    bias = torch.randn(outputs)
    layer = FragmentLinear(weight, bias).to(DEVICE)
    x = torch.randn(rows, inputs).half()
    expected = x.double() @ dense(weight).T + bias.double()
    found = layer(x.to(DEVICE))
    assert found.dtype == torch.float16
    assert (found.cpu().double() - expected).norm() <= HALF * expected.norm()
    assert torch.equal(layer(x.to(DEVICE)), found)
    decoded = layer.decoded().cpu().double()
    assert (decoded - dense(weight)).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(("tiles", "warps", "splits"), [(2, 4, 1), (2, 8, 1), (1, 8, 1), (1, 4, 2), (1, 4, 4)])
@pytest.mark.parametrize("table", [False, True])
def test_however_the_work_is_shared_the_product_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tiles: int, warps: int, splits: int, table: bool
) -> None:
    """Two tiles of outputs a program, chunks that do not fill the warps, the input axis split."""
    triton = pytest.importorskip("triton")
    from fewbits.kernels import triton_fragments, tuning

    chosen = triton.Config({"WARPS": warps, "SPLITS": splits, "TILES": tiles}, num_warps=warps)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(triton_fragments, "configs", lambda *shape: [chosen])
    weight = kernel_weight(3, 60, 64 * 11, 64, table, False)
    x = torch.randn(3, 64 * 11).half()
    expected = x.double() @ dense(weight).T
    found = FragmentLinear(weight, None).to(DEVICE)(x.to(DEVICE)).cpu().double()
    assert (found - expected).norm() <= HALF * expected.norm()


def test_whatever_is_timed_for_a_shape_makes_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine rows are two eights: three tiles of outputs do not divide by two, however many programs there are."""
    from fewbits.kernels import triton_fragments, tuning

    weight, x = kernel_weight(4, 48, 1024, 128, False, False), torch.randn(9, 1024).half()
    expected = x.double() @ dense(weight).T
    layer, configs = FragmentLinear(weight, None).to(DEVICE), triton_fragments.configs(3, 2, 8, 132)
    assert len(configs) > 1
    for config in configs:
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(triton_fragments, "configs", lambda *shape, config=config: [config])
        assert (layer(x.to(DEVICE)).cpu().double() - expected).norm() <= HALF * expected.norm()


def test_few_chunks_of_a_row_are_read_in_vain_and_it_fits_shared_memory() -> None:
    gluon_fragments = pytest.importorskip("fewbits.kernels.gluon_fragments", exc_type=ImportError)
    for chunks in range(1, 300):
        for config in gluon_fragments.configs(chunks, 2, early=True, shared=227 * 1024):
            shape = (chunks, config.num_warps, config.kwargs["AHEAD"])
            assert chunks <= gluon_fragments.covered(*shape) <= chunks + max(15, chunks // 4)
            assert 384 * gluon_fragments.room(*shape) <= 227 * 1024
    assert not gluon_fragments.configs(512, 2, early=True, shared=99 * 1024)


@pytest.mark.skipif(DEVICE == "cpu", reason="Gluon has no interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_row_in_graphs_however_far_is_read_ahead(
    bits: int, table: bool, extras: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph a product begins before its row is there, which the kernel before it makes of what it is given."""
    from fewbits.kernels import gluon_fragments, tuning

    for inputs, group, some in ((4096, 128, {2, 4, 8}), (4096, 64, {8}), (7168, 128, {7}), (1152, 128, {4})):
        weight = kernel_weight(bits, 48, inputs, group, table, extras)
        layer, exact = FragmentLinear(weight, None).to(DEVICE), dense(weight).to(DEVICE)
        chunks = inputs // (128 if table or group == 128 else 64)
        configs = gluon_fragments.configs(chunks, inputs // (64 * chunks), early=True, shared=227 * 1024)
        assert some <= {config.kwargs["AHEAD"] for config in configs}
        for config in (config for config in configs if config.kwargs["AHEAD"] in some):
            monkeypatch.setattr(tuning, "_chosen", {})
            monkeypatch.setattr(gluon_fragments, "configs", lambda *shape, config=config: [config])
            given, graph = torch.zeros(1, inputs, device=DEVICE, dtype=dtype), torch.cuda.CUDAGraph()
            layer(given)
            with torch.cuda.graph(graph):
                outs = [(row, layer(row)) for row in (given * factor for factor in (1, -2, 3))]
            monkeypatch.undo()
            given.copy_(torch.randn(1, inputs))
            graph.replay()
            for row, out in [*outs, (given, layer(given))]:
                expected = row.double() @ exact.T
                assert (out.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no bfloat16 to multiply")
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_product_of_bfloat16(bits: int, table: bool, rows: int) -> None:
    weight = kernel_weight(bits, 48, 256, 128, table, False)
    x = torch.randn(rows, 256).bfloat16()
    expected = x.double() @ dense(weight).T
    found = FragmentLinear(weight, None).to(DEVICE)(x.to(DEVICE)).cpu().double()
    assert (found - expected).norm() <= 4 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_op_has_a_right_fake() -> None:
    layer = FragmentLinear(kernel_weight(4, 20, 128, 64, False, True), None).to(DEVICE)
    x = torch.randn(2, 3, 128, device=DEVICE).half()
    given = layer._held(None).flat()
    torch.library.opcheck(ops.fragment_matmul, (x, *given), test_utils=("test_schema", "test_faketensor"))
    assert ops.fragment_matmul(x[:0], *given).shape == (0, 3, 20)


def test_refusals_give_the_reason() -> None:
    case = Case("codes", 4, 64, 32, 128, 1, torch.float16, torch.device("cuda"))
    if DEVICE == "cpu":
        assert "needs a GPU" in str(unable("triton_mma", replace(case, device=torch.device("cpu"))))
        return
    assert unable("triton_mma", case) is None
    changes: list[dict[str, Any]] = [
        {"bits": 5}, {"inputs": 96}, {"group": 32}, {"dtype": torch.float32}, {"small": False}
    ]  # fmt: skip
    assert all(unable("triton_mma", replace(case, **changed)) for changed in changes)


def test_small_weights_are_told_apart() -> None:
    weight = kernel_weight(3, 8, 64, 64, False, False)
    assert weight.small
    assert weight.zero is not None
    assert not replace(weight, zero=weight.zero + 0.5).small and not replace(weight, zero=weight.zero + 8).small
    levels = kernel_weight(3, 8, 64, 64, True, False)
    assert levels.table is not None
    assert levels.small and not replace(levels, table=levels.table.float()).small
