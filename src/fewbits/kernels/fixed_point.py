"""Real numbers in integer arithmetic: affine parameters, multipliers as mantissa and shift, and their application.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
sections 2.1, 2.2 and appendix B, with the conventions of gemmlowp, its reference: every rounding sends ties away from
zero. What is worked out once, when a model is built, uses float32 as there (`affine_parameters`, `layer_multiplier`);
what runs on every value (`high_multiply`, `shift_right`, `apply`) uses integers alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import integer_affine
from fewbits.formats.rounding import round_to_integer

INT32 = torch.iinfo(torch.int32)
#: Largest number of products of two bytes that a 32-bit accumulator holds whatever the bytes are.
MAX_DEPTH = (2**31 - 1) // (255 * 255)
_LARGEST_SHIFT = 62


class Multiplier(NamedTuple):
    """A positive real factor, mantissa * 2^(-31 - shift).

    mantissa: int32 in [2^30, 2^31). shift: int32, bits to the right; negative ones, to the left, are the signed
    variant for factors of 1 and more. Both have one shape: () for a tensor, [channels] for one factor a channel.
    """

    mantissa: Tensor
    shift: Tensor


def affine_parameters(low: Tensor, high: Tensor, bits: int = 8, *, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """(scale float32, zero point int32) of unsigned codes for values in [low, high], float tensors of one shape.

    The range is widened to hold zero, which gets a code of its own: real = scale * (code - zero). `narrow` leaves the
    code 0 free (weights). An empty range [0, 0] gets scale 1 and the lowest code for zero. Raises `FewbitsError` for
    ends that are not finite or in the wrong order.
    """
    low, high = low.detach().float(), high.detach().float()
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise FewbitsError("affine parameters need finite ends, the lower one first; look for NaN in the calibration")
    params = integer_affine(bits, narrow=narrow).from_range(low, high)
    return params["scale"], params["zero_point"].int() + (2 ** (bits - 1) if narrow else 0)


def quantize(x: Tensor, scale: Tensor, zero: Tensor, *, low: int = 0, high: int = 255) -> Tensor:
    """uint8 codes of float `x`, clamped to [low, high]; `scale` (float32) and `zero` broadcast. NaN takes zero's code.

    The one place, with `dequantize`, where floating point meets the integers.
    """
    moved = torch.where(torch.isnan(x), torch.zeros_like(x), x).float() / scale + zero
    return round_to_integer(moved.clamp(low, high), "half_away").to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """float32 values of integer codes."""
    return (codes.int() - zero).float() * scale


def quantize_bias(bias: Tensor, scale: Tensor) -> tuple[Tensor, int]:
    """(int32 bias in units of `scale`, number of elements that had to be saturated).

    scale: that of the accumulator, input scale times weight scale, () or [out]; its zero point is 0.
    """
    real = bias.detach().double() / scale.double()
    if not bool(torch.isfinite(real).all()):
        raise FewbitsError("a bias is NaN or infinite, or the scale of its accumulator is zero")
    whole = round_to_integer(real, "half_away")
    inside = whole.clamp(INT32.min, INT32.max)
    return inside.to(torch.int32), int((inside != whole).sum())


def layer_multiplier(input_scale: Tensor, weight_scale: Tensor, output_scale: Tensor) -> Tensor:
    """The real factor from accumulator to output codes, M = S1 S2 / S3, float32."""
    return weight_scale.float() * input_scale.float() / output_scale.float()


def decompose(factor: Tensor, *, signed: bool = True) -> Multiplier:
    """Mantissa and shift of positive real factors (float32 or float64), within 2^-31 of them in proportion.

    Factors below 2^-62 become as good as zero: they move no accumulator off 0. Raises `FewbitsError` for factors that
    are not positive and finite and, unless `signed`, for those of 1 and more, whose shift goes to the left.
    """
    factor = factor.detach().double()
    if not bool((torch.isfinite(factor) & (factor > 0)).all()):
        raise FewbitsError("a fixed-point multiplier must be positive and finite; is one of the scales zero?")
    if not signed and bool((factor >= 1).any()):
        raise FewbitsError(
            f"a multiplier of {float(factor.max()):g} is not below 1: use the signed variant (shifts to the left)"
        )
    fraction, exponent = torch.frexp(factor)
    mantissa = round_to_integer(fraction * 2.0**31, "half_away").long()
    shift = -exponent.long()
    full = mantissa == 2**31
    below = full & (shift == 0)  # rounds up to 1 from below: the largest mantissa is as near and needs no left shift
    mantissa = torch.where(below, torch.full_like(mantissa, 2**31 - 1), torch.where(full, mantissa // 2, mantissa))
    shift = torch.where(full & ~below, shift - 1, shift)
    if bool((shift < -31).any()):
        raise FewbitsError("a multiplier of 2^31 and more cannot be applied; is the output's scale far too small?")
    return Multiplier(mantissa.to(torch.int32), shift.clamp_max(_LARGEST_SHIFT).to(torch.int32))


def high_multiply(a: Tensor, b: Tensor) -> Tensor:
    """round(a * b / 2^31) of int32 tensors, int32, ties away from zero; saturates where both are -2^31.

    The saturating rounding doubling high multiply.
    """
    product = _int32(a, "a").long() * _int32(b, "b").long()
    nudge = torch.where(product >= 0, 2**30, 1 - 2**30)
    # Exact without a division: truncation towards zero is a shift of the magnitude.
    moved = product + nudge
    truncated = torch.where(moved >= 0, moved >> 31, -((-moved) >> 31))
    return truncated.clamp_max(INT32.max).to(torch.int32)


def shift_right(x: Tensor, exponent: Tensor | int) -> Tensor:
    """x / 2^exponent rounded to nearest, ties away from zero, int32; exponents 0 to 62 broadcast."""
    wide = _int32(x, "x").long()
    bits = torch.as_tensor(exponent, device=x.device).long()
    mask = (torch.ones_like(bits) << bits) - 1
    threshold = (mask >> 1) + (wide < 0)
    return ((wide >> bits) + ((wide & mask) > threshold)).to(torch.int32)


def apply(acc: Tensor, multiplier: Multiplier) -> Tensor:
    """An int32 accumulator times a factor, int32. A shift to the left comes first and saturates."""
    mantissa, shift = multiplier
    left = (-shift).clamp_min(0).long()
    wide = (_int32(acc, "the accumulator").long() << left).clamp(INT32.min, INT32.max).to(torch.int32)
    return shift_right(high_multiply(wide, mantissa), shift.clamp_min(0))


def _int32(x: Tensor, what: str) -> Tensor:
    if x.dtype != torch.int32:
        raise FewbitsError(f"fixed-point arithmetic works on int32, but {what} is {x.dtype}")
    return x
