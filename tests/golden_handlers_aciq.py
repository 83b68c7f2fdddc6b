"""Golden cases of ACIQ, through the parts that the recipe is made of."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fewbits.allocation.channel_bits import allocate_bits_in_rounds, bits_of_bins, channel_bins
from fewbits.correction import moment_correction, moved_grid, with_real_offset
from fewbits.formats import ChannelBits, Format, Granularity, PerChannel, PerTensor, decode, encode, quantize
from fewbits.papers.aciq import grid
from fewbits.ranges import Analytic, MinMax
from fewbits.ranges.analytic import MULTIPLIERS, block_moments, expected_error


def close(found: Tensor, expected: Tensor | float, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected).to(found.dtype), rtol=tolerance, atol=tolerance)


def bit_allocation(data: dict) -> None:
    alpha = data["alpha"]
    for name, expected in data.items():
        found = re.fullmatch(r"(bits|bits_fixedtarget|omega)_M(\d+)(?:_(round|ceil))?", name)
        if found is None:
            assert name == "alpha"
            continue
        what, mean, rounding = found[1], int(found[2]), found[3]
        if what == "omega":
            close(channel_bins(alpha, mean), expected)
        elif what == "bits":
            assert torch.equal(bits_of_bins(channel_bins(alpha, mean), rounding), expected), name
        else:
            assert torch.equal(allocate_bits_in_rounds(alpha, mean, rounding=rounding), expected), name


def weights_perchannel(data: dict) -> None:
    rows = PerChannel(0)
    for name, expected in data.items():
        found = re.fullmatch(r"w_q_(bitalloc_)?b(\d+)(?:_(bcorr|vcorr|bcorrvcorr))?", name)
        if found is None:
            continue
        bits = int(found[2])
        fmt: Format = ChannelBits(bits) if found[1] else grid(bits)
        weight = data["w"].flatten(1)
        params = (Analytic("none", budget="rounds") if found[1] else MinMax()).fit(weight, fmt, rows)
        if found[1]:
            assert torch.equal(params["bits"].flatten(), data[f"bits_w_b{bits}"])
        codes = encode(weight, fmt, rows, params)
        made = decode(codes, fmt, rows, params)
        if found[3]:
            factor, shift = moment_correction(
                weight, made, rows, mean="bcorr" in found[3], deviation="vcorr" in found[3]
            )
            fmt, params = with_real_offset(fmt), moved_grid(params, factor, shift)
            made = decode(codes, fmt, rows, params)
            assert torch.equal(encode(made, fmt, rows, params), codes), "still on the moved grid"
        close(made, expected.flatten(1))


def activations(data: dict) -> None:
    priors = {"laplace": "laplace", "gaus": "gauss", "2std": "deviations"}
    for (prior, half), table in MULTIPLIERS.items():
        stored = data[f"alpha_{'gaus' if prior == 'gauss' else prior}_{'positive_' if half else ''}table"]
        close(torch.tensor(table[-len(stored) :]), stored)
    for name, expected in data.items():
        found = re.fullmatch(r"(alpha|delta|offset|q|qpc)_(laplace|gaus|2std)_(bitalloc_)?b(\d+)_(sym|half)", name)
        if found is None:
            continue
        what, bits, half = found[1], int(found[4]), found[5] == "half"
        x = data["x"].relu() if half else data["x"]
        clip = Analytic(priors[found[2]], half, budget="rounds")
        gran: Granularity = PerChannel(1) if what == "qpc" else PerTensor()
        fmt: Format = ChannelBits(bits) if found[3] else grid(bits)
        if what in ("q", "qpc"):
            close(quantize(x, fmt, gran, clip.fit(x, fmt, gran)), expected)
            continue
        moments = block_moments(x.reshape(1, -1))
        lo, hi = clip.bounds(moments, torch.tensor([float(bits)]))
        close(
            {"alpha": clip.clip(moments, torch.tensor([float(bits)])), "delta": hi - lo, "offset": lo}[what][0],
            expected,
        )


def clipping_mse_curves(data: dict) -> None:
    for name, expected in data.items():
        found = re.fullmatch(r"mse_(gauss|laplace)_(?:sigma|b)([\d.]+)_M(\d+)", name)
        if found is not None:
            close(expected_error(found[1], data["alpha"], float(found[2]), int(found[3])).float(), expected)


HANDLERS = {
    "aciq": {
        "bit_allocation": bit_allocation,
        "weights_perchannel": weights_perchannel,
        "activations": activations,
        "clipping_mse_curves": clipping_mse_curves,
    }
}
