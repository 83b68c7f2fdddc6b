"""The column solver against a naive explicit-inverse reference and the properties its paper claims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Codebook, Format, PerChannel, PerGroup, PerTensor, PowerOfTwo, Ternary, Uniform, gptq_grid
from fewbits.ranges import MinMax
from fewbits.rounding import (
    HessianAccumulator,
    conv_patches,
    decode_columns,
    factor,
    gptq,
    matrix_weight,
    nearest,
    row_params,
    weight_matrix,
)
from fewbits.rounding.factor import inverse_factor


def problem(out: int = 12, columns: int = 40, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight and Hessian of strongly correlated inputs."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=gen) / columns**0.5
    x = torch.randn(4, tokens, columns, generator=gen) @ (mix + 0.3 * torch.eye(columns)) + 0.5
    accumulator = HessianAccumulator(columns)
    accumulator.add(x)
    return torch.randn(out, columns, generator=gen), accumulator.value


def error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """trace((W - Q) H (W - Q)^T)"""
    difference = (weight - quantized).double()
    return float(((difference @ hessian.double()) * difference).sum())


def rtn(weight: Tensor, fmt: Format) -> Tensor:
    return nearest(weight, fmt, PerChannel(0), MinMax().fit(weight, fmt, PerChannel(0)))[0]


def naive_obq(weight: Tensor, hessian: Tensor, fmt: Format, damping: float) -> Tensor:
    """Optimal Brain Quantization in fixed column order: the full inverse, one row and column eliminated per step."""
    params = MinMax().fit(weight, fmt, PerChannel(0))
    w, h = weight.double(), hessian.double()
    inverse = torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype))
    quantized = torch.zeros_like(weight)
    for j in range(w.shape[1]):
        q = fmt.decode(fmt.encode(w[:, j : j + 1], params), params)[:, 0]
        quantized[:, j] = q
        w = w - ((w[:, j] - q) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return quantized


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.sampled_from([0.01, 0.1]), st.booleans(), st.integers(1, 24)
)
def test_equals_explicit_inverse_elimination(seed: int, bits: int, damping: float, sym: bool, columns: int) -> None:
    weight, hessian = problem(5, columns, seed=seed)
    fmt = gptq_grid(bits, sym=sym)
    solution = gptq(weight, hessian, fmt, MinMax(), damping=damping, block_size=7, dtype=torch.float64)
    assert torch.equal(solution.weight, naive_obq(weight, hessian, fmt, damping))


def test_float32_agrees_with_float64() -> None:
    weight, hessian = problem(16, 64)
    single = gptq(weight, hessian, gptq_grid(4), MinMax())
    double = gptq(weight, hessian, gptq_grid(4), MinMax(), dtype=torch.float64)
    assert (single.codes != double.codes).float().mean() < 0.01
    assert single.loss.item() == pytest.approx(double.loss.item(), rel=1e-2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_far_below_nearest_on_correlated_inputs(bits: int) -> None:
    weight, hessian = problem(16, 64)
    fmt = gptq_grid(bits)
    assert error(weight, gptq(weight, hessian, fmt, MinMax()).weight, hessian) < 0.7 * error(
        weight, rtn(weight, fmt), hessian
    )


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("act_order", [False, True])
def test_white_inputs_give_nearest_exactly(size: float, act_order: bool) -> None:
    weight, _ = problem()
    fmt = gptq_grid(3)
    solution = gptq(weight, size * torch.eye(weight.shape[1]), fmt, MinMax(), act_order=act_order)
    assert torch.equal(solution.weight, rtn(weight, fmt))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 50),
    st.sampled_from(
        [
            {},
            {"act_order": True},
            {"group_size": 8, "static_groups": True},
            {"group_size": 9, "stale_groups": False},
            {"group_size": 16, "stale_groups": False, "act_order": True},
        ]
    ),
)
def test_block_size_changes_only_speed(seed: int, block: int, options: dict) -> None:
    weight, hessian = problem(6, 40, seed=seed)
    one = gptq(weight, hessian, gptq_grid(3), MinMax(), block_size=40, dtype=torch.float64, **options)
    other = gptq(weight, hessian, gptq_grid(3), MinMax(), block_size=block, dtype=torch.float64, **options)
    # a group refitted on weights that differ in the last bit may differ in the last bit itself
    torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=1e-5)


def test_stale_groups_read_the_weights_of_the_block_start() -> None:
    weight, hessian = problem(8, 64)
    settings_ = {"group_size": 16, "dtype": torch.float64}
    fresh = gptq(weight, hessian, gptq_grid(3), MinMax(), block_size=64, stale_groups=False, **settings_)
    stale = gptq(weight, hessian, gptq_grid(3), MinMax(), block_size=64, **settings_)
    aligned = gptq(weight, hessian, gptq_grid(3), MinMax(), block_size=16, **settings_)
    # in one block, stale statistics are those of the untouched weights: all groups as fitted beforehand
    untouched = MinMax().fit(weight, gptq_grid(3), PerGroup(16))
    assert torch.equal(stale.params["scale"], untouched["scale"])
    assert not torch.equal(fresh.params["scale"], untouched["scale"])
    torch.testing.assert_close(aligned.weight, fresh.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"group_size": 16}, {"block_size": 11, "damping": 0.1}])
def test_loss_is_half_the_damped_trace(options: dict) -> None:
    weight, hessian = problem()
    solution = gptq(weight, hessian, gptq_grid(4), MinMax(), dtype=torch.float64, **options)
    damped = hessian.double() + solution.damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    assert solution.loss.item() == pytest.approx(error(weight, solution.weight, damped) / 2, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"act_order": True}, {"group_size": 7}, {"group_size": 16, "act_order": True},
     {"group_size": 16, "act_order": True, "static_groups": True}, {"group_size": 100}],
)  # fmt: skip
def test_codes_and_params_give_the_weight_bit_for_bit(options: dict) -> None:
    weight, hessian = problem(6, 40)
    fmt = gptq_grid(3)
    solution = gptq(weight, hessian, fmt, MinMax(), **options)
    assert torch.equal(decode_columns(fmt, solution.codes, solution.params, solution.group_index), solution.weight)
    assert solution.codes.min() >= 0 and solution.codes.max() <= 7
    groups = -(-40 // options.get("group_size", 40))
    assert solution.params["scale"].shape == (6, groups)
    if "group_size" in options and not (options.get("act_order") and not options.get("static_groups")):
        gran = PerGroup(options["group_size"])
        spread = {name: gran.expand(value, weight.shape) for name, value in solution.params.items()}
        assert torch.equal(fmt.decode(solution.codes, spread), solution.weight)


def test_sixteen_bits_give_the_weight_back() -> None:
    weight, hessian = problem()
    weight *= 0.2
    torch.testing.assert_close(gptq(weight, hessian, gptq_grid(16), MinMax()).weight, weight, rtol=0, atol=1e-4)


def test_act_order_changes_the_processing_order_only() -> None:
    weight, hessian = problem()
    order = hessian.diagonal().argsort(descending=True)
    solution = gptq(weight, hessian, gptq_grid(3), MinMax(), act_order=True, dtype=torch.float64)
    by_hand = gptq(weight[:, order], hessian[order][:, order], gptq_grid(3), MinMax(), dtype=torch.float64)
    assert torch.equal(solution.weight[:, order], by_hand.weight)
    assert not torch.equal(solution.weight, gptq(weight, hessian, gptq_grid(3), MinMax()).weight)


def test_groups_under_act_order() -> None:
    weight, hessian = problem()
    order = hessian.diagonal().argsort(descending=True)
    static = gptq(weight, hessian, gptq_grid(3), MinMax(), group_size=16, act_order=True, static_groups=True)
    dynamic = gptq(weight, hessian, gptq_grid(3), MinMax(), group_size=16, act_order=True)
    assert static.group_index is not None and dynamic.group_index is not None
    assert torch.equal(static.group_index, torch.arange(40) // 16)
    assert torch.equal(static.params["scale"], MinMax().fit(weight, gptq_grid(3), PerGroup(16))["scale"])
    assert torch.equal(dynamic.group_index[order], torch.arange(40) // 16)


def test_dead_inputs_are_zeroed_and_touch_nothing_else() -> None:
    weight, hessian = problem()
    dead = torch.tensor([0, 7, 39])
    live = torch.ones(40, dtype=torch.bool).index_fill(0, dead, False)
    hessian[dead] = 0
    hessian[:, dead] = 0
    # large dead weights: they widen the row grid (fitted first) but are then gone
    solution = gptq(weight, hessian, gptq_grid(4), MinMax(), damping=0, dtype=torch.float64)
    assert (solution.weight[:, dead] == 0).all() and solution.weight.isfinite().all()
    rest = gptq(
        weight[:, live],
        hessian[live][:, live],
        gptq_grid(4),
        None,
        damping=0,
        params=solution.params,
        dtype=torch.float64,
    )
    assert torch.equal(solution.weight[:, live], rest.weight)


def test_no_data_falls_back_to_nearest_of_the_kept_weight() -> None:
    weight, _ = problem()
    solution = gptq(weight, torch.zeros(40, 40), gptq_grid(4), MinMax())
    assert bool(solution.no_data) and solution.loss.item() == 0
    assert torch.equal(solution.weight, rtn(weight, gptq_grid(4)))


def test_damping_grows_until_the_factorisation_succeeds_and_is_reported() -> None:
    weight, full = problem()
    # rank one, made indefinite by rounding-size asymmetry on purpose
    vector = torch.randn(40, generator=torch.Generator().manual_seed(3))
    broken = torch.outer(vector, vector) - 0.02 * vector.square().mean() * torch.eye(40)
    solution = gptq(torch.stack([weight, weight]), torch.stack([broken, full]), gptq_grid(4), MinMax(), damping=0.01)
    assert solution.damping[0] == pytest.approx(0.1) and solution.damping[1] == pytest.approx(0.01)
    assert solution.weight.isfinite().all()
    zero = gptq(weight, torch.outer(vector, vector), gptq_grid(4), MinMax(), damping=0)
    assert zero.damping > 0 and zero.weight.isfinite().all()
    assert not solution.no_data.any()
    with pytest.raises(FewbitsError, match="damping"):
        gptq(weight, -full, gptq_grid(4), MinMax())


def test_inverse_factor() -> None:
    _, hessian = problem()
    u, used = inverse_factor(hessian.double()[None], 0.01)
    assert torch.equal(u, u.triu())
    damped = hessian.double() + used * hessian.double().diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(u[0].T @ u[0], torch.linalg.inv(damped))


@pytest.mark.parametrize("block", [8, 16, 24, 39, 64])
def test_a_factor_found_block_by_block_in_place_is_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "_BLOCK", block)
    _, hessian = problem()
    expected, _ = inverse_factor(hessian.double()[None].clone(), 0.01)
    worked_in = hessian.double()
    used = factor._factorise_in_place(worked_in, 0.01)
    assert used == 0.01 and torch.equal(worked_in, worked_in.triu())
    torch.testing.assert_close(worked_in, expected[0])
    # An attempt that fails starts anew from what it left of H.
    indefinite = hessian.double() - 1.5 * torch.linalg.eigvalsh(hessian.double())[0] * torch.eye(40)
    indefinite[5, 5] = -0.02 * indefinite.diagonal().mean()
    expected, damped = inverse_factor(indefinite[None].clone(), 0.01)
    again = indefinite.clone()
    assert factor._factorise_in_place(again, 0.01) == damped[0] > 0.01
    torch.testing.assert_close(again, expected[0])
    with pytest.raises(FewbitsError, match="damping"):
        factor._factorise_in_place(-hessian.double(), 0.01)


def test_a_batch_solves_each_matrix_as_alone() -> None:
    pairs = [problem(6, 40, seed=seed) for seed in range(3)]
    weights, hessians = torch.stack([w for w, _ in pairs]), torch.stack([h for _, h in pairs])
    for options in (
        {},
        {"act_order": True, "group_size": 16},
        {"act_order": True, "group_size": 16, "static_groups": True},
    ):
        together = gptq(weights, hessians, gptq_grid(3), MinMax(), dtype=torch.float64, **options)
        assert torch.equal(
            decode_columns(gptq_grid(3), together.codes, together.params, together.group_index), together.weight
        )
        for i, (weight, hessian) in enumerate(pairs):
            alone = gptq(weight, hessian, gptq_grid(3), MinMax(), dtype=torch.float64, **options)
            torch.testing.assert_close(together.weight[i], alone.weight, rtol=0, atol=1e-5)
            torch.testing.assert_close(together.loss[i], alone.loss)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_convolution(groups: int) -> None:
    gen = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 8 // groups, 3, 3, generator=gen)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(12, 8, 12, 12, generator=gen), 3, 1)
    conv = {"stride": 2, "padding": 1, "groups": groups}
    accumulator = HessianAccumulator(weight[0].numel(), groups=groups)
    accumulator.add(conv_patches(smooth, (3, 3), **conv))
    fmt = gptq_grid(3)
    solution = gptq(weight_matrix(weight, groups), accumulator.value, fmt, MinMax())
    quantized = matrix_weight(solution.weight, weight.shape)
    params = row_params(solution.params, weight.shape)
    assert params["scale"].shape == (16, 1, 1, 1)
    assert torch.equal(params["scale"], MinMax().fit(weight, fmt, PerChannel(0))["scale"])
    assert torch.equal(fmt.decode(matrix_weight(solution.codes, weight.shape), params), quantized)

    def output(w: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(smooth, w, **conv)

    solved = (output(quantized) - output(weight)).square().sum()
    assert solved < 0.7 * (output(rtn(weight, fmt)) - output(weight)).square().sum()
    # the trace with H is that squared output error: 2 / N times it
    total = sum(
        error(w, q, h)
        for w, q, h in zip(
            weight_matrix(weight, groups).reshape(groups, 16 // groups, -1),
            solution.weight.reshape(groups, 16 // groups, -1),
            accumulator.value.reshape(groups, weight[0].numel(), -1),
            strict=True,
        )
    )
    assert total == pytest.approx(2 / 12 * solved.item(), rel=1e-3)


def test_fixed_params() -> None:
    weight, hessian = problem()
    fmt = gptq_grid(4)
    shared = MinMax().fit(weight, fmt, PerTensor())
    solution = gptq(weight, hessian, fmt, None, params=shared)
    assert solution.params is shared and torch.equal(fmt.decode(solution.codes, shared), solution.weight)
    groups = MinMax().fit(weight, fmt, PerGroup(16))
    given = gptq(weight, hessian, fmt, None, params=groups, group_size=16, act_order=True)
    fitted = gptq(weight, hessian, fmt, MinMax(), group_size=16, act_order=True, static_groups=True)
    assert torch.equal(given.weight, fitted.weight)


@pytest.mark.parametrize(
    "fmt", [Ternary(), Codebook(2), Codebook(3, points=(-1.0, -0.6, -0.2, 0.0, 0.1, 0.5, 1.0)), PowerOfTwo(3)]
)
@pytest.mark.parametrize(
    "options", [{}, {"group_size": 16}, {"group_size": 16, "act_order": True, "static_groups": True}]
)
def test_any_format_that_a_range_can_fit(fmt: Format, options: dict) -> None:
    weight, hessian = problem(8, 40)
    solution = gptq(weight, hessian, fmt, MinMax(), **options)
    assert torch.equal(decode_columns(fmt, solution.codes, solution.params, solution.group_index), solution.weight)
    assert int(solution.codes.max()) <= fmt.code_max
    gran = PerGroup(16) if options else PerChannel(0)
    rounded, _ = nearest(weight, fmt, gran, MinMax().fit(weight, fmt, gran))
    assert error(weight, solution.weight, hessian) < error(weight, rounded, hessian)
    both = gptq(torch.stack([weight, -weight]), hessian.expand(2, -1, -1), fmt, MinMax(), **options)
    torch.testing.assert_close(both.weight[0], solution.weight, rtol=0, atol=1e-5)
    assert torch.equal(decode_columns(fmt, both.codes, both.params, both.group_index), both.weight)


def test_fixed_tables() -> None:
    weight, hessian = problem()
    fmt = Codebook(2)
    table = torch.tensor([-1.5, -0.4, 0.5, 1.6])
    one = gptq(weight, hessian, fmt, None, params={"table": table})
    per_row = gptq(weight, hessian, fmt, None, params={"table": table[:, None, None].expand(4, 12, 1)})
    assert torch.equal(one.weight, per_row.weight) and set(one.weight.unique().tolist()) <= set(table.tolist())


def test_inputs_stay_untouched_and_half_weights_are_solved_in_float32() -> None:
    weight, hessian = problem()
    before = hessian.clone()
    half = weight.half()
    solution = gptq(half, hessian, gptq_grid(4), MinMax(), act_order=True)
    assert torch.equal(hessian, before) and torch.equal(half, weight.half())
    assert solution.weight.dtype == torch.float32
    assert torch.equal(solution.weight, gptq(half.float(), hessian, gptq_grid(4), MinMax(), act_order=True).weight)


def test_global_precision_and_autocast_do_not_reach_the_solver() -> None:
    weight, hessian = problem(16, 64)
    expected = gptq(weight, hessian, gptq_grid(4), MinMax())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = gptq(weight, hessian, gptq_grid(4), MinMax())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hessian": torch.eye(3)}, "do not fit"),
        ({"hessian": torch.full((40, 40), torch.nan)}, "H holds NaN"),
        ({"weight": torch.full((12, 40), torch.inf)}, "weight holds NaN"),
        ({"group_size": 0}, "group_size"),
        ({"block_size": 0}, "block_size"),
        ({"range_": None}, "range"),
        ({"params": {"scale": torch.ones(12, 1)}}, "zero_point"),
        ({"params": {"scale": torch.ones(5, 1), "zero_point": torch.ones(12, 1)}}, r"params\['scale'\]"),
    ],
)
def test_bad_input_is_refused(change: dict, match: str) -> None:
    weight, hessian = problem()
    arguments = {"weight": weight, "hessian": hessian, "fmt": Uniform(4), "range_": MinMax(), **change}
    with pytest.raises(FewbitsError, match=match):
        gptq(**arguments)
