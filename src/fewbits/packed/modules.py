"""Linear layers whose weight is codes. Each takes and gives what the layer did whose place it takes.

Their buffers are all there is of the weight, so `state_dict` goes through safetensors; a model packed in the same way
loads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.formats import Uniform
from fewbits.kernels import native, ops, reference
from fewbits.kernels.choose import padded_int_mm
from fewbits.kernels.fragments import pack_fragments, unpack_fragments
from fewbits.kernels.words import pack_words
from fewbits.quantizer import Quantizer

if TYPE_CHECKING:
    from fewbits.packed.weight import KernelWeight

#: Quantized rows: codes, scales, zero points, sums of the codes.
Rows = tuple[Tensor, Tensor, Tensor, Tensor]


class Packed(nn.Module, ABC):
    """A linear layer [..., in] -> [..., out] around a packed product.

    Around the product: a factor per input channel, the quantizers of input and output where the product does not do
    them itself, in simulation. `kernel` is the name of what multiplies.
    """

    bias: Tensor | None
    factor: Tensor | None

    def __init__(self, shape: Sequence[int], bias: Tensor | None, kernel: str) -> None:
        super().__init__()
        outputs, inputs = shape
        self.in_features, self.out_features, self.kernel = inputs, outputs, kernel
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("factor", None)
        self.input_quantizer: Quantizer | None = None
        self.output_quantizer: Quantizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.factor is not None:
            x = x * self.factor.to(x.dtype)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        out = self.product(x)
        return out if self.output_quantizer is None else self.output_quantizer(out)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x times the weight, plus the bias, in the type of `x`."""

    @abstractmethod
    def decoded(self) -> Tensor:
        """The float32 weight [out, in] that the codes stand for."""

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for code that looks at a layer's weight; made anew each time."""
        return self.decoded()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel}"


class CodesLinear(Packed):
    """Codes in 32-bit words, multiplied by `kernels.ops.packed_matmul`."""

    words: Tensor
    scale: Tensor | None
    zero: Tensor | None
    table: Tensor | None
    order: Tensor | None
    index: Tensor | None
    columns: Tensor | None
    starts: Tensor | None
    places: Tensor | None
    entries: Tensor | None

    def __init__(self, weight: KernelWeight, bias: Tensor | None, kernel: str) -> None:
        super().__init__(weight.codes.shape, bias, kernel)
        self.bits, self.group = weight.bits, weight.group
        self.register_buffer("words", pack_words(weight.codes, weight.bits))
        for name in ("scale", "zero", "table", "order", "index", "columns", "starts", "places", "entries"):
            self.register_buffer(name, getattr(weight, name))

    def product(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        run = ops.run_packed_matmul if ops.eager(x) else ops.packed_matmul
        return run(
            x, self.words, self.scale, self.zero, self.table, self.bits, self.group, self.bias, self.index,
            self.columns, self.starts, self.places, self.entries, backend=self.kernel,
        )  # fmt: skip

    def decoded(self) -> Tensor:
        dense = torch.eye(self.in_features, device=self.words.device)
        if self.order is not None:
            dense = dense.index_select(-1, self.order)
        return reference.packed_matmul(
            dense, self.words, self.scale, self.zero, self.table, self.bits, self.group, None, self.index,
            self.columns, self.starts, self.places, self.entries,
        ).T  # fmt: skip

    def extra_repr(self) -> str:
        grid = "table" if self.table is not None else f"group={self.group}"
        return f"{super().extra_repr()}, bits={self.bits}, {grid}"


class FragmentLinear(Packed):
    """Codes in the order of a GPU's matrix units, multiplied by `kernels.ops.fragment_matmul`."""

    words: Tensor
    scale: Tensor | None
    zero: Tensor | None
    table: Tensor | None
    order: Tensor | None
    index: Tensor | None
    columns: Tensor | None
    starts: Tensor | None
    places: Tensor | None
    entries: Tensor | None

    def __init__(self, weight: KernelWeight, bias: Tensor | None) -> None:
        super().__init__(weight.codes.shape, bias, "triton_mma")
        self.bits, self.group = weight.bits, weight.group
        words = pack_fragments(weight.codes, weight.bits, nibbles=weight.table is not None)
        self.register_buffer("words", words)
        for name in ("scale", "zero", "table", "order", "index", "columns", "starts", "places", "entries"):
            self.register_buffer(name, getattr(weight, name))

    def product(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        run = ops.run_fragment_matmul if ops.eager(x) else ops.fragment_matmul
        return run(
            x, self.words, self.scale, self.zero, self.table, self.bits, self.group, self.out_features, self.bias,
            self.index, self.columns, self.starts, self.places, self.entries,
        )  # fmt: skip

    def decoded(self) -> Tensor:
        codes = unpack_fragments(self.words, self.bits, self.out_features, nibbles=self.table is not None)
        dense = torch.eye(self.in_features, device=self.words.device)
        if self.order is not None:
            dense = dense.index_select(-1, self.order)
        return reference.packed_matmul(
            dense, pack_words(codes, self.bits), self.scale, self.zero, self.table, self.bits, self.group, None,
            self.index, self.columns, self.starts, self.places, self.entries,
        ).T  # fmt: skip


class NativeLinear(Packed):
    """Codes row by row, multiplied by compiled C on a CPU (`kernels.native`)."""

    words: Tensor
    scale: Tensor | None
    offset: Tensor | None
    table: Tensor | None
    order: Tensor | None
    index: Tensor | None
    columns: Tensor | None
    starts: Tensor | None
    places: Tensor | None
    entries: Tensor | None

    def __init__(self, weight: KernelWeight, bias: Tensor | None) -> None:
        super().__init__(weight.codes.shape, bias, "native")
        self.bits, self.group = weight.bits, weight.group
        self.register_buffer("words", native.packed_rows(pack_words(weight.codes, weight.bits)))
        offset = None if weight.scale is None or weight.zero is None else weight.scale.float() * weight.zero.float()
        for name, held in (("scale", weight.scale), ("offset", offset), ("table", weight.table)):
            self.register_buffer(name, None if held is None else held.float().T.contiguous())
        for name in ("columns", "entries"):
            held = getattr(weight, name)
            self.register_buffer(name, None if held is None else held.float())
        for name in ("order", "index", "starts", "places"):
            self.register_buffer(name, getattr(weight, name))

    def product(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        run = ops.run_native_matmul if ops.eager(x) else ops.native_matmul
        return run(
            x, self.words, self.scale, self.offset, self.table, self.bits, self.group, self.out_features, bias,
            self.index, self.columns, self.starts, self.places, self.entries,
        )  # fmt: skip

    def decoded(self) -> Tensor:
        return self._product(torch.eye(self.in_features), None).T


class TorchInt4Linear(Packed):
    """4-bit codes in the order of torch's own int4 product, which differs between CPU and GPU."""

    words: Tensor
    scales_and_zeros: Tensor

    def __init__(self, weight: KernelWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight.codes.shape, bias, "torch_int4")
        assert weight.scale is not None and weight.zero is not None
        self.group = weight.group
        scale, zero = weight.scale.float(), weight.zero.float()
        # its weight is (code - 8) * scale + zero
        pair = torch.stack([scale, (8 - zero) * scale], -1)
        self.register_buffer("scales_and_zeros", pair.to(dtype).contiguous().to(device))
        codes = weight.codes.to(device)
        if device.type == "cuda":
            self.register_buffer("words", torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8))
        else:
            self.register_buffer("words", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))

    def product(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.scales_and_zeros.dtype)
        if flat.device.type == "cuda":
            out = torch.ops.aten._weight_int4pack_mm(flat, self.words, self.group, self.scales_and_zeros)
        else:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.words, self.group, self.scales_and_zeros)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def decoded(self) -> Tensor:
        eye = torch.eye(self.in_features, device=self.words.device, dtype=self.scales_and_zeros.dtype)
        bias, self.bias = self.bias, None
        try:
            return self.product(eye).float().T
        finally:
            self.bias = bias


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

    def product(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        eager = ops.eager(x)
        quantized = self._quantized(flat, ops.run_quantize_rows if eager else ops.quantize_rows)
        if self.kernel in ("torch_int_mm", "native"):
            in_c = ops.run_native_int8_product if eager else ops.native_int8_product
            multiply = padded_int_mm if self.kernel == "torch_int_mm" else in_c
            product = multiply(quantized[0], self.codes)
            out = reference.int8_matmul(
                quantized[0], self.codes, *quantized[1:], self.scale, self.zero, self.sums, self.bias, x.dtype, product
            )
        else:
            run = ops.run_int8_matmul if eager else ops.int8_matmul
            out = run(
                quantized[0], self.codes, *quantized[1:], self.scale, self.zero, self.sums, self.bias, x.dtype,
                self.symmetric, backend=self.kernel,
            )  # fmt: skip
        return out.reshape(*x.shape[:-1], self.out_features)

    def _quantized(self, flat: Tensor, quantize_rows: Callable[..., Any]) -> Rows:
        """(codes, scales, zeros, sums) of the rows."""
        fmt = self.activations.spec.format
        assert isinstance(fmt, Uniform)
        backend = self.kernel if self.kernel in ops.BACKENDS else "auto"
        if self.rows is not None:
            params = {} if self.activations.spec.dynamic else self.activations.params
            scale = fmt.scale_of(params) if params else None
            zero = params.get("zero_point", torch.zeros_like(scale)) if scale is not None else None
            symmetric, floor = self.rows
            made: Rows = quantize_rows(flat, scale, zero, fmt.q_min, fmt.q_max, symmetric, floor, backend=backend)
            return made
        params = self.activations._spread(flat)
        shift = 128 if fmt.q_max > 127 else 0
        codes = (fmt.encode(flat, params).to(torch.int16) - shift).to(torch.int8)
        scale = fmt.scale_of(params).reshape(-1).expand(len(flat)).contiguous()
        zero = params.get("zero_point", torch.zeros_like(fmt.scale_of(params))).reshape(-1).expand(len(flat)) - shift
        return codes, scale, zero.contiguous(), codes.sum(-1, dtype=torch.int32)

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
