"""Units reconstructed in 16 bits: what stays float32, how near the result is, and gradients that do not vanish."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.engine.context import UnitContext
from fewbits.engine.tree import Samples
from fewbits.errors import FewbitsError
from fewbits.papers import build_recipe
from fewbits.reconstruction import Group, Steady, minimise, power_loss
from fewbits.reconstruction.steps import Steps
from fewbits.steps.reconstruct import LearnSteps, ReconstructDropping, ReconstructLayers, ReconstructUnit, arithmetic
from fewbits.steps.reconstruct.arithmetic import gradient_scale, magnified, narrowed, running

NARROW = ["bfloat16", "float16"]
STEPS, RATE = 12, 0.05  # few, and long: a weight can go to its other side
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "adaround": ("W3A16", {"iterations": STEPS, "reg_param": 0.001}),
    "brecq": ("W3A4", {"iters_w": STEPS, "iters_a": STEPS, "round_weight": 0.001}),
    "brecq fisher_diag": ("W3A16", {"iters_w": STEPS, "opt_mode": "fisher_diag", "round_weight": 0.001}),
    "brecq fisher_full": ("W3A16", {"iters_w": STEPS, "opt_mode": "fisher_full", "round_weight": 0.001}),
    "qdrop": ("W4A4", {"iters": STEPS, "candidates": 8, "round_weight": 0.001}),
}


def conv() -> tuple[nn.Module, list[Tensor]]:
    return skipnet(), images(16, batch=8)


def transformer() -> tuple[nn.Module, list[Tensor]]:
    return encoder(width=48, depth=1), tokens(64, batch=32)


def run(name: str, made: Callable[[], tuple[nn.Module, list[Tensor]]] = conv, **options: Any) -> dict[str, Tensor]:
    """What a recipe leaves in the model: weights, codes and grids."""
    model, data = made()
    bits, usual = RECIPES[name]
    recipe = build_recipe(name.split()[0], bits, {**usual, **options})
    rounding = (ReconstructUnit, ReconstructLayers, ReconstructDropping)
    steps = [dataclasses.replace(s, lr=RATE) if isinstance(s, rounding) else s for s in recipe.steps]
    result = quantize(model, dataclasses.replace(recipe, steps=tuple(steps)), data)
    found = {key: value.clone() for key, value in model.state_dict().items()}
    found |= {f"{key} codes": value for key, value in result.attachment.codes.items()}
    for site, quantizer in result.attachment.items():
        found |= {f"{site.name} {key}": value.clone() for key, value in quantizer.params.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# -- the option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adaround", "brecq", "qdrop"])
def test_the_option_reaches_every_learning_step_and_is_recorded(name: str) -> None:
    for chosen in ["float32", *NARROW]:
        recipe = build_recipe(name, "W4A4", {"arithmetic": chosen})
        recorded = [step["arithmetic"] for step in recipe.to_dict()["steps"] if "arithmetic" in step]
        assert recorded == [chosen] * (2 if name == "brecq" else 1)
        assert recipe.to_dict()["options"]["arithmetic"] == chosen
    assert build_recipe(name, "W4A4").to_dict()["options"]["arithmetic"] == "float32"
    with pytest.raises(FewbitsError, match="choose one of float32, bfloat16, float16"):
        build_recipe(name, "W4A4", {"arithmetic": "float8"})


@pytest.mark.parametrize("step", [LearnSteps, ReconstructDropping, ReconstructLayers, ReconstructUnit])
def test_a_step_refuses_an_unknown_arithmetic(step: Any) -> None:
    assert step().arithmetic == "float32"
    with pytest.raises(FewbitsError, match="arithmetic 'half'"):
        step(arithmetic="half")


@pytest.mark.parametrize("name", RECIPES)
def test_the_default_runs_in_the_models_own_types(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = run(name)
    monkeypatch.setattr(torch, "autocast", None)
    monkeypatch.setattr(arithmetic._Magnified, "apply", None)
    assert same(usual, run(name, arithmetic="float32"))


# -- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Per unit, the error of its output on the float targets, in float32, after each learning step."""
    found: dict[str, list[float]] = {}

    def watched(step: Any, activations: bool) -> None:
        real = step.apply

        def apply(self: Any, unit: UnitContext) -> None:
            real(self, unit)
            inputs, targets = unit.inputs(), unit.targets()
            args, kwargs = inputs.rows(torch.arange(inputs.count))
            with torch.no_grad():
                if activations:
                    output = unit.forward(args, kwargs)
                else:
                    with unit.float_activations():
                        output = unit.forward(args, kwargs)
            target = targets.rows(torch.arange(targets.count))
            found.setdefault(unit.name, []).append(float((output - target).square().mean()))

        monkeypatch.setattr(step, "apply", apply)

    watched(ReconstructUnit, False)
    watched(ReconstructLayers, False)
    watched(ReconstructDropping, True)
    return found


@pytest.mark.parametrize("made", [conv, transformer])
@pytest.mark.parametrize("name", ["adaround", "brecq", "brecq fisher_diag", "qdrop"])
def test_errors_are_those_of_float32(
    name: str, made: Callable[[], tuple[nn.Module, list[Tensor]]], errors: dict[str, list[float]]
) -> None:
    run(name, made)
    expected = sum(sum(values) for values in errors.values())
    assert expected > 0
    for kind in NARROW:
        errors.clear()
        run(name, made, arithmetic=kind)
        assert sum(sum(values) for values in errors.values()) == pytest.approx(expected, rel=0.05), kind


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("name", ["brecq", "qdrop"])
def test_the_same_bits_every_time(name: str, kind: str) -> None:
    assert same(run(name, arithmetic=kind), run(name, arithmetic=kind))


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_learned_stays_float32(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    real = Steps._descend

    def watched(self: Steps, loss: Tensor) -> Tensor:
        out = real(self, loss)
        seen.append(loss.dtype)
        for parameter in self.flat:
            held = [parameter, *self.optimiser.state[parameter].values()]  # type: ignore[attr-defined]
            seen.extend(t.dtype for t in [*held, parameter.grad] if isinstance(t, Tensor))
        return out

    monkeypatch.setattr(Steps, "_descend", watched)
    found = run(name, arithmetic=kind)
    assert set(seen) == {torch.float32}
    assert not [key for key, value in found.items() if value.dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("kind", NARROW)
def test_units_run_in_16_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    real = UnitContext.forward

    def watched(self: UnitContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = real(self, args, kwargs)
        if torch.is_autocast_enabled("cpu"):
            seen.add(args[0].dtype)
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(UnitContext, "forward", watched)
    run("brecq", arithmetic=kind)
    assert seen == {getattr(torch, kind)}


# -- samples ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Noted:
    """Of a unit, what `narrowed` asks it."""

    name: str = "unit"
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, message: str) -> None:
        self.notes.append(message)


def samples(*leaves: Any, shared: int = 0) -> Samples:
    """The leaves, the last `shared` of them the same for every sample."""
    return Samples(list(leaves), [1] * (len(leaves) - shared) + [0] * shared, None, len(leaves[0]))


def test_samples_are_held_in_16_bits_and_nothing_else_is() -> None:
    table, index = torch.randn(3, 2), torch.arange(4)
    data = samples(torch.randn(4, 2), index, table, shared=1)
    unit: Any = Noted()
    assert narrowed(unit, "float32", data) == "float32" and data.leaves[0].dtype == torch.float32
    assert narrowed(unit, "float16", data) == "float16" and not unit.notes
    assert data.leaves[0].dtype == torch.float16
    assert data.leaves[1] is index and data.leaves[2] is table


def test_samples_that_float16_cannot_hold_stay_and_are_noted() -> None:
    inputs, targets = samples(torch.ones(4, 2)), samples(torch.tensor([1.0, 7e4]))
    unit: Any = Noted()
    assert narrowed(unit, "float16", inputs, targets) == "float32"
    assert len(unit.notes) == 1 and "too large for float16" in unit.notes[0]
    assert inputs.leaves[0].dtype == targets.leaves[0].dtype == torch.float32
    assert narrowed(unit, "bfloat16", inputs, targets) == "bfloat16" and len(unit.notes) == 1


@pytest.mark.parametrize("kind", NARROW)
def test_masks_stay_masks(kind: Any) -> None:
    lowest, dtype = torch.finfo(torch.float32).min, getattr(torch, kind)
    data = samples(torch.tensor([0.0, lowest]), torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, lowest]), shared=1)
    unit: Any = Noted()
    assert narrowed(unit, kind, data) == kind
    own, infinite, shared = data.leaves
    assert own.dtype == dtype and float(own[1]) == torch.finfo(dtype).min
    assert float(infinite[1]) == -torch.inf
    assert shared.dtype == torch.float32 and float(shared[1]) == torch.finfo(dtype).min


def test_a_unit_whose_samples_do_not_fit_is_learned_in_float32() -> None:
    model, data = conv()
    data = [x * 1e5 for x in data]
    options = {"iters_w": 10, "arithmetic": "float16"}
    result = quantize(model, "brecq", data, bits="W3A16", options=options)
    noted = [note for note in result.notes if "too large for float16" in note]
    assert noted and len(noted) == len(set(noted))
    usual, _ = conv()
    quantize(usual, "brecq", data, bits="W3A16", options={"iters_w": 10})
    assert same(dict(model.state_dict()), dict(usual.state_dict()))


# -- gradients -------------------------------------------------------------------------------------------------------


def gradient_of(kind: Any, size: float, scale: float) -> Tensor:
    """Of the weight of a convolution of many positions whose output is off by about `size`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, 64, 64, generator=generator)
    weight = nn.Parameter(torch.randn(4, 4, 3, 3, generator=generator))
    with torch.no_grad():
        target = torch.conv2d(x, weight, padding=1)
        target += size * torch.randn(target.shape, generator=generator) + size * x.roll(1, 1)

    def loss(index: Tensor, number: Any) -> Tensor:
        with running(kind, torch.device("cpu")):
            output = torch.conv2d(x, weight, padding=1)
        return power_loss(output, target, channel_axis=1)

    steady = Steady(loss)
    with magnified(steady, [Group([weight])], scale) as scaled:
        (gradient,) = torch.autograd.grad(scaled.function(torch.arange(8), None), [weight])
    assert gradient.dtype == torch.float32
    return gradient


def test_gradients_do_not_vanish_in_float16() -> None:
    positions = 8 * 64 * 64
    scale = gradient_scale("float16", positions)
    for size in (1e-2, 1.0):
        exact = gradient_of("float32", size, 1.0)
        found = gradient_of("float16", size, scale)
        assert torch.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.99
        assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.02)
    bare = gradient_of("float16", 1e-3, 1.0)
    assert float((bare == 0).float().mean()) > 0.01 or torch.cosine_similarity(
        bare.flatten(), gradient_of("float32", 1e-3, 1.0).flatten(), 0
    ) < float(
        torch.cosine_similarity(
            gradient_of("float16", 1e-3, scale).flatten(), gradient_of("float32", 1e-3, 1.0).flatten(), 0
        )
    ), "without the factor there is less of them"


def test_the_factor_is_a_power_of_two_and_changes_no_digit_of_float32() -> None:
    assert gradient_scale("float32", 10**6) == gradient_scale("bfloat16", 10**6) == 1
    assert gradient_scale("float16", 4**9) == 2.0**9
    assert gradient_scale("float16", 4**9, weight=2.0**4) == 2.0**5
    assert torch.equal(gradient_of("float32", 1e-2, 1.0), gradient_of("float32", 1e-2, 2.0**9))


def test_hooks_are_gone_afterwards_and_the_error_names_float16() -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = Steady(lambda index, number: (weight * torch.inf).sum())
    with (
        pytest.raises(FewbitsError, match=r"infinite at step 0.*take bfloat16 or float32"),
        magnified(loss, [Group([weight])], 4.0) as scaled,
    ):
        minimise(scaled, [weight], iterations=1, sampler=iter([torch.arange(2)]))
    assert not weight._backward_hooks
