"""Losses, the optimisation loop, samplers and the task gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, affine
from fewbits.graph import record
from fewbits.ranges import MinMax
from fewbits.reconstruction import (
    Group,
    Steady,
    fisher_diagonal_loss,
    fisher_full_loss,
    fisher_weight,
    kl_gradients,
    minimise,
    power_loss,
    with_replacement,
    without_replacement,
)
from fewbits.reconstruction.recorded import why_not
from fewbits.rounding import LearnedRounding, RoundingRegulariser, nearest
from fewbits.steps.reconstruct.norms import _AddedConstants

# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_sums_channels_and_averages_the_rest(p: float) -> None:
    a, b = torch.randn(3, 5, 4, 2), torch.randn(3, 5, 4, 2)
    expected = sum(
        (a[n, :, i, j] - b[n, :, i, j]).abs().pow(p).sum() for n in range(3) for i in range(4) for j in range(2)
    ) / (3 * 4 * 2)
    torch.testing.assert_close(power_loss(a, b, channel_axis=1, p=p), torch.as_tensor(expected))
    # the same values laid out as tokens, with the channels last
    tokens = [x.permute(0, 2, 3, 1).reshape(3, 8, 5) for x in (a, b)]
    torch.testing.assert_close(power_loss(*tokens, channel_axis=-1, p=p), torch.as_tensor(expected))


def test_the_normalisation_grows_with_channels_and_not_with_positions() -> None:
    a, b = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    one = power_loss(a, b, channel_axis=-1)
    torch.testing.assert_close(power_loss(a.repeat(1, 4, 1), b.repeat(1, 4, 1), channel_axis=-1), one)
    torch.testing.assert_close(power_loss(a.repeat(1, 1, 4), b.repeat(1, 1, 4), channel_axis=-1), 4 * one)


def test_fisher_losses() -> None:
    a, b, g = (torch.randn(4, 6, 3, 3) for _ in range(3))
    assert torch.equal(fisher_diagonal_loss(a, b, torch.ones_like(a), channel_axis=1), power_loss(a, b, channel_axis=1))
    torch.testing.assert_close(
        fisher_diagonal_loss(a, b, 3 * g, channel_axis=1), 9 * fisher_diagonal_loss(a, b, g, channel_axis=1)
    )
    by_hand = torch.zeros(())
    for n in range(4):
        weighted = ((a[n] - b[n]) * g[n]).abs()
        by_hand += weighted.sum() * weighted.sum()
    torch.testing.assert_close(fisher_full_loss(a, b, g), by_hand / a.numel() / 100)
    assert torch.equal(fisher_full_loss(a, b, -g), fisher_full_loss(a, b, g))


def test_losses_never_broadcast_and_never_run_in_half_precision() -> None:
    a = torch.randn(2, 3, 4)
    with pytest.raises(FewbitsError, match="target"):
        power_loss(a, a[:1], channel_axis=-1)
    with pytest.raises(FewbitsError, match="gradient"):
        fisher_diagonal_loss(a, a, a[..., :1], channel_axis=-1)
    big = torch.full((2, 3), 200.0, dtype=torch.float16)
    assert power_loss(big, -big, channel_axis=-1).item() == pytest.approx(3 * 400.0**2)


# -- loop ------------------------------------------------------------------------------------------------------------


def fit_line(**options: object) -> tuple[nn.Parameter, Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=gen)
    w = nn.Parameter(torch.zeros(3))
    target = x @ torch.tensor([1.0, -2.0, 0.5])
    history = minimise(
        lambda step, index: (x[index] @ w - target[index]).square().mean(),
        [w],
        iterations=int(options.pop("iterations", 300)),  # type: ignore[call-overload]
        sampler=without_replacement(64, 16, torch.Generator().manual_seed(1)),
        lr=0.05,
        **options,  # type: ignore[arg-type]
    )
    return w, history


def test_minimises_and_repeats_to_the_bit() -> None:
    w, history = fit_line()
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, -2.0, 0.5]), rtol=0, atol=1e-2)
    assert history.shape == (300,) and history[-20:].mean() < 1e-3 * history[0]
    again, same = fit_line()
    assert torch.equal(w, again) and torch.equal(history, same)


def test_cosine_ends_at_zero_and_groups_have_their_own_rate() -> None:
    fast, slow, still = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    seen: list[list[float]] = []

    def loss(step: int, index: Tensor) -> Tensor:
        seen.append([float(p.detach()) for p in (fast, slow, still)])
        return -(fast + slow + still).sum()  # constant gradient: Adam moves by exactly the learning rate

    groups = [
        Group([fast], lr=0.1),
        Group([slow], lr=0.1, schedule="cosine"),
        Group([still], lr=0.1, schedule=lambda t: 0.0),
    ]
    minimise(loss, groups, iterations=10, sampler=[torch.zeros(1)] * 10)
    path = torch.tensor(seen)
    moves = path[1:] - path[:-1]
    torch.testing.assert_close(moves[:, 0], torch.full((9,), 0.1), rtol=0, atol=1e-5)
    expected = torch.tensor([0.05 * (1 + math.cos(math.pi * t / 10)) for t in range(9)])
    torch.testing.assert_close(moves[:, 1], expected, rtol=0, atol=1e-5)
    assert (path[:, 2] == 0).all()


def test_gradients_stay_inside_the_loop() -> None:
    layer = nn.Linear(3, 3)
    extra = nn.Parameter(torch.ones(3))
    with torch.no_grad():  # as a caller that prepared everything without gradients would
        minimise(lambda s, i: layer(extra).square().sum(), [extra], iterations=3, sampler=[torch.zeros(1)] * 3)
    assert layer.weight.grad is None and layer.bias.grad is None and extra.grad is None
    assert not torch.equal(extra, torch.ones(3))


def test_given_indices_are_used_in_order_and_callbacks_can_stop() -> None:
    w = nn.Parameter(torch.zeros(1))
    seen: list[int] = []

    def loss(step: int, index: Tensor) -> Tensor:
        seen.append(int(index))
        return (w - 1).square().sum()

    history = minimise(
        loss, [w], iterations=4, sampler=torch.tensor([3, 1, 2, 0]), callbacks=[lambda step, value: step == 2]
    )
    assert seen == [3, 1, 2] and len(history) == 3


def test_loop_refuses_what_cannot_work() -> None:
    w = nn.Parameter(torch.zeros(1))
    batches = [torch.zeros(1)] * 5
    with pytest.raises(FewbitsError, match="0 parameters"):
        minimise(lambda s, i: w.sum(), [], iterations=1, sampler=batches)
    with pytest.raises(FewbitsError, match="ended after 5 of 6"):
        minimise(lambda s, i: w.sum(), [w], iterations=6, sampler=batches)
    with pytest.raises(FewbitsError, match="depend"):
        minimise(lambda s, i: torch.zeros(()), [w], iterations=1, sampler=batches)
    broken = nn.Parameter(torch.zeros(1))
    with pytest.raises(FewbitsError, match="step 3"):
        minimise(lambda s, i: broken.sum() * (math.nan if s == 3 else 1.0), [broken], iterations=5, sampler=batches)
    with pytest.raises(FewbitsError, match="not both"):
        minimise(lambda s, i: w.sum(), [w, Group([w])], iterations=1, sampler=batches)
    unused = nn.Parameter(torch.zeros(1))
    with pytest.warns(UserWarning, match="1 of 2 parameters"):
        minimise(lambda s, i: w.sum(), [w, unused], iterations=1, sampler=batches)


def test_a_steady_loss_is_the_function_of_its_course() -> None:
    numbers = [None, None, *(1.0 + 0.1 * step for step in range(8))]
    given: list[float | Tensor | None] = []
    found = []
    for steady in (False, True):
        w = nn.Parameter(torch.ones(3))

        def value(index: Tensor, number: float | Tensor | None, w: Tensor = w) -> Tensor:
            given.append(number)
            return (w - index).square().sum() * (1.0 if number is None else number)

        loss = Steady(value, numbers) if steady else lambda step, index, f=value: f(index, numbers[step])
        sampler = [torch.full((3,), float(step)) for step in range(10)]
        found.append((minimise(loss, [w], iterations=10, sampler=sampler), w.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert given == numbers * 2, "on a CPU the numbers are Python's"
    assert Steady(value).at(7) is None


def test_reasons_against_recording() -> None:
    w, host = torch.empty(1, device="meta"), torch.Generator()
    loss = Steady(lambda index, number: w.sum())
    assert why_not(loss, [w, w]) is None
    assert "2 devices" in str(why_not(loss, [w, torch.empty(1)]))
    assert "samples lie on cpu" in str(why_not(replace(loss, samples=torch.device("cpu")), [w]))
    assert "drawn on the CPU" in str(why_not(replace(loss, generators=[host]), [w]))


def test_samplers() -> None:
    draws = [next(without_replacement(10, 4, torch.Generator().manual_seed(0))) for _ in range(2)]
    assert torch.equal(*draws)
    stream = without_replacement(10, 4, torch.Generator().manual_seed(0))
    many = [next(stream) for _ in range(50)]
    assert all(len(set(index.tolist())) == 4 for index in many) and len({tuple(i.tolist()) for i in many}) > 40
    assert sorted(next(without_replacement(3, 32, torch.Generator())).tolist()) == [0, 1, 2]
    repeated = [next(with_replacement(4, 32, torch.Generator().manual_seed(s))) for s in range(3)]
    assert all(len(index) == 32 and set(index.tolist()) <= {0, 1, 2, 3} for index in repeated)
    with pytest.raises(FewbitsError, match="at least 1"):
        next(without_replacement(0, 4, torch.Generator()))


# -- a block ---------------------------------------------------------------------------------------------------------


def test_block_reconstruction_beats_nearest_and_starts_at_zero() -> None:
    gen = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 8, 3, 3, generator=gen) / 8 for _ in range(2)]
    x = F.avg_pool2d(torch.randn(32, 8, 8, 8, generator=gen), 3, 1, 1) * 3

    def block(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.relu(F.conv2d(F.relu(F.conv2d(x, first, padding=1)), second, padding=1) + x)

    fmt, gran = affine(3), PerChannel(0)
    params = [MinMax().fit(w, fmt, gran) for w in weights]
    roundings = [LearnedRounding(w, fmt, p, gran) for w, p in zip(weights, params, strict=True)]
    target = block(x, *weights)
    # zero points are rounded, so a few end weights lie up to half a step outside the grid
    start = power_loss(block(x, *[r() for r in roundings]), target, channel_axis=1)
    near = [nearest(w, fmt, gran, p)[0] for w, p in zip(weights, params, strict=True)]
    rtn = power_loss(block(x, *near), target, channel_axis=1)
    assert start < 0.1 * rtn
    steps = 400
    regulariser = RoundingRegulariser(roundings, iterations=steps)

    def loss(step: int, index: Tensor) -> Tensor:
        data = power_loss(block(x[index], *[r() for r in roundings]), target[index], channel_axis=1)
        penalty = regulariser(step)
        return data if penalty is None else data + penalty

    sampler = without_replacement(32, 16, torch.Generator().manual_seed(0))
    minimise(loss, [r.alpha for r in roundings], iterations=steps, sampler=sampler, lr=1e-2)
    hard = [r.hard_weight() for r in roundings]
    assert power_loss(block(x, *hard), target, channel_axis=1) < 0.7 * rtn


# -- task gradient ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A unit, then two consumers of its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unit, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)

    def unit_output(self, x: Tensor, noise: float) -> Tensor:
        return F.linear(x, self.unit.weight + noise * self.unit.weight.sign(), self.unit.bias)

    def rest(self, y: Tensor) -> Tensor:
        return self.left(y.relu()) + self.right(y.sigmoid())


def gradients(noise: float, batches: list[Tensor], **options: object) -> Tensor:
    net = Net()

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        output = net.unit_output(x, noise)
        return net.rest(output), output

    def reference(x: Tensor) -> Tensor:
        return net.rest(net.unit_output(x, 0.0))

    return kl_gradients(reference, quantized, batches, **options)  # type: ignore[arg-type]


def test_gradient_sums_over_consumers() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found = gradients(0.2, [x])
    net = Net().double()
    output = net.unit_output(x.double(), 0.2).detach()
    target = net.rest(net.unit_output(x.double(), 0.0)).softmax(-1)

    def kl(y: Tensor) -> Tensor:
        log = net.rest(y).log_softmax(-1)
        return (target * (target.log() - log)).sum() / len(x)

    numeric = torch.zeros_like(output)
    for place in range(output.numel()):
        step = torch.zeros_like(output).view(-1).index_fill(0, torch.tensor(place), 1e-5).view_as(output)
        numeric.view(-1)[place] = (kl(output + step) - kl(output - step)).detach() / 2e-5
    torch.testing.assert_close(found.double(), numeric, rtol=1e-3, atol=1e-6)
    both = gradients(0.2, [x, x])
    torch.testing.assert_close(both, torch.cat([found, found]))


def test_weights_are_at_least_the_damping_and_equal_it_where_the_gradient_vanishes() -> None:
    x = torch.randn(4, 6)
    weight = fisher_weight(gradients(0.2, [x]))
    assert (weight >= 1).all() and (weight > 1).any()
    with pytest.warns(UserWarning, match="vanishes"):
        flat = gradients(0.0, [x], vanished="warn")
    torch.testing.assert_close(fisher_weight(flat), torch.ones(4, 8), rtol=0, atol=1e-6)
    assert torch.equal(fisher_weight(torch.zeros(3), damping=0.25), torch.full((3,), 0.25))


def test_gradient_problems_are_reported() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(FewbitsError, match="vanishes"):
        gradients(0.0, [x])
    with pytest.raises(FewbitsError, match="no calibration batch"):
        gradients(0.2, [])
    with pytest.raises(FewbitsError, match="NaN"):
        gradients(0.2, [x * math.inf])
    net = Net()
    with pytest.raises(FewbitsError, match="do not depend"):
        kl_gradients(net.left, lambda y: (net.left(y), net.right(y)), [torch.randn(2, 8)])
    with pytest.raises(FewbitsError, match="no gradient"):
        kl_gradients(net.left, lambda y: (net.left(y), y), [torch.randn(2, 8)])
    with pytest.raises(FewbitsError, match="logits"):
        kl_gradients(net.left, lambda y: (net.left(y)[:1], y), [torch.randn(2, 8)])


# -- what suits a GPU ------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Two norms behind convolutions: one as folding leaves it, one that also scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.constant, self.scaling = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.constant, self.scaling):
            nn.init.normal_(norm.bias)
            norm.running_var.fill_(1 - norm.eps)
        nn.init.normal_(self.scaling.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling(self.second(self.constant(self.first(x))))


def test_only_norms_that_add_a_constant_are_run_as_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Normed().eval(), torch.randn(2, 3, 8, 8)
    graph = record(model, x)
    unit = SimpleNamespace(model=model, graph=graph, unit=SimpleNamespace(calls=range(len(graph.calls))))
    expected = model(x)
    normed: list[Tensor] = []
    real = torch.batch_norm
    monkeypatch.setattr(torch, "batch_norm", lambda *args: (normed.append(args[3]), real(*args))[1])
    with _AddedConstants(unit):  # type: ignore[arg-type]
        found = model(x)
    assert len(normed) == 1 and normed[0] is model.scaling.running_mean
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
