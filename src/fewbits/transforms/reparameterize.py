"""From one scale and zero point per channel to one per tensor, by an affine change of the channels.

RepQ-ViT (Li et al., ICCV 2023), section 3.2. With per-channel grids (s_j, z_j) and their means (s, z): r1 = s_j / s,
r2 = z_j - z, and x' = x / r1 + s r2 = (x + s_j r2) / r1 has the same codes on the per-tensor grid (s, z) that x has on
the per-channel grids. `fewbits.transforms.fold` moves the change into the norm before and the linears after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError


class Reparameterization(NamedTuple):
    """x' = (x + shift) / r1 per channel, quantized with one `scale` and `zero_point` for the whole tensor; all float32.

    scale [], zero_point [], r1 [C], shift [C] (= s_j r2).
    """

    scale: Tensor
    zero_point: Tensor
    r1: Tensor
    shift: Tensor


@torch.no_grad()
def reparameterize(
    scale: Tensor,
    zero_point: Tensor,
    *,
    round_zero_point: bool = True,
    bounds: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-8,
) -> Reparameterization:
    """Derive the per-tensor grid and the change of channels from per-channel ones.

    scale, zero_point: C entries each, any shape with C elements ([C], [1, 1, C]).
    round_zero_point: round the mean zero point BEFORE deriving r2, so that codes stay integers (needed for integer
        kernels); False reproduces the released code, whose fractional mean puts the end codes off the lattice.
    bounds: smallest and largest value of every channel, C entries each. A channel where they are equal is constant: it
        takes no part in the means, gets r1 = 1, and its shift moves the constant into the bias that follows. Where not
        given, channels with scale <= eps count as constant and their value is read off the grid.
    Raises FewbitsError where scales are not positive and finite or the shapes differ.
    """
    if scale.numel() != zero_point.numel():
        raise FewbitsError(
            f"reparameterize: {scale.numel()} scales but {zero_point.numel()} zero points; need one each"
        )
    s, z = scale.detach().float().flatten(), zero_point.detach().float().flatten()
    if not bool((s.isfinite() & (s > 0) & z.isfinite()).all()):
        raise FewbitsError("reparameterize: channel scales must be positive and finite; refit the activation quantizer")
    if bounds is None:
        # -s z is the value of code 0, where a grid without extent keeps its constant
        live, constant = s > eps, -s * z
    else:
        low, high = (bound.detach().float().flatten() for bound in bounds)
        if low.shape != s.shape or high.shape != s.shape:
            raise FewbitsError(f"reparameterize: bounds must hold {s.numel()} channels each, as the scales do")
        live, constant = high > low, low
    if not bool(live.any()):
        return Reparameterization(s.mean(), z.new_zeros(()), torch.ones_like(s), -constant)
    # in float64, so that equal channels have exactly their own value as mean
    mean_scale, mean_zero = s[live].double().mean().float(), z[live].double().mean().float()
    if round_zero_point:
        mean_zero = mean_zero.round()
    r1 = torch.where(live, s / mean_scale, torch.ones_like(s))
    shift = torch.where(live, s * (z - mean_zero), -constant)
    return Reparameterization(mean_scale, mean_zero, r1, shift)
