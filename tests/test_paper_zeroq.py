"""ZeroQ: images from batch norms, bits from sensitivities, and both as parts of other recipes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo_tiny
from engine_models import images, skipnet
from fewbits import quantize
from fewbits.allocation import Table, output_divergence, solve
from fewbits.datagen import InputMatching, StatisticsMatching, feature_statistics, stored_statistics
from fewbits.engine.context import ModelContext
from fewbits.engine.run import QuantizeResult, Run
from fewbits.errors import FewbitsError
from fewbits.graph import operands
from fewbits.papers import build_recipe
from fewbits.papers.zeroq import asymmetric
from fewbits.steps.allocate import MixedPrecision, sensitivities
from fewbits.steps.synthesize import MatchBatchNorms, batch_norm_statistics
from golden import folder

EXAMPLE = torch.zeros(1, 3, 8, 8)
FAST = {"iterations": 3, "images": 4}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The synthetic batches of the runs in a test."""
    seen: list[Tensor] = []
    real = Run.set_batches

    def spy(self: Run, batches: list) -> None:
        seen.extend(batches)
        real(self, batches)

    monkeypatch.setattr(Run, "set_batches", spy)
    return seen


def run_of(model: nn.Module, recipe: str = "zeroq", bits: str = "W4A8", batches: tuple = (), **options: object) -> Run:
    built = build_recipe(recipe, bits, options)
    return Run(model, built, list(batches), EXAMPLE, 0, torch.device("cpu"), None, False, None, None, None, None)


def widths(result: QuantizeResult) -> dict[str, int]:
    return {site.name: q.spec.format.bits for site, q in result.attachment.items() if site.role == "weight"}


# -- data ------------------------------------------------------------------------------------------------------------


class Backwards(nn.Module):
    """Norms registered in another order than they run in, one used twice, one without space, one per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(6)
        self.squeezed = nn.BatchNorm2d(6)
        self.twice = nn.BatchNorm2d(6)
        self.first = nn.BatchNorm2d(6)
        self.conv3, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.head, self.linear = nn.Linear(6, 4), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.conv1(x)), inplace=True)
        x = F.relu(self.twice(self.conv2(x)), inplace=True)
        x = F.relu(self.twice(self.conv3(x)), inplace=True)
        x = F.relu(self.squeezed(F.adaptive_avg_pool2d(x, 1)))
        return self.head(F.relu(self.last(self.linear(x.flatten(1)))))


def backwards() -> nn.Module:
    """A model whose norms saw data: smooth images, mean 0 and standard deviation 1."""
    torch.manual_seed(0)
    model = Backwards().train()
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None  # averages over everything seen
    blurred = F.avg_pool2d(torch.randn(256, 2, 8, 8), 3, 1)
    with torch.no_grad():
        model((blurred - blurred.mean()) / blurred.std())
    return model.eval()


def test_statistics_are_those_of_each_norms_own_input_whatever_the_order() -> None:
    model = backwards()
    run = Run(
        model, build_recipe("zeroq", "W8A8"), [], torch.zeros(2, 2, 6, 6), 0, torch.device("cpu"), None, False, None,
        None, None, None,
    )  # fmt: skip
    targets = batch_norm_statistics(ModelContext(run))
    assert set(targets) == {f"{name}.input" for name in ("first", "twice", "squeezed", "last")}
    for name, (mean, std) in targets.items():
        norm = model.get_submodule(name.removesuffix(".input"))
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(std, (norm.running_var + 1e-6).sqrt())


def test_images_come_to_match_every_norm_and_noise_does_not(made: list[Tensor]) -> None:
    model = backwards()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = quantize(
        model, "zeroq", bits="W32A8", example=torch.zeros(2, 2, 6, 6), options={"iterations": 100, "images": 4}
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "bitwise unchanged"
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    result.attachment.detach()
    assert made[0].shape == (4, 2, 6, 6)

    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)}
    seen: dict[str, list[Tensor]] = {}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0].clone()))
    objectives = [
        StatisticsMatching({n: stored_statistics(norm.running_mean, norm.running_var) for n, norm in norms.items()}),
        InputMatching(),
    ]

    def loss(x: Tensor) -> float:
        seen.clear()
        with torch.no_grad():
            model(x)
        assert len(seen["twice"]) == 2
        return float(sum(objective(0, x, seen) for objective in objectives))

    noise, start = torch.randn(4, 2, 6, 6), torch.zeros(4, 2, 6, 6)
    assert loss(made[0]) < 0.2 * loss(noise) and loss(made[0]) < 0.2 * loss(start)
    (note,) = [note for note in result.notes if "matching loss" in note]
    first, last = float(note.split()[4]), float(note.split()[-4])
    assert first > 10 * last and loss(made[0]) == pytest.approx(last, rel=0.2), note


def test_every_image_matches_by_itself_unless_the_batch_may(made: list[Tensor]) -> None:
    for match in ("sample", "batch"):
        options = {"iterations": 60, "images": 4, "match": match}
        quantize(skipnet(), "zeroq", bits="W8A8", example=EXAMPLE, options=options)
    gap = [(feature_statistics(batch)[0].square().mean(), feature_statistics(batch, "batch")[0].square().mean())
           for batch in made]  # fmt: skip
    assert gap[1][1] < 0.02, "the batch has mean zero"
    assert gap[0][0] < gap[1][0], "and only sample matching asks it of every image"


def test_same_seed_same_images_in_batches_of_the_recipes_size(made: list[Tensor]) -> None:
    options = {"iterations": 3, "images": 40}
    for seed in (0, 0, 1):
        quantize(skipnet(), "zeroq", bits="W8A8", example=EXAMPLE, options=options, seed=seed)
    assert [len(batch) for batch in made] == [32, 8] * 3
    assert made[0].equal(made[2]) and made[1].equal(made[3]) and not made[0].equal(made[4])
    assert not made[0][:8].equal(made[1]), "the second lot starts elsewhere"


@pytest.mark.parametrize("name", ["timm-resnet", "timm-mobilenetv2", "timm-densenet", "torchvision-shufflenet"])
def test_recorded_models_give_their_norms_and_are_quantized_without_data(name: str, made: list[Tensor]) -> None:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    run = Run(
        model, build_recipe("zeroq", "W8A8"), [], (args, kwargs), 0, torch.device("cpu"), None, False, None, None, None,
        None,
    )  # fmt: skip
    count = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert len(batch_norm_statistics(ModelContext(run))) == count
    run.attachment.detach()
    result = quantize(model, "zeroq", bits="W4A8", example=(args, kwargs), options=FAST)
    assert next(torch.utils._pytree.tree_leaves(made[0])[i] for i in (0,)).shape[1:] == args[0].shape[1:]
    sites = {site.name: site for site, _ in result.attachment.items()}
    acts = [site for site in sites.values() if site.role != "weight"]
    relus = sum(call.op in ("relu", "relu6", "hardtanh") for call in result.graph.calls)
    assert acts and len(acts) == relus and all(site.op in ("relu", "relu6", "hardtanh") for site in acts)
    assert any("first_layer" in site.tags for site in sites.values() if site.role == "weight")
    assert any("last_layer" in site.tags for site in sites.values() if site.role == "weight")


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin"])
def test_models_without_batch_norm_are_refused_unless_data_is_given(name: str) -> None:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    with pytest.raises(FewbitsError, match=r"zeroq: this model has no batch norm.*--calib"):
        quantize(model, "zeroq", bits="W8A8", example=(args, kwargs))
    result = quantize(model, "zeroq", [(args, kwargs)], bits="W8A8", options={"placement": "inputs"})
    assert "calibration data was given: no images were synthesized" in result.notes
    assert any(site.role == "weight" for site, _ in result.attachment.items())


def test_folded_norms_and_other_inputs_are_refused_clearly() -> None:
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with pytest.raises(FewbitsError, match="folded ones have lost them"):
        quantize(nn.Sequential(folded(model[0], model[1]), nn.ReLU()), "zeroq", bits="W8A8", example=EXAMPLE)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)) + shift)

    with pytest.raises(FewbitsError, match=r"only input tensor.*\(1, 3, 8, 8\)"):
        quantize(Two().eval(), "zeroq", bits="W8A8", example=(EXAMPLE, torch.ones(1)))
    with pytest.raises(FewbitsError, match="images=0"):
        build_recipe("zeroq", "W8A8", {"images": "0"})


def test_norms_that_remember_nothing_are_noted() -> None:
    model = skipnet()
    model.down[0].bn1 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    result = quantize(model, "zeroq", bits="W8A8", example=EXAMPLE, options=FAST)
    assert "down.0.bn1: this batch norm remembers no statistics and is not matched" in result.notes


def test_no_images_are_made_where_nothing_reads_them(made: list[Tensor]) -> None:
    result = quantize(skipnet(), "zeroq", bits="W4A16", example=EXAMPLE)
    assert not made and widths(result) and not result.notes


# -- quantizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grid_is_within_a_step_and_independent_per_channel(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator) * torch.logspace(-3, 3, 6).unsqueeze(1)
    fmt = asymmetric(bits)
    params = {name: value.unsqueeze(1) for name, value in fmt.from_range(rows.amin(1), rows.amax(1)).items()}
    out = fmt.quantize(rows, params)
    # half a step of rounding, and at the ends half a step more of the rounded zero point
    assert bool(((out - rows).abs() <= params["scale"] * (1 + 1e-5)).all())
    other = rows.clone()
    other[0] *= 50
    moved = {name: value.unsqueeze(1) for name, value in fmt.from_range(other.amin(1), other.amax(1)).items()}
    torch.testing.assert_close(fmt.quantize(other, moved)[1:], out[1:], rtol=0, atol=0)
    for constant in (0.0, 3.0, -0.25):
        value = torch.full((5,), constant)
        kept = fmt.quantize(value, fmt.from_range(value.min(), value.max()))
        torch.testing.assert_close(kept, value, rtol=1e-5, atol=1e-6)


def test_activation_placement_and_percentile() -> None:
    sites = {}
    for placement in ("relu", "activations", "inputs"):
        result = quantize(skipnet(), "zeroq", bits="W8A8", example=EXAMPLE, options={**FAST, "placement": placement})
        sites[placement] = {site.name for site, _ in result.attachment.items() if site.role != "weight"}
    assert sites["relu"] == sites["activations"] and all(name.endswith("output") for name in sites["relu"])
    assert "stem.input" in sites["inputs"] and "head.input" in sites["inputs"]
    tops = []
    for percentile in (None, 0.9):
        result = quantize(skipnet(), "zeroq", images(8), bits="W8A6", options={**FAST, "percentile": percentile})
        quantizer = result.attachment.quantizer("down.0.relu.output")
        assert quantizer is not None
        fmt = quantizer.spec.format
        tops.append(float((fmt.code_max - quantizer.params["zero_point"]) * quantizer.params["scale"]))
    assert tops[1] < 0.8 * tops[0]


def test_a_model_without_relu_is_told_that_its_activations_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3)).eval()
    result = quantize(model, "zeroq", bits="W8A8", example=EXAMPLE, options=FAST)
    assert any("activation" in note and "floating point" in note for note in result.notes)
    result.attachment.detach()
    result = quantize(model, "zeroq", bits="W8A8", example=EXAMPLE, options={**FAST, "placement": "activations"})
    assert "2.output" in {site.name for site, _ in result.attachment.items()}


# -- bits ------------------------------------------------------------------------------------------------------------


def test_sensitivity_is_the_divergence_with_one_layer_quantized() -> None:
    data = images(8)
    run = run_of(skipnet(), batches=tuple(data), average_bits=4)
    context = ModelContext(run)
    sites = context.weights()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with torch.no_grad():
        found = sensitivities(context, sites, (2, 4, 8, 16))
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert found.shape == (len(sites), 4) and bool((found >= 0).all())
    mean = found.mean(0)
    assert mean[0] > mean[1] > mean[2] > mean[3] and float(found[:, 3].max()) < 1e-8
    plain = skipnet()
    for row, site in ((0, sites[0]), (3, sites[3])):  # by hand: the weight replaced, the model run
        changed = skipnet()
        spec = context.spec(site)
        assert spec is not None
        weight = operands.read(changed, site).flatten(1)
        spec = spec.at_bits(2)
        params = spec.range.fit(weight, spec.format, spec.granularity)
        quantized = spec.format.quantize(weight, params)
        operands.write(changed, site, quantized.view(operands.operand(changed, site).shape))
        with torch.no_grad():
            by_hand = torch.cat([output_divergence(plain(x), changed(x)) for x in data]).mean()
        assert float(found[row, 0]) == pytest.approx(float(by_hand), rel=1e-4)
    run.attachment.detach()


@pytest.mark.parametrize("solver", ["pareto", "ilp"])
def test_chosen_bits_are_the_best_within_the_budget(solver: str) -> None:
    data = images(8)
    options = {**FAST, "average_bits": 3.5, "solver": solver}
    result = quantize(skipnet(), "zeroq", data, bits="W4A8", options=options)
    chosen = widths(result)
    sites = [site for site, _ in result.attachment.items() if site.role == "weight"]
    sizes = torch.tensor([math.prod(site.shape) for site in sites])
    average = sum(int(n) * chosen[s.name] for n, s in zip(sizes, sites, strict=True)) / int(sizes.sum())
    assert average <= 3.5 and len(set(chosen.values())) > 1

    run = run_of(skipnet(), batches=tuple(data), average_bits=4)
    context = ModelContext(run)
    with torch.no_grad():
        loss = sensitivities(context, context.weights(), (2, 4, 8))
    run.attachment.detach()
    names = [site.name for site in sites]
    table = Table(tuple(names), (2, 4, 8), loss, sizes.unsqueeze(1) * torch.tensor([2, 4, 8]))
    best = solve(table, int(3.5 * int(sizes.sum())), "enumerate")
    picked = [(2, 4, 8).index(chosen[name]) for name in names]
    assert float(loss[range(len(names)), picked].sum()) == pytest.approx(best.loss, rel=1e-6)
    assert {name: spec["format"]["bits"] for name, spec in result.overrides.items() if spec} == {
        name: bits for name, bits in chosen.items() if bits != 4
    }


def test_target_size_first_and_last_bits_and_impossible_budgets() -> None:
    weights = sum(p.numel() for name, p in skipnet().named_parameters() if p.dim() > 1)
    options = {**FAST, "target_size": 3 * weights / 8 / 2**20}
    result = quantize(skipnet(), "zeroq", images(4), bits="W4A8", options={**options, "first_last_bits": 8})
    chosen = widths(result)
    assert chosen["stem.weight"] == 8 and chosen["head.weight"] == 8, "widths that someone fixed stay"
    bits = sum(chosen[name] * math.prod(result.graph.sites[name].shape) for name in chosen)
    assert bits <= 3 * weights, "and count in the budget"
    result = quantize(skipnet(), "zeroq", images(4), bits="W4A8", options={**FAST, "average_bits": 1.5})
    assert set(widths(result).values()) == {2}
    assert any("below the smallest choice" in note for note in result.notes)
    for wrong, message in (
        ({"average_bits": 4, "target_size": 1}, "one of average_bits and target_size"),
        ({"average_bits": 4, "candidates": "2;4"}, "candidates='2;4'"),
        ({"average_bits": 4, "candidates": "2,9"}, "1 to 8"),
        ({"average_bits": -1}, "above zero"),
        ({"average_bits": 4, "solver": "guess"}, "solver"),
    ):
        with pytest.raises(FewbitsError, match=message):
            build_recipe("zeroq", "W4A8", wrong)


# -- with others, on disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("zeroq+rtn", {}),
        ("zeroq+gptq", {}),
        ("gptq+zeroq", {}),
        ("zeroq+adaround", {"adaround.iterations": 2}),
        ("zeroq+brecq", {"iters_w": 2, "iters_a": 2}),
        ("zeroq+smoothquant+gptq", {}),
    ],
)
def test_any_recipe_runs_on_synthetic_data(recipe: str, options: dict, made: list[Tensor]) -> None:
    other = recipe.replace("zeroq+", "").replace("+zeroq", "")
    options = {**options, "zeroq.iterations": 3, "zeroq.images": 4}
    joined, alone = build_recipe(recipe, "W4A8", options), build_recipe(other, "W4A8", {})
    assert not joined.needs_data and alone.needs_data
    assert joined.scheme == alone.scheme and joined.calibration == alone.calibration
    steps = [type(step).__name__ for step in joined.steps]
    assert steps.count("MatchBatchNorms") == 1
    assert sorted(steps) == sorted([*(type(step).__name__ for step in alone.steps), "MatchBatchNorms"])
    result = quantize(skipnet(), joined, example=EXAMPLE)
    assert sum(map(len, made)) == 4
    model = skipnet()
    same = quantize(model, build_recipe(other, "W4A8", {k: v for k, v in options.items() if "zeroq" not in k}), made)
    mine, theirs = result.model.state_dict(), same.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine), "as if the images had been given"


def test_bits_are_allocated_for_any_recipe(made: list[Tensor]) -> None:
    options = {"zeroq.iterations": 3, "zeroq.images": 4, "average_bits": 3, "brecq.iters_w": 2, "brecq.iters_a": 2}
    for recipe in ("zeroq+gptq", "zeroq+brecq"):
        built = build_recipe(
            recipe, "W4A8", options if "brecq" in recipe else {k: options[k] for k in list(options)[:3]}
        )
        result = quantize(skipnet(), built, example=EXAMPLE)
        chosen = widths(result)
        assert len(set(chosen.values())) > 1
        total = sum(math.prod(result.graph.sites[name].shape) for name in chosen)
        assert sum(chosen[n] * math.prod(result.graph.sites[n].shape) for n in chosen) <= 3 * total
        for name, bits in chosen.items():
            codes = result.attachment.codes[name].int()
            assert int(codes.max()) - int(codes.min()) < 2**bits
    with pytest.raises(FewbitsError, match="both bring their own calibration data"):
        build_recipe("zeroq+zeroq", "W4A8")


def test_a_resumed_run_reads_images_and_sensitivities_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[Tensor]
) -> None:
    options = {**FAST, "average_bits": 3}

    def run(resume: bool) -> QuantizeResult:
        return quantize(
            skipnet(), "zeroq", bits="W4A8", example=EXAMPLE, options=options, work_dir=tmp_path / "work", resume=resume
        )

    first = run(False)
    for file in (tmp_path / "work").glob("sweep*"):
        file.unlink()

    def never(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr(MatchBatchNorms, "_make", never)
    monkeypatch.setattr("fewbits.steps.allocate.sensitivities", never)
    second = run(True)
    assert made[0].equal(made[1]) and widths(first) == widths(second) and first.notes == second.notes
    assert first.calibration_fingerprint == second.calibration_fingerprint
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_steps_are_plain_data_and_checked() -> None:
    step = MixedPrecision(average_bits=4.0)
    assert step.to_dict()["candidates"] == [2, 4, 8] and step.to_dict()["step"] == "MixedPrecision"
    with pytest.raises(FewbitsError, match="whose bits could be chosen"):
        quantize(skipnet(), "zeroq", images(4), bits="W16A8", options={"average_bits": 4})


def test_a_mixed_checkpoint_made_without_data_loads_to_the_same_bits(tmp_path: Path) -> None:
    """Through the command line's own way, from a folder with a timm model."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    import fewbits

    model, _, _ = zoo_tiny.MODELS["timm-resnet"]()
    assert timm
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    config = {
        "architecture": "resnet18",
        "num_classes": 10,
        "model_args": {"layers": [2, 1, 1, 1], "channels": [8, 12, 16, 24], "stem_width": 8},
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    options = {**FAST, "average_bits": "3"}
    report = fewbits.quantize_reference(folder, "zeroq", "W4A8", out=tmp_path / "out", options=options)
    assert report["calibration"] is None and any("matching loss" in note for note in report["notes"])
    loaded = fewbits.load(tmp_path / "out")
    again = fewbits.load_model(str(folder))
    result = quantize(again.model, "zeroq", bits="W4A8", example=again.example_batch(1), options=options)
    assert len(set(widths(result).values())) > 1
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(loaded.model(x), result.model(x))


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("FEWBITS_ZOO") and os.environ.get("FEWBITS_DATA")),
    reason="FEWBITS_ZOO or FEWBITS_DATA is not set",
)
def test_mixed_precision_claim_shows_on_a_trained_mobilenet() -> None:
    """As many bits on average, chosen without any data: many points above four bits everywhere."""
    import fewbits

    zoo, data = folder("FEWBITS_ZOO"), folder("FEWBITS_DATA")
    assert zoo is not None and data is not None
    scores = []
    for options in ({}, {"average_bits": 4}):
        loaded = fewbits.load_model(str(zoo / "mobilenetv2_050"))
        evaluation = fewbits.load_data(
            str(data / "cifar10/test.parquet"), loaded, samples=300, purpose="evaluation", batch_size=100
        )
        quantize(
            loaded.model, "zeroq", bits="W4A8", example=loaded.example_batch(1), options={**options, "iterations": 40}
        )
        scores.append(fewbits.evaluate(loaded, evaluation)["metrics"]["top1"])
    assert scores[1] > scores[0] + 5, scores
