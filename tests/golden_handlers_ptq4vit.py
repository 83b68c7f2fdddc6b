"""What each golden case of PTQ4ViT must reproduce: its quantizers, and whole searches with their score curves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.formats import PerBlock, PerChannel, PerHead, PerTensor, TwinMagnitude, TwinSign, quantize, symmetric
from fewbits.ranges.layer_search import Found, LayerCall, LayerSearch, Operand, search_layer

METRICS = {
    "hessian": "hessian",
    "cosine": "cosine",
    "pearson": "pearson",
    "L2_norm": "l2",
    "L1_norm": "l1",
    "linear_weighted_L2_norm": "linear_weighted_l2",
    "square_weighted_L2_norm": "square_weighted_l2",
}


def close(actual: Tensor, expected: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def grid(bits: int):
    """Signed codes -Q..Q-1, first interval max|t| / (Q - 1/2)."""
    return symmetric(bits, narrow=False, step="span")


def operand(slot: int, x: Tensor, fmt, granularity, data: dict, group_axis: int | None = None, alone=False) -> Operand:
    search = LayerSearch(data["eq_alpha"], data["eq_beta"], data["eq_n"])
    start = search.fit(x, fmt, granularity)
    return Operand(slot, fmt, granularity, start, search.tried(fmt, start), group_axis, alone)


def search(data: dict, run, call: LayerCall, operands: list[Operand], **options) -> Found:
    options = {**options, "metric": METRICS[data["metric"]], "rounds": data["search_round"]}
    found = search_layer(run, [call], operands, **options)
    cut = search_layer(run, [call], operands, at_once=200 * call.raw.numel(), **options)
    for whole, pieces in zip(found.params, cut.params, strict=True):
        assert all(torch.equal(whole[name], pieces[name]) for name in whole), "small passes change nothing"
    return found


def scores_match(data: dict, found: Found, names: list[str], serial: list[str]) -> None:
    """`score_{name}_r{round}`, with `_{letter}{block}` where blocks were searched one after another."""
    for number, row in enumerate(found.scores):
        for name, letter, scores in zip(names, serial, row, strict=True):
            for block, score in enumerate(scores):
                key = f"score_{name}_r{number}" + (f"_{letter}{block}" if len(scores) > 1 else "")
                close(score.view_as(data[key]), data[key], rtol=1e-3, atol=1e-12)


def linear(data: dict) -> None:
    x, weight, bias = data["x"], data["weight"], data["bias"] if len(data["bias"]) else None
    rows = PerBlock(data["n_V"], data["n_H"])
    chunks = PerTensor() if data["n_a"] == 1 else PerHead(-1, heads=data["n_a"])
    gelu = bool(data["is_post_gelu"])
    w_fmt = grid(data["w_bit"])
    a_fmt = TwinSign(data["a_bit"], tie="none") if gelu else grid(data["a_bit"])
    found = search(
        data,
        lambda a, w: F.linear(a, w, bias),
        LayerCall(x, weight, data["raw_out"], data["raw_grad"]),
        [operand(1, weight, w_fmt, rows, data, 0), operand(0, x, a_fmt, chunks, data)],
    )
    w, a = found.params
    close(w["scale"], data["w_interval"], rtol=1e-5)
    close(a["scale"].flatten(), data["a_interval"], rtol=1e-5)
    if gelu:
        assert abs(a_fmt.least_step / data["a_neg_interval"] - 1) < 1e-6
    scores_match(data, found, ["w", "a"], ["h", "a"])
    w_dq, x_dq = quantize(weight, w_fmt, rows, w), quantize(x, a_fmt, chunks, a)
    close(w_dq, data["w_dq"], rtol=1e-5, atol=1e-6)
    close(x_dq, data["x_dq"], rtol=1e-5, atol=1e-6)
    close(F.linear(x_dq, w_dq, bias), data["out"], rtol=1e-5, atol=1e-5)


def matmul(data: dict) -> None:
    a, b = data["A"], data["B"]
    heads = PerHead(1)
    softmax = bool(data["is_softmax"])
    a_fmt = TwinMagnitude(data["A_bit"], additive=True) if softmax else grid(data["A_bit"])
    b_fmt = grid(data["B_bit"])
    a_heads = PerTensor() if softmax else heads
    found = search(
        data,
        torch.matmul,
        LayerCall(a, b, data["raw_out"], data["raw_grad"]),
        [operand(0, a, a_fmt, a_heads, data, None if softmax else 1, softmax), operand(1, b, b_fmt, heads, data, 1)],
        weighted=False,
    )
    if softmax:
        split = 2.0 ** -found.params[0]["shift"]
        close(split, torch.tensor(data["split"]), rtol=1e-6)
        close(split / (2 ** (data["A_bit"] - 1) - 1), torch.tensor(data["A_interval_low"]), rtol=1e-5)
    else:
        close(found.params[0]["scale"].flatten(), data["A_interval"], rtol=1e-5)
    close(found.params[1]["scale"].flatten(), data["B_interval"], rtol=1e-5)
    scores_match(data, found, ["A", "B"], ["", ""])
    a_dq, b_dq = quantize(a, a_fmt, a_heads, found.params[0]), quantize(b, b_fmt, heads, found.params[1])
    close(a_dq, data["A_dq"], rtol=1e-5, atol=1e-6)
    close(b_dq, data["B_dq"], rtol=1e-5, atol=1e-6)
    close(a_dq @ b_dq, data["out"], rtol=1e-5, atol=1e-5)


def conv(data: dict) -> None:
    x, weight, bias = data["x"], data["weight"], data["bias"] if len(data["bias"]) else None
    rows, fmt = PerChannel(0), grid(data["w_bit"])

    def run(a: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(a, w.view(weight.shape), bias, stride=data["stride"])

    matrix = weight.flatten(1)
    found = search(
        data,
        run,
        LayerCall(x, matrix, data["raw_out"], data["raw_grad"]),
        [operand(1, matrix, fmt, rows, data, 0)],
        channel_axis=1,
    )
    close(found.params[0]["scale"].flatten(), data["w_interval"], rtol=1e-5)
    scores_match(data, found, ["w"], [""])
    w_dq = quantize(matrix, fmt, rows, found.params[0]).view(weight.shape)
    close(w_dq, data["w_dq"], rtol=1e-5, atol=1e-6)
    close(run(x, w_dq.flatten(1)), data["out"], rtol=1e-5, atol=1e-5)


def twin_quantizers(data: dict) -> None:
    p, bits = data["p"], data["bits"]
    top = 2 ** (bits - 1) - 1
    for name in [key for key in data if key.startswith("softmax_m")]:
        shift = int(name.removeprefix("softmax_m"))
        params, split = {"shift": torch.tensor(float(shift))}, torch.tensor(2.0**-shift)
        released, paper = TwinMagnitude(bits, additive=True), TwinMagnitude(bits)
        close(released.nearest(p, params)[0], data[name], atol=1e-6)
        offset = torch.where(p < split, torch.round(split * top) / top, split)
        close(paper.nearest(p, params)[0], data[name] - offset, atol=1e-6)
        for fmt in (released, paper):
            codes = fmt.encode(p, params)
            assert int(codes.max()) < 2**bits, "the region is one of the bits"
            assert torch.equal(fmt.decode(codes, params), fmt.nearest(p, params)[0])
    fmt = TwinSign(bits, tie="none")
    assert abs(fmt.least_step / data["a_neg_interval"] - 1) < 1e-6
    for name in [key for key in data if key.startswith("gelu_") and not key.endswith("_interval")]:
        params = {"scale": torch.tensor(data[f"{name}_interval"])}
        value = fmt.nearest(data["h"], params)[0]
        close(value, data[name], atol=1e-6)
        assert torch.equal(fmt.decode(fmt.encode(data["h"], params), params), value)


HANDLERS = {
    "ptq4vit": {
        "linear": linear,
        "matmul": matmul,
        "conv_channelwise": conv,
        "twin_quantizers": twin_quantizers,
    }
}
