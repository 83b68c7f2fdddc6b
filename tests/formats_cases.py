"""Formats, granularities and tensors that the format, range and quantizer tests draw from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.formats import (
    ChannelBits,
    Codebook,
    Float8,
    Format,
    Granularity,
    Log2,
    LogSqrt2,
    PerBlock,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    PerToken,
    PowerOfTwo,
    Ternary,
    TwinMagnitude,
    TwinSign,
    Uniform,
    affine,
    gptq_grid,
    raw_affine,
    symmetric,
)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")),
]

UNIFORM: dict[str, Uniform] = {
    "affine-1": affine(1),
    "affine-2": affine(2),
    "affine-4": affine(4),
    "affine-8": affine(8),
    "affine-16": affine(16),
    "affine-signed": affine(4, signed=True),
    "affine-eps": affine(4, zero_range="eps", eps=1e-8, arithmetic="float64"),
    "affine-shift-first": affine(4, order="shift_then_round"),
    "affine-min-span": affine(4, min_span=1e-5),
    "raw": raw_affine(4),
    "raw-2": raw_affine(2),
    "real": affine(3, zero_point="real", order="shift_then_round"),
    "real-raw": affine(4, zero_point="real", order="shift_then_round", include_zero=False, clamp_zero_point=False),
    "centre": affine(4, zero_point="centre", signed=True, step="levels", include_zero=False, clamp_zero_point=False),
    "symmetric-2": symmetric(2),
    "symmetric-4": symmetric(4),
    "symmetric-8": symmetric(8),
    "symmetric-wide": symmetric(4, narrow=False),
    "symmetric-span": symmetric(4, narrow=False, step="span"),
    "symmetric-levels": symmetric(4, narrow=False, step="levels"),
    "unsigned": affine(4, zero_point="none", step="positive"),
    "unsigned-middle": affine(4, symmetric=True, zero_point="middle", step="positive"),
    "gptq": gptq_grid(4),
    "gptq-sym": gptq_grid(3, sym=True),
    "gptq-sym-released": gptq_grid(3, sym=True, saturate_one_sided=True),
    "half-away": affine(4, rounding="half_away"),
    "half-up": symmetric(4, rounding="half_up"),
    "floor": symmetric(4, rounding="floor"),
    "power-of-two": PowerOfTwo(4),
    "power-of-two-ceil": PowerOfTwo(4, snap="ceil"),
    "power-of-two-floor": PowerOfTwo(3, snap="floor", signed=True, symmetric=True, zero_point="none", step="positive"),
}
FRACTIONAL: dict[str, Uniform] = {
    "fractional": affine(4, zero_point="real"),
    "fractional-raw": affine(3, zero_point="real", include_zero=False, clamp_zero_point=False),
    "rescaled": PowerOfTwo(4, zero_point="real", rescale_zero=True, clamp_zero_point=False),
}
LOG: dict[str, Format] = {
    "log2": Log2(4),
    "log2-unit": Log2(3, scaled=False),
    "log2-zero": Log2(4, zero_code=True),
    "log2-8": Log2(8),
    "log-sqrt2": LogSqrt2(4),
    "log-sqrt2-zero": LogSqrt2(4, zero_code=True),
    "log-sqrt2-2": LogSqrt2(2),
}
OTHER: dict[str, Format] = {
    "e4m3": Float8("e4m3"),
    "e5m2": Float8("e5m2"),
    "e4m3-unscaled": Float8("e4m3", scaled=False),
    "codebook": Codebook(3),
    "codebook-points": Codebook(2, (-1.0, -0.25, 0.0, 0.5)),
    "codebook-five": Codebook(3, (-2.0, -0.5, 0.0, 0.1, 1.0)),
    "ternary": Ternary(),
    "channel-bits": ChannelBits(3, ceiling=3),
    "channel-bits-real": ChannelBits(4, ceiling=4, zero_point="real"),
    "twin-magnitude": TwinMagnitude(4),
    "twin-sign": TwinSign(4),
    "twin-sign-positive": TwinSign(3, tie="positive"),
    "twin-sign-free": TwinSign(8, tie="none"),
}
FORMATS: dict[str, Format] = {**UNIFORM, **FRACTIONAL, **LOG, **OTHER}

GRANULARITIES: dict[str, Granularity] = {
    "tensor": PerTensor(),
    "channel": PerChannel(0),
    "channel-last": PerChannel(-1),
    "group": PerGroup(4),
    "group-first": PerGroup(3, axis=0),
    "token": PerToken(),
    "head": PerHead(1, heads=2),
    "block": PerBlock((1,), 2),
}

KINDS = ("normal", "positive", "negative", "zeros", "constant", "huge", "tiny", "outlier", "offset", "spread", "sparse")


def make(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor of one kind: what the values of weights and activations look like, and what breaks range estimators."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random)
    if kind == "positive":
        return x.abs() + 0.1
    if kind == "negative":
        return -x.abs() - 0.1
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "constant":
        return torch.full(shape, float(x.flatten()[0]) or 1.0)
    if kind == "huge":
        return x * 1e30
    if kind == "tiny":
        return x * 1e-30
    if kind == "outlier":
        x.flatten()[0] = 300.0
        return x
    if kind == "offset":
        return x * 0.1 + 50
    if kind == "spread":
        return x * 10.0 ** torch.randint(-6, 6, shape, generator=random)
    if kind == "sparse":
        return torch.where(torch.rand(shape, generator=random) < 0.8, torch.zeros(shape), x)
    return x


@st.composite
def tensors(draw: st.DrawFn, lower: float = -(2.0**100)) -> Tensor:
    """[rows, cols] float32 tensors with an even number of columns, structured or arbitrary."""
    rows, cols = draw(st.integers(1, 5)), 2 * draw(st.integers(1, 6))
    if draw(st.booleans()):
        return make(draw(st.sampled_from(KINDS)), (rows, cols), draw(st.integers(0, 2**31)))
    number = st.floats(lower, 2.0**100, width=32, allow_subnormal=False)
    return torch.tensor(draw(st.lists(number, min_size=rows * cols, max_size=rows * cols))).reshape(rows, cols)
