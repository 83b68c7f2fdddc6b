"""Bit allocation: tables, solvers, the frontier, and the divergence that sensitivities are made of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.allocation import Table, frontier, output_divergence, solve
from fewbits.allocation.heuristic import solve_genetic
from fewbits.errors import FewbitsError


def table(loss: Tensor | list, cost: Tensor | list) -> Table:
    loss, cost = torch.as_tensor(loss), torch.as_tensor(cost)
    return Table(tuple(map(str, range(len(loss)))), tuple(range(loss.shape[1])), loss, cost)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, int]:
    """Small tables of every kind: ties, useless options, missing options, costs with and without a common unit."""
    rows, options = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    loss = torch.rand(rows, options, generator=generator).double() ** 3 * 10 ** draw(st.sampled_from([0.0, -6.0, 5.0]))
    if draw(st.booleans()):
        loss = (loss / loss.amax() * 4).round()
    if options > 1 and draw(st.booleans()):
        loss[0, draw(st.integers(0, options - 1))] = torch.inf
    cost = torch.randint(0, 40, (rows, options), generator=generator) * draw(st.sampled_from([1, 16, 1728]))
    made = table(loss, cost)
    low, high = int(cost.amin(1).sum()), int(cost.amax(1).sum())
    return made, draw(st.integers(max(0, low - 3), high + 1))


@settings(max_examples=40)
@given(tables())
def test_exact_solvers_equal_enumeration_and_nobody_exceeds_the_budget(case: tuple[Table, int]) -> None:
    made, budget = case
    best = solve(made, budget, "enumerate")
    for method in ("pareto", "ilp", "greedy", "genetic"):
        options = {"iterations": 3} if method == "genetic" else {}
        found = solve(made, budget, method, **options)
        assert found.feasible == best.feasible and (found.cost <= budget) == found.feasible
        rows = torch.arange(len(made.names))
        assert found.cost == int(made.cost[rows, found.index].sum())
        assert found.loss == pytest.approx(float(made.loss[rows, found.index].sum())) and math.isfinite(found.loss)
        scale = float(made.loss[made.loss.isfinite()].sum())
        if method in ("pareto", "ilp"):
            assert found.loss == pytest.approx(best.loss, rel=1e-9, abs=1e-9 * scale), method
        else:
            assert found.loss >= best.loss - 1e-9 * scale
    points = frontier(made)
    assert bool((points.cost.diff() > 0).all()) and bool((points.loss.diff() < 0).all()), "no point beats another"
    if best.feasible:
        within = points.loss[points.cost <= budget]
        assert float(within.min()) == pytest.approx(best.loss, rel=1e-9, abs=1e-9 * scale)


def test_enumeration_is_brute_force() -> None:
    made = table([[5.0, 2.0, 1.0], [torch.inf, 3.0, 0.5]], [[1, 2, 4], [0, 3, 6]])
    totals = [(a + b, x + y) for a, x in ((5, 1), (2, 2), (1, 4)) for b, y in ((3, 3), (0.5, 6))]
    for budget in range(4, 12):
        assert solve(made, budget, "enumerate").loss == min(loss for loss, cost in totals if cost <= budget)


def layers(count: int, seed: int = 0) -> tuple[Table, Tensor]:
    """Layers of a network: sizes over three orders of magnitude, losses that fall with the bits."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1_000, 2_400_000, (count,), generator=generator) // 64 * 64
    base = torch.rand(count, 1, generator=generator).double() ** 4
    bits = torch.tensor([2, 4, 8])
    loss = base * torch.tensor([10.0, 1.0, 0.01]) * torch.rand(count, 3, generator=generator).double()
    return table(loss.sort(1, descending=True).values, sizes.unsqueeze(1) * bits), sizes


@pytest.mark.parametrize("count", [20, 54, 120])
def test_networks_of_real_size_are_solved_exactly_and_losses_fall_with_the_budget(count: int) -> None:
    made, sizes = layers(count)
    total, before = int(sizes.sum()), math.inf
    for average in (2.0, 2.5, 3.0, 4.0, 6.0, 8.0):
        exact, linear = (solve(made, int(average * total), method) for method in ("pareto", "ilp"))
        assert exact.feasible and exact.loss == pytest.approx(linear.loss, rel=1e-7)
        assert exact.loss <= before
        assert solve(made, int(average * total), "greedy").loss >= exact.loss * (1 - 1e-9)
        before = exact.loss
    assert solve(made, 8 * total, "pareto").index.tolist() == [2] * count
    assert solve(made, 2 * total, "pareto").index.tolist() == [0] * count


def test_greedy_is_not_taken_for_exact() -> None:
    """One large gain that just fits against the better rate of a small one: the reason for a frontier."""
    made = table([[10.0, 0.0], [3.0, 0.0]], [[0, 10], [0, 1]])
    assert solve(made, 10, "greedy").loss == 10 and solve(made, 10, "pareto").loss == 3


@pytest.mark.parametrize("method", ["pareto", "ilp", "greedy", "genetic", "enumerate"])
def test_a_budget_below_everything_gives_the_smallest_choice_and_says_so(method: str) -> None:
    found = solve(table([[5.0, 1.0, 4.0], [9.0, 2.0, 0.5]], [[3, 7, 3], [2, 4, 8]]), 4, method)  # type: ignore[arg-type]
    assert not found.feasible and found.index.tolist() == [2, 0] and found.cost == 5, "of equal costs the lesser loss"


def test_genetic_search_is_seeded_and_takes_losses_that_do_not_add_up() -> None:
    made, sizes = layers(8, seed=3)
    budget = int(3.2 * int(sizes.sum()))
    first, again, other = (
        solve(made, budget, "genetic", generator=torch.Generator().manual_seed(seed), iterations=4)
        for seed in (1, 1, 2)
    )
    assert first.index.tolist() == again.index.tolist() and other.feasible
    exact = solve(made, budget, "pareto")
    longer = solve(made, budget, "genetic", iterations=200)
    assert longer.loss <= first.loss and longer.loss <= exact.loss * 1.1

    rows = torch.arange(8)

    def joint(index: Tensor) -> Tensor:
        """Two neighbours at the lowest width cost a block more than both of them alone."""
        low = index == 0
        return made.loss[rows, index].sum(1) + 100.0 * (low[:, ::2] & low[:, 1::2]).sum(1)

    found = solve_genetic(made, budget, generator=torch.Generator().manual_seed(0), iterations=200, loss=joint)
    low = found.index == 0
    assert not bool((low[::2] & low[1::2]).any()) and found.cost <= budget
    assert found.loss == pytest.approx(float(joint(found.index.unsqueeze(0))))


@pytest.mark.parametrize(
    ("loss", "cost", "message"),
    [
        ([[1.0, torch.nan]], [[1, 2]], "NaN"),
        ([[1.0, 2.0]], [[1, -2]], "negative cost"),
        ([[1.0, 2.0]], [[1.5, 2.0]], "whole units"),
        ([[torch.inf, torch.inf]], [[1, 2]], "no option"),
        ([[1.0, 2.0]], [[1]], "that shape"),
    ],
)
def test_bad_tables_are_refused(loss: list, cost: list, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        table(loss, cost)


def test_unknown_methods_and_options_are_refused() -> None:
    made = table([[1.0]], [[1]])
    with pytest.raises(FewbitsError, match="pareto, ilp"):
        solve(made, 1, "anneal")  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="population"):
        solve(made, 1, "pareto", population=3)
    with pytest.raises(FewbitsError, match="mutation=2"):
        solve(made, 1, "genetic", mutation=2)


def test_output_divergence_is_kl_per_sample_and_zero_only_for_equal_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 7, generator=generator) for _ in range(2))
    expected = torch.stack([torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a.double()), torch.distributions.Categorical(logits=b.double())
    ) for a, b in zip(first, second, strict=True)])  # fmt: skip
    torch.testing.assert_close(output_divergence(first, second), expected)
    assert output_divergence(first, first).tolist() == [0.0] * 5
    torch.testing.assert_close(output_divergence(first, first + 3), torch.zeros(5, dtype=torch.float64))
    tokens = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    by_pixel = output_divergence(*(t.movedim(1, -1).flatten(0, 2) for t in tokens)).view(2, -1).mean(1)
    torch.testing.assert_close(output_divergence(*tokens, axis=1), by_pixel)
    masked = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert output_divergence(masked, masked).tolist() == [0.0]
