"""Quantized weights in the two forms ONNX has for them: int8 tensors to dequantize, and `MatMulNBits`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.packing import pack_codes
from fewbits.graph.operands import restore
from fewbits.outliers.parts import Columns

if TYPE_CHECKING:
    from fewbits.export.layers import Layer

#: Set on a DequantizeLinear whose scales carry the batch norm that followed the layer.
FOLDED = "fewbits.folded"
#: Ops whose weight may be packed into the blocks of a matrix product.
PRODUCTS = ("linear", "addmm", "matmul")
#: Columns that share a scale where the weight itself has one scale a row.
_ROW_BLOCK = 128
_WIDTHS = (2, 4, 8)


@dataclass
class Integers:
    """Codes for DequantizeLinear.

    codes: int8, in the operand's own shape, or [out, columns] where `canonical`. scale, zero: float32 and int8, scalars
    or along `axis`; [out, groups] where `block`, the columns of a group, is given: the last group is then filled up.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    axis: int | None
    canonical: bool = False
    block: int | None = None


@dataclass
class Blocks:
    """A weight as `com.microsoft::MatMulNBits` reads it.

    bits: 2, 4 or 8 of a stored code. block: columns that share a scale. codes: uint8 [out, blocks, bytes of a block],
    lowest bits first. scale: float32 [out, blocks]. zero: packed as the codes are, every row on whole bytes, uint8
    [out * bytes], or None where it is 2^(bits-1) everywhere. order: int64 [columns], the input's columns in the order
    of the codes', or None. kept, kept_values: input columns (int64 [k]) with their weights (float32 [k, out]) that stay
    in full precision; the codes there stand for zero.
    """

    bits: int
    block: int
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None = None
    kept: Tensor | None = None
    kept_values: Tensor | None = None


def integers(layer: Layer) -> Integers:
    """The weight for DequantizeLinear, along an axis of the operand where one holds the rows of the codes."""
    site, gran = layer.site, layer.quantizer.spec.granularity
    codes, zero = layer.signed()
    scale, _ = layer.scales()
    held = zero.round().to(torch.int8)
    if gran.kind == "group":
        assert layer.group_size is not None
        whole = torch.nn.functional.pad(codes, (0, -codes.shape[1] % layer.group_size))
        return Integers(whole, scale, held, 1, True, layer.group_size)
    shape = operand_shape(layer)
    axis = {"oi": 0, "io": 1, "io_conv": 1}.get(site.layout)
    if (site.layout == "io" and len(shape) != 2) or (site.layout == "io_conv" and site.groups != 1):
        axis = None
    if gran.kind == "tensor":
        return Integers(operand_codes(layer, codes), scale[0, 0], held[0, 0], None)
    scale, held = scale[:, 0].contiguous(), held[:, 0].contiguous()
    if axis is None:  # rows of the codes lie across the operand
        return Integers(codes, scale, held, 0, True)
    return Integers(operand_codes(layer, codes), scale, held, axis)


def operand_shape(layer: Layer) -> tuple[int, ...]:
    """Shape of the weight as the op reads it."""
    return tuple(layer.site.view[0]) if layer.site.view is not None else tuple(layer.site.shape)


def operand_codes(layer: Layer, codes: Tensor) -> Tensor:
    """Codes [out, columns] in the shape in which the op reads the weight."""
    site, shape = layer.site, operand_shape(layer)
    return restore(codes.view(canonical_shape(layer)), site.layout, shape, site.groups).contiguous()


def canonical_shape(layer: Layer) -> tuple[int, ...]:
    """(out, in, *kernel) of a weight."""
    from fewbits.graph.operands import canonical

    site = layer.site
    return tuple(canonical(torch.empty(operand_shape(layer), device="meta"), site.layout, site.groups).shape)


def blocks(layer: Layer) -> Blocks:
    """The weight for `MatMulNBits`. Raises `FewbitsError` where groups are not runs of a power of two, 16 at least."""
    codes, zero = layer.unsigned()
    scale, _ = layer.scales()
    rows, columns = codes.shape
    block = layer.group_size or _ROW_BLOCK
    if block < 16 or block & (block - 1):
        raise FewbitsError(f"{layer.site.name}: groups of {block}; MatMulNBits takes powers of two from 16")
    bits = next(width for width in _WIDTHS if width >= layer.uniform.bits)
    count = -(-columns // block)
    if layer.group_size is None:
        scale, zero = scale.expand(rows, count), zero.expand(rows, count)
    index = torch.arange(columns) // block if layer.group_index is None else layer.group_index.cpu().long()
    kept = kept_values = order = None
    for part in layer.parts:
        if not isinstance(part, Columns):
            raise FewbitsError(f"{layer.site.name}: ONNX holds no {part.kind} part of a weight")
        kept, kept_values = part.index, part.values.float().T.contiguous()
        codes = codes.clone()
        codes[:, kept] = zero[:, index[kept]].round().to(torch.uint8)
    if layer.group_index is not None:
        order = torch.argsort(index, stable=True)
        if not torch.equal(index[order], torch.arange(columns) // block):
            raise FewbitsError(f"{layer.site.name}: its groups differ in size; MatMulNBits needs {block} columns each")
        codes = codes[:, order]
    codes = torch.nn.functional.pad(codes, (0, count * block - columns))
    packed = pack_codes(codes, bits).view(rows, count, block * bits // 8)
    held = None
    if not bool((zero == 2 ** (bits - 1)).all()):
        aligned = torch.nn.functional.pad(zero.round().to(torch.uint8), (0, -count % (8 // bits)))
        held = pack_codes(aligned, bits)
    return Blocks(bits, block, (rows, columns), packed, scale.contiguous(), held, order, kept, kept_values)
