"""The fused kernels of reconstruction against their formulas, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from fewbits.formats import Granularity, PerChannel, PerGroup, PerTensor, Uniform, affine, raw_affine, symmetric
from fewbits.ranges import MinMax
from fewbits.rounding.adaround import GAMMA, ZETA, LearnedRounding, rounding_penalty

pytest.importorskip("triton")
kernels = importlib.import_module("fewbits.kernels.triton_rounding")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(fmt: Uniform, granularity: Granularity, rows: int = 7, columns: int = 300) -> LearnedRounding:
    """Variables all over: h clamped at both ends, codes clipped at both ends."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    params = MinMax().fit(weight * 0.7, fmt, granularity)
    rounding = LearnedRounding(weight, fmt, params, granularity).to(DEVICE)
    with torch.no_grad():
        rounding.alpha.copy_(torch.randn(rows, columns, generator=generator) * 3)
        rounding.alpha[0, 0] = 0.0
    return rounding


def fused_weight(rounding: LearnedRounding) -> Tensor:
    return kernels.soft_weight(
        rounding.alpha, rounding.low, rounding.scale, rounding.zero_point, rounding.format.code_bounds({}),
        shifted=rounding._shift_first, stretch=(GAMMA, ZETA),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [
        (affine(2), PerChannel(0)),
        (symmetric(4), PerTensor()),
        (raw_affine(3, order="shift_then_round", zero_point="real"), PerChannel(0)),
        (affine(3), PerGroup(100)),
        (symmetric(8), PerChannel(0)),
    ],
)
def test_soft_weights_and_their_gradients(fmt: Uniform, granularity: Granularity) -> None:
    rounding = made(fmt, granularity)
    expected = rounding._weight(rounding.h())
    found = fused_weight(rounding)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (wanted,) = torch.autograd.grad(expected, rounding.alpha, gradient)
    (got,) = torch.autograd.grad(found, rounding.alpha, gradient)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert 0.1 < (wanted == 0).float().mean() < 0.95
    assert torch.equal(got == 0, wanted == 0)


def test_a_gradient_of_another_layout_is_read_right() -> None:
    rounding = made(affine(4), PerChannel(0))
    gradient = torch.randn(300, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE).T
    (wanted,) = torch.autograd.grad(rounding._weight(rounding.h()), rounding.alpha, gradient)
    (got,) = torch.autograd.grad(fused_weight(rounding), rounding.alpha, gradient)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [20.0, 11.3, 2.0])
def test_penalty_and_its_gradient(beta: float) -> None:
    rounding = made(affine(4), PerChannel(0))
    expected = rounding_penalty(rounding.h(), beta)
    found = kernels.penalty(rounding.alpha, torch.tensor(beta, device=DEVICE), stretch=(GAMMA, ZETA))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    (wanted,) = torch.autograd.grad(0.3 * expected, rounding.alpha)
    (got,) = torch.autograd.grad(0.3 * found, rounding.alpha)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert got[0, 0] == 0, "at one half there is no way to turn"


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU on this machine")
def test_a_gpu_takes_the_kernels_for_matrices_only() -> None:
    rounding = made(affine(4), PerChannel(0))
    assert torch.equal(rounding.soft_weight(), fused_weight(rounding))
    weight = torch.randn(3, 4, 2, 2, device=DEVICE)
    other = LearnedRounding(weight, affine(4), MinMax().fit(weight, affine(4), PerChannel(0)), PerChannel(0))
    torch.testing.assert_close(other.soft_weight(), other._weight(other.h()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_squared_distance(dtype: torch.dtype) -> None:
    losses = importlib.import_module("fewbits.kernels.triton_losses")
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 5, 1001, generator=generator).to(DEVICE, dtype) for _ in range(2))
    assert losses.alike(one, other) and not losses.alike(one, other.double()) and not losses.alike(one, other[..., 1:])
    found, expected = losses.squared_distance(one, other), (one.double() - other.double()).square().sum()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_squared_error_and_its_gradient(layout: torch.memory_format) -> None:
    losses = importlib.import_module("fewbits.kernels.triton_losses")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 20, 31, generator=generator).to(DEVICE, memory_format=layout) for _ in range(2))
    assert losses.fits(a.requires_grad_(), b)
    found, expected = losses.squared_error(a, b), (a - b).square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    (got,), (wanted,) = (torch.autograd.grad(0.3 * loss, a) for loss in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert got.stride() == a.stride(), "what comes behind reads one layout"
    for other in (b.half(), b[:2], b.transpose(2, 3), b[:1].expand(3, -1, -1, -1), b.clone().requires_grad_()):
        assert not losses.fits(a, other)
    assert not losses.fits(a[..., ::2], b[..., ::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constants_added_to_channels(dtype: torch.dtype) -> None:
    channels = importlib.import_module("fewbits.kernels.triton_channels")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 20, 31, generator=generator).to(DEVICE, dtype, memory_format=torch.channels_last)
    constants = torch.randn(5, generator=generator).to(DEVICE)
    assert channels.fits(x.requires_grad_(), constants)
    found = channels.add_constants(x, constants)
    assert found.stride() == x.stride()
    # Triton's interpreter cuts bfloat16 off where a GPU rounds it
    away = torch.finfo(dtype).eps if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
    torch.testing.assert_close(found, (x.float() + constants.view(-1, 1, 1)).to(dtype), rtol=away, atol=0)
    gradient = torch.randn_like(found)
    assert torch.equal(torch.autograd.grad(found, x, gradient)[0], gradient)
    for other in (constants[:1], constants.clone().requires_grad_(), constants.repeat(2)[::2]):
        assert not channels.fits(x, other)
    assert not channels.fits(x.contiguous(), constants) and not channels.fits(x[:, :, 0], constants)


def test_adam_is_torchs() -> None:
    make = importlib.import_module("fewbits.kernels.triton_adam").Adam
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).to(DEVICE) for shape in ((3, 700), (1,), (5,))]
    mine, torchs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    rates = [torch.tensor(rate, device=DEVICE) for rate in (1e-2, 3e-3)]
    betas = [(0.9, 0.999), (0.5, 0.9)]
    optimiser = make(
        [{"params": part, "lr": lr, "betas": b} for part, lr, b in zip((mine[:1], mine[1:]), rates, betas, strict=True)]
    )
    reference = torch.optim.Adam(
        [
            {"params": part, "lr": float(lr), "betas": b}
            for part, lr, b in zip((torchs[:1], torchs[1:]), rates, betas, strict=True)
        ]
    )
    for step in range(12):
        for a, b in zip(mine, torchs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(DEVICE) * 1e-3
            b.grad = a.grad.clone()
        if step < 3:  # the last has had nothing to learn from yet
            mine[2].grad = torchs[2].grad = None
        rates[1].mul_(0.9)
        reference.param_groups[1]["lr"] = float(rates[1])
        optimiser.step()
        reference.step()
    for a, b, start in zip(mine, torchs, starts, strict=True):
        assert (b - start).abs().max() > 5e-3
        torch.testing.assert_close(a - start, b - start, rtol=1e-4, atol=1e-7)
    optimiser.zero_grad()
    assert all(parameter.grad is None for parameter in mine)
