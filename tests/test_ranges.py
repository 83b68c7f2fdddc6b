"""Range estimation: what is minimised is minimal, blocks do not mix, bad input is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import (
    Format,
    Granularity,
    LogSqrt2,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    affine,
    gptq_grid,
    quantize,
    raw_affine,
    symmetric,
)
from fewbits.ranges import (
    AbsMax,
    Analytic,
    JointSearch,
    LpError,
    MinMax,
    Percentile,
    Quantiles,
    QuantileSearch,
    Range,
    Search,
    Shrink,
    ShrinkSearch,
    WidthZeroPoint,
    quantiles,
    range_from_dict,
)
from fewbits.ranges.quantile import select_quantiles
from formats_cases import FORMATS, GRANULARITIES, KINDS, make, tensors

quick = settings(max_examples=50, deadline=None)
RANGES: dict[str, Range] = {
    "minmax": MinMax(),
    "absmax": AbsMax(),
    "laplace": Analytic(),
    "gauss-half": Analytic("gauss", half=True),
    "percentile": Percentile(0.9),
    "shrink": ShrinkSearch(),
    "shrink-sum": ShrinkSearch(40, 0.02, 2.0, "sum"),
    "quantile": QuantileSearch(),
    "search": Search(Shrink(10, 0.05), LpError(1.0)),
    "joint": JointSearch(10),
}
every_range = pytest.mark.parametrize("found", RANGES.values(), ids=RANGES.keys())


@every_range
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@given(kind=st.sampled_from(KINDS), gran=st.sampled_from(list(GRANULARITIES.values())), seed=st.integers(0, 999))
@settings(max_examples=5, deadline=None)
def test_parameters_are_always_valid(found: Range, fmt: Format, kind: str, gran: Granularity, seed: int) -> None:
    x = make(kind, (3, 10), seed)
    params = found.fit(x, fmt, gran)
    fmt.check_params(params)
    for spec in fmt.param_specs():
        assert params[spec.name].dtype == torch.float32
        if spec.per == "block":
            lead = (spec.width,) if spec.width > 1 else ()
            assert tuple(params[spec.name].shape) == (*lead, *gran.param_shape(x.shape))
    assert bool(torch.isfinite(quantize(x, fmt, gran, params)).all())


@every_range
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_are_named(found: Range, bad: float) -> None:
    x = torch.ones(4, 4)
    x[1, 2] = bad
    with pytest.raises(FewbitsError, match=r"layer1\.input: 1 of 16"):
        found.fit(x, affine(4), PerTensor(), where="layer1.input")
    with pytest.raises(FewbitsError, match="empty"):
        found.fit(torch.empty(0, 4), affine(4), PerTensor())


@every_range
@given(x=tensors())
@settings(max_examples=20, deadline=None)
def test_blocks_do_not_mix(found: Range, x: Tensor) -> None:
    """Fitting all rows at once equals fitting each row alone."""
    together = found.fit(x, affine(4), PerChannel(0))
    for row in range(x.shape[0]):
        alone = found.fit(x[row : row + 1], affine(4), PerChannel(0))
        for name, value in alone.items():
            # one row sums its errors in another order; where two candidates tie to the last bit either may win
            if not torch.equal(together[name][row], value[0]):
                pieces = [
                    quantize(x[row : row + 1], affine(4), PerChannel(0), p)
                    for p in (alone, {k: v[row : row + 1] for k, v in together.items()})
                ]
                errors = [float((piece.double() - x[row : row + 1].double()).abs().pow(2.4).sum()) for piece in pieces]
                assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_ragged_groups_are_fitted_exactly() -> None:
    x = make("normal", (3, 11), 0)
    params = ShrinkSearch().fit(x, affine(3), PerGroup(4))
    for at, start in enumerate(range(0, 11, 4)):
        alone = ShrinkSearch().fit(x[:, start : start + 4], affine(3), PerChannel(0))
        assert torch.equal(params["scale"][:, at : at + 1], alone["scale"])
        assert torch.equal(params["zero_point"][:, at : at + 1], alone["zero_point"])


@given(x=tensors(), bits=st.integers(2, 5))
@quick
def test_shrink_search_equals_the_loop_it_stands_for(x: Tensor, bits: int) -> None:
    fmt = gptq_grid(bits)
    params = ShrinkSearch(reduction="sum").fit(x, fmt, PerChannel(0))
    for row in x:
        unit = 2.0 ** float(torch.frexp(row.abs().max())[1]) if float(row.abs().max()) else 1.0
        errors = []
        for index in range(80):
            factor = 1.0 - 0.01 * index
            candidate = fmt.from_range(row.min() * factor, row.max() * factor)
            errors.append(((row - fmt.quantize(row, candidate)).double() / unit).abs().pow(2.4).sum())
        chosen = {name: value[int((x == row).all(dim=1).nonzero()[0])] for name, value in params.items()}
        got = ((row - fmt.quantize(row, chosen)).double() / unit).abs().pow(2.4).sum()
        assert float(got) <= float(min(errors)) * (1 + 1e-4) + 1e-30


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_search_works_at_any_magnitude(size: float) -> None:
    """Powers of huge errors overflow and of tiny ones vanish; the search must still clip an outlier as it does at size
    one."""
    x = make("normal", (2, 400), 1)
    x[:, 0] = 9.0
    exact = 2.0 ** round(np.log2(size))
    plain, scaled = (ShrinkSearch().fit(x * s, symmetric(3, eps=1e-38), PerChannel(0))["scale"] for s in (1.0, exact))
    assert bool((plain < 9.0 / 3 * 0.9).all())
    assert torch.equal(scaled / exact, plain)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
    name=st.sampled_from(["affine-1", "affine-4", "raw-2", "real", "shift", "centre", "gptq", "power-of-two"]),
)
@settings(max_examples=20, deadline=None)
def test_joint_search_is_as_good_as_trying_every_width_and_zero_point(kind: str, seed: int, name: str) -> None:
    fmt = FORMATS.get(name, affine(3, order="shift_then_round"))
    x = make(kind, (3, 40), seed)
    errors = []
    for found in (JointSearch(12), Search(WidthZeroPoint(12), LpError(2.4)), MinMax()):
        params = found.fit(x, fmt, PerChannel(0))
        loud = x.abs().amax(1, keepdim=True).clamp_min(1e-30)
        errors.append(((x - quantize(x, fmt, PerChannel(0), params)) / loud).double().abs().pow(2.4).mean(1))
    assert bool((errors[0] <= errors[1] * (1 + 1e-4) + 1e-12).all()), "no candidate was wrongly left out"
    if name.startswith("affine"):
        assert bool((errors[0] <= errors[2] * (1 + 1e-2) + 1e-12).all()), "min-max is nearly among the candidates"


def test_joint_search_visits_few_windows_and_holds_little(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.ranges import joint

    visits = [0]
    visit = joint._Search._try

    def counting(self: object, rows: Tensor, *rest: Tensor) -> None:
        visits[0] += len(rows)
        visit(self, rows, *rest)

    monkeypatch.setattr(joint._Search, "_try", counting)
    x = make("normal", (16, 300), 0)
    whole = JointSearch().fit(x, affine(8), PerChannel(0))
    assert visits[0] < 16 * 100 * 256 / 100, "of 25600 windows per row few can win"
    monkeypatch.setattr(joint, "_AT_ONCE", {"cpu": 128})
    pieces = JointSearch().fit(x, affine(8), PerChannel(0))
    assert torch.equal(whole["zero_point"], pieces["zero_point"]) and torch.equal(whole["scale"], pieces["scale"])


LARGE = {
    "normal": lambda x: x,
    "heavy": lambda x: x / (x.flip(0).abs() + 0.05),
    "softmax": lambda x: torch.softmax(x.view(-1, 50) * 3, -1),
    "below": lambda x: -x.relu() - 0.1,
    "steps": lambda x: (3 * x).round(),
    "far off": lambda x: x + 1000,
    "constant": lambda x: torch.full_like(x, 2.5),
}


@pytest.mark.parametrize("fmt", [affine(2), affine(8), symmetric(4)], ids=["affine-2", "affine-8", "symmetric-4"])
@pytest.mark.parametrize("name", LARGE)
def test_joint_search_of_a_large_tensor_tries_few_ranges_and_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, fmt: Format
) -> None:
    from fewbits.ranges import joint

    tried = [0]
    attempt = joint._Search._try

    def counting(self: joint._Search, rows: Tensor, *rest: Tensor) -> None:
        tried[0] += len(rows) if self.exact.counts is None else 0
        attempt(self, rows, *rest)

    monkeypatch.setattr(joint._Search, "_try", counting)
    x = LARGE[name](torch.randn(300_000, generator=torch.Generator().manual_seed(0)))
    by_bins, few = JointSearch(20).fit(x, fmt, PerTensor()), tried[0]
    monkeypatch.setattr(joint, "_MANY", 1 << 62)
    plain = JointSearch(20).fit(x, fmt, PerTensor())
    assert all(torch.equal(value, plain[key]) for key, value in by_bins.items()), (by_bins, plain)
    assert few <= 4 or few < 0.35 * (tried[0] - few)


@pytest.mark.parametrize("name", ["normal", "heavy", "softmax", "below"])
def test_a_range_found_by_bins_stays_where_sums_of_the_same_numbers_differ(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A GPU adds up in an order that depends on how much it is given at once."""
    from fewbits.ranges import joint

    x = LARGE[name](torch.randn(300_000, generator=torch.Generator().manual_seed(0)))
    expected = JointSearch(20).fit(x, affine(8), PerTensor())
    calls, total = [0], joint.total

    def drifting(errors: Tensor, counts: Tensor | None) -> Tensor:
        calls[0] += 1
        return total(errors, counts).double() * (1 + 1e-9 * calls[0])

    monkeypatch.setattr(joint, "total", drifting)
    found = JointSearch(20).fit(x, affine(8), PerTensor())
    assert all(torch.equal(value, found[key]) for key, value in expected.items()), (expected, found)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("bits", [3, 8])
def test_the_error_told_by_bins_is_never_too_large(name: str, bits: int) -> None:
    from fewbits.ranges import joint
    from fewbits.ranges.base import extremes
    from fewbits.ranges.sketch import Sample, sketch

    x = LARGE[name](torch.randn(20_000, generator=torch.Generator().manual_seed(1))).reshape(1, -1)
    ends = extremes(x)
    bins = sketch(x, *ends, limit=3000)
    assert bins.counts is not None and int(bins.counts.sum()) == x.numel()
    place = torch.searchsorted(bins.x[0], x[0]).clamp_max(bins.x.shape[1] - 1)
    near = torch.minimum((bins.x[0][place] - x[0]).abs(), (bins.x[0][(place - 1).clamp_min(0)] - x[0]).abs())
    assert float(near.max()) <= bins.radius, "every value lies in a bin"
    search = joint._Search(Sample(x, *ends), affine(bits), 20, 2.4, bins)
    share = torch.linspace(0.05, 1.1, 60)
    lo, hi = ends[0].clamp_max(0) * share, ends[1].clamp_min(0) * share.flip(0)
    params = affine(bits).from_range(lo, hi)
    rows = {key: value[:, None] for key, value in params.items()}
    exact = (x - affine(bits).nearest(x, rows)[0]).double().abs().pow(2.4).sum(1)
    least = search._least(torch.zeros(60, dtype=torch.int64), lo, hi)
    assert bool((least <= exact * (1 + 1e-5) + 1e-12).all())
    if name in ("normal", "heavy"):
        assert bool((least >= 0.8 * exact).all()), "a bound that is worth having"


def test_joint_search_decides_the_side_for_the_whole_tensor() -> None:
    x = make("normal", (4, 200), 0).abs()
    assert bool((JointSearch().fit(x, affine(4), PerChannel(0))["zero_point"] == 0).all())
    assert bool((JointSearch().fit(-x, affine(4), PerChannel(0))["zero_point"] == 15).all())
    # steps of thresholds, not of windows: one side of a symmetric grid
    sym = symmetric(4, narrow=False, step="span")
    scale = JointSearch(50).fit(x, sym, PerTensor())["scale"]
    multiple = scale * 7.5 / (x.max() / 50)
    assert float((multiple - multiple.round()).abs()) < 1e-3


def test_search_keeps_the_first_of_equals() -> None:
    x = torch.zeros(2, 5)
    assert torch.equal(
        ShrinkSearch().fit(x, gptq_grid(4), PerChannel(0))["scale"],
        MinMax().fit(x, gptq_grid(4), PerChannel(0))["scale"],
    )


@given(kind=st.sampled_from(["normal", "outlier", "offset", "positive", "sparse"]), seed=st.integers(0, 999))
@quick
def test_quantile_search_returns_the_best_of_its_three(kind: str, seed: int) -> None:
    x = make(kind, (2, 700), seed)
    for fmt in (raw_affine(4), LogSqrt2(4)):
        y = x.abs() if fmt == LogSqrt2(4) else x
        errors = []
        for p in (0.999, 0.9999, 0.99999):
            lo, hi = torch.quantile(y, 1.0 - p, dim=1), torch.quantile(y, p, dim=1)
            params = {name: value.unsqueeze(1) for name, value in fmt.from_range(lo, hi).items()}
            errors.append((y - fmt.quantize(y, params)).square().mean(dim=1))
        best = torch.stack(errors).amin(dim=0)
        got = (y - quantize(y, fmt, PerChannel(0), QuantileSearch().fit(y, fmt, PerChannel(0)))).square().mean(dim=1)
        torch.testing.assert_close(got, best, rtol=1e-5, atol=0)


def test_quantile_search_clips_rare_outliers_and_spares_fine_grids() -> None:
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    spiked = normal.clone()
    spiked[:40] = 1000.0

    def tight(x: Tensor, bits: int) -> bool:
        lo, hi = torch.quantile(x, 1.0 - 0.999), torch.quantile(x, 0.999)
        fmt = raw_affine(bits)
        return torch.equal(QuantileSearch().fit(x, fmt, PerTensor())["scale"], fmt.from_range(lo, hi)["scale"])

    assert tight(normal, 3)
    assert not tight(normal, 8)
    spiked_small = torch.where(spiked == 1000.0, torch.full_like(spiked, 12.0), spiked)
    assert tight(spiked_small, 4)


@given(
    rows=st.integers(1, 3),
    count=st.integers(1, 3000),
    p=st.sampled_from([0.0, 1e-5, 1.0 - 0.999, 0.1, 0.5, 0.9, 0.999, 0.9999, 0.99999, 1.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_selected_quantiles_equal_torch(rows: int, count: int, p: float, seed: int) -> None:
    x = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(select_quantiles(x, [p, 1 - p])[0], torch.quantile(x, p, dim=1))


def test_quantiles_of_more_values_than_torch_accepts() -> None:
    count = (1 << 24) + 7
    x = torch.arange(count, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        torch.quantile(x, 0.5)
    low, high = quantiles(x.flip(0).reshape(1, -1), [0.25, 0.999])
    assert float(low) == pytest.approx(0.25 * (count - 1), abs=2)
    assert float(high) == pytest.approx(0.999 * (count - 1), abs=2)


def test_percentile_and_absmax() -> None:
    x = torch.arange(101.0)
    params = Percentile(0.9).fit(x, raw_affine(4), PerTensor())
    assert float(params["scale"]) == pytest.approx(80 / 15)
    assert float(Percentile(1.0, 0.0).fit(x, raw_affine(4), PerTensor())["scale"]) == pytest.approx(100 / 15)
    token = torch.stack([torch.zeros(8), torch.full((8,), -3.0)])
    scale = AbsMax().fit(token, symmetric(8), PerToken())["scale"].flatten()
    assert torch.equal(scale, torch.tensor([1e-5, 3.0]) / 127)


def test_bounds_alone() -> None:
    x = make("normal", (4, 16), 0)
    lo, hi = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    for found in (MinMax(), AbsMax()):
        for name, value in found.fit(x, affine(4), PerChannel(0)).items():
            assert torch.equal(found.fit_bounds(lo, hi, affine(4))[name], value)
    for found in (ShrinkSearch(), QuantileSearch(), Percentile()):
        with pytest.raises(FewbitsError, match="needs the values"):
            found.fit_bounds(lo, hi, affine(4))


@every_range
def test_description_round_trip(found: Range) -> None:
    assert range_from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_bad_descriptions_are_refused() -> None:
    for data in (
        {"kind": "shrink_search", "steps": 0},
        {"kind": "shrink_search", "steps": 200},
        {"kind": "shrink_search", "reduction": "max"},
        {"kind": "percentile", "upper": 1.5},
        {"kind": "quantile_search", "probs": []},
        {"kind": "search", "candidates": {"kind": "all"}},
        {"kind": "absmax", "floor": -1},
        {"kind": "best"},
    ):
        with pytest.raises(FewbitsError):
            range_from_dict(data)


def test_quantile_candidates_round_trip_inside_a_search() -> None:
    found = Search(Quantiles((0.9, 0.99)), LpError(2.4, "sum"))
    assert range_from_dict(json.loads(json.dumps(found.to_dict()))) == found
