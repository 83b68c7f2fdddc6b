"""What each golden case of the formats and ranges must reproduce.

HANDLERS[slug][prefix] takes the arrays of one case and asserts. Shapes, bits and flags come from the arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbits.formats import (
    Float8,
    Granularity,
    Log2,
    LogSqrt2,
    PerChannel,
    PerTensor,
    PerToken,
    PowerOfTwo,
    Ternary,
    Uniform,
    encode,
    gptq_grid,
    quantize,
    raw_affine,
    snap_to_power_of_two,
    symmetric,
)
from fewbits.ranges import AbsMax, MinMax, QuantileSearch, ShrinkSearch


def close(actual: Tensor, expected: Any, *, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual.float().reshape(expected.shape), expected, rtol=rtol, atol=atol)


def close_off_ties(actual: Tensor, expected: Tensor, ratio: Tensor, atol: float = 1e-6) -> None:
    """Equal except where x / step lies within 1e-5 of a rounding tie."""
    tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-5
    close(torch.where(tie, expected, actual), expected, atol=atol)


def channels(flag: int, x: Tensor, channel_last: bool = False) -> Granularity:
    if not flag:
        return PerTensor()
    return PerChannel(-1 if channel_last and x.ndim == 3 else 0)


def gptq_find_params(data: dict) -> None:
    x = data["x"]
    names = sorted(name[: -len("_dq")] for name in data if name.endswith("_dq"))
    assert names
    for name in names:
        if name.startswith("trits"):
            params = MinMax().fit(x, Ternary(), PerChannel(0))
            close(params["positive"], data[f"{name}_scale"])
            close(params["negative"], data[f"{name}_zero"])
            close(quantize(x, Ternary(), PerChannel(0), params), data[f"{name}_dq"])
            continue
        fields = name.split("_")
        gran: Granularity = PerChannel(0)
        if fields[0] == "pt":
            gran, fields = PerTensor(), [*fields[1:], "sym0", "mse0"]
        bits, sym, mse = (int(field.lstrip("bsyme")) for field in fields[:3])
        fmt = gptq_grid(bits, sym=bool(sym), saturate_one_sided=True)
        params = (ShrinkSearch(reduction="sum") if mse else MinMax()).fit(x, fmt, gran)
        rows = torch.ones(x.shape[0], 1)
        close(params["scale"] * rows, data[f"{name}_scale"])
        close(params["zero_point"] * rows, data[f"{name}_zero"])
        close(quantize(x, fmt, gran, params), data[f"{name}_dq"])


def brecq_scale(data: dict) -> None:
    weight, bits = data["W"], data["bits"]
    gran = channels(data["channel_wise"], weight)
    if data["method"] == "mse":
        fmt, found = raw_affine(bits), ShrinkSearch()
    else:
        assert data["method"] == "max"
        # the release computes step and zero point in Python floats
        fmt = Uniform(
            bits=bits,
            symmetric=bool(data["symmetric"]),
            one_sided="keep",
            clamp_zero_point=False,
            zero_range="eps",
            eps=1e-8,
            arithmetic="float64",
        )
        found = MinMax()
    params = found.fit(weight, fmt, gran)
    close(params["scale"], data["delta"])
    close(params["zero_point"], data["zero_point"])
    close(quantize(weight, fmt, gran, params), data["W_q"])


def repq_uniform(data: dict) -> None:
    x, fmt = data["x"], raw_affine(data["n_bits"])
    gran = channels(data["channel_wise"], x, channel_last=True)
    params = QuantileSearch().fit(x, fmt, gran)
    close(params["scale"], data["delta"], atol=0)
    close(params["zero_point"], data["zero_point"])
    close_off_ties(quantize(x, fmt, gran, params), data["y"], x / params["scale"])


def repq_log(data: dict) -> None:
    fmt = LogSqrt2(data["n_bits"])
    params = QuantileSearch().fit(data["a"], fmt, PerTensor())
    close(params["scale"], data["delta"], atol=0)
    for name in ("a", "b"):
        steps = -2 * torch.log2(data[name] / params["scale"])
        close_off_ties(quantize(data[name], fmt, PerTensor(), params), data[f"y{name}"], steps)


def smoothquant_fake_quant(data: dict) -> None:
    kinds = {
        "w_pc": ("w", PerChannel(0)),
        "w_pt": ("w", PerTensor()),
        "t_tok": ("t", PerToken()),
        "t_pt": ("t", PerTensor()),
    }
    checked = 0
    for name, expected in data.items():
        kind, _, bits = name.rpartition("_b")
        if kind in kinds:
            source, gran = kinds[kind]
            fmt = symmetric(int(bits))
            params = AbsMax(1e-5).fit(data[source], fmt, gran)
            close(quantize(data[source], fmt, gran, params), expected)
            checked += 1
    assert checked == len(data) - 2


def fp8_grid(data: dict) -> None:
    for variant in ("e4m3", "e5m2"):
        plain, scaled = Float8(variant, scaled=False), Float8(variant)  # type: ignore[arg-type]
        one = {"scale": torch.ones(())}
        assert torch.equal(plain.quantize(data["x"], one), data[f"{variant}_saturating"])
        assert torch.equal(plain.encode(data["x"], one), data[f"{variant}_codes"])
        assert torch.equal(plain.quantize(data["y"], one), data[f"y_{variant}_direct"])
        params = MinMax().fit(data["y"], scaled, PerTensor())
        close(params["scale"], data[f"y_{variant}_scale"], atol=0)
        close(quantize(data["y"], scaled, PerTensor(), params), data[f"y_{variant}_scaled"])
        if f"{variant}_table" in data:
            table = data[f"{variant}_table"]
            real = torch.isfinite(table)
            codes = torch.arange(table.numel(), dtype=torch.int32).to(torch.uint8)
            assert torch.equal(plain.decode(codes, one)[real], table[real])


def fqvit_weight(data: dict) -> None:
    weight = data["weight"]
    gran = channels(len(torch.as_tensor(data["scale"]).reshape(-1)) > 1, weight)
    fmt = symmetric(data["bits"], narrow=False, step="span", zero_range="eps", eps=2.0**-23)
    params = MinMax().fit(weight, fmt, gran)
    close(params["scale"], data["scale"], atol=0)
    codes = encode(weight, fmt, gran, params)
    assert float((codes.float() != data["q"]).float().mean()) <= 1e-3
    close(quantize(weight, fmt, gran, params), data["dq"])


def fqvit_log2(data: dict) -> None:
    fmt = Log2(data["bits"], scaled=False)
    one = {"scale": torch.ones(())}
    close_off_ties(fmt.quantize(data["p"], one), data["dq"], -torch.log2(data["p"]))
    # the release keeps zero beside the codes, clamped onto the last; here it is a code of its own
    codes = fmt.encode(data["p"], one).clamp_max(2 ** data["bits"] - 1)
    close_off_ties(codes.float(), data["q"], -torch.log2(data["p"]))


def rapq_naive(data: dict) -> None:
    x, bits = data["x"], data["bits"]
    gran = channels(data["channel_wise"], x)
    free = ShrinkSearch().fit(x, raw_affine(bits), gran)
    close(free["scale"], data["delta_float"])
    close(free["zero_point"], data["zero_point_float_grid"])
    fmt = PowerOfTwo(bits, zero_point="real", rescale_zero=True, include_zero=False, clamp_zero_point=False)
    scale = snap_to_power_of_two(free["scale"])
    params = {"scale": scale, "zero_point": fmt.rescaled_zero(free["zero_point"], free["scale"], scale)}
    close(params["scale"], data["delta_pot"], atol=0)
    close(params["zero_point"], data["zero_point_pot"])
    close(quantize(x, fmt, gran, params), data["x_q"])


HANDLERS: dict[str, dict[str, Callable[[dict], None]]] = {
    "gptq": {"quantizer_find_params": gptq_find_params},
    "brecq": {"weight_scale_": brecq_scale, "tensor_scale_": brecq_scale},
    "repq-vit": {"uniform_": repq_uniform, "logsqrt2_": repq_log},
    "smoothquant": {"fake_quant": smoothquant_fake_quant},
    "fp8-bert": {"fp8_grid": fp8_grid},
    "fq-vit": {"weight_int": fqvit_weight, "log2_quantizer_": fqvit_log2},
    "rapq": {"naive_pot_": rapq_naive},
}
