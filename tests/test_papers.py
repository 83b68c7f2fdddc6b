"""Recipes: how they join, what they refuse, that they run on models they were not made for, that their claims show."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zoo_tiny
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.engine.tree import map_tensors
from fewbits.errors import FewbitsError
from fewbits.formats import LogSqrt2, PerChannel, PerTensor
from fewbits.graph import record
from fewbits.papers import build_recipe, implemented, recipe_names
from fewbits.recipe import Scheme
from golden import folder

FAST = {
    "brecq": {"iters_w": 3, "iters_a": 2},
    "adaround": {"iterations": 3},
    "awq": {"ratios": 3, "clip_steps": 4},
    "owq": {"weak_columns": 2, "tuning": "minmax"},
    "zeroq": {"iterations": 3},
    "ptq4vit": {"candidates": 4, "rounds": 1},
    "qdrop": {"iters": 3, "candidates": 10},
}  # fmt: skip


def _options(recipe: str) -> dict:
    return {key: value for part in recipe.split("+") for key, value in FAST.get(part, {}).items()}


# -- joining ---------------------------------------------------------------------------------------------------------


def test_joined_recipes_take_each_part_from_the_paper_that_brings_it() -> None:
    joined = build_recipe("smoothquant+gptq", "W4A8")
    names = [type(step).__name__ for sweep in joined.sweeps() for step in sweep]
    assert names == ["Smooth", "CalibrateActivations", "ColumnSolver"]
    assert joined.scheme.weights == build_recipe("gptq", "W4A8").scheme.weights, "the solver keeps its own grid"
    assert joined.scheme.activations == build_recipe("smoothquant", "W4A8").scheme.activations
    turned = build_recipe("gptq+smoothquant", "W4A8")
    assert next(type(step).__name__ for sweep in turned.sweeps() for step in sweep) == "Smooth", (
        "order of names is not order of steps"
    )

    refined = build_recipe("repq-vit+brecq", "W4A4")
    sweeps = [[type(step).__name__ for step in sweep] for sweep in refined.sweeps()]
    assert sweeps == [["CalibrateInline"], ["Reparameterize"], ["ReconstructUnit"], ["LearnSteps"]]
    assert refined.scheme.weights == build_recipe("repq-vit", "W4A4").scheme.weights
    assert refined.scheme.activations == build_recipe("repq-vit", "W4A4").scheme.activations


@pytest.mark.parametrize(("first", "second"), [("repq-vit", "brecq"), ("brecq", "repq-vit"), ("repq-vit", "qdrop")])
def test_joined_recipes_quantize_activations_only_where_their_paper_does(first: str, second: str) -> None:
    """A solver's own 8-bit edges are of outputs; RepQ-ViT quantizes inputs."""
    model, args, kwargs = zoo_tiny.MODELS["timm-vit"]()
    sites = record(model, *args, **kwargs).sites.values()
    joined, placed = (build_recipe(name, "W4A4").scheme for name in (f"{first}+{second}", "repq-vit"))
    activations = [site for site in sites if site.role != "weight"]
    assert any(placed.spec(site) for site in activations)
    assert {s.name: joined.spec(s) for s in activations} == {s.name: placed.spec(s) for s in activations}
    bits = {s.name: spec.format.bits for s in sites if s.role == "weight" and (spec := joined.spec(s)) is not None}
    assert bits["patch_embed.proj.weight"] == bits["head.weight"] == 8 and set(bits.values()) == {4, 8}


@pytest.mark.parametrize("pair", ["gptq+adaround", "gptq+brecq", "adaround+brecq", "brecq+gptq"])
def test_two_solvers_for_one_thing_are_refused_with_the_reason(pair: str) -> None:
    with pytest.raises(FewbitsError, match="both bring their own rounding"):
        build_recipe(pair, "W4A16")


def test_smoothquant_then_gptq_is_gptq_on_the_smoothed_model() -> None:
    joined = encoder()
    quantize(joined, "smoothquant+gptq", tokens(8), bits="W3A16")
    # The same by hand: smooth alone (its weights kept at 16 bits is not a scheme), then solve.
    from fewbits.steps.norm_folds import Smooth

    by_hand = encoder()
    import dataclasses

    smooth = build_recipe("gptq", "W3A16")
    quantize(by_hand, dataclasses.replace(smooth, steps=(Smooth(), *smooth.steps)), tokens(8))
    assert all(torch.equal(a, b) for a, b in zip(joined.parameters(), by_hand.parameters(), strict=True))
    plain = encoder()
    quantize(plain, "gptq", tokens(8), bits="W3A16")
    assert not torch.equal(joined.blocks[0].q.weight, plain.blocks[0].q.weight)


# -- names, bits, options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["W4A", "4A8", "W0A8", "W9A8", "", "W4A8g0", "W4A8x", "Wa"])
def test_wrong_bits_are_refused(bad: str) -> None:
    with pytest.raises(FewbitsError, match="bits"):
        build_recipe("rtn", bad)


def test_unknown_names_and_options_are_refused_with_a_hint() -> None:
    with pytest.raises(FewbitsError, match="gptq"):
        build_recipe("gtpq", "W4A16")
    with pytest.raises(FewbitsError, match="percdamp"):
        build_recipe("gptq", "W4A16", {"damping": "1"})
    with pytest.raises(FewbitsError, match="percdamp='much'"):
        build_recipe("gptq", "W4A16", {"percdamp": "much"})
    with pytest.raises(FewbitsError, match="variant"):
        build_recipe("gptq", "W4A16", {"variant": "mine"})
    with pytest.raises(FewbitsError, match="regime"):
        build_recipe("gptq", "W4A16", {"regime": "whatever"})


def test_options_reach_the_paper_and_are_recorded() -> None:
    recipe = build_recipe("smoothquant+gptq", "W4A8", {"alpha": "0.8", "gptq.percdamp": "0.1", "samples": "7"})
    steps = {type(step).__name__: step for step in recipe.steps}
    assert steps["Smooth"].alpha == 0.8 and steps["ColumnSolver"].damping == 0.1
    assert recipe.calibration.samples == 7
    assert recipe.to_dict()["options"]["gptq.percdamp"] == 0.1


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_plain_data_and_documented(name: str) -> None:
    import importlib
    import json

    recipe = build_recipe(name, "W4A8")
    data = json.loads(json.dumps(recipe.to_dict()))
    assert Scheme.from_dict(data["scheme"]) == recipe.scheme
    module = importlib.import_module(f"fewbits.papers.{name.replace('-', '_')}")
    assert module.__doc__ and (
        name not in implemented() or any(year in module.__doc__ for year in map(str, range(2017, 2027)))
    )
    assert len(Path(module.__file__).read_text().splitlines()) <= 150


# -- any paper on any model ------------------------------------------------------------------------------------------

FOREIGN = {
    "timm-vit": (
        "rtn gptq smoothquant adaround brecq repq-vit smoothquant+gptq repq-vit+brecq awq owq squeezellm aciq dfq "
        "qdrop ptq4vit"
    ),
    "timm-resnet": (
        "rtn gptq adaround brecq repq-vit awq owq squeezellm aciq dfq qdrop ptq4vit zeroq zeroq+gptq dfq+qdrop "
        "awq+gptq"
    ),
    "timm-swin": "repq-vit gptq brecq ptq4vit qdrop",
    "timm-mobilenetv2": "gptq brecq dfq aciq zeroq awq qdrop",
    "timm-densenet": "gptq brecq dfq",
    "hf-llama": (
        "rtn gptq smoothquant adaround brecq repq-vit smoothquant+gptq awq owq squeezellm aciq dfq qdrop ptq4vit "
        "awq+gptq"
    ),
    "hf-gpt2": "gptq smoothquant+gptq",
    "hf-falcon": "gptq smoothquant awq owq",
    "hf-bert": "gptq brecq smoothquant ptq4vit awq squeezellm",
    "hf-bart": "gptq",
    "hf-mixtral-eager": "gptq smoothquant awq squeezellm owq",
    "torchvision-shufflenet": "gptq dfq zeroq aciq",
    "torchvision-vit": "gptq smoothquant repq-vit",
    "torchvision-retinanet": "rtn",
    "diffusers-unet2d": "rtn gptq",
}  # fmt: skip


def _batches(args: tuple, kwargs: dict, count: int = 2) -> list:
    """Batches like the model's example, with other values where they are floating point or token-like."""
    generator = torch.Generator().manual_seed(3)

    def vary(t: Tensor, number: int) -> Tensor:
        if t.is_floating_point():
            return t + 0.3 * torch.randn(t.shape, generator=generator)
        return t.roll(number + 1, -1) if t.dim() > 1 else t

    return [map_tensors(lambda t, n=n: vary(t, n), (args, {**kwargs})) for n in range(count)]


@pytest.mark.parametrize(
    ("name", "recipe"), [(name, recipe) for name, recipes in FOREIGN.items() for recipe in recipes.split()]
)
def test_recipes_run_on_models_of_any_kind(name: str, recipe: str) -> None:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = _batches(args, kwargs)
    result = quantize(model, recipe, batches, bits="W4A8", options=_options(recipe), example=(args, kwargs))
    attachment = result.attachment
    weights = [site for site, _ in attachment.items() if site.role == "weight"]
    assert weights, "nothing was quantized"
    for site in weights:
        quantizer = attachment.quantizer(site.name)
        assert quantizer is not None
        codes = attachment.codes[site.name]
        assert int(codes.min()) >= quantizer.spec.format.code_min and int(codes.max()) <= quantizer.spec.format.code_max
    missing = set(before) - set(model.state_dict())
    assert not missing, f"state_dict lost {missing}"
    with torch.no_grad():
        output = model(*batches[0][0], **batches[0][1])
    leaves = [
        t
        for t in torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
        if isinstance(t, Tensor)
    ]
    assert all(bool(torch.isfinite(t).all()) for t in leaves if t.is_floating_point())


def test_expected_layers_are_quantized_and_no_others() -> None:
    result = quantize(encoder(), "gptq", tokens(4), bits="W4A8")
    sites = {site.name for site, _ in result.attachment.items()}
    expected = {
        f"blocks.{i}.{layer}.{role}"
        for i in range(3)
        for layer in ("q", "k", "v", "o", "up", "down")
        for role in ("weight", "input")
    }
    assert sites == expected, "embedding and head stay floating point"
    result = quantize(skipnet(), "brecq", images(4), bits="W4A4", options=_options("brecq"))
    bits = {site.name: q.spec.format.bits for site, q in result.attachment.items()}
    assert bits["stem.weight"] == 8 and bits["head.weight"] == 8 and bits["head.input"] == 8
    assert bits["down.0.conv1.weight"] == 4 and bits["down.0.relu_1.output"] == 4
    assert "stem.input" not in bits and "down.0.conv2.output" not in bits and "down.0.bn2.output" not in bits


# -- properties of the papers, on whole models -----------------------------------------------------------------------


def test_smoothing_keeps_the_float_function_and_balances_channels() -> None:
    model = encoder()
    model.blocks[0].norm1.weight.data[3] *= 40  # an outlier channel
    data = tokens(16)
    with torch.no_grad():
        before = torch.cat([model(t) for t in data])
    original = copy.deepcopy(model)
    result = quantize(model, "smoothquant", data, bits="W8A8")
    moved = original.blocks[0].norm1.weight / model.blocks[0].norm1.weight  # s, shared by q, k and v
    with result.attachment.disabled(), torch.no_grad():
        for site in list(result.attachment.frozen):  # weights back from their codes' floating-point source
            name = site.removesuffix(".weight")
            block, layer = name.split(".")[1], name.split(".")[2]
            norm = {"q": "norm1", "k": "norm1", "v": "norm1", "up": "norm2"}.get(layer)
            source = original.get_submodule(name).weight
            if norm is not None:
                s = (
                    original.get_submodule(f"blocks.{block}.{norm}").weight
                    / model.get_submodule(f"blocks.{block}.{norm}").weight
                )
                source = source * s
            model.get_submodule(name).weight.data.copy_(source)
        after = torch.cat([model(t) for t in data])
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        h = torch.cat([model.blocks[0].norm1(model.embed(t)) for t in data]).flatten(0, 1).abs().amax(0)
    columns = torch.stack([model.blocks[0].get_submodule(x).weight.abs().amax(0) for x in "qkv"]).amax(0)
    torch.testing.assert_close(h, columns, rtol=1e-3, atol=1e-4, msg="alpha=0.5: activation and weight maxima meet")
    assert float((moved[3] / moved.median()).detach()) > 3


def test_reparameterised_quantizers_are_scalars_and_the_float_function_stays() -> None:
    model = encoder()
    for block in model.blocks:
        block.norm1.weight.data *= torch.linspace(0.2, 4, 16)
        block.norm1.bias.data += torch.linspace(-2, 2, 16)
    data = tokens(8, batch=8)
    with torch.no_grad():
        before = model(data[0])
    result = quantize(model, "repq-vit", data, bits="W8A4")
    quantizer = result.attachment.quantizer("blocks.0.q.input")
    assert isinstance(quantizer.spec.granularity, PerTensor) and quantizer.params["scale"].shape == ()
    assert float(quantizer.params["zero_point"]) == round(float(quantizer.params["zero_point"]))
    assert isinstance(result.attachment.quantizer("blocks.0.matmul_1.lhs").spec.format, LogSqrt2)
    assert all(
        not isinstance(q.spec.granularity, PerChannel) for site, q in result.attachment.items() if site.role != "weight"
    )
    with result.attachment.without_activations(), torch.no_grad():
        after = model(data[0])  # 8-bit weights of the transformed model: close to the float one
    assert float((after - before).norm() / before.norm()) < 0.05


def test_gptq_on_white_inputs_is_nearest_and_beats_it_on_correlated_ones() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False))
    mixing = torch.randn(32, 32) * torch.linspace(0.05, 2, 32)
    for x, better in ((torch.linalg.qr(torch.randn(64, 32))[0] * 8, False), (torch.randn(256, 32) @ mixing, True)):
        errors = {}
        for recipe in ("rtn", "gptq"):
            model = copy.deepcopy(layer)
            quantize(model, recipe, [x], bits="W3A16", units=["0"])
            with torch.no_grad():
                errors[recipe] = float((model(x) - layer(x)).square().sum())
        if better:
            assert errors["gptq"] < 0.7 * errors["rtn"]
        else:
            assert errors["gptq"] == pytest.approx(errors["rtn"], rel=1e-3)


def test_brecq_lowers_the_block_error_that_nearest_leaves() -> None:
    data = images(32, batch=16)
    float_model = skipnet()
    errors = {}
    for recipe, options in (("brecq", {"iters_w": 1, "iters_a": 1}), ("brecq", {"iters_w": 400, "round_weight": 0.02})):
        model = skipnet()
        quantize(model, recipe, data, bits="W2A16", options=options)
        with torch.no_grad():
            errors[options["iters_w"]] = float(
                torch.stack([(model(x) - float_model(x)).square().mean() for x in data]).mean()
            )
    assert errors[400] < 0.8 * errors[1], "one step is nearest rounding"


@pytest.mark.parametrize("mode", ["fisher_diag", "fisher_full"])
def test_brecq_with_fisher_weights_runs(mode: str) -> None:
    result = quantize(skipnet(), "brecq", images(8), bits="W2A16", options={"iters_w": 3, "opt_mode": mode})
    assert len(result.attachment.codes) >= 9


@pytest.mark.parametrize(
    ("name", "ends", "inside"),
    [
        ("timm-resnet", ("act1.output", "layer4.0.act2.output", "fc.input"), ("layer1.0.act1.output",)),
        ("timm-vit", ("patch_embed.proj.output", "norm.output"), ("blocks.0.attn.qkv.input", "blocks.0.add.output")),
    ],
)
def test_brecq_keeps_what_the_last_layer_reads_at_eight_bits(
    name: str, ends: tuple[str, ...], inside: tuple[str, ...]
) -> None:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    sites = record(model, *args, **kwargs).sites
    scheme = build_recipe("brecq", "W3A3").scheme
    found = {name: spec.format.bits for name, site in sites.items() if (spec := scheme.spec(site)) is not None}
    assert {site: found[site] for site in ends} == dict.fromkeys(ends, 8)
    assert {site: found[site] for site in inside} == dict.fromkeys(inside, 3)


# -- claims, on really trained models --------------------------------------------------------------------------------


def _demo_loss(model, data, count: int = 24) -> float:
    with torch.no_grad():
        logits = model(data.inputs[:count])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.labels[:count].flatten()))


def test_gptq_repairs_what_rounding_breaks_on_the_demo_model() -> None:
    from fewbits import demo

    calibration, evaluation = (demo.data("text", split) for split in ("calibration", "evaluation"))
    losses = {"float": _demo_loss(demo.load("text")[0], evaluation)}
    for recipe in ("rtn", "gptq"):
        model = demo.load("text")[0]
        quantize(model, recipe, list(calibration.inputs[:32].split(8)), bits="W3A16")
        losses[recipe] = _demo_loss(model, evaluation)
    assert losses["rtn"] > losses["float"] + 0.3
    assert losses["gptq"] < losses["float"] + 0.6 * (losses["rtn"] - losses["float"])


needs_zoo = pytest.mark.skipif(
    not (os.environ.get("FEWBITS_ZOO") and os.environ.get("FEWBITS_DATA")),
    reason="FEWBITS_ZOO or FEWBITS_DATA is not set",
)


@needs_zoo
@pytest.mark.parametrize(
    ("name", "bits", "recipe", "options", "gain"),
    [
        ("swin_mini", "W4A4", "repq-vit", {}, 1.5),
        ("resnet10t_w32", "W3A16", "gptq", {}, 3.0),
        ("resnet10t_w32", "W2A16", "brecq", {"iters_w": 150, "samples": 128}, 10.0),
    ],
)
def test_claims_show_on_zoo_vision_models(name: str, bits: str, recipe: str, options: dict, gain: float) -> None:
    import fewbits

    zoo, data = folder("FEWBITS_ZOO"), folder("FEWBITS_DATA")
    scores = {}
    for which in ("rtn", recipe):
        loaded = fewbits.load_model(str(zoo / name))
        chosen = options if which == recipe else {}
        built = build_recipe(which, bits, chosen)
        calibration = fewbits.load_data(
            str(data / "cifar10/calibration.parquet"), loaded, samples=min(64, built.calibration.samples), batch_size=32
        )
        evaluation = fewbits.load_data(
            str(data / "cifar10/test.parquet"), loaded, samples=400, purpose="evaluation", batch_size=100
        )
        quantize(loaded.model, built, list(calibration.batches()))
        scores[which] = fewbits.evaluate(loaded, evaluation)["metrics"]["top1"]
    assert scores[recipe] >= scores["rtn"] + gain, scores


def test_a_dead_channel_does_not_disturb_the_others() -> None:
    data = tokens(8, batch=8)
    scales = []
    for dead in (False, True):
        model = encoder()
        if dead:
            model.blocks[0].norm1.weight.data[5] = 0
            model.blocks[0].norm1.bias.data[5] = 30.0
        result = quantize(model, "repq-vit", data, bits="W8A4")
        scales.append(float(result.attachment.quantizer("blocks.0.q.input").params["scale"]))
        with torch.no_grad():
            assert bool(torch.isfinite(model(data[0])).all())
    assert scales[1] == pytest.approx(scales[0], rel=0.2), "a constant channel takes no part in the mean scale"


def test_adaround_aims_at_the_float_models_outputs_in_every_layer_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer of a block has a quantized first layer before it; its target must not."""
    from fewbits.steps.reconstruct import layers as reconstruct

    real, fed = reconstruct.layer_with_activation, {}

    def recording(model, graph, site):
        layer = real(model, graph, site)

        def run(x: Tensor, weight: Tensor) -> Tensor:
            fed.setdefault(site.name, x.clone())  # the first call computes the target
            return layer(x, weight)

        return run

    monkeypatch.setattr(reconstruct, "layer_with_activation", recording)
    data, float_model = tokens(8, batch=8), encoder()
    quantize(encoder(), "adaround", data, bits="W2A16", options={"iterations": 2})
    seen = {}
    for name in ("blocks.0.o", "blocks.0.down", "blocks.2.down"):
        module = float_model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, args[0].clone()))
    with torch.no_grad():
        float_model(data[0])
    for name, expected in seen.items():
        torch.testing.assert_close(fed[f"{name}.weight"], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
