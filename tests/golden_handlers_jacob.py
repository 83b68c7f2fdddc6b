"""Golden cases of integer-only inference: parameters, fixed-point arithmetic, whole integer layers."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels import fixed_point as fp
from fewbits.kernels.integer_ops import Output, linear


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def fixed_point(data: dict) -> None:
    scale, zero = fp.affine_parameters(data["rmin"], data["rmax"])
    assert torch.equal(scale, data["scale"]) and torch.equal(zero, data["zero_point"])
    for signed in (False, True):
        found = fp.decompose(data["real_multiplier"], signed=signed)
        assert torch.equal(found.mantissa, data["quantized_multiplier"])
        assert torch.equal(found.shift, data["right_shift"])
    assert torch.equal(fp.high_multiply(data["srdhm_a"], data["srdhm_b"]), data["srdhm_out"])
    assert torch.equal(fp.shift_right(data["rdpot_x"], data["rdpot_exponent"]), data["rdpot_out"])


def layer(data: dict) -> None:
    """Everything from the floats on; the product and what follows are what the executor runs."""
    scales, zeros, codes = {}, {}, {}
    for name, held in (("w", "W"), ("x", "X"), ("y", "Y_float")):
        scales[name], zeros[name] = fp.affine_parameters(data[held].min(), data[held].max())
        codes[name] = fp.quantize(data[held], scales[name], zeros[name])
        assert float(scales[name]) == data[f"S_{name}"] and int(zeros[name]) == data[f"Z_{name}"], name
    assert torch.equal(codes["w"], data["W_q"]) and torch.equal(codes["x"], data["X_q"])
    bias, saturated = fp.quantize_bias(data["bias"], scales["w"] * scales["x"])
    assert torch.equal(bias, data["bias_q"]) and not saturated
    factor = fp.layer_multiplier(scales["x"], scales["w"], scales["y"])
    assert float(factor) == data["M"]
    multiplier = fp.decompose(factor, signed=False)
    assert int(multiplier.mantissa) == data["M0"] and int(multiplier.shift) == data["n"]
    out = Output(multiplier, zeros["y"], data["act_min"], data["act_max"])
    accumulators = linear(codes["x"].T, zeros["x"], codes["w"], zeros["w"], bias)
    assert torch.equal(accumulators.T, data["acc_int32"])
    assert torch.equal(out(accumulators).T, data["Y_q"])
    if data["Y_float"].min() >= 0:  # after ReLU
        assert data["act_min"] == int(zeros["y"])


HANDLERS = {"jacob-integer-only": {"params_and_fixedpoint": fixed_point, "integer_layer_": layer}}
