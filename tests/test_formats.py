"""What every format must keep at every granularity."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import (
    Codebook,
    Float8,
    Format,
    Granularity,
    Log2,
    LogSqrt2,
    PerBlock,
    PerChannel,
    PerTensor,
    PowerOfTwo,
    Ternary,
    TwinMagnitude,
    TwinSign,
    Uniform,
    affine,
    decode,
    encode,
    expand_params,
    format_from_dict,
    gptq_grid,
    quantize,
    round_to_integer,
    snap_to_power_of_two,
    storage_bits,
    symmetric,
)
from fewbits.ranges import MinMax
from formats_cases import FORMATS, FRACTIONAL, GRANULARITIES, KINDS, LOG, UNIFORM, make, tensors

quick = settings(max_examples=50, deadline=None)
granularities = st.sampled_from(list(GRANULARITIES.values()))
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
every_granularity = pytest.mark.parametrize("gran", GRANULARITIES.values(), ids=GRANULARITIES.keys())


def fit(x: Tensor, fmt: Format, gran: Granularity) -> dict[str, Tensor]:
    params = MinMax().fit(x, fmt, gran)
    fmt.check_params(params)
    return params


def zero_points_stay_exact(fmt: Format, params: dict[str, Tensor]) -> bool:
    """Codes far from the zero point leave float32's integers: only then may x / s be off by a whole code."""
    return "zero_point" not in params or bool((params["zero_point"].abs() < 2**20).all())


@every_format
@given(x=tensors(), gran=granularities)
@quick
def test_codes_and_values_agree(fmt: Format, gran: Granularity, x: Tensor) -> None:
    params = fit(x, fmt, gran)
    codes, value = encode(x, fmt, gran, params), quantize(x, fmt, gran, params)
    assert codes.dtype == fmt.code_dtype
    assert codes.shape == x.shape
    assert fmt.code_min <= int(codes.min()) and int(codes.max()) <= fmt.code_max
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value).all())
    assert torch.equal(decode(codes, fmt, gran, params), value)


@every_format
@given(x=tensors(), gran=granularities)
@quick
def test_idempotent(fmt: Format, gran: Granularity, x: Tensor) -> None:
    params = fit(x, fmt, gran)
    assume(zero_points_stay_exact(fmt, params))
    codes = encode(x, fmt, gran, params)
    again = encode(decode(codes, fmt, gran, params), fmt, gran, params)
    if fmt in FRACTIONAL.values():
        # the end codes lie off the lattice and may step to their neighbour; the others stay
        ends = (codes == fmt.code_min) | (codes == codes.max()) | (codes == fmt.code_max)
        assert bool(((again == codes) | (ends & ((again.int() - codes.int()).abs() <= 1))).all())
    elif fmt in LOG.values():
        # where scale * power is not a normal number, the quotient cannot come back exactly
        value = decode(codes, fmt, gran, params)
        normal = (value == 0) | (value >= 2.0**-120)
        assert torch.equal(again[normal], codes[normal])
    elif isinstance(fmt, TwinMagnitude):
        # the top of the fine region is the split, where the coarse one begins
        below = codes != fmt.half - 1
        assert torch.equal(again[below], codes[below])
    else:
        assert torch.equal(again, codes)


@every_format
@given(x=tensors(), gran=granularities)
@quick
def test_monotone(fmt: Format, gran: Granularity, x: Tensor) -> None:
    params = fit(x, fmt, gran)
    for block, part in zip(gran.blocks(x), gran.blocks(quantize(x, fmt, gran, params)), strict=True):
        order = block.argsort(dim=1)
        value = part.gather(1, order)
        assert bool((value.diff(dim=1) >= 0).all())
    # codes are ordered too, downwards for log grids; fp8 codes are sign and magnitude
    if not isinstance(fmt, Float8):
        sign = -1 if fmt in LOG.values() else 1
        for block, part in zip(gran.blocks(x), gran.blocks(encode(x, fmt, gran, params)), strict=True):
            codes = part.gather(1, block.argsort(dim=1)).int() * sign
            assert bool((codes.diff(dim=1) >= 0).all())


@every_format
@given(x=tensors())
@quick
def test_on_the_grid(fmt: Format, x: Tensor) -> None:
    """Every value is one of the values the codes decode to, and no other code of that block is nearer."""
    gran = PerChannel(0)
    params = fit(x, fmt, gran)
    if fmt.levels > 300:
        return
    codes = torch.arange(fmt.code_min, fmt.code_max + 1).expand(x.shape[0], -1)
    if isinstance(fmt, Float8):
        bits = codes.to(torch.uint8).view(fmt.dtype).float()
        grid = torch.where(torch.isfinite(bits), bits, torch.zeros_like(bits)) * params["scale"]
    else:
        grid = decode(codes, fmt, gran, params)
    value = quantize(x, fmt, gran, params)
    distance = (value.unsqueeze(-1) - grid.unsqueeze(1)).abs()
    assert bool((distance.min(dim=-1).values == 0).all())
    if fmt in LOG.values() or isinstance(fmt, Ternary) or getattr(fmt, "rounding", "") == "floor":
        return
    best = (x.double().unsqueeze(-1) - grid.double().unsqueeze(1)).abs().min(dim=-1).values
    slack = 1e-6 * (x.abs().double() + grid.abs().double().amax(dim=1, keepdim=True))
    if zero_points_stay_exact(fmt, params):
        if fmt in FRACTIONAL.values():
            # rounding happens on the lattice through zero, then the ends are clamped: at most one step from the best
            slack = slack + params["scale"].double()
        assert bool(((x.double() - value.double()).abs() <= best + slack).all())


@pytest.mark.parametrize("fmt", UNIFORM.values(), ids=UNIFORM.keys())
@given(x=tensors(), gran=granularities)
@quick
def test_uniform_error_bound(fmt: Uniform, gran: Granularity, x: Tensor) -> None:
    params = fit(x, fmt, gran)
    assume(zero_points_stay_exact(fmt, params))
    spread = expand_params(fmt, gran, params, x.shape)
    step = spread["scale"].expand_as(x)
    zero = spread.get("zero_point", torch.zeros(())).expand_as(x)
    low, high = (fmt.q_min - zero) * step, (fmt.q_max - zero) * step
    value = quantize(x, fmt, gran, params)
    inside = (x >= low) & (x <= high)
    bound = (1.0 if fmt.rounding == "floor" else 0.5) * step * (1 + 1e-4) + 1e-6 * x.abs()
    assert bool(((x - value).abs() <= bound)[inside].all())
    assert torch.equal(value[x >= high], high[x >= high]) or fmt.rounding == "floor"
    assert torch.equal(value[x <= low], low[x <= low])
    # values are whole numbers of steps away from the zero point
    whole = value / step + zero
    assert bool(((whole - whole.round()).abs() <= 1e-3 * (1 + zero.abs()) + 1e-6 * whole.abs()).all())


@pytest.mark.parametrize(
    "name", ["affine-4", "affine-8", "gptq", "symmetric-4", "symmetric-8", "gptq-sym", "power-of-two-ceil"]
)
@given(x=tensors())
@quick
def test_minmax_covers_the_values(name: str, x: Tensor) -> None:
    """No value of the fitted tensor loses more than half a step, or a step where the zero point was rounded."""
    fmt = UNIFORM[name]
    params = fit(x, fmt, PerChannel(0))
    slack = 1.0 if "zero_point" in params else 0.5
    error = (x - quantize(x, fmt, PerChannel(0), params)).abs()
    assert bool((error <= slack * params["scale"] * (1 + 1e-4) + 1e-6 * x.abs()).all())


def test_released_gptq_grid_saturates_one_sided_rows_and_the_default_does_not() -> None:
    x = torch.linspace(0.1, 1.0, 10).reshape(1, -1)
    for saturate, top in ((True, 7 / 15), (False, 14 / 15)):
        fmt = gptq_grid(4, sym=True, saturate_one_sided=saturate)
        assert float(quantize(x, fmt, PerChannel(0), fit(x, fmt, PerChannel(0))).max()) == pytest.approx(top)
    both = torch.tensor([[-1.0, 0.5, 1.0]])
    a, b = (fit(both, gptq_grid(4, sym=True, saturate_one_sided=s), PerChannel(0)) for s in (True, False))
    assert torch.equal(a["scale"], b["scale"])


@every_format
@every_granularity
def test_zero_blocks_stay_zero(fmt: Format, gran: Granularity) -> None:
    x = torch.zeros(4, 8)
    assert torch.equal(quantize(x, fmt, gran, fit(x, fmt, gran)), x)


@pytest.mark.parametrize(
    "name", ["affine-4", "affine-eps", "raw", "symmetric-4", "gptq", "real-raw", "codebook", "e4m3", "ternary"]
)
@pytest.mark.parametrize("constant", [3.7, -0.02, 1e30, -1e-15])
def test_constant_blocks_keep_their_value(name: str, constant: float) -> None:
    x = torch.full((2, 6), constant)
    params = MinMax().fit(x, FORMATS[name], PerChannel(0))
    value = quantize(x, FORMATS[name], PerChannel(0), params)
    if name == "affine-eps" and abs(constant) < 1e-8:
        assert float(value.abs().max()) <= 1e-8
    else:
        torch.testing.assert_close(value, x, rtol=1e-6, atol=0)


@every_format
def test_nan_and_infinity_at_run_time(fmt: Format) -> None:
    """Infinities take the end of the grid; NaN stays visible in values and has a valid code."""
    x = make("normal", (3, 8), 0)
    params = {
        name: value.reshape(()) if value.numel() == 1 else value for name, value in fit(x, fmt, PerTensor()).items()
    }
    wild = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38])
    value = quantize(wild, fmt, PerTensor(), params)
    codes = encode(wild, fmt, PerTensor(), params)
    assert bool(torch.isnan(value[2])) and bool(torch.isfinite(value[[0, 1, 3, 4]]).all())
    assert torch.equal(value[0], value[3]) and torch.equal(value[1], value[4])
    assert torch.equal(decode(codes, fmt, PerTensor(), params)[[0, 1]], value[[0, 1]])
    assert fmt.code_min <= int(codes.min()) and int(codes.max()) <= fmt.code_max


@every_format
def test_low_precision_input_is_computed_in_float32(fmt: Format) -> None:
    x = make("normal", (4, 8), 1)
    for dtype in (torch.float16, torch.bfloat16):
        low = x.to(dtype)
        params = fit(low, fmt, PerChannel(0))
        assert all(value.dtype == torch.float32 for value in params.values())
        assert torch.equal(quantize(low, fmt, PerChannel(0), params), quantize(low.float(), fmt, PerChannel(0), params))
        assert torch.equal(encode(low, fmt, PerChannel(0), params), encode(low.float(), fmt, PerChannel(0), params))


@every_format
def test_empty_tensor_through_fitted_parameters(fmt: Format) -> None:
    params = fit(torch.ones(3, 4), fmt, PerTensor())
    assert quantize(torch.empty(0, 4), fmt, PerTensor(), params).shape == (0, 4)
    assert encode(torch.empty(0, 4), fmt, PerTensor(), params).dtype == fmt.code_dtype


@every_format
def test_description_round_trip(fmt: Format) -> None:
    again = format_from_dict(json.loads(json.dumps(fmt.to_dict())))
    assert again == fmt and type(again) is type(fmt) and hash(again) == hash(fmt)


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "nothing"},
        {"kind": "uniform", "bitz": 4},
        {"kind": "uniform", "bits": 0},
        {"kind": "uniform", "bits": 17},
        {"kind": "uniform", "bits": "4"},
        {"kind": "uniform", "rounding": "up"},
        {"kind": "uniform", "narrow": True},
        {"kind": "uniform", "step": "positive"},
        {"kind": "uniform", "eps": 0.0},
        {"kind": "power_of_two", "snap": "down"},
        {"kind": "power_of_two", "rescale_zero": True},
        {"kind": "float8", "variant": "e3m4"},
        {"kind": "log2", "bits": 9},
        {"kind": "codebook", "bits": 1, "points": [0, 1, 2]},
        {"kind": "codebook", "points": [1, 0]},
        {"kind": "ternary", "threshold": 2},
        {"bits": 4},
        ["uniform"],
        None,
    ],
)
def test_bad_descriptions_are_refused(data: object) -> None:
    with pytest.raises(FewbitsError):
        format_from_dict(data)  # type: ignore[arg-type]


def test_check_params_names_what_is_wrong() -> None:
    fmt = affine(4)
    good = {"scale": torch.ones(2), "zero_point": torch.zeros(2)}
    for bad in (
        {"scale": torch.ones(2)},
        {**good, "extra": torch.ones(2)},
        {**good, "scale": torch.tensor([1.0, torch.nan])},
    ):
        with pytest.raises(FewbitsError, match="here"):
            fmt.check_params(bad, "here")
    with pytest.raises(FewbitsError, match="positive"):
        fmt.check_params({**good, "scale": torch.tensor([1.0, 0.0])}, "here")


# -- single formats --------------------------------------------------------------------------------------------------


def test_rounding_modes_on_ties_and_near_them() -> None:
    below_half = 0.49999997
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, below_half, -below_half, 0.2, -0.2])
    expected = {
        "half_even": [-2, -2, 0, 0, 2, 2, 0, 0, 0, 0],
        "half_away": [-3, -2, -1, 1, 2, 3, 0, 0, 0, 0],
        "half_up": [-2, -1, 0, 1, 2, 3, 0, 0, 0, 0],
        "floor": [-3, -2, -1, 0, 1, 2, 0, -1, 0, -1],
    }
    for mode, values in expected.items():
        assert round_to_integer(x, mode).tolist() == values, mode  # type: ignore[arg-type]


@given(scale=st.floats(2.0**-60, 2.0**60, width=32), code=st.integers(-(2**15), 2**15))
@quick
def test_floor_keeps_grid_points(scale: float, code: int) -> None:
    s = torch.tensor(scale)
    assert float(round_to_integer(code * s / s, "floor")) == code


@given(x=st.floats(2.0**-100, 2.0**100, width=32))
@quick
def test_snap_to_power_of_two(x: float) -> None:
    import math

    t = torch.tensor(x)
    exact = math.log2(x)
    for how, exponent in (
        ("nearest", math.floor(exact + 0.5)),
        ("ceil", math.ceil(exact)),
        ("floor", math.floor(exact)),
    ):
        snapped = float(snap_to_power_of_two(t, how))  # type: ignore[arg-type]
        assert math.frexp(snapped)[0] == 0.5
        near = abs(exact + 0.5 - round(exact + 0.5)) < 1e-6 or abs(exact - round(exact)) < 1e-6
        assert snapped == 2.0**exponent or (near and abs(math.log2(snapped) - exponent) == 1)


@given(x=tensors())
@quick
def test_power_of_two_scales_are_powers_even_when_learned_away(x: Tensor) -> None:
    fmt = PowerOfTwo(4)
    params = fit(x, fmt, PerChannel(0))
    assert bool((torch.frexp(params["scale"])[0] == 0.5).all())
    moved = {**params, "scale": params["scale"] * 1.1}
    assert torch.equal(quantize(x, fmt, PerChannel(0), moved), quantize(x, fmt, PerChannel(0), params))
    assert torch.equal(encode(x, fmt, PerChannel(0), moved), encode(x, fmt, PerChannel(0), params))


def test_rescaled_zero_keeps_the_offset() -> None:
    x = make("offset", (4, 64), 0) - 49
    fmt = PowerOfTwo(4, zero_point="real", rescale_zero=True, clamp_zero_point=False)
    free = MinMax().fit(x, affine(4, clamp_zero_point=False), PerChannel(0))
    params = MinMax().fit(x, fmt, PerChannel(0))
    torch.testing.assert_close(params["scale"] * params["zero_point"], free["scale"] * free["zero_point"])


def test_fp8_tables() -> None:
    """Every finite code decodes to the value its sign, exponent and mantissa spell, and encodes back."""
    for variant, exponent_bits, mantissa_bits, bias in (("e4m3", 4, 3, 7), ("e5m2", 5, 2, 15)):
        fmt = Float8(variant, scaled=False)  # type: ignore[arg-type]
        codes = torch.arange(256, dtype=torch.int32)
        sign = 1 - 2 * (codes >> 7)
        exponent, mantissa = (codes >> mantissa_bits) & (2**exponent_bits - 1), codes & (2**mantissa_bits - 1)
        normal = 2.0 ** (exponent - bias).double() * (1 + mantissa.double() / 2**mantissa_bits)
        small = 2.0 ** (1 - bias) * mantissa.double() / 2**mantissa_bits
        table = (sign * torch.where(exponent == 0, small, normal)).float()
        used = table.abs() <= fmt.largest if variant == "e5m2" else (codes & 127) != 127
        params = {"scale": torch.ones(())}
        assert torch.equal(fmt.decode(codes.to(torch.uint8), params)[used], table[used])
        assert torch.equal(fmt.encode(table[used], params), codes[used].to(torch.uint8))
        assert float(table[used].max()) == fmt.largest


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", [Log2, LogSqrt2])
def test_log_levels(bits: int, kind: type[Log2] | type[LogSqrt2]) -> None:
    base = 2.0 if kind is Log2 else 2.0**0.5
    for zero_code, levels in ((False, 2**bits + 1), (True, 2**bits)):
        fmt = kind(bits, zero_code=zero_code)
        assert fmt.levels == levels and fmt.code_bits == (bits if zero_code else bits + 1)
        params = {"scale": torch.tensor(0.75)}
        values = fmt.decode(torch.arange(levels), params)
        powers = torch.tensor([0.75 * base**-q for q in range(levels - 1)])
        torch.testing.assert_close(values[:-1], powers, rtol=1e-6, atol=0)
        assert float(values[-1]) == 0.0
        assert fmt.encode(torch.tensor([0.0, -1.0, 5.0, 0.75]), params).tolist() == [levels - 1, levels - 1, 0, 0]
        if kind is Log2:
            # decoding shifts: the even codes of the finer grid are the coarser grid
            fine = LogSqrt2(min(bits + 1, 8)).decode(torch.arange(0, 2 * (levels - 1), 2), params)
            assert torch.equal(fine, values[:-1])


@given(x=tensors(lower=0.0))
@quick
def test_log_rounds_to_the_nearest_power(x: Tensor) -> None:
    x = x.abs().clamp_max(1.0)
    for fmt in (Log2(4), LogSqrt2(4)):
        params = {"scale": torch.ones(())}
        value = quantize(x, fmt, PerTensor(), params)
        kept = (value > 0) & (x > 0)
        off = (torch.log2(value[kept]) - torch.log2(x[kept])).abs()
        assert bool((off <= 0.5 / fmt.per_octave + 1e-4).all())
    both = (quantize(x, Log2(4), PerTensor(), params), quantize(x, LogSqrt2(5), PerTensor(), params))
    inside = (both[0] > 0) & (both[1] > 0)
    worst = [((value - x).abs() / x.clamp_min(1e-30))[inside] for value in both]
    assert bool((worst[1] <= 2**0.25 - 1 + 1e-4).all()) and bool((worst[0] <= 2**0.5 - 1 + 1e-4).all())


def test_codebook_ties_duplicates_and_edges() -> None:
    fmt = Codebook(2)
    params = {"table": torch.tensor([[-1.0], [0.0], [0.0], [2.0]])}
    x = torch.tensor([[-5.0, -0.5, -0.4, 0.0, 0.9, 1.0, 1.1, 9.0]])
    assert quantize(x, fmt, PerChannel(0), {"table": params["table"].reshape(4, 1, 1)}).tolist() == [
        [-1, -1, 0, 0, 0, 0, 2, 2]
    ]
    codes = encode(x, fmt, PerChannel(0), {"table": params["table"].reshape(4, 1, 1)})
    assert codes.tolist() == [[0, 0, 2, 2, 2, 2, 3, 3]]


def test_accounting() -> None:
    shape = (6, 10)
    assert storage_bits(symmetric(4), PerTensor(), shape) == 60 * 4 + 32
    assert storage_bits(symmetric(4), PerChannel(0), shape) == 60 * 4 + 6 * 32
    assert storage_bits(affine(4), PerChannel(0), shape) == 60 * 4 + 6 * (32 + 4)
    assert storage_bits(gptq_grid(4), PerChannel(0), shape) == 60 * 4 + 6 * (32 + 32)
    assert storage_bits(gptq_grid(4, sym=True), PerChannel(0), shape) == 60 * 4 + 6 * 32
    assert storage_bits(affine(4), GRANULARITIES["group"], shape) == 60 * 4 + 6 * 3 * (32 + 4)
    assert storage_bits(PowerOfTwo(4, symmetric=True, signed=True, zero_point="none"), PerTensor(), shape) == 60 * 4 + 8
    assert storage_bits(LogSqrt2(4), PerTensor(), shape) == 60 * 5 + 32
    assert storage_bits(LogSqrt2(4, zero_code=True), PerTensor(), shape) == 60 * 4 + 32
    assert storage_bits(affine(4, zero_point="real"), PerTensor(), shape) == 60 * 5 + 64
    assert storage_bits(Float8(scaled=False), PerTensor(), shape) == 60 * 8
    assert storage_bits(Codebook(3), PerChannel(0), shape) == 60 * 3 + 6 * 8 * 32
    assert storage_bits(Codebook(2, (-1.0, 0.0, 1.0)), PerChannel(0), shape) == 60 * 2 + 6 * 32
    assert storage_bits(Ternary(), PerTensor(), shape) == 60 * 2 + 64
    assert storage_bits(TwinMagnitude(4), PerTensor(), shape) == 60 * 4 + 8
    assert storage_bits(TwinSign(4), PerTensor(), shape) == 60 * 4 + 8
    assert storage_bits(TwinSign(4, tie="positive"), PerTensor(), shape) == 60 * 4 + 32 + 8
    assert storage_bits(symmetric(4), PerBlock(3, 2), shape) == 60 * 4 + 6 * 32


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_codes_negate(kind: str) -> None:
    x = make(kind, (4, 32), 3)
    fmt = symmetric(4)
    params = fit(x, fmt, PerChannel(0))
    assert torch.equal(encode(-x, fmt, PerChannel(0), params), -encode(x, fmt, PerChannel(0), params))
