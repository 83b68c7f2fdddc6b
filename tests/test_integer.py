"""Integer-only inference: fixed-point arithmetic, integer operations, the recipe's placement, and the executor."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fewbits
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.engine.run import QuantizeResult
from fewbits.engine.statistics import MovingBounds
from fewbits.errors import FewbitsError
from fewbits.export.integer import IntegerProgram, build, compare
from fewbits.export.integer.program import step
from fewbits.formats import PerTensor, integer_affine
from fewbits.graph import record
from fewbits.graph.requantize import find_placement
from fewbits.hub import checkpoint
from fewbits.kernels import fixed_point as fp
from fewbits.kernels import integer_ops as ops
from fewbits.papers import build_recipe
from fewbits.ranges import Fixed
from fewbits.steps.batchnorm import FoldBatchNorm
from golden import folder

RECIPE = "jacob-integer-only"
INT32 = st.integers(-(2**31), 2**31 - 1)
REAL = st.floats(-1e4, 1e4, width=32)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def half_away(value: Fraction) -> int:
    """Nearest integer, ties away from zero, exactly."""
    whole = math.floor(abs(value) + Fraction(1, 2))
    return whole if value >= 0 else -whole


def uint8(generator: torch.Generator, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, 256, shape, generator=generator).to(torch.uint8)


# -- parameters ------------------------------------------------------------------------------------------------------


@given(REAL, REAL, st.integers(2, 8), st.booleans())
def test_zero_has_a_code_of_its_own_whatever_the_range(a: float, b: float, bits: int, narrow: bool) -> None:
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero = fp.affine_parameters(low, high, bits, narrow=narrow)
    lowest, top = (1 if narrow else 0), 2**bits - 1
    assert scale > 0 and lowest <= int(zero) <= top and zero.dtype == torch.int32
    code = fp.quantize(torch.zeros(1), scale, zero, low=lowest, high=top)
    assert int(code) == int(zero) and float(fp.dequantize(code, scale, zero)) == 0.0
    wide = fp.affine_parameters(low.clamp_max(0), high.clamp_min(0), bits, narrow=narrow)
    assert (scale, zero) == wide, "a range that excludes zero acts as one that reaches to it"
    ends = fp.quantize(torch.stack([low, high]), scale, zero, low=lowest, high=top)
    # half a step of rounding and half a step of the rounded zero point
    assert bool(((fp.dequantize(ends, scale, zero) - torch.stack([low, high])).abs() <= 1.001 * scale).all())


def test_parameters_of_known_ranges() -> None:
    ends = torch.tensor([[0.0, 0.0], [-0.5, 254.5], [3.0, 5.1], [-5.1, -2.0], [-1.0, 1.55]])
    scale, zero = fp.affine_parameters(ends[:, 0], ends[:, 1])
    assert scale.tolist() == pytest.approx([1, 1, 0.02, 0.02, 0.01]) and scale[0] == 1
    assert zero.tolist() == [0, 1, 0, 255, 100], "a dead range gets the lowest code; a tie goes away from zero"
    scale, zero = fp.affine_parameters(torch.tensor(-1.27), torch.tensor(1.27), narrow=True)
    codes = fp.quantize(torch.linspace(-2, 2, 9), scale, zero, low=1)
    assert int(zero) == 128 and codes.min() == 1 and codes.max() == 255, "the code 0 (int8 -128) is left free"
    for low, high in ((math.nan, 1.0), (0.0, math.inf), (1.0, 0.0)):
        with pytest.raises(FewbitsError, match="finite ends"):
            fp.affine_parameters(torch.tensor(low), torch.tensor(high))


def test_the_recipes_grid_is_the_same_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in (4, 6, 8):
        for narrow in (False, True):
            x = torch.randn(200, generator=generator) * 3 + 1
            fmt = integer_affine(bits, narrow=narrow)
            params = fmt.from_range(x.min(), x.max())
            scale, zero = fp.affine_parameters(x.min(), x.max(), bits, narrow=narrow)
            lift = 2 ** (bits - 1) if narrow else 0
            assert params["scale"] == scale and int(params["zero_point"]) + lift == int(zero)
            codes = fp.quantize(x, scale, zero, low=int(narrow), high=2**bits - 1)
            assert torch.equal(fmt.encode(x, params).int() + lift, codes.int())


# -- fixed point -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(INT32, INT32), min_size=1, max_size=20))
def test_high_multiply_is_exact(pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor(side, dtype=torch.int32) for side in zip(*pairs, strict=True))
    # the released form rounds ties of negative products towards zero: nudge 1 - 2^30, then truncation
    for x, y, found in zip(a.tolist(), b.tolist(), fp.high_multiply(a, b).tolist(), strict=True):
        exact = Fraction(x * y, 2**31)
        tie = exact < 0 and (exact * 2).denominator == 1 and exact.denominator == 2
        expected = math.ceil(exact) if tie else half_away(exact)
        assert found == min(expected, 2**31 - 1)


def test_high_multiply_saturates_in_one_case_only() -> None:
    least = -(2**31)
    assert fp.high_multiply(int32(least, least, 2**31 - 1), int32(least, 2**31 - 1, 2**31 - 1)).tolist() == [
        2**31 - 1, -(2**31 - 1), 2**31 - 2,
    ]  # fmt: skip
    with pytest.raises(FewbitsError, match="int32"):
        fp.high_multiply(torch.ones(1), int32(1))


@given(st.lists(INT32, min_size=1, max_size=20), st.integers(0, 40))
def test_shift_right_sends_ties_away_from_zero(values: list[int], exponent: int) -> None:
    found = fp.shift_right(torch.tensor(values, dtype=torch.int32), exponent)
    assert found.dtype == torch.int32
    assert found.tolist() == [half_away(Fraction(value, 2**exponent)) for value in values]


def test_shift_right_of_known_ties() -> None:
    assert fp.shift_right(int32(-6, 6, 5, -5, 2, -2), 2).tolist() == [-2, 2, 1, -1, 1, -1]


@given(st.floats(1e-12, 1, exclude_max=True))
def test_a_multiplier_is_within_its_last_bit(factor: float) -> None:
    found = fp.decompose(torch.tensor(factor, dtype=torch.float64), signed=False)
    mantissa, shift = int(found.mantissa), int(found.shift)
    assert 2**30 <= mantissa < 2**31 and shift >= 0
    exact = Fraction(factor)
    assert abs(Fraction(mantissa, 2 ** (31 + shift)) - exact) <= exact / 2**31


@given(st.floats(1, 2.0**30), INT32)
def test_multipliers_of_one_and_more_shift_left_and_saturate(factor: float, acc: int) -> None:
    with pytest.raises(FewbitsError, match="signed variant"):
        fp.decompose(torch.tensor(factor), signed=False)
    multiplier = fp.decompose(torch.tensor(factor, dtype=torch.float64))
    assert int(multiplier.shift) <= 0
    found = int(fp.apply(int32(acc), multiplier))
    # saturation comes before the mantissa, which is at least a half
    exact = Fraction(acc) * Fraction(factor)
    if abs(exact) < 2**30:
        assert abs(found - exact) <= 1 + abs(exact) / 2**31
    else:
        assert abs(found) >= min(abs(exact), 2**30) - 2 and (found > 0) == (acc > 0)


def test_impossible_multipliers_and_tiny_ones() -> None:
    for factor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(FewbitsError, match="positive and finite"):
            fp.decompose(torch.tensor(factor))
    with pytest.raises(FewbitsError, match="2\\^31"):
        fp.decompose(torch.tensor(2.0**32))
    tiny = fp.decompose(torch.tensor(1e-30))
    assert fp.apply(int32(2**31 - 1, -(2**31)), tiny).tolist() == [0, 0]
    nearly = fp.decompose(torch.tensor(1 - 2.0**-40, dtype=torch.float64), signed=False)
    assert (int(nearly.mantissa), int(nearly.shift)) == (2**31 - 1, 0)


def test_biases_are_whole_steps_and_saturate_loudly() -> None:
    codes, saturated = fp.quantize_bias(torch.tensor([0.25, -0.35, 0.0]), torch.tensor(0.1))
    assert codes.tolist() == [3, -3, 0] or codes.tolist() == [2, -3, 0]
    assert codes.dtype == torch.int32 and saturated == 0
    codes, saturated = fp.quantize_bias(torch.tensor([1.0, -1.0, 1e-12]), torch.tensor(1e-12))
    assert codes.tolist() == [2**31 - 1, -(2**31), 1] and saturated == 2
    with pytest.raises(FewbitsError, match="NaN or infinite"):
        fp.quantize_bias(torch.tensor([math.nan]), torch.tensor(1.0))


# -- operations ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 2**20))
def test_a_layer_is_its_definition_bit_for_bit(depth: int, out: int, rows: int, channels: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = uint8(generator, rows, depth), uint8(generator, out, depth, low=1)
    zero_x = torch.randint(0, 256, (), generator=generator, dtype=torch.int32)
    zero_w = torch.randint(0, 256, (out,) if channels else (), generator=generator, dtype=torch.int32)
    bias = torch.randint(-(2**24), 2**24, (out,), generator=generator, dtype=torch.int32)
    acc = ops.linear(x, zero_x, w, zero_w, bias)
    centred_w = w.long() - (zero_w[:, None] if channels else zero_w)
    expected = (x.long() - zero_x) @ centred_w.T + bias
    assert acc.dtype == torch.int32 and torch.equal(acc.long(), expected), "sums of rows and columns change nothing"
    factors = torch.rand((out,) if channels else (), generator=generator) * 0.01 + 1e-5
    multiplier = fp.decompose(factors, signed=False)
    found = ops.Output(multiplier, int32(17)[0], 17, 250)(acc)
    mantissas, shifts = (part.expand(out).tolist() for part in multiplier)
    for row in range(rows):
        for column in range(out):
            high = half_away(Fraction(int(expected[row, column]) * mantissas[column], 2**31))
            exact = half_away(Fraction(high, 2 ** shifts[column])) + 17
            assert int(found[row, column]) == min(max(exact, 17), 250)


@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 1, "padding": 1, "dilation": 1, "groups": 1},
        {"stride": 2, "padding": 0, "dilation": 2, "groups": 2},
        {"stride": (1, 2), "padding": (2, 1), "dilation": 1, "groups": 6},
    ],
)
def test_convolutions_count_padding_as_zero(geometry: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = uint8(generator, 2, 6, 9, 8), uint8(generator, 12, 6 // geometry["groups"], 3, 3)
    zero_x, zero_w = int32(131)[0], torch.randint(0, 256, (12,), generator=generator, dtype=torch.int32)
    acc = ops.convolution(x, zero_x, w, zero_w, **geometry)
    exact = F.conv2d(x.double() - 131, w.double() - zero_w.view(-1, 1, 1, 1), **geometry)
    assert acc.dtype == torch.int32 and torch.equal(acc.double(), exact)


def test_accumulators_that_could_overflow_are_refused() -> None:
    assert ops.check_depth(33025) is None
    with pytest.raises(FewbitsError, match="33026 products"):
        ops.check_depth(33026)
    deep = torch.full((1, 33025), 255, dtype=torch.uint8)
    assert int(ops.linear(deep, int32(0)[0], deep, int32(0)[0])) == 33025 * 255 * 255
    for zero_x, zero_w in ((255, 0), (0, 255), (255, 255)):
        expected = 33025 * (255 - zero_x) * (255 - zero_w)
        assert int(ops.linear(deep, int32(zero_x)[0], deep, int32(zero_w)[0])) == expected
    assert ops.add_bias(int32(2**31 - 5), int32(10), -1).tolist() == [2**31 - 1], "saturates, does not wrap"


def test_floats_are_refused_everywhere() -> None:
    codes, zero = torch.zeros(1, 2, dtype=torch.uint8), int32(0)[0]
    for run in (
        lambda: ops.linear(codes.float(), zero, codes, zero),
        lambda: ops.linear(codes, zero, codes, zero, torch.ones(1)),
        lambda: ops.concatenate([codes, codes.int()], 0),
        lambda: ops.rescale(codes.float(), zero),
        lambda: fp.apply(torch.ones(1), fp.decompose(torch.tensor(0.5))),
    ):
        with pytest.raises(FewbitsError, match=r"uint8|int32"):
            run()


@given(st.integers(0, 2**20))
def test_sums_and_products_are_within_a_step(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = uint8(generator, 300), uint8(generator, 300)
    scales = torch.rand(2, generator=generator) * torch.tensor([1.0, 10.0]) ** torch.randn((), generator=generator)
    zeros = torch.randint(0, 256, (2,), generator=generator, dtype=torch.int32)
    real_a, real_b = (fp.dequantize(x, s, z) for x, s, z in zip((a, b), scales, zeros, strict=True))
    for real, kind in ((real_a.double() + real_b, "add"), (real_a.double() * real_b, "multiply")):
        scale, zero = fp.affine_parameters(real.min(), real.max())
        if kind == "add":
            left, right, rest = ops.add_factors(scales[0], scales[1], scale)
            acc = ops.add(a, zeros[0], b, zeros[1], (fp.decompose(left), fp.decompose(right)))
        else:
            acc, rest = ops.multiply(a, zeros[0], b, zeros[1]), scales[0] * scales[1] / scale
        found = ops.Output(fp.decompose(rest), zero)(acc)
        exact = (real / scale.double() + zero).clamp(0, 255)
        multiplier = fp.decompose(rest)
        # half a step, and half a unit of what the first of the two roundings keeps
        assert float((found.double() - exact).abs().max()) <= 0.501 + 2.0 ** -(int(multiplier.shift) + 1)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.booleans(), st.booleans(), st.integers(4, 9))
def test_average_pools_round_as_codes_do(
    kernel: int, stride: int, padding: int, ceil_mode: bool, counted: bool, size: int
) -> None:
    padding = min(padding, kernel // 2)
    generator = torch.Generator().manual_seed(size)
    x, zero = uint8(generator, 2, 3, size, size), int32(90)[0]
    found = ops.average_pool(
        x, zero, [kernel] * 2, [stride] * 2, [padding] * 2, ceil_mode=ceil_mode, count_include_pad=counted
    )
    exact = F.avg_pool2d(x.double() - 90, kernel, stride, padding, ceil_mode, counted) + 90
    assert torch.equal(found.double(), torch.floor(exact + 0.5 + 1e-9)), "integer division, ties up among codes"


def test_the_other_operations() -> None:
    generator = torch.Generator().manual_seed(1)
    x, zero = uint8(generator, 2, 3, 7, 7), int32(40)[0]
    found = ops.global_average(x, zero, [2, 3], True)
    assert torch.equal(found.double(), torch.floor(x.double().mean((2, 3), keepdim=True) + 0.5))
    assert torch.equal(ops.max_pool(x, kernel_size=3, stride=2, padding=1).double(),
                       F.max_pool2d(x.double(), 3, 2, 1))  # fmt: skip
    table = uint8(generator, 256)
    assert torch.equal(ops.look_up(x, table), table[x.long()])
    halved = ops.Output(fp.decompose(torch.tensor(0.5 / 2**20)), int32(10)[0])(ops.rescale(x, zero))
    exact = (x.double() - 40) / 2
    assert torch.equal(halved.double(), (10 + exact.sign() * torch.floor(exact.abs() + 0.5)).clamp(0, 255))
    weight, bias = int32(3, -2, 0), int32(5, 7, 1000)
    acc = ops.affine_channels(x, zero, weight, bias)
    assert torch.equal(acc, (x.int() - 40) * weight.view(1, 3, 1, 1) + bias.view(1, 3, 1, 1))
    a, b = uint8(generator, 2, 3, 5), uint8(generator, 2, 5, 4)
    assert torch.equal(ops.product(a, zero, b, zero).long(), (a.long() - 40) @ (b.long() - 40))


@given(st.integers(0, 2**20), st.booleans())
def test_an_integer_layer_is_within_a_step_of_its_simulation(seed: int, relu: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(5, 24, generator=generator), torch.randn(7, 24, generator=generator)
    bias = torch.randn(7, generator=generator)
    (sx, zx), (sw, zw) = (fp.affine_parameters(t.min(), t.max()) for t in (x, w))
    qx, qw = fp.quantize(x, sx, zx), fp.quantize(w, sw, zw)
    qb, _ = fp.quantize_bias(bias, sx * sw)
    y = F.linear(fp.dequantize(qx, sx, zx), fp.dequantize(qw, sw, zw), qb.float() * (sx * sw))
    y = y.relu() if relu else y
    sy, zy = fp.affine_parameters(y.min(), y.max())
    simulated = fp.quantize(y, sy, zy)
    out = ops.Output(fp.decompose(fp.layer_multiplier(sx, sw, sy)), zy, int(zy) if relu else 0)
    gap = (out(ops.linear(qx, zx, qw, zw, qb)).int() - simulated.int()).abs()
    assert int(gap.max()) <= 1 and float((gap > 0).float().mean()) < 0.2


# -- the recipe ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every operation of the executor: layers with and without norm and ReLU, depthwise, sums, products, concatenation,
    pools of all kinds, a norm of its own, an activation of its own, layout, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.side = nn.Conv2d(8, 4, 3, padding=1)
        self.free_norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.last, self.head = nn.Conv2d(12, 6, 3, stride=2, dilation=2, padding=2), nn.Linear(6, 5)
        self.pool, self.average = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_norm(self.stem(x)))
        y = self.point(F.relu_(self.depthwise_norm(self.depthwise(x))))
        x = F.relu(x + y)
        x = self.pool(x)
        x = torch.cat([x, self.side(x)], 1)
        x = F.relu(self.free_norm(x))
        gate = torch.sigmoid(self.excite(F.hardswish(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = F.pad(self.average(x * gate), (1, 0, 0, 1))
        x = self.last(x).mean((2, 3))
        return self.head(x.flatten(1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(-1.5, 1.5)
        norm.bias.data.normal_(0, 0.5)
    return model.eval()


def quantized(
    model: nn.Module | None = None, bits: str = "W8A8", recipe: str = RECIPE, **options: object
) -> QuantizeResult:
    return quantize(model or net(), recipe, images(16), bits=bits, options=options)


def grids(result: QuantizeResult) -> dict[str, tuple[float, float]]:
    return {
        site.name: (float(q.params["scale"]), float(q.params["zero_point"]))
        for site, q in result.attachment.items()
        if site.role != "weight"
    }


def test_bytes_are_made_where_the_paper_makes_them() -> None:
    found = grids(quantized())
    assert set(found) == {
        "stem.input", "relu6.output", "relu.output", "point.output", "relu_1.output", "side.output", "cat.output",
        "relu_2.output", "adaptive_avg_pool2d.output", "squeeze.output", "hardswish.output", "excite.output",
        "sigmoid.output", "mul.output", "average.output", "last.output", "head.input", "head.output",
    }  # fmt: skip
    assert found["cat.output"] == found["side.output"] == found["relu_1.output"], "also through the max pool"
    assert (
        found["adaptive_avg_pool2d.output"] == found["relu_2.output"] and found["average.output"] == found["mul.output"]
    )
    assert found["head.input"] == found["last.output"], "a mean that is no pool stays on the grid too"
    assert found["relu_2.output"] != found["mul.output"] and found["relu6.output"][1] == 0
    assert all(zero == int(zero) and 0 <= zero <= 255 for _, zero in found.values())


def test_weights_are_per_tensor_and_leave_the_lowest_code_free() -> None:
    for options, least, shape in (
        ({}, -127, ()),
        ({"narrow_weights": False}, 0, ()),
        ({"per_channel": True}, -127, (8, 1)),
    ):
        result = quantized(**options)
        codes = result.attachment.codes["stem.weight"].int()
        quantizer = result.attachment.quantizer("stem.weight")
        assert quantizer is not None and quantizer.params["scale"].shape == shape
        assert int(codes.min()) >= least and int(codes.max()) <= (255 if least == 0 else 127)
        assert int(codes.max()) - int(codes.min()) >= 127
        result.attachment.detach()


def test_a_folded_network_is_the_same_function() -> None:
    x = images(4)[0]
    with torch.no_grad():
        before = net()(x)
    result = quantized(bits="W16A8")
    assert {"stem.weight", "head.weight"}.isdisjoint(site.name for site, _ in result.attachment.items())
    with result.attachment.disabled(), torch.no_grad():
        torch.testing.assert_close(result.model(x), before, rtol=1e-5, atol=1e-5)


def test_what_layers_add_is_whole_steps_of_their_accumulators() -> None:
    from fewbits.graph.constants import layer_constants

    shares = {}
    for integer_bias in (True, False):
        result = quantized(integer_bias=integer_bias)
        off = []
        for name, reads in (("stem", "stem.input"), ("depthwise", "relu6.output"), ("head", "head.input")):
            site = result.graph.sites[f"{name}.weight"]
            scales = [float(result.attachment.quantizer(q).params["scale"]) for q in (site.name, reads)]
            call = result.graph.calls[site.call]
            _, constant = layer_constants(result.model, result.graph, call, site.shape[0])
            steps = constant / (scales[0] * scales[1])
            off.append(float((steps - steps.round()).abs().max()))
        shares[integer_bias] = max(off)
        assert not result.notes
        result.attachment.detach()
    assert shares[True] < 0.02 < shares[False]


def test_ranges_can_be_moving_averages() -> None:
    moving = MovingBounds(PerTensor(), 0.9)
    for low, high in ((-1.0, 1.0), (-3.0, 2.0), (0.0, 0.0)):
        moving.update(torch.tensor([low, high]), 1)
    lo, hi = moving.value()
    assert float(lo) == pytest.approx((-1 * 0.9 - 3 * 0.1) * 0.9) and float(hi) == pytest.approx((0.9 + 0.2) * 0.9)
    plain, averaged = grids(quantized()), grids(quantized(ema=0.5))
    assert set(plain) == set(averaged) and sum(averaged[n][0] < plain[n][0] for n in plain) > len(plain) / 2
    assert averaged["cat.output"] == averaged["side.output"]
    with pytest.raises(FewbitsError, match=r"smoothing=1\.5"):
        quantized(ema=1.5)


def test_bad_data_and_bad_bits() -> None:
    broken = [images(4)[0], torch.full((4, 3, 8, 8), math.nan)]
    with pytest.raises(FewbitsError, match="NaN or infinity"):
        quantize(net(), RECIPE, broken, bits="W8A8")
    with pytest.raises(FewbitsError, match="calibration data"):
        quantize(net(), RECIPE, bits="W8A8", example=images(1)[0])
    with pytest.raises(FewbitsError, match="group"):
        build_recipe(RECIPE, "W8A8g32")
    with pytest.raises(FewbitsError, match="low must be below high"):
        Fixed(1.0, 0.0)


def test_dead_layers_stay_at_zero() -> None:
    model = net()
    model.side.weight.data.zero_()
    model.side.bias.data.zero_()
    model.squeeze.weight.data.zero_()
    model.squeeze.bias.data.zero_()
    result = quantized(model)
    assert grids(result)["squeeze.output"] == (1.0, 0.0)
    program = build(result.model, images(1)[0])
    assert compare(program, result.model, images(8)).most <= 1


def test_biases_beyond_32_bits_are_reported_and_refused() -> None:
    for whole in (True, False):
        model = net()
        model.point.weight.data.mul_(1e-9)
        model.point.bias.data.fill_(10)
        result = quantized(model, integer_bias=whole)
        if whole:
            assert any("point.weight: 8 biases leave 32 bits" in note for note in result.notes)
            assert bool((model.point.bias < 1).all()), "the simulation saturates too"
            assert compare(build(model, images(1)[0]), model, images(8)).most <= 1
        else:
            with pytest.raises(FewbitsError, match="point: 8 biases leave 32 bits"):
                build(model, images(1)[0])


def test_other_kinds_of_models_are_simulated_and_named_when_they_cannot_be_integers() -> None:
    model = encoder()
    with torch.no_grad():
        before = model(tokens(4)[0])
    result = quantize(model, RECIPE, tokens(16), bits="W8A8")
    assert not result.notes
    softmax = result.attachment.quantizer("blocks.0.softmax.output")
    assert softmax is not None and float(softmax.params["scale"]) == 1 / 256 and int(softmax.params["zero_point"]) == 0
    with torch.no_grad():
        after = model(tokens(4)[0])
    assert 0 < float((after - before).norm() / before.norm()) < 0.1
    with pytest.raises(FewbitsError, match=r"Encoder: .*blocks\.0\.norm1: layer_norm has no integer form"):
        build(model, tokens(2)[0])


# -- the executor ----------------------------------------------------------------------------------------------------


class NoFloats(TorchDispatchMode):
    """Fails on any operation that reads or makes a floating-point tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, made)):
            assert not (isinstance(value, Tensor) and value.is_floating_point()), func
        return made


def test_no_float_tensor_appears_between_input_and_output() -> None:
    result = quantized()
    program = build(result.model, images(1)[0])
    x = images(4)[0]
    registers = program.encode(x)
    with NoFloats():
        found = program.run(registers)
    assert {value.dtype for value in found.values()} == {torch.uint8}
    codes = found[program.outputs[0].register]
    assert torch.equal(program.outputs[0].grid.decode(codes), program(x))
    with pytest.raises(AssertionError), NoFloats():
        torch.ones(2) + 1


@pytest.mark.parametrize(
    ("bits", "options"),
    [("W8A8", {}), ("W4A8", {}), ("W8A4", {}), ("W6A5", {"ema": 0.9}), ("W8A8", {"per_channel": True}),
     ("W7A7", {"narrow_weights": False}), ("W8A8", {"integer_bias": False})],
)  # fmt: skip
def test_every_operation_is_within_a_step_of_the_simulation(bits: str, options: dict) -> None:
    result = quantized(bits=bits, **options)
    program = build(result.model, images(1)[0])
    kinds = {op.kind for op in program.ops}
    assert kinds == {
        "add", "average", "channels", "concatenate", "convolution", "global_average", "layout", "linear", "max_pool",
        "multiply", "pad", "table",
    }  # fmt: skip
    found = compare(program, result.model, images(12))
    made = {site.name for site, _ in result.attachment.items() if site.role != "weight"}
    assert set(found.sites) == made - {"stem.input"}, "every quantizer is judged"
    assert found.most <= 1, found.sites
    assert found.share < (0.02 if options.get("integer_bias", True) else 0.05)
    assert found.agreement >= 0.75 and found.samples == 12
    top = 2 ** int(bits[-1]) - 1
    held = program.run(program.encode(images(4)[0]))
    assert max(int(held[op.writes].max()) for op in program.ops if op.kind != "layout") <= top
    result.attachment.detach()


def test_a_quantizer_in_the_wrong_place_shows() -> None:
    """The control of the oracle: grids that the program was not built from are more than a step away."""
    result = quantized()
    program = build(result.model, images(1)[0])
    assert compare(program, result.model, images(4)).most <= 1
    moved = result.attachment.quantizer("relu.output")
    assert moved is not None
    result.attachment.set_quantizer("relu.output", None)
    result.attachment.set_quantizer("depthwise_norm.output", moved)  # between layer and ReLU
    moved.params["zero_point"].fill_(128)
    found = compare(program, result.model, images(4))
    assert found.sites["point.output"].free_most > 1
    with pytest.raises(FewbitsError, match=r"relu\.output carries no quantizer"):
        build(result.model, images(1)[0])


def test_norms_that_were_not_folded_become_multipliers_per_channel() -> None:
    built = build_recipe(RECIPE, "W8A8")
    steps = tuple(step for step in built.steps if not isinstance(step, FoldBatchNorm))
    model = net()
    with pytest.raises(FewbitsError, match="not folded and flips signs"):
        result = quantize(model, dataclasses.replace(built, steps=steps), images(8))
        assert any("batch norm still scales" in note for note in result.notes)
        build(result.model, images(1)[0])
    model = net()
    for norm in (model.stem_norm, model.depthwise_norm):
        norm.weight.data.abs_().add_(0.1)
    result = quantize(model, dataclasses.replace(built, steps=steps), images(8))
    program = build(result.model, images(1)[0])
    (stem,) = (op for op in program.ops if op.name == "relu6.output")
    assert stem.tensors["mantissa"].shape == (8,)
    assert compare(program, result.model, images(8)).most <= 1


def test_an_output_without_quantizer_leaves_as_accumulators() -> None:
    result = quantized(quantize_output=False)
    assert "head.output" not in grids(result)
    program = build(result.model, images(1)[0])
    x = images(4)[0]
    codes = program.run(program.encode(x))[program.outputs[0].register]
    assert codes.dtype == torch.int32 and program.outputs[0].grid.accumulator
    with torch.no_grad():
        torch.testing.assert_close(program(x), result.model(x), rtol=0.1, atol=0.2)
    found = compare(program, result.model, [x])
    assert found.most <= 1 and found.difference < 0.1 * found.scale + 0.1


def test_sums_of_other_grids_and_changed_widths() -> None:
    """A site that the user gives other bits no longer shares its grid; integers then rescale."""
    result = quantized(sites="side.output:6")
    program = build(result.model, images(1)[0])
    assert any(op.kind == "rescale" for op in program.ops)
    assert compare(program, result.model, images(8)).most <= 1


def test_unsupported_ops_are_all_named() -> None:
    result = quantize(skipnet(), RECIPE, images(8), bits="W8A8")
    with pytest.raises(FewbitsError, match="interpolate has no integer form"):
        build(result.model, images(1)[0])
    result.attachment.detach()
    with pytest.raises(FewbitsError, match="carries no quantizers"):
        build(result.model, images(1)[0])
    result = quantized(exclude="point.*")
    with pytest.raises(FewbitsError, match=r"point\.weight is not quantized"):
        build(result.model, images(1)[0])
    result = quantize(net(), "rtn", images(8), bits="W4A8")
    with pytest.raises(FewbitsError, match=r"no integer-only form of Net.*the recipe jacob-integer-only"):
        build(result.model, images(1)[0])


class Moves(nn.Module):
    """Layout only: channel shuffle, chunks, slices, permutations, a module that runs twice, two inputs' worth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x[:, 1:5].transpose(2, 3))
        left, right = x.chunk(2, 1)
        left = self.b(self.b(left))
        x = torch.cat([left, right], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.norm(x.flatten(2).permute(0, 2, 1)[..., :, :])


def test_layout_moves_codes_for_any_batch() -> None:
    torch.manual_seed(0)
    data = list(torch.randn(12, 6, 4, 5).split(4))
    result = quantize(Moves().eval(), RECIPE, data, bits="W8A8")
    program = build(result.model, data[0][:1])
    for batch in (data[0], data[1][:3]):
        found = compare(program, result.model, [batch])
        assert found.most <= 1 and program(batch).shape == (len(batch), 20, 8)
    assert [op.name for op in program.ops].count("b.output") == 2


@pytest.mark.parametrize("other", ["gptq", "adaround", "dfq"])
def test_other_papers_round_or_transform_for_the_same_executor(other: str) -> None:
    options = {"adaround.iterations": 4} if other == "adaround" else {}
    result = quantized(recipe=f"{other}+{RECIPE}", bits="W6A8", **options)
    program = build(result.model, images(1)[0])
    found = compare(program, result.model, images(8))
    assert found.most <= 1 and result.attachment.quantizer("cat.output") is not None


def test_a_program_is_the_same_after_saving(tmp_path: Path) -> None:
    result = quantized(quantize_output=False)
    program = build(result.model, images(1)[0])
    program.save(tmp_path / "program")
    again = IntegerProgram.load(tmp_path / "program")
    x = images(4)[0]
    assert torch.equal(again(x), program(x)) and again.inputs == program.inputs and again.outputs == program.outputs
    assert sorted(path.name for path in (tmp_path / "program").iterdir()) == ["program.json", "program.safetensors"]
    described = json.loads((tmp_path / "program" / "program.json").read_text())
    described["ops"][0]["kind"] = "system"
    file = tmp_path / "program" / "program.json"
    for change, message in (
        (json.dumps(described), "not known"),
        ("{", "damaged"),
        ("{}", "not an integer program"),
        (json.dumps({**described, "ops": []}), "nothing wrote"),
        (json.dumps({**described, "ops": [{"kind": "add"}]}), "damaged"),
        (json.dumps({**described, "tensors_sha256": "0"}), "not what was saved"),
    ):
        file.write_text(change)
        with pytest.raises(FewbitsError, match=message):
            IntegerProgram.load(tmp_path / "program")
    with pytest.raises(FewbitsError, match="no integer program"):
        IntegerProgram.load(tmp_path)


def test_inputs_are_checked() -> None:
    program = build(quantized().model, images(1)[0])
    with pytest.raises(FewbitsError, match="NaN"):
        program(torch.full((1, 3, 8, 8), math.nan))
    with pytest.raises(FewbitsError, match="needs 1 inputs"):
        program()
    floating = dataclasses.replace(program.ops[0], tensors={"weight": torch.ones(1)})
    with pytest.raises((FewbitsError, KeyError)):
        step(floating, program.encode(images(1)[0]))


def test_the_placement_of_a_residual_network() -> None:
    graph = record(skipnet(), images(1)[0])
    placement = find_placement(graph)
    names = [[graph.calls[c.index].op for c in chain] for chain in placement.chains.values()]
    assert ["conv2d", "batch_norm", "relu"] in names and ["add", "relu"] in names and ["conv2d", "batch_norm"] in names
    assert "stem.input" in placement.entering
    (group,) = (group for group in placement.shared if any("cat" in name for name in group))
    assert {"relu.output", "cat.output"} <= set(group)


def zoo_model(name: str) -> tuple[fewbits.LoadedModel, list[Tensor], list[Tensor]]:
    zoo, data = folder("FEWBITS_ZOO"), folder("FEWBITS_DATA")
    assert zoo is not None and data is not None
    loaded = fewbits.load_model(str(zoo / name))
    calibration = fewbits.load_data(str(data / "cifar10/calibration.parquet"), loaded, samples=32, batch_size=16)
    test = fewbits.load_data(str(data / "cifar10/test.parquet"), loaded, samples=8, purpose="evaluation", batch_size=8)
    return loaded, list(calibration.batches()), [batch.inputs for batch in test]


@pytest.mark.skipif(
    folder("FEWBITS_ZOO") is None or folder("FEWBITS_DATA") is None, reason="FEWBITS_ZOO or FEWBITS_DATA is not set"
)
@pytest.mark.parametrize(
    ("name", "differing"), [("resnet10t_w32", 0.005), ("mobilenetv2_050", 0.02), ("densenet_k16", 0.005)]
)
def test_trained_networks_run_in_integers(name: str, differing: float) -> None:
    loaded, calibration, test = zoo_model(name)
    result = quantize(loaded.model, RECIPE, calibration, bits="W8A8")
    program = build(result.model, loaded.example_batch(1))
    found = compare(program, result.model, test)
    assert found.most <= 1 and found.share < differing and found.agreement >= 7 / 8, found.to_dict()
    made = {site.name for site, _ in result.attachment.items() if site.role != "weight"}
    assert len(made - set(found.sites)) == 1, "all but the network's input"


def test_a_checkpoint_is_exported_and_checked(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from safetensors.torch import save_file

    import zoo_tiny

    model, _, _ = zoo_tiny.MODELS["timm-resnet"]()
    source = tmp_path / "model"
    source.mkdir()
    save_file(dict(model.state_dict()), source / "model.safetensors")
    config = {
        "architecture": "resnet18",
        "num_classes": 10,
        "model_args": {"layers": [2, 1, 1, 1], "channels": [8, 12, 16, 24], "stem_width": 8},
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (source / "config.json").write_text(json.dumps(config))
    loaded = fewbits.load_model(str(source))
    data = list(torch.randn(8, 3, 64, 64).split(4))
    result = quantize(loaded.model, RECIPE, data, bits="W8A8", example=loaded.example_batch(1))
    checkpoint.save(tmp_path / "int8", result, loaded, {})
    before = build(result.model, loaded.example_batch(1))
    from fewbits.export.workflow import export_reference

    report = export_reference(tmp_path / "int8", to="integer", out=tmp_path / "program")
    (comparison,) = report["comparison"]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert comparison["most_steps"] <= 1 and report["written"]["ops"]["convolution"] == convolutions
    again = IntegerProgram.load(tmp_path / "program")
    assert torch.equal(again(data[0]), before(data[0])), "the checkpoint gives the same integers"
