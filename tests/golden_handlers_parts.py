"""What each golden case of the rounding, reconstruction and transform parts must reproduce.

HANDLERS[slug][prefix] takes the arrays of one case and asserts. Shapes, bits and schedules come from the arrays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.formats import Params, PerChannel, PerTensor, PerToken, Uniform, affine, gptq_grid, raw_affine, symmetric
from fewbits.kernels.pack3 import pack3, unpack3
from fewbits.ranges import AbsMax, MinMax, ShrinkSearch
from fewbits.reconstruction import (
    Group,
    fisher_diagonal_loss,
    fisher_full_loss,
    fisher_weight,
    kl_gradients,
    minimise,
    power_loss,
)
from fewbits.rounding import (
    HessianAccumulator,
    LearnedRounding,
    RoundingRegulariser,
    conv_patches,
    decode_columns,
    gptq,
    matrix_weight,
    nearest,
    rectified_sigmoid,
    rounding_penalty,
    row_params,
    temperature,
    weight_matrix,
)
from fewbits.transforms import fold_into_norm, scale_inputs, smoothing_scales


def close(actual: Tensor, expected: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


# -- gptq ------------------------------------------------------------------------------------------------------------


def gptq_solver(data: dict) -> None:
    weight, inputs = data["W"], data["X"]
    accumulator = HessianAccumulator(weight.shape[1])
    for sequence in inputs:
        accumulator.add(sequence[None])
    hessian = accumulator.value
    close(hessian, data["H"], rtol=1e-6, atol=1e-6)
    names = sorted(name[: -len("_params")] for name in data if name.startswith("cfg") and name.endswith("_params"))
    assert names
    for name in names:
        bits, sym, mse, block, damping, group, act_order, static = data[f"{name}_params"].tolist()
        fmt = gptq_grid(int(bits), sym=bool(sym), saturate_one_sided=True)
        solution = gptq(
            weight,
            hessian,
            fmt,
            ShrinkSearch(reduction="sum") if mse else MinMax(),
            group_size=None if group < 0 else int(group),
            block_size=int(block),
            damping=round(damping, 4),
            act_order=bool(act_order),
            static_groups=bool(static),
        )
        close(solution.weight, data[f"{name}_Q"], atol=1e-5)
        assert abs(float(solution.loss) / data[f"{name}_loss"] - 1) < 1e-4, name
        assert abs(objective(weight, solution.weight, hessian) / data[f"{name}_obj"] - 1) < 1e-4, name
        assert torch.equal(decode_columns(fmt, solution.codes, solution.params, solution.group_index), solution.weight)
    grid = gptq_grid(4)
    rounded, _ = nearest(weight, grid, PerChannel(0), MinMax().fit(weight, grid, PerChannel(0)))
    assert abs(objective(weight, rounded, hessian) / data["rtn_b4_asym_obj"] - 1) < 1e-4


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    difference = (weight - quantized).double()
    return float(((difference @ hessian.double()) * difference).sum())


def gptq_conv2d(data: dict) -> None:
    weight, images = data["W"], data["X"]
    bits, stride, padding = (int(value) for value in data["params"])
    kernel = weight.shape[2:]
    accumulator = HessianAccumulator(weight[0].numel())
    for batch in images.split(3):
        accumulator.add(conv_patches(batch, kernel, stride=stride, padding=padding))
    close(accumulator.value, data["H"], rtol=1e-5, atol=1e-5)
    solution = gptq(weight_matrix(weight), accumulator.value, gptq_grid(bits), MinMax())
    close(matrix_weight(solution.weight, weight.shape), data["Q"], atol=1e-5)
    codes = matrix_weight(solution.codes, weight.shape)
    decoded = gptq_grid(bits).decode(codes, row_params(solution.params, weight.shape))
    assert torch.equal(decoded, matrix_weight(solution.weight, weight.shape))


def gptq_pack3(data: dict) -> None:
    params = {"scale": data["scale"], "zero_point": data["zero"]}
    codes = gptq_grid(3).encode(data["Wdq"], params)
    words = pack3(codes)
    assert words.dtype == data["qweight"].dtype and torch.equal(words, data["qweight"])
    assert torch.equal(unpack3(words, codes.shape[1]), codes)
    close(data["zero"] * data["scale"], data["packed_zeros"], rtol=1e-6)
    close(data["scale"], data["packed_scales"])


# -- smoothquant -----------------------------------------------------------------------------------------------------


def smoothquant_smooth(data: dict) -> None:
    count = sum(name.endswith("_bias") for name in data if name.startswith("fc"))
    weights = [data[f"fc{i}_weight"] for i in range(count)]
    scales = smoothing_scales(data["act_scales"], weights, data["alpha"], dead="clamp")
    norm_weight, norm_bias = fold_into_norm(data["ln_weight"], data.get("ln_bias"), scales)
    close(norm_weight, data["ln_weight_s"], rtol=1e-6)
    if norm_bias is not None:
        close(norm_bias, data["ln_bias_s"], rtol=1e-6)
    plain = normalised(data["x"], data["ln_weight"], data.get("ln_bias"))
    smooth = normalised(data["x"], norm_weight, norm_bias)
    eight = symmetric(8)
    for i, weight in enumerate(weights):
        smoothed = scale_inputs(weight, scales)
        close(smoothed, data[f"fc{i}_weight_s"], rtol=1e-6)
        bias, float_output = data[f"fc{i}_bias"], data[f"y{i}_fp"]
        close(F.linear(plain, weight, bias), float_output, rtol=1e-5, atol=1e-5)
        close(F.linear(smooth, smoothed, bias), float_output, rtol=1e-5, atol=1e-5 * float(float_output.abs().max()))
        for weight_name, weight_gran in (("per_channel", PerChannel(0)), ("per_tensor", PerTensor())):
            quantized = simulated(smoothed, eight, weight_gran)
            close(quantized, data[f"wq{i}_{weight_name}"], rtol=1e-6, atol=1e-7)
            for act_name, act_gran in (("per_token", PerToken()), ("per_tensor", PerTensor())):
                output = F.linear(simulated(smooth, eight, act_gran), quantized, bias)
                if i == 0:
                    output = simulated(output, eight, act_gran)
                close(output, data[f"y{i}_w_{weight_name}_a_{act_name}"], rtol=1e-4, atol=1e-4)


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def simulated(x: Tensor, fmt: Uniform, gran: PerChannel | PerTensor | PerToken) -> Tensor:
    return nearest(x, fmt, gran, AbsMax().fit(x, fmt, gran))[0]


# -- adaround --------------------------------------------------------------------------------------------------------


def adaround_quantizer(data: dict) -> None:
    weight, fmt, gran = data["W"], affine(data["bits"]), PerChannel(0)
    params = per_channel(data["scale"], data["zero_point"], weight)
    close(nearest(weight, fmt, gran, params)[0], data["W_nearest"], atol=1e-6)
    rounding = LearnedRounding(weight, fmt, params, gran)
    close(rounding.alpha.detach(), data["alpha_init"], atol=1e-6)
    close(rounding.soft_weight().detach(), data["W_soft_at_init"], atol=1e-6)
    close(rounding.hard_weight(), data["W_hard_at_init"], atol=1e-6)
    with torch.no_grad():
        rounding.alpha.copy_(data["alpha"])
    close(rounding.h().detach(), data["h"], atol=1e-6)
    soft = rounding()
    close(soft.detach(), data["W_soft"], atol=1e-6)
    soft.backward(data["upstream"])
    close(rounding.alpha.grad, data["grad_alpha"], atol=1e-6)
    rounding.soft = False
    close(rounding(), data["W_hard"], atol=1e-6)
    integers = (data["W_hard"] / params["scale"]).round() + params["zero_point"]
    assert torch.equal(rounding.codes().float(), integers)


def per_channel(scale: Tensor, zero_point: Tensor, weight: Tensor) -> Params:
    shape = PerChannel(0).param_shape(weight.shape)
    return {"scale": scale.float().reshape(shape), "zero_point": zero_point.float().reshape(shape)}


def adaround_loss(data: dict) -> None:
    alpha = data["alpha"].requires_grad_()
    total, warm = data["iterations"], round(data["warm_start"], 6)
    for step in range(total):
        beta = temperature(
            step, total, warm_start=warm, start=data["beta_start"], end=data["beta_end"], schedule="cosine"
        )
        expected = float(data["round_loss_by_iter"][step])
        if beta is None:
            assert step < warm * total and expected == 0
            continue
        assert abs(beta - float(data["beta_formula_by_iter"][step])) < 1e-5 * beta
        loss = data["reg_param"] * rounding_penalty(rectified_sigmoid(alpha), beta)
        assert abs(float(loss.detach()) - expected) <= 1e-5 * abs(expected), step
        if step == data["iter_of_grad"]:
            (gradient,) = torch.autograd.grad(loss, alpha)
            close(gradient, data["grad_alpha_at_iter"], rtol=1e-5, atol=1e-8)
    loss = power_loss(data["quant_out"], data["float_out"], channel_axis=1)
    assert abs(float(loss) / data["recon_loss"] - 1) < 1e-5


# -- brecq -----------------------------------------------------------------------------------------------------------


def brecq_losses(data: dict) -> None:
    prediction, target, gradient = data["pred"], data["tgt"], data["grad"]
    mse = power_loss(prediction, target, channel_axis=1)
    for found, name in (
        (mse, "rec_mse"),
        (power_loss(prediction, target, channel_axis=1, p=2.4), "rec_mse_p2p4"),
        (fisher_diagonal_loss(prediction, target, gradient, channel_axis=1), "rec_fisher_diag"),
        (fisher_full_loss(prediction, target, gradient), "rec_fisher_full"),
    ):
        assert abs(float(found) / data[name] - 1) < 1e-5, name
    alpha = data["alpha"].requires_grad_()
    close(rectified_sigmoid(alpha).detach(), data["h"], atol=1e-6)
    total, warm = data["T"], round(data["warmup"], 6)
    settings = {"warm_start": warm, "start": data["b_start"], "end": data["b_end"]}
    for place in range(total):
        beta = temperature(place + 1, total, **settings)
        loss = mse
        if beta is None:
            assert float(data["temperature_by_count"][place]) == data["b_start"]
        else:
            assert abs(beta / float(data["temperature_by_count"][place]) - 1) < 1e-5
            loss = mse + data["round_weight"] * rounding_penalty(rectified_sigmoid(alpha), beta)
        assert abs(float(loss.detach()) / float(data["total_loss_by_count"][place]) - 1) < 1e-5, place
    half = temperature(total // 2, total, **settings)
    assert half is not None
    (gradient,) = torch.autograd.grad(data["round_weight"] * rounding_penalty(rectified_sigmoid(alpha), half), alpha)
    close(gradient, data["round_grad_alpha_at_half"], rtol=1e-5, atol=1e-8)


def brecq_block_recon(data: dict) -> None:
    layers = [name[len("w_") :] for name in data if name.startswith("w_")]
    gran = PerChannel(0)
    grid = raw_affine(data["bits"])
    roundings = {
        layer: LearnedRounding(
            data[f"w_{layer}"], grid, {"scale": data[f"delta_{layer}"], "zero_point": data[f"zp_{layer}"]}, gran
        )
        for layer in layers
    }
    target, steps = data["cached_out_fp"], data["iters"]

    def block(x: Tensor, weights: dict[str, Tensor], inner: object = None, outer: object = None) -> Tensor:
        def conv(x: Tensor, layer: str, stride: int) -> Tensor:
            pad = weights[layer].shape[-1] // 2
            return F.conv2d(x, weights[layer], data[f"b_{layer}"], stride=stride, padding=pad)

        middle = F.relu(conv(x, "conv1", 2))
        middle = inner(middle) if callable(inner) else middle
        out = F.relu(conv(middle, "conv2", 1) + conv(x, "downsample", 2))
        return outer(out) if callable(outer) else out

    regulariser = RoundingRegulariser(roundings.values(), iterations=steps, weight=data["round_weight"])
    rows = data["cached_inp_quant"]

    def weight_loss(step: int, index: Tensor) -> Tensor:
        soft = {layer: rounding() for layer, rounding in roundings.items()}
        loss = power_loss(block(rows[index], soft), target[index], channel_axis=1)
        penalty = regulariser(step)
        return loss if penalty is None else loss + penalty

    alphas = [rounding.alpha for rounding in roundings.values()]
    history = minimise(weight_loss, alphas, iterations=steps, sampler=data["idx_weight_stage"].long())
    close(history, data["loss_weight_stage"], rtol=1e-5)
    hard = {}
    for layer, rounding in roundings.items():
        final = data[f"alpha_final_{layer}"]
        close(rounding.alpha.detach(), final, atol=1e-5)
        hard[layer] = rounding.hard_weight()
        sure = final.abs() >= 1e-4
        close(hard[layer][sure], data[f"wq_final_{layer}"][sure], atol=1e-6)
        # where the sign is in doubt go on from the recorded weight, so that the second stage is comparable
        hard[layer] = torch.where(sure, hard[layer], data[f"wq_final_{layer}"])

    acts = raw_affine(data["abits"])
    deltas = {site: torch.nn.Parameter(torch.tensor(data[f"a_delta_init_{site}"])) for site in ("conv1", "block")}

    def quantizer(site: str) -> object:
        zero = torch.tensor(data[f"a_zp_{site}"])
        return lambda x: acts.quantize(x, {"scale": deltas[site], "zero_point": zero})

    def act_loss(step: int, index: Tensor) -> Tensor:
        output = block(data["cached_inp_fp"][index], hard, quantizer("conv1"), quantizer("block"))
        return power_loss(output, target[index], channel_axis=1, p=2.4)

    group = Group(list(deltas.values()), lr=4e-4, schedule="cosine")
    indices = data["idx_act_stage"].long()
    history = minimise(act_loss, [group], iterations=len(indices), sampler=indices)
    close(history, data["loss_act_stage"], rtol=1e-5)
    for site, delta in deltas.items():
        assert abs(float(delta.detach()) - data[f"a_delta_final_{site}"]) < 1e-5


def brecq_fisher_weight(data: dict) -> None:
    grid = raw_affine(data["bits"])
    names = [name[len("w_") :] for name in data if name.startswith("w_")]

    def weight(name: str, quantized: bool) -> Tensor:
        value = data[f"w_{name}"]
        if not quantized:
            return value
        return nearest(value, grid, PerChannel(0), {"scale": data[f"delta_{name}"], "zero_point": data[f"zp_{name}"]})[
            0
        ]

    def conv(x: Tensor, name: str, stride: int, quantized: bool) -> Tensor:
        w = weight(name, quantized)
        return F.conv2d(x, w, data[f"b_{name}"], stride=stride, padding=w.shape[-1] // 2)

    def block(x: Tensor, name: str, quantized: bool) -> Tensor:
        down = f"{name}__downsample"
        stride = 2 if down in names else 1
        middle = F.relu(conv(x, f"{name}__conv1", stride, quantized))
        skip = conv(x, down, stride, quantized) if down in names else x
        return F.relu(conv(middle, f"{name}__conv2", 1, quantized) + skip)

    def rest(x: Tensor) -> Tensor:
        return F.linear(block(x, "b2", False).mean((2, 3)), data["w_fc"], data["b_fc"])

    def run_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        output = block(x, "b1", True).requires_grad_()
        return rest(output), output

    gradient = kl_gradients(lambda x: rest(block(x, "b1", False)), run_quantized, [data["X"]])
    found, expected = fisher_weight(gradient) - 1, data["weight_of_block1_output"] - 1
    close(found, expected, rtol=1e-3, atol=1e-6)


HANDLERS = {
    "gptq": {"solver": gptq_solver, "conv2d": gptq_conv2d, "pack3": gptq_pack3},
    "smoothquant": {"smooth_": smoothquant_smooth},
    "adaround": {"quantizer_": adaround_quantizer, "loss_": adaround_loss},
    "brecq": {"losses": brecq_losses, "block_recon": brecq_block_recon, "fisher_weight": brecq_fisher_weight},
}
