"""Linear layers whose weight is codes. Each takes and gives what the layer did whose place it takes.

Their buffers are all there is of the weight, so `state_dict` goes through safetensors; a model packed in the same way
loads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fewbits.kernels import native, ops, reference
from fewbits.kernels.fragments import pack_fragments, unpack_fragments
from fewbits.kernels.operands import Beside, PackedWeight
from fewbits.kernels.words import pack_words
from fewbits.quantizer import Quantizer

if TYPE_CHECKING:
    from fewbits.packed.weight import KernelWeight


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


class Coded(Packed):
    """Codes in 32-bit words, and parts beside them. A kind says in which order its words are, and what reads them.

    Columns may be in another order than the model's (`order`), and the codes stand for numbers by a grid or a table:
    `kernels.operands.PackedWeight`.
    """

    #: The buffer in the place of `PackedWeight.zero`.
    origin: ClassVar[str] = "zero"
    words: Tensor
    scale: Tensor | None
    table: Tensor | None
    order: Tensor | None
    index: Tensor | None
    columns: Tensor | None
    starts: Tensor | None
    places: Tensor | None
    entries: Tensor | None

    def __init__(self, words: Tensor, weight: KernelWeight, bias: Tensor | None, kernel: str) -> None:
        super().__init__(weight.codes.shape, bias, kernel)
        self.bits, self.group = weight.bits, weight.group
        self.register_buffer("words", words)
        self.register_buffer(self.origin, weight.zero)
        for name in ("scale", "table", "order", "index", "columns", "starts", "places", "entries"):
            self.register_buffer(name, getattr(weight, name))

    def product(self, x: Tensor) -> Tensor:
        return self._multiply(self._ordered(x), self._held(self.bias))

    def decoded(self) -> Tensor:
        eye = torch.eye(self.in_features, device=self.words.device)
        return self._exact(self._ordered(eye), self._held(None)).T

    @abstractmethod
    def _multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """x, its columns in the order of the codes, times the weight."""

    def _exact(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """`_multiply`, with no weight rounded on the way."""
        return reference.packed_matmul(x, weight)

    def _ordered(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(-1, self.order)

    def _held(self, bias: Tensor | None) -> PackedWeight:
        held = self._buffers  # by attribute, nn.Module would look each up in three dicts, every call
        beside = Beside(bias, held["index"], held["columns"], held["starts"], held["places"], held["entries"])
        grid = held["scale"], held[self.origin], held["table"]
        return PackedWeight(self.words, *grid, self.bits, self.group, self.out_features, beside)

    def extra_repr(self) -> str:
        grid = "table" if self.table is not None else f"group={self.group}"
        return f"{super().extra_repr()}, bits={self.bits}, {grid}"


class CodesLinear(Coded):
    """Codes along the input axis (`kernels.words`), multiplied by `kernels.ops.packed_matmul`."""

    zero: Tensor | None

    def __init__(self, weight: KernelWeight, bias: Tensor | None, kernel: str) -> None:
        super().__init__(pack_words(weight.codes, weight.bits), weight, bias, kernel)

    def _multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return ops.multiply(ops.run_packed_matmul, ops.packed_matmul, x, weight, backend=self.kernel)


class FragmentLinear(Coded):
    """Codes in the order of a GPU's matrix units, multiplied by `kernels.ops.fragment_matmul`."""

    zero: Tensor | None

    def __init__(self, weight: KernelWeight, bias: Tensor | None) -> None:
        words = pack_fragments(weight.codes, weight.bits, nibbles=weight.table is not None)
        if weight.table is not None:
            weight = replace(weight, table=weight.table.T.contiguous())  # an output's levels side by side
        super().__init__(words, weight, bias, "triton_mma")

    def _multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return ops.multiply(ops.run_fragment_matmul, ops.fragment_matmul, x, weight)

    def _held(self, bias: Tensor | None) -> PackedWeight:
        held = super()._held(bias)
        return held if held.table is None else held._replace(table=held.table.T)

    def _exact(self, x: Tensor, weight: PackedWeight) -> Tensor:
        codes = unpack_fragments(weight.words, weight.bits, weight.outputs, nibbles=weight.table is not None)
        return super()._exact(x, weight._replace(words=pack_words(codes, weight.bits)))


class NativeLinear(Coded):
    """Codes row by row, multiplied by compiled C on a CPU (`kernels.native`)."""

    origin = "offset"
    offset: Tensor | None

    def __init__(self, weight: KernelWeight, bias: Tensor | None) -> None:
        def wide(held: Tensor | None) -> Tensor | None:
            return None if held is None else held.float()

        def row_by_row(held: Tensor | None) -> Tensor | None:
            return None if held is None else held.float().T.contiguous()

        offset = None if weight.scale is None or weight.zero is None else weight.scale.float() * weight.zero.float()
        made = replace(
            weight, scale=row_by_row(weight.scale), zero=row_by_row(offset), table=row_by_row(weight.table),
            columns=wide(weight.columns), entries=wide(weight.entries),
        )  # fmt: skip
        super().__init__(native.packed_rows(pack_words(weight.codes, weight.bits)), made, bias, "native")

    def _multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return ops.multiply(ops.run_native_matmul, ops.native_matmul, x, weight)

    def _exact(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self._multiply(x, weight)


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
