"""Linear layers in 8-bit integers: int8 codes on both sides of the product, summed in int32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbits.formats import Uniform
from fewbits.kernels import ops, reference
from fewbits.kernels.operands import Int8Matrix, RowGrid
from fewbits.kernels.reference import padded_int_mm
from fewbits.packed.modules import Packed
from fewbits.quantizer import Quantizer

if TYPE_CHECKING:
    from fewbits.packed.shared import Link
    from fewbits.packed.weight import KernelWeight


class Int8Linear(Packed):
    """int8 weights and activations quantized to int8 on the way in: sums in int32, one rounding to the output."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor

    def __init__(self, weight: KernelWeight, bias: Tensor | None, kernel: str, activations: Quantizer) -> None:
        super().__init__(weight.codes.shape, bias, kernel)
        assert weight.scale is not None and weight.zero is not None
        shift = 128 if weight.bits == 8 else 0
        codes = (weight.codes.to(torch.int16) - shift).to(torch.int8)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", weight.scale.float().reshape(-1))
        self.register_buffer("zero", weight.zero.float().reshape(-1) - shift)
        self.register_buffer("sums", codes.sum(-1, dtype=torch.int32))
        self.symmetric = not bool(self.zero.any())
        self.activations = activations
        self.rows = row_grid(activations)
        self.shared: Link | None = None  # the layers that have its input too

    @property
    def backend(self) -> str:
        """Of `ops.quantize`, for its input."""
        return self.kernel if self.kernel in ops.BACKENDS else "auto"

    def grid(self) -> RowGrid | None:
        """What its input is quantized on, where `ops.quantize` does that."""
        if self.rows is None:
            return None
        fmt = self.activations.spec.format
        assert isinstance(fmt, Uniform)
        params = {} if self.activations.spec.dynamic else self.activations.params
        scale = fmt.scale_of(params) if params else None
        zero = params.get("zero_point", torch.zeros_like(scale)) if scale is not None else None
        return RowGrid(scale, zero, fmt.q_min, fmt.q_max, *self.rows)

    def product(self, x: Tensor) -> Tensor:
        link = self.shared if ops.eager(x) else None
        rows = self._quantized(x) if link is None else link.rows(x, self._quantized)
        weight = Int8Matrix(self.codes, self.scale, self.zero, self.sums, self.symmetric)
        if self.kernel in ("torch_int_mm", "native"):
            in_c = ops.run_native_int8_product if ops.eager(x) else ops.native_int8_product
            multiply = padded_int_mm if self.kernel == "torch_int_mm" else in_c
            out = reference.int8_matmul(rows, weight, self.bias, x.dtype, multiply(rows.codes, weight.codes))
        else:
            out = ops.multiply_int8(rows, weight, self.bias, x.dtype, self.kernel)
        return out.reshape(*x.shape[:-1], self.out_features)

    def _quantized(self, x: Tensor) -> Int8Matrix:
        """The rows [m, in] of `x` [..., in] as int8."""
        flat = x.reshape(-1, x.shape[-1])
        if (grid := self.grid()) is not None:
            return ops.quantize(flat, grid, self.backend)
        fmt = self.activations.spec.format
        assert isinstance(fmt, Uniform)
        params = self.activations._spread(flat)
        shift = 128 if fmt.q_max > 127 else 0
        codes = (fmt.encode(flat, params).to(torch.int16) - shift).to(torch.int8)
        scale = fmt.scale_of(params).reshape(-1).expand(len(flat)).contiguous()
        zero = params.get("zero_point", torch.zeros_like(fmt.scale_of(params))).reshape(-1).expand(len(flat)) - shift
        return Int8Matrix(codes, scale, zero.contiguous(), codes.sum(-1, dtype=torch.int32))

    def decoded(self) -> Tensor:
        return (self.codes.float() - self.zero[:, None]) * self.scale[:, None]


def integer_activations(quantizer: Quantizer) -> str | None:
    """Why 8-bit activations of a quantizer cannot be multiplied as integers; None where they can."""
    spec = quantizer.spec
    fmt, grain = spec.format, spec.granularity
    if not isinstance(fmt, Uniform) or fmt.bits > 8 or fmt.zero_point == "real":
        return "its grid is not a uniform one of at most 8 bits with whole zero points"
    if not (grain.kind == "tensor" or (grain.kind == "token" and getattr(grain, "axis", None) == -1 and spec.dynamic)):
        return f"its parameters vary per {grain.describe()}, not per tensor or token"
    if not spec.dynamic and not quantizer.ready:
        return "it is not calibrated yet"
    return None


def row_grid(quantizer: Quantizer) -> tuple[bool, float] | None:
    """(symmetric, floor) where `ops.quantize_rows` makes exactly the codes of a quantizer; else None."""
    from fewbits.ranges import AbsMax, MinMax

    spec, fmt = quantizer.spec, quantizer.spec.format
    assert isinstance(fmt, Uniform)
    if fmt.rounding != "half_even" or (fmt.order != "round_then_shift" and fmt.zero_point != "none"):
        return None
    if not spec.dynamic:
        return False, 0.0
    if spec.granularity.kind != "token" or type(fmt) is not Uniform:
        return None
    plain = (fmt.eps, fmt.min_span, fmt.zero_range, fmt.arithmetic) == (1e-20, 0.0, "unit", "float32")
    if not plain:
        return None
    middle = fmt.zero_point == ("none" if fmt.signed else "middle")
    if isinstance(spec.range, AbsMax) and fmt.step == "positive" and middle:
        return True, spec.range.floor
    affine = Uniform(bits=fmt.bits, signed=fmt.signed, narrow=fmt.narrow)
    return (False, 0.0) if isinstance(spec.range, MinMax) and fmt == affine else None
