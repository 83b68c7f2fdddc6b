"""The operations of integer-only inference: bytes in, 32-bit accumulators, bytes out. No floating point anywhere.

Jacob et al. (CVPR 2018), sections 2.2 to 2.4 and appendix A: real = scale * (code - zero); products of bytes are summed
in 32 bits; bias is an int32 in units of the accumulator; a fixed-point multiplier, the output's zero point and a clamp,
which is also the activation function, make bytes of the sum (`Output`). Codes are uint8 whatever their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import fixed_point
from fewbits.kernels.fixed_point import INT32, MAX_DEPTH, Multiplier

#: Bits that the inputs of an addition are moved to the left before their scales are made equal.
ADD_SHIFT = 20


@dataclass(frozen=True)
class Output:
    """From int32 accumulators to uint8 codes: multiply, shift, add the zero point, clamp.

    multiplier: one factor, or one per channel, [channels]. zero: int32 (). low, high: the clamp, in codes: for ReLU the
    lower end is the zero point, for ReLU6 the upper one the code of 6.
    """

    multiplier: Multiplier
    zero: Tensor
    low: int = 0
    high: int = 255

    def __call__(self, acc: Tensor, axis: int = -1) -> Tensor:
        """`axis`: that of the channels, where there is a multiplier for each."""
        spread = Multiplier(*(along(part, acc.dim(), axis) for part in self.multiplier))
        scaled = fixed_point.apply(acc, spread).long() + self.zero
        return scaled.clamp(self.low, self.high).to(torch.uint8)


def along(vector: Tensor, dims: int, axis: int) -> Tensor:
    """A scalar as it is, a vector as a tensor of `dims` dimensions that extends along `axis`."""
    if vector.dim() == 0:
        return vector
    shape = [1] * dims
    shape[axis] = -1
    return vector.view(shape)


def check_depth(depth: int, where: str = "an integer product") -> None:
    """Raises `FewbitsError` where a sum of `depth` products of bytes may leave 32 bits."""
    if depth > MAX_DEPTH:
        raise FewbitsError(f"{where}: {depth} products of bytes can overflow an int32 accumulator, {MAX_DEPTH} cannot")


def linear(x: Tensor, zero_x: Tensor, w: Tensor, zero_w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Accumulators int32 [..., out] of codes x [..., in] and w [out, in], both uint8; bias int32 [out].

    The plain product of codes, corrected by the sums of rows and columns (equation 7), is the product of the centred
    codes exactly. zero_x: (); zero_w: () or [out].
    """
    _bytes(x, w)
    depth = w.shape[1]
    check_depth(depth)
    plain = x.int() @ w.int().t()
    sums_x = x.sum(-1, keepdim=True, dtype=torch.int32)
    sums_w = w.sum(1, dtype=torch.int32)
    # The parts may leave 32 bits and come back: integers wrap, and their sum is within.
    return add_bias(plain - zero_x * sums_w - zero_w * sums_x + depth * zero_x * zero_w, bias, -1)


def convolution(
    x: Tensor, zero_x: Tensor, w: Tensor, zero_w: Tensor, bias: Tensor | None = None, **geometry: Any
) -> Tensor:
    """Accumulators int32 of a 1-, 2- or 3-dimensional convolution of codes x [N, in, ...] with w [out, in/groups, ...].

    zero_w: () or [out]. `geometry`: stride, padding, dilation, groups. Padding is with real zero, whose code is zero_x.
    """
    _bytes(x, w)
    check_depth(w[0].numel())
    centred = x.int() - zero_x
    kernel = _spread(w.int() - along(zero_w, w.dim(), 0), geometry.pop("dilation", 1))
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[w.dim() - 2]
    return add_bias(run(centred, kernel, **geometry), bias, 1)


def _spread(kernel: Tensor, dilation: int | Sequence[int]) -> Tensor:
    """A kernel with zeros between its elements: torch has no dilated convolution of integers."""
    steps = [dilation] * (kernel.dim() - 2) if isinstance(dilation, int) else list(dilation)
    if all(step == 1 for step in steps):
        return kernel
    sizes = [(size - 1) * step + 1 for size, step in zip(kernel.shape[2:], steps, strict=True)]
    wide = kernel.new_zeros((*kernel.shape[:2], *sizes))
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in steps))] = kernel
    return wide


def product(a: Tensor, zero_a: Tensor, b: Tensor, zero_b: Tensor) -> Tensor:
    """Accumulators int32 of the matrix product of two activations, codes a [..., n, k] and b [..., k, m]."""
    _bytes(a, b)
    check_depth(a.shape[-1])
    return (a.int() - zero_a) @ (b.int() - zero_b)


def add_bias(acc: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """int32 accumulators plus an int32 bias along `axis`, saturated."""
    if bias is None:
        return acc
    if bias.dtype != torch.int32:
        raise FewbitsError(f"a bias of integer-only inference is int32, not {bias.dtype}")
    return (acc.long() + along(bias, acc.dim(), axis)).clamp(INT32.min, INT32.max).to(torch.int32)


def add(a: Tensor, zero_a: Tensor, b: Tensor, zero_b: Tensor, factors: tuple[Multiplier, Multiplier]) -> Tensor:
    """The sum of two tensors of codes on a common scale, int32, for an `Output` to bring to bytes.

    factors: of each input's scale over twice the larger of the two. The sum is in units of 2^-20 of that.
    """
    _bytes(a, b)
    moved = ((x.int() - zero) << ADD_SHIFT for x, zero in ((a, zero_a), (b, zero_b)))
    first, second = (fixed_point.apply(x, factor) for x, factor in zip(moved, factors, strict=True))
    return first + second


def add_factors(scale_a: Tensor, scale_b: Tensor, scale_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real factors (float32) of the two inputs of `add` and of its output."""
    twice = 2 * torch.maximum(scale_a, scale_b)
    return scale_a / twice, scale_b / twice, twice / (2.0**ADD_SHIFT * scale_out)


def multiply(a: Tensor, zero_a: Tensor, b: Tensor, zero_b: Tensor) -> Tensor:
    """The elementwise product of two tensors of codes, int32, in units of the product of their scales."""
    _bytes(a, b)
    return (a.int() - zero_a) * (b.int() - zero_b)


def rescale(x: Tensor, zero: Tensor) -> Tensor:
    """Codes as int32 in units of 2^-20 of their scale, for an `Output` on another grid."""
    _bytes(x)
    return (x.int() - zero) << ADD_SHIFT


def concatenate(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Codes that share scale and zero point, side by side: a copy."""
    _bytes(*parts)
    return torch.cat(list(parts), axis)


def average_pool(
    x: Tensor,
    zero: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Codes of the means of windows, on the grid of the input: integer sum, division rounded half up.

    Padding counts as real zero, or with `count_include_pad` False not at all, as in `torch.nn.AvgPool2d`.
    """
    _bytes(x)
    spatial = list(x.shape[2:])
    ones = torch.ones(spatial, dtype=torch.int32)
    outer = [amount for size in reversed(padding) for amount in (size, size)]
    counted = F.pad(ones, outer, value=int(count_include_pad))
    # zero padding adds nothing to the sum of centred codes
    centred = F.pad(x.int() - zero, outer)
    extra = [
        _overhang(size + 2 * pad, size, pad, k, step) if ceil_mode else 0
        for size, pad, k, step in zip(spatial, padding, kernel, stride, strict=True)
    ]
    beyond = [amount for size in reversed(extra) for amount in (0, size)]
    sums = _windows(F.pad(centred, beyond), kernel, stride)
    counts = _windows(F.pad(counted, beyond), kernel, stride)
    return _mean(sums, counts, zero)


def global_average(x: Tensor, zero: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """Codes of the means over `axes`, on the grid of the input: integer sum, division rounded half up."""
    _bytes(x)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    check_depth(count // 255 + 1, "a global average")
    sums = (x.int() - zero).sum(list(axes), keepdim=keepdim, dtype=torch.int32)
    return _mean(sums, torch.tensor(count, dtype=torch.int32), zero)


def max_pool(x: Tensor, **geometry: Any) -> Tensor:
    """The largest code of every window of x [N, C, H, W] (or [N, C, L]); padding never wins."""
    _bytes(x)
    return {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.dim()](x, **geometry)


def affine_channels(x: Tensor, zero: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """int32 accumulators weight * (x - zero) + bias of every channel (axis 1); weight and bias int32 [channels].

    A batch norm that no layer takes up. The caller keeps |weight| * 255 + |bias| below 2^31.
    """
    _bytes(x)
    return (x.int() - zero) * along(weight, x.dim(), 1) + along(bias, x.dim(), 1)


def look_up(x: Tensor, table: Tensor) -> Tensor:
    """Codes by way of a table, uint8 [256]: a function of one value, between any two grids."""
    _bytes(x, table)
    return table[x.int()]


def _mean(sums: Tensor, counts: Tensor, zero: Tensor) -> Tensor:
    # sums + zero * counts are not negative, so that this rounds half up as codes are rounded
    total = sums.long() + zero * counts.long()
    return torch.div(total + counts // 2, counts, rounding_mode="floor").to(torch.uint8)


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Sums of the windows over the last axes."""
    first = x.dim() - len(kernel)
    for offset, (size, step) in enumerate(zip(kernel, stride, strict=True)):
        x = x.unfold(first + offset, size, step)
    return x.sum(list(range(-len(kernel), 0)), dtype=torch.int32)


def _overhang(padded: int, size: int, padding: int, kernel: int, stride: int) -> int:
    """What an axis lacks for the last window of a pool with `ceil_mode`, which must start before the right padding."""
    windows = -(-(padded - kernel) // stride) + 1
    if (windows - 1) * stride >= size + padding:
        windows -= 1
    return max(0, (windows - 1) * stride + kernel - padded)


def _bytes(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.uint8:
            raise FewbitsError(f"integer-only inference works on uint8 codes, not {tensor.dtype}")
