"""ACIQ: what the paper proves, on tensors; what its recipe does, on models of its own kind and of others."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo_tiny
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.allocation.channel_bits import allocate_bits, allocate_bits_in_rounds, bits_of_bins, channel_bins
from fewbits.attach import attachment_of
from fewbits.correction import moment_correction, moved_grid, with_real_offset
from fewbits.engine import snapshot
from fewbits.engine.statistics import SampleMoments
from fewbits.errors import FewbitsError
from fewbits.formats import (
    ChannelBits,
    Codebook,
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    PowerOfTwo,
    Uniform,
    decode,
    encode,
    expand_params,
    format_from_dict,
    gptq_grid,
    symmetric,
)
from fewbits.formats import quantize as put_on_grid
from fewbits.graph import record
from fewbits.papers import build_recipe
from fewbits.papers.aciq import grid
from fewbits.ranges import Analytic, MinMax
from fewbits.ranges.analytic import MULTIPLIERS, best_multiplier, block_moments, expected_error
from fewbits.rounding.adaround import LearnedRounding

ROWS = PerChannel(0)


def laplace(*shape: int, b: float = 1.0, mean: float = 0.0, seed: int = 0) -> Tensor:
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return (mean - b * uniform.sign() * torch.log1p(-2 * uniform.abs())).float()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(deviations: Tensor, count: int = 400, seed: int = 0) -> Tensor:
    return deviations.unsqueeze(1) * normal(len(deviations), count, seed=seed)


# -- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prior", "half"), list(MULTIPLIERS))
def test_every_published_multiplier_is_the_argmin_of_its_error(prior: str, half: bool) -> None:
    grid_of_clips = torch.linspace(0.01, 14, 140_000, dtype=torch.float64)
    for bits, published in enumerate(MULTIPLIERS[prior, half]):
        error = expected_error(prior, grid_of_clips, 1.0, bits + half)
        argmin = float(grid_of_clips[error.argmin()])
        assert abs(argmin - published) < 0.02
        assert best_multiplier(prior, bits, half) == pytest.approx(argmin, abs=2e-4)
    assert list(MULTIPLIERS[prior, half]) == sorted(MULTIPLIERS[prior, half]), "more bits, wider clip"


@pytest.mark.parametrize("prior", ["laplace", "gauss"])
def test_the_expected_error_is_what_clipping_and_rounding_do(prior: str) -> None:
    x = laplace(1, 400_000, seed=3) if prior == "laplace" else normal(1, 400_000, seed=3)
    for bits in (2, 3, 4):
        clip = best_multiplier(prior, bits)  # type: ignore[arg-type]
        step = 2 * clip / 2**bits
        rounded = ((x.clamp(-clip, clip) + clip) / step).round() * step - clip
        measured = float((x - rounded).square().mean())
        assert measured == pytest.approx(float(expected_error(prior, torch.tensor(clip), 1.0, bits)), rel=0.08)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("half", [False, True])
def test_clipping_beats_the_extremes_and_two_deviations(bits: int, half: bool) -> None:
    x = laplace(1, 50_000, b=0.7, mean=0.0 if half else 0.2, seed=bits)
    target = x.relu() if half else x

    def error(prior: str) -> float:
        params = Analytic(prior, half).fit(x, grid(bits), PerTensor())  # type: ignore[arg-type]
        made = put_on_grid(x, grid(bits), PerTensor(), params)
        return float((made - target).square().mean())

    assert error("laplace") < error("none")
    if bits == 4:
        assert error("laplace") < error("deviations")


def test_the_clip_scales_with_the_data_and_grows_with_the_bits() -> None:
    x = laplace(3, 1000)
    moments, scaled = block_moments(x), block_moments(2.5 * x)
    clips = [Analytic().clip(moments, torch.full((3,), float(bits))) for bits in range(1, 9)]
    assert all(bool((b > a).all()) for a, b in itertools.pairwise(clips))
    torch.testing.assert_close(Analytic().clip(scaled, torch.full((3,), 4.0)), 2.5 * clips[3])


def test_half_of_the_range_starts_at_zero_and_uses_the_table_of_one_bit_more() -> None:
    x = laplace(2, 4000)
    params = Analytic(half=True).fit(x, grid(4), ROWS)
    made = put_on_grid(x, grid(4), ROWS, params)
    assert float(made.min()) == 0.0 and bool((params["zero_point"] == 0).all())
    assert torch.equal(made, made.relu()), "the ReLU that follows has nothing left to do"
    moments = block_moments(x)
    five = torch.full((2,), 5.0)
    torch.testing.assert_close(
        Analytic(half=True).clip(moments, five - 1), Analytic().clip(moments, five), rtol=1e-6, atol=0
    )
    low, high = Analytic(half=True, most=1.5).bounds(moments, five - 1)
    assert bool((low == 0).all() and (high == 1.5).all())


def test_symmetric_ranges_start_no_lower_than_the_data() -> None:
    x = torch.cat([laplace(1, 1000, mean=1.0).abs(), laplace(1, 1000)], 0)
    low, high = Analytic().bounds(block_moments(x), torch.full((2,), 4.0))
    clip = Analytic().clip(block_moments(x), torch.full((2,), 4.0))
    assert float(low[0]) == float(x[0].min())
    torch.testing.assert_close(low[1], x[1].mean() - clip[1])
    torch.testing.assert_close(high - low, 2 * clip)


@pytest.mark.parametrize("gran", [PerTensor(), PerChannel(1)])
def test_statistics_are_averages_of_samples_whatever_the_batches(gran: PerTensor | PerChannel) -> None:
    x = normal(12, 3, 5, 5) * torch.tensor([1.0, 2.0, 5.0]).view(1, 3, 1, 1) + 0.3
    whole, parts = SampleMoments(gran), SampleMoments(gran)
    whole.update(x, 12)
    for batch in x.split(5):
        parts.update(batch, len(batch))
    for a, b in zip(whole.value(), parts.value(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    found = whole.value()
    samples = x.reshape(12, 1, -1) if gran == PerTensor() else x.flatten(2)
    mean = samples.mean(2)
    torch.testing.assert_close(found.mean.flatten(), mean.mean(0))
    torch.testing.assert_close(found.absolute.flatten(), (samples - mean.unsqueeze(2)).abs().mean(2).mean(0))
    torch.testing.assert_close(found.standard.flatten(), samples.std(2).mean(0))
    assert torch.equal(found.low.flatten(), samples.amin((0, 2)))
    with pytest.raises(FewbitsError, match="no calibration data"):
        SampleMoments(gran).value()


# -- bits of channels ------------------------------------------------------------------------------------------------


def test_eight_times_the_spread_is_two_bits_more() -> None:
    spread = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5
    wider = spread.clone()
    wider[3] *= 8
    gained = torch.log2(channel_bins(wider, 4) / channel_bins(spread, 4))
    torch.testing.assert_close(gained[3] - gained[0], torch.tensor(2.0))
    assert float(gained.diff()[4:].abs().max()) < 1e-5
    torch.testing.assert_close(channel_bins(wider, 4).sum(), torch.tensor(16 * 2.0**4))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rounding", ["round", "ceil"])
def test_the_mean_is_the_budget(bits: int, rounding: str) -> None:
    met = 0
    for seed in range(30):
        spread = torch.exp(0.8 * normal(64, seed=seed))
        found = allocate_bits(spread, bits, rounding=rounding)  # type: ignore[arg-type]
        assert bool((found == found.round()).all()) and float(found.min()) >= 0 and float(found.max()) <= 8
        assert float(found.mean()) == bits
        assert bool((found[spread.argsort()].diff() >= 0).all())
        rounds = allocate_bits_in_rounds(spread, bits, rounding=rounding)  # type: ignore[arg-type]
        if float(rounds.mean()) == bits:
            met += 1
            assert torch.equal(rounds, found), "the one allocation of that mean"
    assert 15 < met < 30, "the released rounds often meet it, not always"
    one_shot = bits_of_bins(channel_bins(spread, bits), "ceil")
    assert float(one_shot.mean()) > bits + 0.2, "without the budget's correction it is not met"


def test_unreachable_and_degenerate_budgets() -> None:
    spread = torch.tensor([1.0] + [0.0] * 15)
    for allocate in (allocate_bits, allocate_bits_in_rounds):
        assert allocate(spread, 4).tolist() == [8.0] + [0.0] * 15, "the limit makes 4 bits on average impossible"
        assert allocate(torch.zeros(5), 3).tolist() == [3.0] * 5
        assert allocate(torch.full((7,), 0.3), 4).tolist() == [4.0] * 7
        assert allocate(torch.tensor([0.0, 1.0, 1.0]), 3)[0] == 0
        assert bool(torch.isfinite(allocate(torch.tensor([torch.nan, torch.inf, 1.0, 1.0]), 3)).all())
        with pytest.raises(FewbitsError, match="9"):
            allocate(torch.ones(2), 9)


def test_shared_bits_lower_the_error_and_each_channel_is_clipped_for_its_own() -> None:
    x = rows_of(2.0 ** torch.linspace(-3, 3, 32), 2000)
    errors = {}
    for name, fmt in (("shared", ChannelBits(4)), ("equal", grid(4))):
        params = Analytic("gauss").fit(x, fmt, ROWS)
        errors[name] = float((put_on_grid(x, fmt, ROWS, params) - x).square().sum())
    assert errors["shared"] < 0.5 * errors["equal"]
    params = Analytic("gauss").fit(x, ChannelBits(4), ROWS)
    bits = params["bits"].flatten()
    assert len(bits.unique()) > 2
    widths = params["scale"].flatten() * (2**bits - 1) / x.std(1) / 2
    expected = torch.tensor([MULTIPLIERS["gauss", False][int(b)] for b in bits])
    torch.testing.assert_close(widths, expected, rtol=1e-3, atol=0, msg="not the multiplier of the nominal 4 bits")


# -- the grid --------------------------------------------------------------------------------------------------------


def released(x: Tensor, low: Tensor, width: Tensor, bits: Tensor) -> Tensor:
    """The published quantizer, as the equations say it."""
    top = 2.0**bits - 1
    scale = torch.where(top > 0, width / top.clamp_min(1), torch.zeros_like(top)).clamp_min(1e-8)
    zero = torch.round(-low / scale)
    code = torch.round(torch.minimum((x / scale + zero).clamp_min(0), top))
    return (code - zero) * scale


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("half", [False, True])
def test_the_grid_is_the_published_one_for_any_number_of_bits(bits: int, half: bool) -> None:
    x = rows_of(torch.exp(2.0 * normal(24, seed=bits)), 50, seed=bits) + normal(24, 1, seed=9)
    x[5] = 1.25  # constant
    x[6] = 0.0
    fmt = ChannelBits(bits)
    params = Analytic(half=half).fit(x, fmt, ROWS)
    moments = block_moments(x)
    given = allocate_bits(moments.absolute, bits)
    assert torch.equal(params["bits"].flatten(), given) and bool((given == 0).any())
    low, high = (end.unsqueeze(1) for end in Analytic(half=half).bounds(moments, given))
    expected = released(x, low, high - low, given.unsqueeze(1))
    made = put_on_grid(x, fmt, ROWS, params)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    codes = encode(x, fmt, ROWS, params)
    assert torch.equal(decode(codes, fmt, ROWS, params), made) and bool(torch.isfinite(made).all())
    assert bool((codes.amax(1) <= 2**given - 1).all())
    assert all(len(made[row].unique()) <= 2 ** int(b) for row, b in enumerate(given))
    assert len(made[int(given.argmin())].unique()) == 1, "no bits, one level"


def test_codes_are_packed_with_the_bits_of_their_channel() -> None:
    x = rows_of(2.0 ** torch.linspace(-6, 6, 10), 37)
    fmt = ChannelBits(3)
    params = Analytic("none").fit(x, fmt, ROWS)
    codes = encode(x, fmt, ROWS, params)
    spread = expand_params(fmt, ROWS, params, x.shape)
    packed = fmt.pack(codes, spread)
    bits = params["bits"].flatten()
    assert fmt.mean_code_bits(params) == pytest.approx(3, abs=0.05)
    assert packed.numel() <= math.ceil(float(bits.sum()) * 37 / 8) + 8 < codes.numel() / 2
    again = fmt.unpack(packed, spread, codes.shape)
    assert torch.equal(again, codes) and again.dtype == codes.dtype
    with pytest.raises(FewbitsError, match="bytes"):
        fmt.unpack(packed[:-1], spread, codes.shape)
    with pytest.raises(FewbitsError, match="bytes"):
        fmt.unpack(torch.cat([packed, packed[:1]]), spread, codes.shape)
    assert fmt.count_bits(370, 10) == 370 * 3 + 10 * (32 + 32 + 4)


def test_bad_channel_bits_are_refused() -> None:
    for data in ({"bits": 0}, {"bits": 9}, {"ceiling": 17}, {"zero_point": "middle"}, {"eps": 0.0}, {"bits": 2.5}):
        with pytest.raises(FewbitsError):
            format_from_dict({"kind": "channel_bits", **data})
    params = Analytic("none").fit(normal(3, 8), ChannelBits(3), ROWS)
    for bits in (torch.full((3, 1), 9.0), torch.full((3, 1), 2.5), torch.full((3, 1), -1.0)):
        with pytest.raises(FewbitsError, match="here"):
            ChannelBits(3).check_params({**params, "bits": bits}, "here")
    with pytest.raises(FewbitsError, match="prior"):
        Analytic("cauchy")  # type: ignore[arg-type]


def test_rounding_is_learned_within_the_bits_of_each_channel() -> None:
    weight = rows_of(2.0 ** torch.linspace(-4, 4, 12), 9)
    fmt = ChannelBits(3)
    params = Analytic("none").fit(weight, fmt, ROWS)
    rounding = LearnedRounding(weight, fmt, params, ROWS)
    close = (rounding().detach() - weight).abs() <= params["scale"] * 1.01
    assert bool(close[params["bits"].flatten() > 0].all())
    with torch.no_grad():
        rounding.alpha.fill_(9.0)  # everything up
    codes = rounding.codes()
    assert bool((codes.amax(1) <= 2 ** params["bits"].flatten() - 1).all())
    assert torch.equal(rounding.hard_weight(), decode(codes, fmt, ROWS, params))


# -- moments of weights ----------------------------------------------------------------------------------------------

FORMATS: dict[str, Format] = {
    "channel-bits": ChannelBits(3), "aciq": grid(4), "gptq": gptq_grid(4), "symmetric": symmetric(4),
    "middle": gptq_grid(4, sym=True), "eight": grid(8),
}  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("deviation", [False, True])
def test_corrected_weights_have_the_moments_of_the_float_ones(fmt: Format, deviation: bool) -> None:
    weight = rows_of(2.0 ** torch.linspace(-5, 1, 12), 45) + 0.02
    weight[4] = 0.3  # a constant channel
    params = (Analytic("none") if isinstance(fmt, ChannelBits) else MinMax()).fit(weight, fmt, ROWS)
    codes = encode(weight, fmt, ROWS, params)
    made = decode(codes, fmt, ROWS, params)
    factor, shift = moment_correction(weight, made, ROWS, mean=True, deviation=deviation)
    moved = with_real_offset(fmt)
    assert moved is not None and moved.code_min == fmt.code_min and moved.code_max == fmt.code_max
    params = moved_grid(params, factor, shift)
    moved.check_params(params)
    found = decode(codes, moved, ROWS, params)
    assert float((found.mean(1) - weight.mean(1)).abs().max()) < 1e-6
    assert float((made.mean(1) - weight.mean(1)).abs().max()) > 1e-4, "there was something to correct"
    alive = made.std(1) > 0
    if deviation:
        torch.testing.assert_close(
            found.std(1)[alive & (weight.std(1) > 0)], weight.std(1)[alive & (weight.std(1) > 0)]
        )
    else:
        torch.testing.assert_close(found - found.mean(1, keepdim=True), made - made.mean(1, keepdim=True))
    assert torch.equal(encode(found, moved, ROWS, params)[alive], codes[alive]), "weights remain integers"
    assert all(len(a.unique()) == len(b.unique()) for a, b in zip(found, made, strict=True))


def test_grids_without_an_offset_are_told_apart() -> None:
    for fmt in (Codebook(3), PowerOfTwo(4), Uniform(bits=4, zero_point="real")):
        assert with_real_offset(fmt) is None


def test_blocks_of_one_value_and_ragged_groups_stay_finite() -> None:
    weight = normal(4, 7)
    gran = PerGroup(3)
    params = Analytic("none").fit(weight, ChannelBits(3), gran)
    made = put_on_grid(weight, ChannelBits(3), gran, params)
    factor, shift = moment_correction(weight, made, gran, deviation=True)
    found = put_on_grid(made, ChannelBits(3, zero_point="real"), gran, moved_grid(params, factor, shift))
    assert factor.shape == (4, 3) and bool(torch.isfinite(found).all())
    torch.testing.assert_close(
        gran.reduce(made, lambda b: b.mean(1)) * factor + shift, gran.reduce(weight, lambda b: b.mean(1))
    )


# -- placement -------------------------------------------------------------------------------------------------------


def _tagged(model: nn.Module, example: Tensor, *tags: str) -> list[str]:
    graph = record(model, example)
    return [site.name for site in graph.sites.values() if set(tags) <= site.tags]


def test_results_of_layers_are_before_relu_and_residual_sums() -> None:
    graph = record(skipnet(), torch.randn(1, 3, 8, 8))
    block = [s for s in graph.sites.values() if "layer_result" in s.tags and s.name.startswith("down.0.")]
    assert [s.name for s in block] == ["down.0.bn1.output", "down.0.bn2.output"]
    assert ["before_relu" in s.tags for s in block] == [True, False], "the second goes into a sum first"
    assert all("feature_map" in s.tags for s in block)
    assert "first_layer" in graph.sites["stem.output"].tags
    assert "pooled" in graph.sites["max_pool2d.output"].tags
    bare = [s.name for s in graph.sites.values() if "bare_of_results" in s.tags]
    assert bare == ["shared.input", "head.input"], "interpolated and averaged by hand; sums of results are covered"


def test_results_in_transformers_and_mobile_networks() -> None:
    vit = zoo_tiny.recorded("timm-vit").sites
    assert "layer_result" in vit["blocks.0.mlp.act.output"].tags, "past an activation that is no ReLU"
    assert "layer_result" not in vit["blocks.0.mlp.fc1.output"].tags
    assert "bare_of_results" not in vit["blocks.0.mlp.fc2.input"].tags
    assert {"bare_of_results"} <= vit["blocks.0.attn.qkv.input"].tags & vit["blocks.0.attn.matmul_1.lhs"].tags
    assert "bare_of_results" not in vit["blocks.0.attn.matmul.lhs"].tags, "a scaled part of qkv"
    mobile = zoo_tiny.recorded("timm-mobilenetv2").sites
    assert "before_relu6" in mobile["blocks.1.0.bn1.output"].tags
    assert "before_relu" not in mobile["blocks.1.0.bn1.output"].tags
    dense = zoo_tiny.recorded("timm-densenet").sites
    assert {"layer_result", "before_relu"} <= dense["features.denseblock1.denselayer2.norm1.output"].tags


# -- the recipe ------------------------------------------------------------------------------------------------------


def _logits(model: nn.Module, data: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in data])


def test_what_the_recipe_puts_where() -> None:
    result = quantize(skipnet(), "aciq", images(8), bits="W4A4")
    held = {site.name: quantizer for site, quantizer in result.attachment.items()}
    assert isinstance(held["down.0.bn1.output"].spec.format, ChannelBits)
    assert held["down.0.bn1.output"].params["bits"].shape == (1, 8, 1, 1)
    assert float(held["down.0.bn1.output"].params["bits"].mean()) == pytest.approx(4, abs=0.005)
    assert bool((held["down.0.bn1.output"].params["zero_point"] == 0).all()), "half range in front of the ReLU"
    assert not bool((held["down.0.bn2.output"].params["zero_point"] == 0).all())
    for name in ("stem.weight", "head.weight", "stem.output", "head.output", "head.input", "max_pool2d.output"):
        assert isinstance(held[name].spec.format, Uniform) and held[name].spec.format.bits == 8, name
    assert held["stem.output"].spec.range == Analytic("none", half=True)
    assert "stem.input" not in held and "down.0.conv2.input" not in held and "down.0.relu.output" not in held
    eight = quantize(skipnet(), "aciq", images(8), bits="W8A8")
    assert not any(isinstance(q.spec.format, ChannelBits) for _, q in eight.attachment.items()), "only up to 4 bits"
    graph = zoo_tiny.recorded("timm-vit")
    scheme = build_recipe("aciq", "W4A4").scheme
    spec = scheme.spec(graph.sites["blocks.0.attn.qkv.output"])
    assert spec is not None and spec.granularity == PerTensor() and not isinstance(spec.format, ChannelBits)
    spec = scheme.spec(graph.sites["blocks.0.attn.matmul_1.lhs"])
    assert spec is not None and spec.range == Analytic(half=True), "attention is not negative"
    mobile = scheme.spec(zoo_tiny.recorded("timm-mobilenetv2").sites["blocks.1.0.bn1.output"])
    assert mobile is not None and mobile.range == Analytic(half=True, most=6.0)


def test_weights_keep_their_means_and_their_budget() -> None:
    model, folded = skipnet(), skipnet()
    result = quantize(model, "aciq", images(8), bits="W3A16")
    plain = quantize(folded, "aciq", images(8), bits="W16A8", options={"correction": "none"})
    assert not any(site.role == "weight" for site, _ in plain.attachment.items())
    for name in ("down.0.conv1", "up.1.conv2", "shared", "stem", "head"):
        made, float_ = (m.get_submodule(name).weight.flatten(1) for m in (model, folded))
        assert float((made.mean(1) - float_.mean(1)).abs().max()) < 1e-6, name
        assert not torch.equal(made, float_)
        assert all(len(row.unique()) <= 256 for row in made)
    quantizer = result.attachment.quantizer("up.0.conv1.weight")
    assert float(quantizer.params["bits"].mean()) == pytest.approx(3, abs=0.005)
    uncorrected = skipnet()
    quantize(uncorrected, "aciq", images(8), bits="W3A16", options={"correction": "none"})
    codes = result.attachment.codes["up.0.conv1.weight"]
    assert torch.equal(
        decode(codes, quantizer.spec.format, ROWS, quantizer.params).view_as(model.up[0].conv1.weight),
        model.up[0].conv1.weight,
    )
    both = skipnet()
    quantize(both, "aciq", images(8), bits="W3A16", options={"correction": "both"})
    made, float_ = (m.up[0].conv1.weight.flatten(1) for m in (both, folded))
    torch.testing.assert_close(made.std(1), float_.std(1), rtol=1e-5, atol=1e-6)


def test_eight_bit_weights_err_by_half_a_step_at_most() -> None:
    model, folded = skipnet(), skipnet()
    result = quantize(model, "aciq", images(4), bits="W8A16", options={"correction": "none", "allocation": "none"})
    quantize(folded, "aciq", images(4), bits="W16A8")
    for site, quantizer in result.attachment.items():
        made, float_ = (m.get_submodule(site.module).weight.flatten(1) for m in (model, folded))
        # the zero point is rounded too, so that an end may lose another half step
        inner = (float_ > float_.amin(1, keepdim=True)) & (float_ < float_.amax(1, keepdim=True))
        assert bool((((made - float_).abs() <= quantizer.params["scale"] * 0.5001) | ~inner).float().mean() > 0.99)
        assert bool(((made - float_).abs() <= quantizer.params["scale"] * 1.0001).all())


@pytest.mark.parametrize("name", ["timm-resnet", "timm-vgg"])
def test_it_beats_rounding_to_nearest_on_convolutional_networks(name: str) -> None:
    model, args, _ = zoo_tiny.MODELS[name]()
    generator = torch.Generator().manual_seed(5)
    data = [torch.randn(4, *args[0].shape[1:], generator=generator) for _ in range(2)]
    float_ = _logits(model, data)
    errors = {}
    for recipe in ("rtn", "aciq"):
        changed = copy.deepcopy(model)
        quantize(changed, recipe, data, bits="W4A4")
        errors[recipe] = float((_logits(changed, data) - float_).square().mean())
    assert errors["aciq"] < errors["rtn"]


def test_online_statistics_need_no_data() -> None:
    recipe = build_recipe("aciq", "W4A4", {"statistics": "online"})
    assert not recipe.needs_data
    model = skipnet()
    result = quantize(model, recipe, example=images(2)[0])
    dynamic = [q.spec.dynamic for site, q in result.attachment.items() if site.role != "weight"]
    assert dynamic and all(dynamic)
    batch = images(4)[0]
    assert torch.equal(_logits(model, [batch]), _logits(model, [batch]))
    assert bool(torch.isfinite(_logits(model, [batch, 0 * batch])).all()), "dead channels too"
    offline = build_recipe("aciq", "W4A4")
    assert offline.needs_data and not any(rule.spec.dynamic for rule in offline.scheme.activations if rule.spec)
    with pytest.raises(FewbitsError, match="calibration"):
        quantize(skipnet(), offline, example=images(2)[0])


def test_dead_channels_and_constant_weights() -> None:
    model = skipnet()
    with torch.no_grad():
        model.down[0].bn1.weight[2] = 0.0
        model.down[0].bn1.bias[2] = -1.0
        model.up[0].conv1.weight[3] = 0.125
        model.shared.weight[1] = 0.0
    data = images(8)
    result = quantize(model, "aciq", data, bits="W4A4", options={"correction": "both"})
    assert bool(torch.isfinite(_logits(model, data)).all())
    assert float(result.attachment.quantizer("down.0.bn1.output").params["bits"][0, 2, 0, 0]) == 0
    assert bool((model.shared.weight[1] == 0).all())
    row = model.up[0].conv1.weight[3]
    assert len(row.unique()) == 1


@pytest.mark.parametrize("bits", ["W4A4", "W4A4g8", "W2A8"])
def test_saved_and_read_back_bit_for_bit(bits: str, tmp_path: Path) -> None:
    data = images(8)
    model = skipnet()
    result = quantize(model, "aciq", data, bits=bits)
    expected = _logits(model, data)
    attachment = result.attachment
    sites = [site for site, _ in attachment.items()]
    file = tmp_path / "m.safetensors"
    snapshot.write(file, *snapshot.take(model, attachment, list(model.state_dict()), sites))
    fresh = skipnet()
    again = type(attachment)(fresh, attachment.sites, attachment.known)
    snapshot.put(fresh, again, *snapshot.read(file))
    assert torch.equal(_logits(fresh, data), expected)
    assert attachment_of(fresh) is again
    tensors, _ = snapshot.read(file)
    if bits == "W4A4":
        name = "up.0.conv1.weight"
        assert tensors[f"codes/{name}"].numel() <= attachment.codes[name].numel() / 2 + 8, "four bits on average"


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    data = images(8)
    whole = skipnet()
    quantize(whole, "aciq", data, bits="W4A4", work_dir=tmp_path / "a")
    first = tmp_path / "b"
    quantize(skipnet(), "aciq", data, bits="W4A4", work_dir=first)
    last = sorted(first.glob("sweep0-*.safetensors"))[-1]
    last.unlink()
    resumed = skipnet()
    quantize(resumed, "aciq", data, bits="W4A4", work_dir=first, resume=True)
    assert torch.equal(_logits(resumed, data), _logits(whole, data))


# -- joined with others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("aciq+gptq", {}),
        ("gptq+aciq", {}),
        ("aciq+adaround", {"iterations": 3}),
        ("aciq+brecq", {"iters_w": 3, "iters_a": 2}),
        ("smoothquant+aciq", {}),
    ],
)
def test_solvers_round_on_the_shared_bits(recipe: str, options: dict) -> None:
    model, data = (encoder(), tokens(8)) if "smooth" in recipe else (skipnet(), images(8))
    result = quantize(model, recipe, data, bits="W3A4", options=options)
    assert bool(torch.isfinite(_logits(model, data)).all())
    name = "blocks.1.down.weight" if "smooth" in recipe else "up.1.conv1.weight"
    quantizer = result.attachment.quantizer(name)
    assert isinstance(quantizer.spec.format, ChannelBits)
    codes = result.attachment.codes[name]
    assert bool((codes.amax(1) <= 2 ** quantizer.params["bits"].flatten() - 1).all())
    solved = "gptq" in recipe
    assert any("solver" in note for note in result.notes) == (solved or "ada" in recipe or "brecq" in recipe)
    if "smooth" in recipe:
        assert quantizer.spec.format.zero_point == "real", "rounded to nearest, so corrected"
    elif solved:
        assert quantizer.spec.format.zero_point == "integer"
        names = [type(step).__name__ for sweep in result.recipe.sweeps() for step in sweep]
        assert names[-2:] == ["ColumnSolver", "CorrectWeightMoments"]


def test_gptq_on_shared_bits_beats_nearest_on_them() -> None:
    data = images(32, batch=16)
    float_ = _logits(skipnet(), data)
    errors = {}
    for recipe in ("aciq", "aciq+gptq"):
        model = skipnet()
        quantize(model, recipe, data, bits="W2A16")
        errors[recipe] = float((_logits(model, data) - float_).square().mean())
    assert errors["aciq+gptq"] < errors["aciq"]


def test_a_relu6_that_another_paper_opened_bounds_nothing() -> None:
    model, args, _ = zoo_tiny.MODELS["timm-mobilenetv2"]()
    data = [args[0], args[0].flip(-1)]
    result = quantize(model, "dfq+aciq", data, bits="W4A4")
    ranges = [q.spec.range for site, q in result.attachment.items() if "before_relu" in site.tags]
    assert len(ranges) > 10 and all(r.half and r.most is None for r in ranges)  # type: ignore[attr-defined]
    assert not any("before_relu6" in site.tags for site, _ in result.attachment.items())
    assert bool(torch.isfinite(_logits(model, data)).all())


@pytest.mark.parametrize("pair", ["aciq+repq-vit", "repq-vit+aciq"])
def test_two_placements_are_refused(pair: str) -> None:
    with pytest.raises(FewbitsError, match="both bring their own activation quantizers"):
        build_recipe(pair, "W4A4")


def test_options_are_checked() -> None:
    for options in ({"prior": "cauchy"}, {"statistics": "sometimes"}, {"correction": "yes"}, {"allocation": "all"}):
        with pytest.raises(FewbitsError):
            build_recipe("aciq", "W4A4", options)
