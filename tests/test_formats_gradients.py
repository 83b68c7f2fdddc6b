"""Gradients of the simulated quantizer: straight-through to the values, learned-step to the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.formats import (
    Codebook,
    Format,
    Granularity,
    PerChannel,
    PowerOfTwo,
    Ternary,
    Uniform,
    affine,
    expand_params,
)
from fewbits.ranges import MinMax
from formats_cases import DEVICES, FORMATS, FRACTIONAL, GRANULARITIES, UNIFORM, make

every_device = pytest.mark.parametrize("device", DEVICES)
every_granularity = pytest.mark.parametrize("gran", GRANULARITIES.values(), ids=GRANULARITIES.keys())


def ste_round(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def explicit(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: Uniform) -> Tensor:
    """The formula papers print, differentiated by autograd with round as the identity."""
    shift = torch.zeros_like(scale) if zero is None else zero
    code = ste_round(x / scale) + shift if fmt.order == "round_then_shift" else ste_round(x / scale + shift)
    return (torch.clamp(code, fmt.q_min, fmt.q_max) - shift) * scale


def setting(fmt: Format, gran: Granularity, device: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Values, parameters that clip some of them, and an upstream gradient."""
    x = make("outlier", (6, 10), 5).to(device)
    params = {name: value.clone() for name, value in MinMax().fit(x / 2, fmt, gran).items()}
    return x, params, make("normal", (6, 10), 6).to(device)


NEAREST = {
    name: fmt
    for name, fmt in {**UNIFORM, **FRACTIONAL}.items()
    if fmt.rounding == "half_even" and not isinstance(fmt, PowerOfTwo)
}


@every_device
@every_granularity
@pytest.mark.parametrize("fmt", NEAREST.values(), ids=NEAREST.keys())
def test_uniform_matches_the_explicit_formula(fmt: Uniform, gran: Granularity, device: str) -> None:
    x, params, upstream = setting(fmt, gran, device)
    grads = []
    for mine in (True, False):
        leaf = x.clone().requires_grad_()
        learned = {name: value.clone().requires_grad_() for name, value in params.items()}
        spread = expand_params(fmt, gran, learned, x.shape)
        out = fmt.quantize(leaf, spread) if mine else explicit(leaf, spread["scale"], spread.get("zero_point"), fmt)
        (out * upstream).sum().backward()
        grads.append({"value": out.detach(), "x": leaf.grad, **{name: value.grad for name, value in learned.items()}})
    assert torch.equal(grads[0]["x"] != 0, grads[1]["x"] != 0)
    torch.testing.assert_close(grads[0]["value"], grads[1]["value"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grads[0]["x"], upstream * (grads[0]["x"] != 0), rtol=0, atol=0)
    for name in params:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-4 * float(upstream.abs().sum()))


@every_device
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_straight_through_is_one_inside_and_zero_where_clipped(fmt: Format, device: str) -> None:
    x, params, _ = setting(fmt, PerChannel(0), device)
    spread = expand_params(fmt, PerChannel(0), params, x.shape)
    leaf = x.clone().requires_grad_()
    out = fmt.quantize(leaf, spread)
    assert torch.equal(out.detach(), fmt.decode(fmt.encode(x, spread), spread))
    out.sum().backward()
    assert leaf.grad is not None
    _, inside = fmt.nearest(x, spread)
    assert torch.equal(leaf.grad, inside.float())
    assert bool(inside.any()) and (not bool(inside.all()) or fmt == FORMATS["e4m3-unscaled"])


@every_device
@pytest.mark.parametrize(
    "name", ["affine-4", "symmetric-4", "gptq-sym", "real", "e4m3", "log-sqrt2", "codebook-points"]
)
def test_scale_gradient_by_finite_differences(name: str, device: str) -> None:
    """Between its jumps the quantized value is linear in s, slope Q(x/s). The learned step adds the derivative that
    rounding as the identity gives: -x/s inside. So gradient = finite difference - inside * x/s."""
    fmt = FORMATS[name]
    x, params, _ = setting(fmt, PerChannel(0), device)
    x, params = (
        x.double(),
        {key: value.double() for key, value in expand_params(fmt, PerChannel(0), params, x.shape).items()},
    )
    moved = 1e-7
    up, down = ({**params, "scale": params["scale"] * (1 + sign * moved)} for sign in (1, -1))
    value, inside = fmt.nearest(x, params)
    slope = (fmt.nearest(x, up)[0].double() - fmt.nearest(x, down)[0].double()) / (2 * moved * params["scale"])
    # keep the values that no jump lies near
    steady = (
        fmt.nearest(x, {**params, "scale": params["scale"] * 1.001})[0] / 1.001 - value
    ).abs() < 1e-6 * value.abs() + 1e-12
    steady &= (
        fmt.nearest(x, {**params, "scale": params["scale"] * 0.999})[0] / 0.999 - value
    ).abs() < 1e-6 * value.abs() + 1e-12
    assert int(steady.sum()) > 10
    expected = torch.where(inside, slope - x / params["scale"], slope)
    scale = params["scale"].expand_as(x).clone().requires_grad_()
    fmt.quantize(x, {**params, "scale": scale}).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad[steady], expected[steady], rtol=1e-4, atol=1e-4)


@every_device
def test_power_of_two_passes_the_gradient_to_the_raw_scale(device: str) -> None:
    x = make("normal", (4, 16), 0).to(device)
    fmt, plain = PowerOfTwo(4), affine(4)
    params = MinMax().fit(x, fmt, PerChannel(0))
    raw = (params["scale"] * 1.1).requires_grad_()
    fmt.quantize(x, {**params, "scale": raw}).square().sum().backward()
    snapped = params["scale"].clone().requires_grad_()
    plain.quantize(x, {**params, "scale": snapped}).square().sum().backward()
    torch.testing.assert_close(raw.grad, snapped.grad)


@every_device
def test_tables_and_levels_learn(device: str) -> None:
    x = make("normal", (3, 20), 1).to(device)
    upstream = make("normal", (3, 20), 2).to(device)
    book = Codebook(2)
    table = MinMax().fit(x, book, PerChannel(0))["table"].requires_grad_()
    (book.quantize(x, {"table": table}) * upstream).sum().backward()
    codes = book.encode(x, {"table": table.detach()}).long()
    expected = torch.stack([(upstream * (codes == code)).sum(dim=1, keepdim=True) for code in range(4)])
    torch.testing.assert_close(table.grad, expected)
    trits = Ternary()
    params = {name: value.requires_grad_() for name, value in MinMax().fit(x, trits, PerChannel(0)).items()}
    (trits.quantize(x, params) * upstream).sum().backward()
    signs = trits.encode(x, {name: value.detach() for name, value in params.items()})
    torch.testing.assert_close(params["positive"].grad, (upstream * (signs == 2)).sum(dim=1, keepdim=True))
    torch.testing.assert_close(params["negative"].grad, (upstream * (signs == 0)).sum(dim=1, keepdim=True))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_gradients_are_finite_for_wild_values(fmt: Format) -> None:
    """A frozen small scale and huge, infinite or vanishing values: clipped, gradient zero, never NaN."""
    params = {name: value.clone() for name, value in MinMax().fit(make("tiny", (1, 8), 0), fmt, PerChannel(0)).items()}
    learnable = {spec.name for spec in fmt.param_specs() if spec.learnable}
    params = {name: value.requires_grad_(name in learnable) for name, value in params.items()}
    x = torch.tensor([[1e30, -1e30, torch.inf, -torch.inf, 0.0, 1e-38, -1e-38, 3e38]], requires_grad=True)
    fmt.quantize(x, expand_params(fmt, PerChannel(0), params, x.shape)).sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    assert all(value.grad is None or bool(torch.isfinite(value.grad).all()) for value in params.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@every_granularity
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_gpu_codes_equal_cpu_codes(fmt: Format, gran: Granularity) -> None:
    x = make("normal", (8, 24), 9)
    params = MinMax().fit(x, fmt, gran)
    fitted = MinMax().fit(x.cuda(), fmt, gran)
    for name, value in params.items():
        torch.testing.assert_close(fitted[name].cpu(), value, rtol=1e-6, atol=0)
    on_gpu = fmt.encode(
        x.cuda(), expand_params(fmt, gran, {name: value.cuda() for name, value in params.items()}, x.shape)
    )
    assert torch.equal(on_gpu.cpu(), fmt.encode(x, expand_params(fmt, gran, params, x.shape)))
