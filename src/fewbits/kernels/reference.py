"""What every kernel here computes, in plain torch: the paths of machines without a GPU, and the tests' yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.operands import Int8Matrix, Norm, PackedWeight, RowGrid
from fewbits.kernels.words import RUN


def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """`ops.packed_matmul` by decoding the weight whole, in float32, and rounding it to the type of `x`."""
    dense = decode(weight, x.shape[-1])
    weight.beside.lay_over(dense.T)
    out, bias = x @ dense.to(x.dtype), weight.beside.bias
    return out if bias is None else out + bias.to(x.dtype)


def decode(weight: PackedWeight, inputs: int) -> Tensor:
    """What the codes of a weight alone stand for, [in, out]; float32, or float64 where scale or table are."""
    words, scale, zero, table, bits, group, outputs, _ = weight
    places = words.shape[0] // bits * RUN
    if table is not None:
        codes = torch.empty(places, outputs, dtype=torch.int64, device=words.device)
        return table.to(_wide(table)).gather(0, unpack_into(codes, words, bits)[:inputs])
    assert scale is not None and zero is not None
    wide = _wide(scale)
    dense = torch.empty(places, outputs, dtype=wide, device=words.device)
    dense = unpack_into(dense, words, bits)[:inputs]
    groups, whole = inputs // group, inputs // group * group
    for part, at in ((dense[:whole], slice(0, groups)), (dense[whole:], slice(groups, None))):
        if len(part):
            grouped = part.unflatten(0, (-1, min(group, len(part))))
            grouped.sub_(zero[at].to(wide).unsqueeze(1)).mul_(scale[at].to(wide).unsqueeze(1))
    return dense


def unpack_into(out: Tensor, words: Tensor, bits: int) -> Tensor:
    """`out` [runs * 32, out], of any type, filled with the codes of `kernels.words`: what a decoder reads them into."""
    word, place = words.view(-1, bits, words.shape[1]), out.view(-1, RUN, words.shape[1])
    for k in range(RUN):
        at, bit = divmod(bits * k, 32)
        code = word[:, at] >> bit
        if bit > 32 - bits:
            low = (1 << (32 - bit)) - 1
            code = (code & low) | (word[:, at + 1] << (32 - bit))
        place[:, k] = code & ((1 << bits) - 1)
    return out


def _wide(held: Tensor) -> torch.dtype:
    return torch.promote_types(held.dtype, torch.float32)


def quantize_rows(x: Tensor, grid: RowGrid) -> Int8Matrix:
    """`ops.quantize_rows` in torch."""
    scale, zero, low, high, symmetric, floor = grid
    value = x.float()
    if scale is None or zero is None:
        lowest, highest = value.amin(-1), value.amax(-1)
        if symmetric:
            bound = torch.maximum(highest, -lowest).clamp_min(floor)
            bound = torch.where(bound == 0, torch.ones_like(bound), bound)
            scale = (bound / (high - grid.middle)).clamp_min(1e-20)
            zero = torch.full_like(bound, float(grid.middle))
        else:
            lowest, highest = lowest.clamp_max(0), highest.clamp_min(0)
            flat = lowest == highest
            lowest, highest = torch.where(flat, -1.0, lowest), torch.where(flat, 1.0, highest)
            scale = ((highest - lowest) / (high - low)).clamp_min(1e-20)
            zero = (low - torch.round(lowest / scale)).clamp(low, high)
    else:
        # copies: an op must not give back what it was given
        scale, zero = (held.float().reshape(-1).repeat(len(x)) for held in (scale, zero))
    code = (torch.round(value / scale[:, None]) + zero[:, None]).clamp(low, high) - grid.shift
    sums = code.sum(-1).to(torch.int32)
    return Int8Matrix(code.to(torch.int8), scale.contiguous(), (zero - grid.shift).contiguous(), sums)


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """The norm of `x`, rounded to the type of `x`."""
    value = x.float()
    if norm.centred:
        value = value - value.mean(-1, keepdim=True)
    value = value * (value.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    value = (value.to(x.dtype).float() if norm.twice else value) * norm.weight.float()
    return (value if norm.bias is None else value + norm.bias.float()).to(x.dtype)


def int8_matmul(
    a: Int8Matrix, b: Int8Matrix, bias: Tensor | None, dtype: torch.dtype, product: Tensor | None = None
) -> Tensor:
    """`ops.int8_matmul` in torch; `product` is a.codes @ b.codes.T in int32 where something else made it.

    Without one, the codes are multiplied as float32, 1024 columns at a time, whose sums stay within 2^24: exactly.
    """
    if product is None:
        pieces = zip(a.codes.split(1024, 1), b.codes.split(1024, 1), strict=True)
        product = sum((left.float() @ right.float().T).to(torch.int32) for left, right in pieces)
    acc = product - a.zeros.int()[:, None] * b.sums[None, :]
    acc = acc - (a.sums - a.codes.shape[-1] * a.zeros.int())[:, None] * b.zeros.int()[None, :]
    out = acc.float() * a.scales[:, None] * b.scales[None, :]
    return (out if bias is None else out + bias.float()).to(dtype)


def padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in int32 by torch, for int8 [m, k] and [n, k]; few rows are filled up where a GPU wants more than 16."""
    rows = a.shape[0]
    if a.is_cuda and rows <= 16:
        a = torch.nn.functional.pad(a, (0, 0, 0, 32 - rows))
    return torch._int_mm(a, b.t())[:rows]
