"""QDrop: what is dropped, when, and how often; what is learned with it; where its quantizers sit and what they meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo_tiny
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, PerTensor, affine
from fewbits.formats import quantize as on_grid
from fewbits.papers import build_recipe
from fewbits.quantizer import Quantizer
from fewbits.ranges import AbsMax, JointSearch, MinMax
from fewbits.recipe import QSpec, Recipe
from fewbits.reconstruction import RandomMasks, keep_positive, lsq_factor, lsq_quantize, mixed, scale_gradient
from fewbits.steps.reconstruct import ReconstructDropping, dropping
from fewbits.steps.reconstruct.dropping import DroppedQuantizer, mixed_trees

FAST = {"iters": 2, "candidates": 8, "batch": 4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def four_bits(x: Tensor) -> Quantizer:
    quantizer = Quantizer(QSpec(affine(4), PerTensor(), MinMax()), "site")
    quantizer.calibrate(x)
    return quantizer


def recipe_with(bits: str = "W4A4", weight_range: Any = None, **options: Any) -> Recipe:
    """The recipe, every weight perhaps on another range."""
    recipe = build_recipe("qdrop", bits, {**FAST, **options})
    if weight_range is None:
        return recipe
    rules = {
        name: tuple(
            dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, range=weight_range))
            if rule.spec is not None and "weight" in rule.roles
            else rule
            for rule in getattr(recipe.scheme, name)
        )
        for name in ("weights", "overrides")
    }
    return dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, **rules))


# -- dropping --------------------------------------------------------------------------------------------------------


def test_keep_one_is_the_quantizer_and_keep_zero_is_floating_point() -> None:
    x = noise(3, 5, 7)
    quantizer = four_bits(x)
    assert torch.equal(DroppedQuantizer(quantizer, RandomMasks(1.0, generator()))(x), quantizer(x))
    assert torch.equal(DroppedQuantizer(quantizer, RandomMasks(0.0, generator()))(x), x)
    assert RandomMasks(1.0, generator())(x) is None, "nothing is drawn where nothing is dropped"
    for wrong in (-0.1, 1.5):
        with pytest.raises(FewbitsError, match="keep"):
            ReconstructDropping(keep=wrong)


def test_half_of_the_elements_are_quantized_each_by_itself_and_anew_every_time() -> None:
    x = noise(8, 16, 10, 10)
    quantizer = four_bits(x)
    quantized = quantizer(x)
    dropped = DroppedQuantizer(quantizer, RandomMasks(0.5, generator()))
    first, second = dropped(x), dropped(x)
    kept = first == quantized
    assert bool((kept | (first == x)).all()), "an element is quantized or left alone, never something between"
    assert 0.48 < float(kept.float().mean()) < 0.52
    for axes in ((1, 2, 3), (0, 2, 3)):  # no image and no channel goes as a whole
        share = kept.float().mean(axes)
        assert float(share.min()) > 0.35 and float(share.max()) < 0.65
    assert 0.45 < float((first != second).float().mean()) < 0.55, "masks change from step to step"
    quarter = RandomMasks(0.25, generator())(x)
    assert quarter is not None and 0.23 < float(quarter.float().mean()) < 0.27


def test_gradients_go_to_what_was_taken() -> None:
    x = noise(4, 50).requires_grad_()
    full = noise(4, 50, seed=1).requires_grad_()
    mask = RandomMasks(0.5, generator())(x)
    mixed(x, full, mask).sum().backward()
    assert mask is not None and torch.equal(x.grad, mask.float()) and torch.equal(full.grad, (~mask).float())


def test_every_input_of_a_unit_is_mixed_with_its_own_mask() -> None:
    a, b = torch.zeros(4, 100), torch.ones(4, 100)
    index = torch.arange(4)
    (first, second, number), named = mixed_trees(
        ((a, a, index), {"more": a}), ((b, b, index + 1), {"more": b}), RandomMasks(0.5, generator())
    )
    assert torch.equal(number, index), "only floating-point tensors are mixed"
    masks = [first, second, named["more"]]
    assert all(0.4 < float(m.mean()) < 0.6 for m in masks)
    assert all(0.4 < float((masks[i] != masks[j]).float().mean()) < 0.6 for i in range(3) for j in range(i))


# -- step sizes ------------------------------------------------------------------------------------------------------


def test_scaled_gradients_leave_the_value_alone() -> None:
    scale = torch.tensor(0.123456, requires_grad=True)
    out = scale_gradient(scale, 0.01)
    assert torch.equal(out, scale)
    out.backward()
    assert float(scale.grad) == pytest.approx(0.01)
    assert lsq_factor(400, 15) == pytest.approx(1 / 6000**0.5)


def test_step_gradients_count_the_values_of_their_own_scale() -> None:
    x, fmt = noise(6, 40), affine(4)
    params = MinMax().fit(x, fmt, PerChannel(0))
    found = {}
    for name in ("plain", "scaled"):
        scale = params["scale"].clone().requires_grad_()
        use = lsq_quantize if name == "scaled" else on_grid
        use(x, fmt, PerChannel(0), {**params, "scale": scale}).square().sum().backward()
        found[name] = scale.grad
    torch.testing.assert_close(found["scaled"], found["plain"] / (40 * 15) ** 0.5)


def test_scales_stay_positive() -> None:
    scales = [torch.tensor([-0.5, 0.0, 1e-9, 2.0])]
    keep_positive(scales)
    assert scales[0].tolist() == pytest.approx([0.5, 2.0**-23, 2.0**-23, 2.0])


# -- the step, on whole models ---------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every unit was learned with: groups of parameters, the sampler, the losses."""
    seen: list[dict[str, Any]] = []
    real = dropping.optimise

    def recording(unit: Any, loss: Callable, groups: Any, **rest: Any) -> Tensor:
        start = [p.detach().clone() for group in groups for p in group.parameters]
        history = real(unit, loss, groups, **rest)
        seen.append({"unit": unit.name, "groups": groups, "history": history, "start": start, **rest})
        return history

    monkeypatch.setattr(dropping, "optimise", recording)
    return seen


def test_input_and_every_quantizer_inside_are_mixed_with_masks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[Tensor]] = {}
    real = ReconstructDropping._masks

    def watched(self: ReconstructDropping, unit: Any, purpose: str) -> Callable[[Tensor], Tensor | None]:
        masks = real(self, unit, purpose)

        def keeping(x: Tensor) -> Tensor | None:
            mask = masks(x)
            assert mask is not None and mask.shape == x.shape
            drawn.setdefault(f"{unit.name}: {purpose}", []).append(mask)
            return mask

        return keeping

    monkeypatch.setattr(ReconstructDropping, "_masks", watched)
    quantize(skipnet(), recipe_with(iters=3), images(8))
    block = {name: masks for name, masks in drawn.items() if name.startswith("down.0: ")}
    assert set(block) == {"down.0: input", "down.0: down.0.relu.output", "down.0: down.0.relu_1.output"}
    assert "stem: relu.output" in drawn, "a layer outside any block is compared past its own quantizer"
    assert "head: head.input" in drawn and "head: input" in drawn
    for masks in drawn.values():
        assert len(masks) in (3, 6), "one mask per step, or per step and call"
        assert all(0.3 < float(mask.float().mean()) < 0.7 for mask in masks)
        assert not torch.equal(masks[0], masks[1])
    inner, outer = block["down.0: down.0.relu.output"][0], block["down.0: down.0.relu_1.output"][0]
    assert inner.shape == outer.shape and not torch.equal(inner, outer)


def test_dropping_ends_with_the_learning() -> None:
    model, data = skipnet(), images(8)
    result = quantize(model, recipe_with(), data)
    values: dict[str, Tensor] = {}
    for site, quantizer in result.attachment.items():
        assert type(quantizer) is Quantizer and not list(quantizer.parameters())
        if site.role == "weight":
            # writing back is final: nearest rounding leaves the committed weight where it is
            weight = result.attachment.decoded(site.name)
            assert torch.equal(quantizer(weight), weight)
        else:
            forward = quantizer.forward
            quantizer.forward = lambda x, f=forward, n=site.name: values.setdefault(n, f(x))
    with torch.no_grad():
        assert torch.equal(model(data[0]), model(data[0]))
    for name, value in values.items():
        quantizer = result.attachment.quantizer(name)
        assert quantizer is not None and len(value.unique()) <= 2**quantizer.spec.format.bits


def test_all_units_learn_with_two_rates_and_samples_drawn_with_replacement(runs: list[dict[str, Any]]) -> None:
    quantize(skipnet(), recipe_with(batch=32), images(4))
    assert [run["unit"] for run in runs][:2] == ["stem", "down.0"], "the first layer is learned too"
    assert {run["unit"] for run in runs} >= {"stem", "down.0", "down.1", "up.0", "up.1", "shared", "head"}
    for run in runs:
        alphas, scales = run["groups"]
        assert (alphas.lr, alphas.schedule) == (1e-3, None)
        assert (scales.lr, scales.schedule) == (4e-5, "cosine")
        assert scales.lr_at(0.5) == pytest.approx(2e-5)
        index = next(iter(run["sampler"]))
        assert len(index) == 32 and len(index.unique()) <= 8  # `shared` runs twice a sample


def test_steps_are_learned_and_zero_points_are_not() -> None:
    found = []
    for iters, scale_lr in ((1, 0.0), (20, 1e-3)):
        result = quantize(skipnet(), recipe_with(iters=iters, scale_lr=scale_lr), images(8))
        found.append({site.name: q.params for site, q in result.attachment.items() if site.role != "weight"})
    before, after = found
    assert all(torch.equal(before[name]["zero_point"], after[name]["zero_point"]) for name in before)
    moved = [name for name in before if not torch.equal(before[name]["scale"], after[name]["scale"])]
    assert {"relu.output", "down.0.relu.output", "down.0.relu_1.output", "head.input"} <= set(moved)


def test_ranges_are_searched_on_the_first_images_of_the_float_model() -> None:
    data = images(12, batch=4)
    result = quantize(skipnet(), recipe_with(iters=1, scale_lr=0.0, observe=6), data)
    model, seen = skipnet(), {}
    model.down[0].register_forward_hook(lambda m, i, out: seen.setdefault("down.0.relu_1.output", out))
    model.up[1].conv2.register_forward_pre_hook(lambda m, i: seen.setdefault("up.1.relu.output", i[0]))
    model.head.register_forward_pre_hook(lambda m, i: seen.setdefault("head.input", i[0]))
    with torch.no_grad():
        model(torch.cat(data)[:6])
        seen["relu.output"] = torch.relu(model.stem(torch.cat(data)[:6]))
    for name, value in seen.items():
        quantizer = result.attachment.quantizer(name)
        assert quantizer is not None and isinstance(quantizer.spec.range, JointSearch)
        expected = quantizer.fit(value)
        torch.testing.assert_close(quantizer.params["scale"], expected["scale"], rtol=1e-4, atol=0)
        assert torch.equal(quantizer.params["zero_point"], expected["zero_point"]), name


def test_with_float_inputs_and_nothing_quantized_the_unit_starts_at_its_float_output(
    runs: list[dict[str, Any]],
) -> None:
    """keep = 0, soft weights inside the range: the first loss is zero in every unit, also behind quantized ones."""
    # six steps: the first lies before the regulariser's start
    quantize(skipnet(), recipe_with("W3A2", weight_range=AbsMax(4.0), keep=0.0, iters=6), images(8))
    assert all(float(run["history"][0]) < 1e-8 for run in runs)
    runs.clear()
    quantize(skipnet(), recipe_with("W3A2", weight_range=AbsMax(4.0), keep=1.0, iters=6), images(8))
    assert all(float(run["history"][0]) > 1e-6 for run in runs)


def test_activation_quantization_takes_part_in_learning_the_weights(runs: list[dict[str, Any]]) -> None:
    learned = []
    for keep in (0.0, 0.5, 1.0):
        runs.clear()
        quantize(skipnet(), recipe_with("W2A2", iters=4, keep=keep), images(8))
        learned.append(next(run["groups"][0].parameters[0].detach() for run in runs if run["unit"] == "down.0"))
    assert not torch.equal(learned[0], learned[1]) and not torch.equal(learned[1], learned[2])


def test_same_seed_same_bits_other_seed_other_masks() -> None:
    found = []
    for seed in (0, 0, 1):
        model = skipnet()
        quantize(model, recipe_with("W2A2", iters=8), images(8), seed=seed)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_block_error_falls_below_that_of_nearest_rounding() -> None:
    data, float_model = images(16, batch=16), skipnet()
    errors = {}
    for iters in (1, 100):
        model = skipnet()
        quantize(model, recipe_with("W2A4", iters=iters, batch=8, candidates=40, round_weight=0.02), data)
        with torch.no_grad():
            errors[iters] = float(torch.stack([(model(x) - float_model(x)).square().mean() for x in data]).mean())
    assert errors[100] < 0.8 * errors[1], "one step is nearest rounding"


# -- where quantizers sit --------------------------------------------------------------------------------------------


def test_edges_have_eight_bits_and_the_image_is_not_quantized() -> None:
    model, args, kwargs = zoo_tiny.MODELS["timm-resnet"]()
    recipe = recipe_with("W3A3", iters=1)
    result = quantize(model, recipe, [torch.cat([args[0], args[0].flip(-1)])], example=(args, kwargs))
    bits = {site.name: q.spec.format.bits for site, q in result.attachment.items()}
    assert bits["conv1.weight"] == 8 and bits["fc.weight"] == 8 and bits["fc.input"] == 8
    assert bits["layer4.0.act2.output"] == 8, "what the last layer reads, before pooling too"
    assert bits["act1.output"] == 3, "the first layer's output is like any other"
    assert "conv1.input" not in bits and "fc.output" not in bits
    assert not any("downsample" in name and "output" in name for name in bits), "none at the end of a branch"
    assert bits["layer1.0.act1.output"] == 3 and bits["layer1.0.act2.output"] == 3
    assert "layer1.0.conv2.output" not in bits and "layer1.0.bn2.output" not in bits


def test_a_dead_activation_keeps_a_tiny_positive_step() -> None:
    model = skipnet()
    model.down[0].bn1.bias.data.fill_(-100.0)
    data = images(8)
    result = quantize(model, recipe_with(iters=4), data)
    quantizer = result.attachment.quantizer("down.0.relu.output")
    assert quantizer is not None and 0 < float(quantizer.params["scale"]) < 1e-2
    with torch.no_grad():
        assert bool(torch.isfinite(model(data[0])).all())


def test_float_activations_still_mix_the_inputs(runs: list[dict[str, Any]]) -> None:
    quantize(skipnet(), recipe_with("W2A16"), images(8))
    assert runs and all(len(run["groups"]) == 1 for run in runs)


def test_a_language_model_runs_with_masks_of_its_own() -> None:
    model = encoder()
    result = quantize(model, recipe_with("W3A4", placement="inputs"), tokens(8))
    with torch.no_grad():
        assert bool(torch.isfinite(model(tokens(4)[0])).all())
    assert {"blocks.0.q.weight", "blocks.0.q.input"} <= {site.name for site, _ in result.attachment.items()}


# -- joined with others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["brecq", "adaround", "gptq"])
def test_two_roundings_are_refused(other: str) -> None:
    with pytest.raises(FewbitsError, match="both bring their own"):
        build_recipe(f"qdrop+{other}", "W4A4")


def test_dropping_behind_the_quantizers_of_repq_vit() -> None:
    joined = build_recipe("repq-vit+qdrop", "W4A4", FAST)
    names = [type(step).__name__ for sweep in joined.sweeps() for step in sweep]
    assert names == ["CalibrateInline", "Reparameterize", "ReconstructDropping"]
    model, data = encoder(), tokens(8)
    result = quantize(model, joined, data)
    maps = result.attachment.quantizer("blocks.0.matmul_1.lhs")
    assert maps is not None and maps.spec.format.kind.startswith("log")
    assert any("log" in note and "keeps its calibrated parameters" in note for note in result.notes)
    assert float(result.attachment.quantizer("blocks.0.q.input").params["scale"]) > 0  # type: ignore[union-attr]


def test_equalized_weights_are_learned_from_the_equalized_float_model(runs: list[dict[str, Any]]) -> None:
    recipe = build_recipe("dfq+qdrop", "W4A4", {f"qdrop.{key}": value for key, value in {**FAST, "iters": 4}.items()})
    steps = [type(step).__name__ for step in (*recipe.model_steps(), *(s for sweep in recipe.sweeps() for s in sweep))]
    assert "ReconstructDropping" in steps and len(steps) > 2
    model = skipnet()
    quantize(model, recipe, images(8))
    assert {run["unit"] for run in runs} >= {"stem", "down.0", "head"}


# -- interrupted runs and checkpoints --------------------------------------------------------------------------------


def state(model: nn.Module, result: Any) -> dict[str, Tensor]:
    held = {f"p/{name}": value for name, value in model.state_dict().items()}
    for site, quantizer in result.attachment.items():
        held |= {f"q/{site.name}/{name}": value for name, value in quantizer.params.items()}
    return held | {f"c/{name}": codes for name, codes in result.attachment.codes.items()}


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_an_interrupted_run_ends_with_the_same_bits(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stop` 1 is right behind the stem, whose activation quantizer was learned with it and lies in no unit."""
    recipe, data = recipe_with("W3A3", iters=4, scale_lr=1e-3), images(8)
    whole = skipnet()
    expected = state(whole, quantize(whole, recipe, data))
    real, count = ReconstructDropping.apply, [0]

    def failing(self: ReconstructDropping, unit: Any) -> None:
        if count[0] == stop:
            raise KeyboardInterrupt
        count[0] += 1
        real(self, unit)

    monkeypatch.setattr(ReconstructDropping, "apply", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(skipnet(), recipe, data, work_dir=tmp_path)
    monkeypatch.setattr(ReconstructDropping, "apply", real)
    again = skipnet()
    found = state(again, quantize(again, recipe, data, work_dir=tmp_path, resume=True))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_saved_model_gives_the_same_bits(tmp_path: Path) -> None:
    from fewbits.hub import checkpoint
    from test_checkpoint import _RESNET, _images, _timm

    loaded, data = _timm("resnet18", **_RESNET), _images()
    result = quantize(loaded.model, recipe_with("W3A4"), data)
    checkpoint.save(tmp_path / "out", result, loaded, {"top1": 0.5})
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "out").model(data[0]), loaded.model(data[0]))
