"""DFQ: equalization, absorption, statistics without data, bias correction: what the paper promises."""

from __future__ import annotations

import copy
import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import fewbits
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.attach import attachment_of
from fewbits.correction import clipped_normal, mean_output
from fewbits.engine.context import ModelContext
from fewbits.engine.run import Run
from fewbits.errors import FewbitsError
from fewbits.formats import affine
from fewbits.graph.relations import would_be_relations
from fewbits.graph.weights import scale
from fewbits.papers import build_recipe
from fewbits.recipe import Recipe
from fewbits.steps.equalize import links
from fewbits.transforms.absorb import absorbable
from fewbits.transforms.equalize import column_ranges, pair_scales, row_ranges, triple_scales

NAIVE = {"equalize": False, "absorb": False, "correction": "none"}


class MobileNet(nn.Module):
    """A stem and an inverted residual block as MobileNets have it, twice, then a classifier."""

    def __init__(self, act: type[nn.Module] = nn.ReLU, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, width, 1, bias=False), nn.BatchNorm2d(width), act(),
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), act(),
                nn.Conv2d(width, 8, 1, bias=False), nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def data(count: int = 64, size: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return list(torch.randn(count, 3, size, size, generator=generator).split(32))


def mobile(seed: int = 0, act: type[nn.Module] = nn.ReLU, spread: float = 0.0) -> MobileNet:
    """Seeded, norms' statistics measured. `spread`: how many powers of ten channels between layers differ in size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MobileNet(act)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0.2, 0.5)
                module.momentum = None
        model.train()
        with torch.no_grad():
            for x in data():
                model(x)
        model.eval()
        if spread:
            for block in model.blocks:
                for norm, reader, dim in ((block[1], block[3], 0), (block[4], block[6], 1)):
                    s = 10 ** torch.empty(len(norm.weight)).uniform_(-spread, spread)
                    norm.weight.data *= s
                    norm.bias.data *= s
                    reader.weight.data /= s.view(-1, 1, 1, 1) if dim == 0 else s.view(1, -1, 1, 1)
        return model


def transformed(model: nn.Module, options: dict | None = None, recipe: Recipe | None = None) -> ModelContext:
    """The model with the recipe's transforms applied and nothing quantized; its context."""
    built = recipe or build_recipe("dfq", "W8A8", options or {})
    run = Run(model, built, [], data()[0][:1], 0, torch.device("cpu"), None, False, None, None, None, None)
    context = ModelContext(run)
    with torch.no_grad():
        for step in built.model_steps():
            if step.part == "transform":
                step.apply(context)
    return context


def outputs(model: nn.Module, batches: list[Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in batches or data()])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- equalization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU, nn.LeakyReLU, nn.Identity])
def test_equalization_keeps_the_float_function_and_makes_ranges_equal(act: type[nn.Module]) -> None:
    model = mobile(act=act, spread=1.5)
    before = outputs(model)
    context = transformed(model, {"absorb": False})
    assert distance(outputs(model), before) < 1e-5
    for block in model.blocks:
        first, middle, last = (row_ranges(block[i].weight) for i in (0, 3, 6))
        last = column_ranges(block[6].weight)
        torch.testing.assert_close(first, middle, rtol=2e-3, atol=0)
        torch.testing.assert_close(last, middle, rtol=2e-3, atol=0)
    found = links(context.graph, context.graph.relations)
    assert {(link.first.name, link.second.name) for link in found} == {
        (f"blocks.{n}.{a}.weight", f"blocks.{n}.{b}.weight") for n in range(2) for a, b in ((0, 3), (3, 6))
    }, "pairs within blocks; residual sums join what several layers make and read"


def test_one_triple_is_solved_by_one_pass_and_a_second_changes_nothing() -> None:
    once, converged = mobile(spread=1.0), mobile(spread=1.0)
    transformed(once, {"passes": 1, "absorb": False})
    transformed(converged, {"absorb": False})
    for a, b in zip(once.parameters(), converged.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert build_recipe("dfq", "W8A8", {"variant": "released"}).steps[2].passes == 1
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Conv2d(6, 6, 3, bias=True), nn.ReLU())])
    model[2].weight.data[3] *= 50
    before = outputs(model, [torch.randn(2, 6, 12, 12)])
    transformed_chain(model)
    weights = [model[i].weight.detach().clone() for i in (0, 2, 4, 6)]
    for one, two in pairwise(weights):
        torch.testing.assert_close(row_ranges(one), column_ranges(two), rtol=5e-3, atol=0)
    transformed_chain(model)
    for i, weight in zip((0, 2, 4, 6), weights, strict=True):
        torch.testing.assert_close(model[i].weight, weight, rtol=5e-3, atol=1e-6)
    assert before.isfinite().all()


def transformed_chain(model: nn.Sequential) -> None:
    x = torch.randn(4, 6, 12, 12, generator=torch.Generator().manual_seed(0))
    before = outputs(model, [x])
    built = build_recipe("dfq", "W8A8")
    run = Run(model, built, [], x[:1], 0, torch.device("cpu"), None, False, None, None, None, None)
    for step in built.model_steps():
        if step.part == "transform":
            step.apply(ModelContext(run))
    run.attachment.detach()
    assert distance(outputs(model, [x]), before) < 1e-5


def test_equalized_weights_do_not_depend_on_how_channels_were_scaled_before() -> None:
    plain, broken = mobile(), mobile()
    for block in broken.blocks:
        s = torch.logspace(-2, 2, 12)
        block[1].weight.data *= s
        block[1].bias.data *= s
        block[3].weight.data /= s.view(-1, 1, 1, 1)
    for model in (plain, broken):
        transformed(model, {"absorb": False})
    for a, b in zip(plain.parameters(), broken.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_dead_channels_are_left_alone() -> None:
    first, second = torch.tensor([0.0, 2.0, 8.0, 1e-30]), torch.tensor([3.0, 0.0, 2.0, 1e-30])
    assert pair_scales(first, second).tolist() == [1.0, 1.0, 2.0, 1.0]
    s12, s23 = triple_scales(first, torch.ones(4), second)
    assert s12[:2].tolist() == s23[:2].tolist() == [1.0, 1.0] and bool((s12 > 0).all())
    model = mobile()
    model.blocks[0][0].weight.data[2] = 0
    model.blocks[1][6].weight.data[:, 5] = 0
    before = outputs(model)
    transformed(model)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert distance(outputs(model), before) < 2e-2  # of the absorption's borders


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid])
def test_other_activations_are_never_equalized_across(act: type[nn.Module]) -> None:
    model = mobile(act=act, spread=1.0)
    before, weights = outputs(model), copy.deepcopy(model.blocks[0][3].weight)
    context = transformed(model)
    assert not links(context.graph, context.graph.relations)
    assert any("can be equalized" in note for note in context.run.notes)
    folded = mobile(act=act, spread=1.0)
    transformed(folded, {"equalize": False, "absorb": False})
    assert torch.equal(model.blocks[0][3].weight, folded.blocks[0][3].weight)
    assert distance(outputs(model), before) < 1e-5 and weights.shape == model.blocks[0][3].weight.shape


def test_relu6_blocks_equalization_until_it_is_replaced() -> None:
    model = mobile(act=nn.ReLU6, spread=1.0)
    before = outputs(model)
    context = transformed(model, {"equalize": False, "absorb": False})
    relations = would_be_relations(context.graph)
    assert not links(context.graph, context.graph.relations) and len(links(context.graph, relations)) == 4
    with pytest.raises(FewbitsError, match="replaced"):
        scale(model, relations[0], torch.full((relations[0].size,), 2.0))
    context.attachment.detach()
    context = transformed(model, {"absorb": False})
    assert len(links(context.graph, context.graph.relations)) == 4
    assert any("run as ReLU" in note for note in context.run.notes)
    unclipped = mobile(act=nn.ReLU6, spread=1.0)
    for block in unclipped.blocks:
        block[2] = block[5] = nn.ReLU()
    assert distance(outputs(model), outputs(unclipped)) < 1e-5, (
        "ReLU stands where two layers are equalized, not behind the stem"
    )
    assert distance(before, outputs(unclipped)) > 1e-3, "which the clipped one's was not"


def test_residual_streams_and_shared_layers_are_not_touched() -> None:
    model = skipnet()
    before = outputs(model, images(4))
    run = Run(model, build_recipe("dfq", "W8A8"), [], images(1)[0], 0, torch.device("cpu"), *[None] * 6)
    found = links(run.graph, run.graph.relations)
    assert {(link.first.name, link.second.name) for link in found} == {
        (f"{side}.{n}.conv1.weight", f"{side}.{n}.conv2.weight") for side in ("down", "up") for n in range(2)
    }
    shared = model.shared.weight.detach().clone()
    with torch.no_grad():
        for step in run.recipe.model_steps():
            if step.part == "transform":
                step.apply(ModelContext(run))
    assert distance(outputs(model, images(4)), before) < 1e-2 and torch.equal(model.shared.weight, shared)


# -- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)])
def test_moments_of_clipped_normals_match_samples_and_limits(ends: tuple[float, float]) -> None:
    mean, std = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0, 5.0]), torch.tensor([0.5, 2.0, 1.0, -0.3, 1.0, 0.0])
    z = torch.randn(400_000, 6, generator=torch.Generator().manual_seed(0)).double() * std + mean
    found = clipped_normal(mean, std, *ends)
    for value, sampled in zip(found, (z.clamp(*ends).mean(0), z.clamp(*ends).var(0)), strict=True):
        torch.testing.assert_close(value, sampled, rtol=1e-2, atol=1e-2)
    high, _ = clipped_normal(torch.tensor([1e3, -1e3]), torch.tensor([1.0, 1.0]), 0.0)
    assert high.tolist() == [1e3, 0.0]


def test_propagated_moments_are_those_of_the_data() -> None:
    """Sums, pooling, swish and hard-swish, squeeze and excitation, concatenation, layers without a norm."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
            self.gate, self.last = nn.Conv2d(6, 6, 1), nn.Linear(12, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a, b = F.hardswish(self.a(x)), F.relu6(self.b(y))
            s = a + b - 0.5
            gated = s * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(b, 1)))
            joined = torch.cat([gated, F.silu(self.b(y))], 1)
            return self.last(joined.mean((2, 3)))

    torch.manual_seed(0)
    model = Net().eval()
    for norm in (model.a, model.b):
        norm.weight.data.uniform_(-2, 2)
        norm.bias.data.normal_(0, 1)
    x, y = torch.randn(2, 4000, 6, 4, 4)
    built = build_recipe("dfq", "W8A8", {"equalize": False})
    run = Run(model, built, [], (x[:1], y[:1]), 0, torch.device("cpu"), *[None] * 6)
    context = ModelContext(run)
    for step in built.model_steps():
        if step.part == "transform":
            step.apply(context)
    sites = {name: [] for name in ("mul.lhs", "gate.input", "mul.output", "cat.output", "last.input")}
    with run.attachment.observing({name: [seen.append] for name, seen in sites.items()}), torch.no_grad():
        model(x, y)
    for name, (seen,) in sites.items():
        found = run.moments[run.graph.sites[name].value if name.endswith(("input", "lhs")) else _made(run, name)]
        channels = seen.transpose(0, 1).flatten(1)
        predicted = found.mean.expand(seen[:1].shape).transpose(0, 1).flatten(1).mean(1)
        torch.testing.assert_close(channels.mean(1).double(), predicted, rtol=0.05, atol=0.03, msg=name)
        low, high = channels.amin(1).min(), channels.amax(1).max()
        assert float(found.low.min()) <= low * 0.9 + 1e-6 and float(found.high.max()) >= high * 0.9, name
    assert run.moments[run.graph.sites["last.input"].value].guesses == 1, "the gate"


def _made(run: Run, name: str) -> int:
    return run.graph.calls[run.graph.sites[name].call].outputs[0]


def test_statistics_follow_equalization_and_absorption() -> None:
    """Forgetting to scale or shift the remembered statistics would show here."""
    model = mobile(spread=1.0)
    context = transformed(model)
    for block in range(2):
        for layer in (1, 4):
            name = f"blocks.{block}.{layer}.output"
            seen: list[Tensor] = []
            with context.attachment.observing({name: [seen.append]}):
                outputs(model)
            values = torch.cat(seen)[:, :, 2:-2, 2:-2].transpose(0, 1).flatten(1)
            beta, gamma = context.run.norms[_made(context.run, name)]
            scale_ = values.std(1)
            assert float(((values.mean(1) - beta) / scale_).abs().max()) < 0.25
            torch.testing.assert_close(scale_.double(), gamma, rtol=0.25, atol=0)


def test_activation_ranges_are_six_deviations_clipped_by_relu_and_summed_over_branches() -> None:
    model = mobile()
    result = quantize(model, "dfq", example=data()[0][:1], bits="W8A8", options=NAIVE, input_range=(-4.0, 4.0))
    norm = mobile().blocks[0][1]
    quantizer = result.attachment.quantizer("blocks.0.3.input")
    top = float((norm.bias + 6 * norm.weight).detach().max())
    assert float(quantizer.params["zero_point"]) == 0
    assert float(quantizer.params["scale"]) * 255 == pytest.approx(top, rel=1e-5)
    # the second block reads relu(stem) + projection: independent normals
    fresh = mobile()
    stem, projection = fresh.stem[1], fresh.blocks[0][7]
    mean, _ = clipped_normal(stem.bias.data, stem.weight.data, 0.0)
    low = mean + projection.bias - torch.hypot(mean, 6 * projection.weight.double())
    high = mean + projection.bias + torch.hypot(stem.bias + 6 * stem.weight - mean, 6 * projection.weight.double())
    held = result.attachment.quantizer("blocks.1.0.input").params
    span = float((high.max() - low.min()).detach())
    assert float(held["scale"]) * 255 == pytest.approx(span, rel=1e-4)
    assert float(result.attachment.quantizer("stem.0.input").params["scale"]) * 255 == pytest.approx(8.0)


# -- absorption ------------------------------------------------------------------------------------------------------


def test_absorption_is_exact_above_c_and_rarely_wrong_below() -> None:
    beta, gamma = torch.tensor([5.0, 1.0, -2.0, 3.1]), torch.tensor([1.0, -1.0, 0.5, -1.0])
    c = absorbable(beta, gamma, clipped=True)
    torch.testing.assert_close(c, torch.tensor([2.0, 0.0, 0.0, 0.1]))
    assert torch.equal(absorbable(beta, gamma, clipped=False), beta)
    z = torch.randn(500_000, generator=torch.Generator().manual_seed(1)) + 5
    wrong = (F.relu(z - 2) != F.relu(z) - 2).double()
    assert float(((F.relu(z - 2) - (F.relu(z) - 2)).abs() > 1e-6).double().mean()) == pytest.approx(0.00135, rel=0.15)
    assert bool((z[wrong.bool() & ((F.relu(z - 2) - (F.relu(z) - 2)).abs() > 1e-6)] < 2).all())


@pytest.mark.parametrize("act", [nn.ReLU, nn.Identity])
def test_absorbed_biases_leave_the_function_and_shrink_the_ranges(act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
    ).eval()
    model[1].bias.data = torch.tensor([9.0, 8.0, 0.0, -1.0, 12.0, 1.0, 0.5, 0.0])
    model.train()
    model[1].momentum = model[4].momentum = None
    outputs(model)
    model.eval()
    before = outputs(model)
    context = transformed(model, {"equalize": False})
    assert distance(outputs(model), before) < (2e-2 if act is nn.ReLU else 1e-5)  # 0.135 % of the values were below c
    beta, _ = context.run.norms[_made(context.run, "1.output")]
    if act is nn.ReLU:
        torch.testing.assert_close(beta[[0, 2, 4]], torch.tensor([3.0, 0.0, 3.0], dtype=torch.float64))
    else:
        assert float(beta.abs().max()) == 0
    assert model[3].bias is not None, "the next convolution got a bias to take the shift"


def test_a_gate_between_two_layers_lets_no_bias_through() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.g, self.b = (
                nn.Conv2d(3, 6, 1),
                nn.BatchNorm2d(6),
                nn.Conv2d(3, 6, 1),
                nn.Conv2d(6, 4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.n(self.a(x)) * torch.sigmoid(self.g(x)))

    torch.manual_seed(0)
    model = Gated().eval()
    model.n.bias.data += 8
    before = outputs(model)
    context = transformed(model)
    assert distance(outputs(model), before) < 1e-5
    assert any("gated on the way" in note for note in context.run.notes)


# -- correction ------------------------------------------------------------------------------------------------------


def _channel_errors(model: nn.Module, reference: nn.Module, names: list[str], batches: list[Tensor]) -> float:
    """Largest mean error of an output channel, relative to the channel's spread."""
    seen: dict[str, list[list[Tensor]]] = {}
    hooks = []
    for which, net in enumerate((model, reference)):
        for name in names:
            parts = seen.setdefault(name, [[], []])[which]
            hooks.append(
                net.get_submodule(name).register_forward_hook(lambda m, a, out, parts=parts: parts.append(out))
            )
        outputs(net, batches)
    for hook in hooks:
        hook.remove()
    worst = 0.0
    for mine, wanted in seen.values():
        a, b = (torch.cat(parts).transpose(0, 1).flatten(1).double() for parts in (mine, wanted))
        worst = max(worst, float(((a.mean(1) - b.mean(1)).abs() / b.std(1)).max()))
    return worst


def test_analytic_correction_takes_most_of_the_mean_error_without_data() -> None:
    names = [f"blocks.{n}.{i}" for n in range(2) for i in (1, 4, 7)]
    errors = {}
    for correction in ("none", "analytic"):
        model, reference = mobile(), mobile()
        transformed(reference, {"absorb": False})
        quantize(model, "dfq", example=data()[0][:1], bits="W4A16", options={"correction": correction, "absorb": False})
        errors[correction] = _channel_errors(model, reference, names, data())
    assert errors["analytic"] < 0.5 * errors["none"], errors


def test_empirical_correction_leaves_no_mean_error_on_its_data() -> None:
    names = [f"blocks.{n}.{i}" for n in range(2) for i in (1, 4, 7)]
    model, reference = mobile(), mobile()
    transformed(reference, {"absorb": False})
    options = {"correction": "empirical", "absorb": False, "unknown": "dynamic"}
    quantize(model, "dfq", data(), bits="W4A8", options=options)
    assert _channel_errors(model, reference, [*names, "head"], data()) < 1e-5


def test_weights_that_quantization_does_not_move_keep_their_biases() -> None:
    for correction in ("analytic", "empirical"):
        recipe = build_recipe("dfq", "W8A16", {"correction": correction, "equalize": False, "absorb": False})
        (rule,) = recipe.scheme.weights
        fine = dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, format=affine(16)))
        recipe = dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, weights=(fine,)))
        model = mobile()
        quantize(model, recipe, data())
        assert float((model.head.bias - mobile().head.bias).abs().max()) < 1e-4
        assert float(model.blocks[0][0].bias.abs().max()) < 1e-4


def test_the_mean_behind_a_relu_is_not_beta_and_padding_counts() -> None:
    weight, mean = torch.randn(4, 3, 3, 3), torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    x = mean.expand(1, 3, 5, 5).double()
    plain = mean_output(lambda a, w: F.conv2d(a, w), weight, x, 1)
    torch.testing.assert_close(plain, weight.double().sum((2, 3)) @ mean.view(3).double())
    padded = mean_output(lambda a, w: F.conv2d(a, w, padding=1), weight, x, 1)
    torch.testing.assert_close(padded, F.conv2d(x, weight.double(), padding=1).mean((0, 2, 3)))
    assert not torch.allclose(plain, padded)


def test_a_layer_that_runs_twice_is_corrected_over_both_runs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.conv = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.norm(self.stem(x)))
            return self.conv(h).mean((2, 3)) + self.conv(F.max_pool2d(h, 2)).mean((2, 3))

    torch.manual_seed(0)
    model = Twice().eval()
    before = model.conv.bias.detach().clone()
    result = quantize(model, "dfq", example=data()[0][:1], bits="W3A16")
    assert not torch.equal(model.conv.bias, before) and not any("not corrected" in note for note in result.notes)


# -- the whole recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["W4A16", "W8A8"])
def test_injected_imbalance_breaks_per_tensor_rounding_and_not_dfq(bits: str) -> None:
    errors = {}
    for name, options in (("naive", NAIVE), ("dfq", {})):
        model = mobile(spread=1.5)
        before = outputs(model)
        quantize(model, "dfq", example=data()[0][:1], bits=bits, options=options, input_range=(-4.0, 4.0))
        errors[name] = distance(outputs(model), before)
    assert errors["dfq"] < (0.5 if bits == "W4A16" else 0.3) * errors["naive"], errors


def test_no_data_is_asked_for_unless_correction_is_empirical() -> None:
    assert not build_recipe("dfq", "W8A8").needs_data
    assert build_recipe("dfq", "W8A8", {"correction": "empirical"}).needs_data
    result = quantize(mobile(), "dfq", example=data()[0][:1], bits="W8A8", options={"input_range": "-3,3.5"})
    held = result.attachment.quantizer("stem.0.input").params
    assert float(held["scale"]) * 255 == pytest.approx(6.5)
    for wrong in ("3", "a,b", "2,1"):
        with pytest.raises(FewbitsError, match="input_range"):
            build_recipe("dfq", "W8A8", {"input_range": wrong})


def test_without_statistics_ranges_come_from_data_or_are_an_error() -> None:
    example = tokens(1, 1)[0]
    with pytest.raises(FewbitsError, match=r"blocks\.0\.q\.input.*calibration data.*unknown=dynamic"):
        quantize(encoder(), "dfq", example=example, bits="W8A8")
    result = quantize(encoder(), "dfq", tokens(8), bits="W8A8")
    assert any("ranges from the calibration data" in note for note in result.notes)
    assert any("no bias is absorbed" in note for note in result.notes)
    assert distance(outputs(result.model, tokens(8)), outputs(encoder(), tokens(8))) < 0.05
    dynamic = quantize(encoder(), "dfq", example=example, bits="W8A8", options={"unknown": "dynamic"})
    assert dynamic.attachment.quantizer("blocks.0.q.input").spec.dynamic
    # values to output projections, and the ReLU MLP, can be equalized without any norm between them
    run = Run(encoder(), build_recipe("dfq", "W8A8"), [], example, 0, torch.device("cpu"), *[None] * 6)
    kinds = {
        (link.first.name.split(".")[2], link.second.name.split(".")[2])
        for link in links(run.graph, run.graph.relations)
    }
    assert kinds == {("v", "o"), ("up", "down")}


@pytest.mark.parametrize("name", ["dfq+gptq", "dfq+brecq", "dfq+adaround", "gptq+dfq", "dfq+rtn"])
def test_its_transforms_and_correction_join_other_roundings(name: str) -> None:
    options = {"brecq": {"iters_w": 2, "iters_a": 1}, "adaround": {"iterations": 2}}
    chosen = {key: value for part in name.split("+") for key, value in options.get(part, {}).items()}
    joined = build_recipe(name, "W4A8", chosen)
    parts = [step.part for step in joined.steps]
    assert parts.count("correction") == 1 and parts.count("rounding") == 1
    assert sum(type(step).__name__ == "FoldBatchNorm" for step in joined.steps) == 1
    model = mobile(spread=1.0)
    result = quantize(model, joined, data(), input_range=(-4.0, 4.0))
    first, middle = (row_ranges(result.attachment.decoded(f"blocks.0.{i}.weight")) for i in (0, 3))
    torch.testing.assert_close(first, middle, rtol=0.5, atol=0.1), "equalized before rounding"
    assert bool(outputs(model).isfinite().all())


@pytest.mark.parametrize("correction", ["analytic", "empirical"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, correction: str) -> None:
    whole = mobile(spread=1.0)
    options = {"correction": correction}
    settings = {"bits": "W4A8", "options": options, "input_range": (-4.0, 4.0)}
    quantize(whole, "dfq", data(), work_dir=tmp_path, **settings)
    files = sorted(tmp_path.glob("sweep*.safetensors"))
    for file in files[len(files) // 2 :]:
        file.unlink()
    again = mobile(spread=1.0)
    quantize(again, "dfq", data(), work_dir=tmp_path, resume=True, **settings)
    assert torch.equal(outputs(whole), outputs(again))
    for (name, a), (other, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name


LOADER = """
import sys
sys.path.insert(0, {tests!r})
from safetensors.torch import load_file
from test_paper_dfq import mobile
import torch.nn as nn

def load(folder):
    model = mobile(act=nn.ReLU6)
    model.load_state_dict(load_file(folder + "/model.safetensors"))
    config = dict(input_size=[3, 12, 12], mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    return model, config
"""


def test_a_checkpoint_made_without_data_loads_bit_equal(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file(mobile(act=nn.ReLU6, spread=1.0).state_dict(), tmp_path / "model/model.safetensors")
    code = tmp_path / "loader.py"
    code.write_text(LOADER.format(tests=str(Path(__file__).parent)))
    reference = f"module:{code}:load:{tmp_path / 'model'}"
    report = fewbits.quantize_reference(reference, "dfq", "W8A8", out=tmp_path / "out")
    assert report["calibration"] is None and report["needs_data"] is False
    assert any("run as ReLU" in note for note in report["notes"])
    loaded = fewbits.load(tmp_path / "out", code_module=f"{code}:load")
    attachment = attachment_of(loaded.model)
    assert attachment is not None and len(attachment.replacements) == 4
    low = float(attachment.quantizer("stem.0.input").params["scale"]) * 255
    assert low == pytest.approx(4.0), "normalised pixels lie in [-2, 2]"
    fresh = fewbits.load_model(reference)
    quantize(
        fresh.model,
        "dfq",
        example=fresh.example_batch(1),
        bits="W8A8",
        input_range=(torch.full((3,), -2.0), torch.full((3,), 2.0)),
    )
    assert torch.equal(outputs(loaded.model), outputs(fresh.model))
