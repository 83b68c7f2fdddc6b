"""What each golden case of QDrop must reproduce. Shapes, bits, schedules and masks come from the arrays."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.formats import PerChannel, PerTensor, Uniform, affine, encode, symmetric
from fewbits.papers import build_recipe
from fewbits.ranges import JointSearch
from fewbits.reconstruction import Group, keep_positive, lsq_factor, lsq_quantize, minimise, mixed, power_loss
from fewbits.rounding import LearnedRounding, RoundingRegulariser


def close(actual: Tensor, expected: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def grid(bits: int) -> Uniform:
    """The recipe's own weight grid."""
    spec = build_recipe("qdrop", f"W{bits}A16").scheme.weights[0].spec
    assert spec is not None and isinstance(spec.format, Uniform)
    return spec.format


def observer(data: dict) -> None:
    fmt = symmetric(data["bits"], narrow=False, step="span", eps=1e-8) if data["symmetric"] else grid(data["bits"])
    assert (fmt.q_min, fmt.q_max) == (data["quant_min"], data["quant_max"])
    x, axis = data["x"], data["ch_axis"]
    gran = PerTensor() if axis < 0 else PerChannel(axis)
    params = JointSearch(num=100, p=2.4).fit(x, fmt, gran)
    scale = torch.as_tensor(data["scale"])
    close(params["scale"].flatten(), scale.flatten(), rtol=1e-6)
    zero = params.get("zero_point", torch.zeros_like(params["scale"]))
    close(zero.flatten(), torch.as_tensor(data["zero_point"]).float().flatten())
    # the range that won, not only the grid made of it
    lo, hi = torch.as_tensor(data["min_val"]).flatten(), torch.as_tensor(data["max_val"]).flatten()
    if not data["symmetric"]:
        close((hi - lo) / (2 ** data["bits"] - 1), params["scale"].flatten(), rtol=1e-5)
        close(-lo / params["scale"].flatten(), zero.flatten(), atol=1e-3)
    else:
        close(hi, params["scale"].flatten() * (2 ** data["bits"] - 1) / 2, rtol=1e-5)


def lsq(data: dict) -> None:
    x = data["X"].requires_grad_()
    fmt = affine(data["bits"])
    scale = torch.tensor(data["scale"], requires_grad=True)
    zero = torch.tensor(float(data["zero_point"]))
    y = lsq_quantize(x, fmt, PerTensor(), {"scale": scale, "zero_point": zero})
    close(y.detach(), data["y"], atol=1e-6)
    y.backward(data["upstream"])
    close(x.grad, data["grad_X"], atol=1e-5)
    close(scale.grad.reshape(-1), data["grad_scale"].reshape(-1), rtol=1e-5, atol=1e-7)
    # without the factor it is another gradient
    assert lsq_factor(x.numel(), fmt.q_max) == pytest.approx((x.numel() * (2 ** data["bits"] - 1)) ** -0.5)


def recon(data: dict) -> None:
    layers = [name[len("w_") :] for name in data if name.startswith("w_") and not name.startswith("w_final")]
    sites = [name[len("a_scale_init_") :] for name in data if name.startswith("a_scale_init_")]
    shape = PerChannel(0).param_shape
    weight_grid, act_grid = grid(data["wbits"]), affine(data["abits"])
    roundings, params = {}, {}
    for layer in layers:
        weight = data[f"w_{layer}"]
        params[layer] = {
            "scale": data[f"scale_{layer}"].reshape(shape(weight.shape)),
            "zero_point": data[f"zp_{layer}"].float().reshape(shape(weight.shape)),
        }
        roundings[layer] = LearnedRounding(weight, weight_grid, params[layer], PerChannel(0))
    scales = {site: torch.nn.Parameter(data[f"a_scale_init_{site}"].reshape(())) for site in sites}
    dropping = any(name.startswith("keepquant_mask") for name in data)
    assert dropping == (data["drop_prob"] < 1)

    def mask(name: str, step: int, like: Tensor) -> Tensor | None:
        return data[f"keepquant_mask_{name}"][step].bool().reshape(like.shape) if dropping else None

    def quantized(site: str, step: int, x: Tensor) -> Tensor:
        zero = data[f"a_zp_{site}"].float().reshape(())
        value = lsq_quantize(x, act_grid, PerTensor(), {"scale": scales[site], "zero_point": zero})
        return mixed(value, x, mask(site, step, x))

    def block(step: int, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        def conv(x: Tensor, layer: str, stride: int) -> Tensor:
            pad = weights[layer].shape[-1] // 2
            return F.conv2d(x, weights[layer], data[f"b_{layer}"], stride=stride, padding=pad)

        middle = quantized("conv1", step, F.relu(conv(x, "conv1", 2)))
        return quantized("block", step, F.relu(conv(middle, "conv2", 1) + conv(x, "downsample", 2)))

    steps = data["iters"]
    regulariser = RoundingRegulariser(roundings.values(), iterations=steps, weight=data["round_weight"])

    def loss(step: int, index: Tensor) -> Tensor:
        both = data["inp_quant"][index], data["inp_fp"][index]
        x = mixed(*both, mask("input", step, both[0]))
        soft = {layer: rounding() for layer, rounding in roundings.items()}
        value = power_loss(block(step, x, soft), data["out_fp"][index], channel_axis=1)
        penalty = regulariser(step)
        return value if penalty is None else value + penalty

    keep_positive(scales.values())
    history = minimise(
        loss,
        [
            Group([rounding.alpha for rounding in roundings.values()], lr=1e-3),
            Group(list(scales.values()), lr=4e-5, schedule="cosine"),
        ],
        iterations=steps,
        sampler=data["idx"].long(),
        callbacks=[lambda step, value: keep_positive(scales.values())],
    )
    close(history, data["loss"], rtol=1e-5)
    for site, scale in scales.items():
        close(scale.detach().reshape(-1), data[f"a_scale_final_{site}"].reshape(-1), atol=1e-6)
    for layer, rounding in roundings.items():
        final = data[f"alpha_final_{layer}"]
        close(rounding.alpha.detach(), final, atol=1e-5)
        sure = final.abs() >= 1e-4
        hard = rounding.hard_weight()
        close(hard[sure], data[f"w_final_{layer}"][sure], atol=1e-6)
        # written back, nearest rounding leaves it alone
        nearest = dataclasses.replace(weight_grid, rounding="half_even")
        assert torch.equal(encode(hard, nearest, PerChannel(0), params[layer]), rounding.codes())


HANDLERS = {"qdrop": {"observer_": observer, "lsq_": lsq, "recon_": recon}}
