"""Optimisation steps recorded on a GPU: the same bits as one by one, and what happens where they cannot be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import images, skipnet
from fewbits import quantize
from fewbits.reconstruction import (
    Group,
    RandomMasks,
    Steady,
    minimise,
    mixed,
    power_loss,
    recorded,
    without_replacement,
)
from fewbits.reconstruction.recorded import WARM, RecordedSteps
from fewbits.steps.reconstruct import device
from fewbits.steps.reconstruct.arithmetic import gradient_scale, magnified, running

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

STEPS = 40


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedSteps]:
    """Every run of steps on the GPU, in order."""
    seen: list[RecordedSteps] = []
    real = RecordedSteps.__init__

    def watched(self: RecordedSteps, *args: Any) -> None:
        seen.append(self)
        real(self, *args)

    monkeypatch.setattr(RecordedSteps, "__init__", watched)
    return seen


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(recorded, "why_not", lambda loss, parameters: "told not to")


def fit(extra: Callable[[Tensor], Tensor] = lambda loss: loss, **options: Any) -> dict[str, Any]:
    """Two groups, a number that comes after ten steps, random masks, and a callback that writes to a parameter."""
    torch.manual_seed(0)
    x, target = torch.randn(64, 8, 6, 6, device="cuda"), torch.randn(64, 4, 6, 6, device="cuda")
    conv = nn.Conv2d(8, 4, 3, padding=1).cuda()
    scale = nn.Parameter(torch.ones(1, device="cuda"))
    masks = RandomMasks(0.5, torch.Generator("cuda").manual_seed(3))

    def loss(index: Tensor, number: float | Tensor | None) -> Tensor:
        rows = x[index]
        output = conv(mixed(rows.round(), rows, masks(rows))) * scale
        error = (output - target[index]).square().mean()
        return extra(error if number is None else error + 1e-3 * conv.weight.abs().pow(number).sum())

    found: dict[str, Any] = {"reasons": [], "seen": []}

    def callback(step: int, value: Tensor) -> bool:
        with torch.no_grad():
            scale.clamp_(max=1.5)
        found["seen"].append(value)
        return step == options.get("stop")

    sampler = options.get("sampler") or without_replacement(64, 16, torch.Generator().manual_seed(1))
    found["history"] = minimise(
        Steady(loss, [None] * 10 + [4.0 - step / STEPS for step in range(10, STEPS)], [masks.generator]),
        [Group([conv.weight, conv.bias], 1e-2), Group([scale], 1e-1, "cosine")],
        iterations=STEPS,
        sampler=sampler,
        callbacks=[callback],
        note=found["reasons"].append,
    )
    found["parameters"] = [conv.weight.detach(), conv.bias.detach(), scale.detach()]
    found["next"] = torch.rand(5, device="cuda", generator=masks.generator)
    found["global"] = torch.rand(5, device="cuda")
    return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert torch.equal(a["history"], b["history"])
    assert torch.equal(torch.stack(a["seen"]), a["history"]), "a loss given to a callback is not written over later"
    for name in ("next", "global"):
        assert torch.equal(a[name], b[name]), f"{name}: a generator is not where it was without recording"
    assert all(torch.equal(x, y) for x, y in zip(a["parameters"], b["parameters"], strict=True))


def test_recorded_steps_give_the_same_bits(runs: list[RecordedSteps], one_by_one: Callable[[], None]) -> None:
    first, again = fit(), fit()
    assert [run.replayed for run in runs] == [STEPS - 2 * WARM] * 2 and not first["reasons"]
    one_by_one()
    eager = fit()
    assert runs[-1].replayed == 0 and len(eager["reasons"]) == 1
    assert_same(first, again)
    assert_same(first, eager)
    assert first["history"][-1] < first["history"][10]


def test_a_callback_ends_a_recorded_run(runs: list[RecordedSteps], one_by_one: Callable[[], None]) -> None:
    found = fit(stop=25)
    assert len(found["history"]) == 26 and runs[-1].replayed
    one_by_one()
    assert_same(found, fit(stop=25))


def waits(loss: Tensor) -> Tensor:
    loss.item()
    return loss


def synchronises(loss: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return loss


@pytest.mark.parametrize(("extra", "reason"), [(waits, "waits for the device"), (synchronises, "cannot be recorded")])
def test_what_cannot_be_recorded_runs_one_by_one_from_where_it_was(
    extra: Callable[[Tensor], Tensor], reason: str, runs: list[RecordedSteps]
) -> None:
    expected = fit()
    found = fit(extra)
    assert len(found["reasons"]) == 1 and reason in found["reasons"][0]
    assert runs[-1].replayed == 0
    assert_same(found, expected)
    assert_same(fit(), expected)
    assert runs[-1].replayed, "a recording that failed does not keep the next one from being made"


def test_an_error_of_the_loss_is_not_taken_for_one_of_recording() -> None:
    calls: list[int] = []

    def breaks(loss: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no such thing")
        return loss

    with pytest.raises(RuntimeError, match="no such thing"):
        fit(breaks)


def test_batches_of_different_sizes_run_one_by_one(runs: list[RecordedSteps]) -> None:
    rows = [torch.arange(16 if step != 30 else 8) for step in range(STEPS)]
    found = fit(sampler=iter(rows))
    assert "differ in size" in found["reasons"][0] and runs[-1].replayed == 0


def test_samples_in_host_memory_run_one_by_one(runs: list[RecordedSteps]) -> None:
    x = torch.randn(64, 3)
    w = nn.Parameter(torch.zeros(3, device="cuda"))
    reasons: list[str] = []
    history = minimise(
        Steady(lambda index, number: (x[index].cuda() @ w - 1).square().mean(), samples=x.device),
        [w],
        iterations=10,
        sampler=without_replacement(64, 16, torch.Generator().manual_seed(1)),
        note=reasons.append,
    )
    assert len(history) == 10 and "samples lie on cpu" in reasons[0] and runs[-1].replayed == 0


RECIPES = {
    "adaround": ("W3A8", {"iterations": 30}),
    "brecq": ("W3A4", {"iters_w": 30, "iters_a": 20}),
    "brecq fisher": ("W3A16", {"iters_w": 30, "opt_mode": "fisher_diag"}),
    "qdrop": ("W3A4", {"iters": 30}),
}
RECIPES |= {
    f"{name} {kind}": (bits, {**options, "arithmetic": kind})
    for name, (bits, options) in RECIPES.items()
    for kind in ("bfloat16", "float16")
}


def outcome(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights and grids that a recipe ends with, and what it noted about steps taken one by one."""
    bits, options = RECIPES[name]
    model = skipnet()
    result = quantize(model, name.split()[0], images(8), bits=bits, options=options, device="cuda")
    values = {key: value.cpu() for key, value in model.state_dict().items()}
    for site, quantizer in result.attachment.items():
        values |= {f"{site.name} {key}": value.cpu() for key, value in quantizer.params.items()}
    return values, [note for note in result.notes if "one by one" in note]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_same_bits(name: str, runs: list[RecordedSteps], one_by_one: Callable[[], None]) -> None:
    recorded_values, notes = outcome(name)
    assert runs and all(run.replayed for run in runs) and not notes
    runs.clear()
    one_by_one()
    values, notes = outcome(name)
    assert runs and not any(run.replayed for run in runs) and notes
    assert_equal(recorded_values, values)


@pytest.mark.parametrize("name", [name for name in RECIPES if "adaround" not in name])
def test_data_that_does_not_fit_on_the_device_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = outcome(name)
    monkeypatch.setattr(device, "fits", lambda unit, streams: False)
    values, notes = outcome(name)
    assert notes and all("samples lie on cpu" in note for note in notes)
    assert_equal(expected, values)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_squared_error_in_16_bits_is_that_of_the_formula(kind: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shape, scale = (8, 16, 32, 32), 2.0**7
    prediction, target = (
        torch.randn(shape, device="cuda", generator=generator).to(kind, memory_format=torch.channels_last)
        for _ in range(2)
    )
    found, expected = prediction.clone().requires_grad_(), prediction.double().requires_grad_()
    loss = power_loss(found, target, channel_axis=1)
    exact = (expected - target.double()).square().sum(1).mean()
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(exact), rel=1e-5)
    (loss * scale).backward()
    (exact * scale).backward()
    assert found.grad is not None and found.grad.dtype == kind and found.grad.stride() == prediction.stride()
    # the difference is rounded, then the product
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=2.1 * torch.finfo(kind).eps, atol=1e-7)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_gradients_in_16_bits_point_where_those_of_float32_do(kind: Any) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(32, 16, 64, 64, device="cuda", generator=generator).contiguous(memory_format=torch.channels_last)
    weight = nn.Parameter(torch.randn(16, 16, 3, 3, device="cuda", generator=generator))
    with torch.no_grad():
        target = torch.conv2d(x, weight, padding=1)
        target = target + 0.05 * target.roll(1, 1) + 0.05 * torch.randn_like(target)

    def gradient(kind: Any) -> Tensor:
        scale = gradient_scale(kind, 32 * 64 * 64)
        held = (t if kind == "float32" else t.to(getattr(torch, kind)) for t in (x, target))
        inputs, targets = held

        def loss(index: Tensor, number: float | Tensor | None) -> Tensor:
            with running(kind, x.device):
                output = torch.conv2d(inputs, weight, padding=1)
            return power_loss(output, targets, channel_axis=1)

        with magnified(Steady(loss), [Group([weight])], scale) as scaled:
            (found,) = torch.autograd.grad(scaled.function(torch.arange(1), None), [weight])
        return found

    found, exact = gradient(kind), gradient("float32")
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.99
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.03)
