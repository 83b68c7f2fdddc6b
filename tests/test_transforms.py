"""Function-preserving edits: same float output in float64 precision, and what each method promises beyond that."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, PerTensor, PerToken, Uniform, affine, encode, quantize, raw_affine, symmetric
from fewbits.ranges import AbsMax, QuantileSearch
from fewbits.transforms import (
    absorb_shift,
    fold_batch_norm,
    fold_into_norm,
    fold_into_outputs,
    reparameterize,
    scale_inputs,
    smoothing_scales,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rand(*shape: int, seed: int = 0, low: float = 0.2) -> Tensor:
    """Positive float64 factors."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + low


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- folds -----------------------------------------------------------------------------------------------------------


def test_norm_to_linears_with_scale_and_shift() -> None:
    x, scale, shift = randn(7, 10), rand(10), randn(10, seed=1)
    gamma, beta, weight, bias = randn(10, seed=2), randn(10, seed=3), randn(4, 10, seed=4), randn(4, seed=5)
    y = F.linear(F.layer_norm(x, (10,), gamma, beta), weight, bias)
    new_gamma, new_beta = fold_into_norm(gamma, beta, scale, shift)
    inner = F.layer_norm(x, (10,), new_gamma, new_beta)
    torch.testing.assert_close(inner, (F.layer_norm(x, (10,), gamma, beta) + shift) / scale, **EXACT)
    new_weight, new_bias = scale_inputs(weight, scale), absorb_shift(weight, bias, shift)
    torch.testing.assert_close(F.linear(inner, new_weight, new_bias), y, **EXACT)
    # a consumer without bias gets one
    created = absorb_shift(weight, None, shift)
    torch.testing.assert_close(F.linear(inner, new_weight, created), y - bias, **EXACT)


def test_norm_without_bias() -> None:
    gamma, scale = randn(5), rand(5)
    weight, bias = fold_into_norm(gamma, None, scale)
    assert bias is None
    torch.testing.assert_close(weight, gamma / scale)
    _, created = fold_into_norm(gamma, None, scale, torch.ones(5))
    torch.testing.assert_close(created, 1 / scale)
    offset, _ = fold_into_norm(gamma, None, scale, offset=1.0)
    torch.testing.assert_close(1 + offset, (1 + gamma) / scale)


@pytest.mark.parametrize(
    ("groups", "transposed"), [(1, False), (2, False), (8, False), (1, True), (2, True), (8, True)]
)
def test_convolutions(groups: int, transposed: bool) -> None:
    conv = F.conv_transpose2d if transposed else F.conv2d
    x, bias = randn(2, 8, 6, 6), randn(16, seed=1)
    weight = randn(*((8, 16 // groups) if transposed else (16, 8 // groups)), 3, 3, seed=2)
    y = conv(x, weight, bias, groups=groups, padding=1)
    into, out, shift = rand(8), rand(16), randn(16, seed=3)
    kind = {"groups": groups, "transposed": transposed}
    channels = (1, -1, 1, 1)
    scaled = conv(x / into.view(channels), scale_inputs(weight, into, **kind), bias, groups=groups, padding=1)
    torch.testing.assert_close(scaled, y, **EXACT)
    folded, new_bias = fold_into_outputs(weight, bias, out, shift, **kind)
    produced = conv(x, folded, new_bias, groups=groups, padding=1)
    torch.testing.assert_close(produced, (y + shift.view(channels)) / out.view(channels), **EXACT)
    assert fold_into_outputs(weight, None, out, **kind)[1] is None
    _, made = fold_into_outputs(weight, None, out, shift, **kind)
    torch.testing.assert_close(made, shift / out, **EXACT)
    if not transposed:
        moved = randn(8, seed=4)
        unpadded = conv(x, weight, bias, groups=groups)
        absorbed = absorb_shift(weight, bias, moved, groups=groups)
        torch.testing.assert_close(conv(x + moved.view(channels), weight, absorbed, groups=groups), unpadded, **EXACT)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_batch_norm_folds_and_keeps_its_state(kind: type, groups: int, bias: bool, affine_: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear = kind is nn.Linear
    layer = kind(4, 8, bias=bias) if linear else kind(4, 8, 3, groups=groups, bias=bias, padding=1)
    norm_kind = nn.BatchNorm1d if kind in (nn.Linear, nn.Conv1d) else nn.BatchNorm2d
    norm = norm_kind(8, affine=affine_, eps=1e-3)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.1, 4)
    if affine_:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.weight.data[0] = 0
    layer, norm = layer.double().eval(), norm.double().eval()
    x = torch.randn(*{nn.Linear: (3, 4), nn.Conv1d: (3, 4, 6)}.get(kind, (3, 4, 6, 6)), dtype=torch.float64)
    expected = norm(layer(x))
    names = set(norm.state_dict())
    folded = fold_batch_norm(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps,
        groups=1 if linear else groups, transposed=kind is nn.ConvTranspose2d,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(folded.weight)
        if bias:
            layer.bias.copy_(folded.bias)
        norm.running_mean.copy_(folded.norm_mean)
        norm.running_var.copy_(folded.norm_var)
        if affine_:
            norm.weight.copy_(folded.norm_weight)
            norm.bias.copy_(folded.norm_bias)
        else:
            assert folded.norm_weight is None and folded.norm_bias is None
    torch.testing.assert_close(norm(layer(x)), expected, **EXACT)
    assert set(norm.state_dict()) == names
    # what is left of the norm is a constant: it neither scales nor depends on the channel's statistics
    probe = torch.randn_like(expected)
    torch.testing.assert_close(norm(probe) - norm(torch.zeros_like(probe)), probe, **EXACT)


def test_batch_norm_fold_in_float32_and_bad_statistics() -> None:
    weight, ones = torch.randn(4, 3), torch.ones(4)
    folded = fold_batch_norm(weight, None, ones, ones * 1e-3, ones * 3, ones, 1e-5)
    assert folded.weight.dtype == folded.norm_bias.dtype == torch.float32  # type: ignore[union-attr]
    with pytest.raises(FewbitsError, match="eps"):
        fold_batch_norm(weight, None, ones, ones, ones, ones, 1.0)
    with pytest.raises(FewbitsError, match="variance"):
        fold_batch_norm(weight, None, ones, -ones, ones, ones, 1e-5)
    with pytest.raises(FewbitsError, match="channels"):
        fold_batch_norm(weight, None, torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(3), 1e-5)


def test_folds_change_nothing_in_place_and_check_shapes() -> None:
    weight, scale = torch.randn(4, 6), torch.rand(6) + 0.5
    before = weight.clone()
    assert scale_inputs(weight.half(), scale).dtype == torch.float16
    scale_inputs(weight, scale)
    absorb_shift(weight, None, scale)
    fold_into_outputs(weight, None, torch.ones(4))
    assert torch.equal(weight, before)
    for call in (
        lambda: scale_inputs(weight, scale[:5]),
        lambda: absorb_shift(weight, None, scale[:5]),
        lambda: fold_into_norm(scale, None, scale[:5]),
        lambda: fold_into_outputs(weight, None, scale),
        lambda: fold_into_outputs(weight, None, torch.ones(4), torch.ones(5)),
        lambda: scale_inputs(weight, scale, groups=2),
    ):
        with pytest.raises(FewbitsError, match="fold"):
            call()


# -- smoothing -------------------------------------------------------------------------------------------------------


def outliers(seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    x = randn(200, 16, seed=seed).float()
    x[:, [2, 11]] *= 60
    return x, [randn(8, 16, seed=seed + i).float() / 4 for i in (1, 2, 3)]


@given(st.integers(0, 1000), st.floats(0, 1))
def test_migration_strength(seed: int, alpha: float) -> None:
    x, weights = outliers(seed)
    act = x.abs().amax(0)
    s = smoothing_scales(act, weights, alpha)
    smooth_act = act / s
    smooth_weight = torch.stack([(w * s).abs().amax(0) for w in weights]).amax(0)
    # the geometric balance: log-linear between "all in the activations" and "all in the weights"
    weight_max = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    torch.testing.assert_close(smooth_act, (act * weight_max) ** (1 - alpha), rtol=1e-4, atol=0)
    torch.testing.assert_close(smooth_weight, (act * weight_max) ** alpha, rtol=1e-4, atol=0)
    if alpha == 0.5:
        torch.testing.assert_close(smooth_act, smooth_weight)


def test_ends_and_balance() -> None:
    x, weights = outliers()
    act = x.abs().amax(0)
    torch.testing.assert_close(act / smoothing_scales(act, weights, 1.0), torch.ones(16))
    s = smoothing_scales(act, weights, 0.0)
    torch.testing.assert_close(torch.cat([w * s for w in weights]).abs().amax(0), torch.ones(16))
    s = smoothing_scales(act, weights, 0.5)
    torch.testing.assert_close(act / s, torch.cat([w * s for w in weights]).abs().amax(0))


def test_all_readers_count() -> None:
    x, weights = outliers()
    act = x.abs().amax(0)
    both = smoothing_scales(act, weights, 0.5)
    assert not torch.equal(both, smoothing_scales(act, weights[:1], 0.5))
    # equal to the smoothing for the stacked weight, whatever the order
    torch.testing.assert_close(both, smoothing_scales(act, [torch.cat(weights)], 0.5))
    conv = smoothing_scales(act, [w.view(8, 16, 1, 1).expand(8, 16, 3, 3) for w in weights], 0.5)
    torch.testing.assert_close(both, conv)


def test_dead_channels_and_columns() -> None:
    x, weights = outliers()
    act = x.abs().amax(0)
    act[5] = 0
    for w in weights:
        w[:, 7] = 0
    assert smoothing_scales(act, weights, 0.5)[5] == 1
    assert smoothing_scales(act, weights, 0.5, dead="clamp")[5] == pytest.approx(1e-5)
    s = smoothing_scales(act, weights, 0.5)
    assert s.isfinite().all() and s[7] > s.median()


def error(x: Tensor, weight: Tensor) -> float:
    fmt = symmetric(8)

    def simulated(value: Tensor, gran: PerTensor | PerChannel) -> Tensor:
        return quantize(value, fmt, gran, AbsMax().fit(value, fmt, gran))

    return float(
        (F.linear(simulated(x, PerTensor()), simulated(weight, PerChannel(0))) - F.linear(x, weight)).square().mean()
    )


def test_outliers_stop_hurting() -> None:
    x, weights = outliers()
    s = smoothing_scales(x.abs().amax(0), weights, 0.5)
    assert error(x / s, weights[0] * s) < 0.25 * error(x, weights[0])
    plain = x.clone()
    plain[:, [2, 11]] /= 60
    s = smoothing_scales(plain.abs().amax(0), weights, 0.5)
    assert 0.3 < error(plain / s, weights[0] * s) / error(plain, weights[0]) < 3


def test_integer_product_equals_the_simulated_one() -> None:
    x, weights = outliers()
    fmt = symmetric(8)
    xs, ws = AbsMax().fit(x, fmt, PerToken()), AbsMax().fit(weights[0], fmt, PerChannel(0))
    integer = encode(x, fmt, PerToken(), xs).int() @ encode(weights[0], fmt, PerChannel(0), ws).int().T
    simulated = F.linear(quantize(x, fmt, PerToken(), xs), quantize(weights[0], fmt, PerChannel(0), ws))
    torch.testing.assert_close(integer.float() * xs["scale"] * ws["scale"].T, simulated, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("act", "weights", "alpha", "match"),
    [
        (torch.ones(4), [], 0.5, "no weight"),
        (torch.ones(4), [torch.ones(2, 5)], 0.5, "does not read"),
        (torch.tensor([1.0, math.nan, 1, 1]), [torch.ones(2, 4)], 0.5, "finite"),
        (-torch.ones(4), [torch.ones(2, 4)], 0.5, "negative"),
        (torch.ones(4), [torch.ones(2, 4)], 1.5, "alpha"),
    ],
)
def test_smoothing_refuses(act: Tensor, weights: list[Tensor], alpha: float, match: str) -> None:
    with pytest.raises(FewbitsError, match=match):
        smoothing_scales(act, weights, alpha)


# -- reparameterization ----------------------------------------------------------------------------------------------


def channels(seed: int, count: int = 12) -> tuple[Tensor, Uniform, dict[str, Tensor]]:
    x = randn(4, 50, count, seed=seed) * rand(count, seed=seed, low=0.05) * 3 + randn(count, seed=seed + 1)
    fmt = raw_affine(4)
    return x.float(), fmt, QuantileSearch().fit(x.float(), fmt, PerChannel(-1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_per_tensor_codes_are_the_per_channel_codes(seed: int) -> None:
    x, fmt, params = channels(seed)
    found = reparameterize(params["scale"], params["zero_point"])
    assert found.scale.shape == found.zero_point.shape == () and found.zero_point == found.zero_point.round()
    moved = ((x.double() + found.shift) / found.r1).float()
    whole = {"scale": found.scale, "zero_point": found.zero_point}
    ours, theirs = encode(moved, fmt, PerTensor(), whole), encode(x, fmt, PerChannel(-1), params)
    ratio = x / params["scale"]
    tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-3
    assert torch.equal(ours[~tie], theirs[~tie])
    # dequantized values are the same affine map of each other
    ours_value, theirs_value = quantize(moved, fmt, PerTensor(), whole), quantize(x, fmt, PerChannel(-1), params)
    back = found.r1 * ours_value - found.shift
    torch.testing.assert_close(back[~tie], theirs_value[~tie], rtol=1e-4, atol=1e-4)


def test_norm_and_linear_keep_their_function() -> None:
    x, _, params = channels(0)
    gamma, beta, weight = randn(12, seed=5), randn(12, seed=6), randn(7, 12, seed=7)
    for rounded in (True, False):
        found = reparameterize(params["scale"], params["zero_point"], round_zero_point=rounded)
        y = F.linear(F.layer_norm(x.double(), (12,), gamma, beta), weight)
        inner = F.layer_norm(x.double(), (12,), *fold_into_norm(gamma, beta, found.r1, found.shift))
        bias = absorb_shift(weight, None, found.shift)
        torch.testing.assert_close(F.linear(inner, scale_inputs(weight, found.r1.double()), bias), y, **EXACT)


def test_equal_channels_are_left_alone() -> None:
    found = reparameterize(torch.full((1, 1, 9), 0.3), torch.full((1, 1, 9), 7.0))
    assert torch.equal(found.r1, torch.ones(9)) and torch.equal(found.shift, torch.zeros(9))


def test_definitions() -> None:
    s, z = torch.tensor([0.1, 0.4, 0.7]), torch.tensor([3.0, -2.0, 9.0])
    found = reparameterize(s, z, round_zero_point=False)
    torch.testing.assert_close(found.scale, s.mean())
    torch.testing.assert_close(found.zero_point, z.mean())
    torch.testing.assert_close(found.r1, s / s.mean())
    torch.testing.assert_close(found.shift, s * (z - z.mean()))
    rounded = reparameterize(s, z)
    assert rounded.zero_point == 3
    torch.testing.assert_close(rounded.shift, s * (z - 3))


def test_constant_channels_move_into_the_bias() -> None:
    x, fmt, _ = channels(3)
    x[..., 4], x[..., 8] = 2.5, 0.0
    params = QuantileSearch().fit(x, fmt, PerChannel(-1))
    flat = x.flatten(0, 1)
    found = reparameterize(params["scale"], params["zero_point"], bounds=(flat.amin(0), flat.amax(0)))
    live = torch.ones(12, dtype=torch.bool).index_fill(0, torch.tensor([4, 8]), False)
    torch.testing.assert_close(found.scale, params["scale"].flatten()[live].mean())
    assert found.r1[4] == 1 and found.r1[8] == 1
    moved = (x + found.shift) / found.r1
    assert (moved[..., 4] == 0).all() and (moved[..., 8] == 0).all()
    weight = randn(3, 12).float()
    restored = F.linear(moved, scale_inputs(weight, found.r1), absorb_shift(weight, None, found.shift))
    torch.testing.assert_close(restored, F.linear(x, weight), rtol=1e-4, atol=1e-4)
    # where only the grid is known, a step of (next to) no size says the same
    tiny = reparameterize(torch.tensor([1e-8, 0.5]), torch.tensor([-3e8, 4.0]))
    assert tiny.scale == 0.5 and tiny.r1[0] == 1
    torch.testing.assert_close(3.0 + tiny.shift[0], torch.tensor(0.0), rtol=0, atol=1e-5)
    all_dead = reparameterize(torch.ones(3), torch.zeros(3), bounds=(torch.ones(3), torch.ones(3)))
    assert all_dead.scale.isfinite() and torch.equal(all_dead.shift, -torch.ones(3))


@pytest.mark.parametrize("scale", [[0.0, 1.0], [math.nan, 1.0], [-1.0, 1.0], [1.0]])
def test_reparameterize_refuses(scale: list[float]) -> None:
    with pytest.raises(FewbitsError, match="reparameterize"):
        reparameterize(torch.tensor(scale), torch.zeros(2))


def test_per_channel_calibration_is_never_worse_on_uneven_channels() -> None:
    x = randn(4, 50, 12).float() * torch.logspace(-1, 1, 12)
    fmt = affine(4)
    losses = []
    for gran in (PerChannel(-1), PerTensor()):
        losses.append(float((quantize(x, fmt, gran, QuantileSearch().fit(x, fmt, gran)) - x).square().mean()))
    assert losses[0] < losses[1]
