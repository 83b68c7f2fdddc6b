"""Random dropping of quantization: every element of a tensor is, by itself, quantized or left as it is.

QDrop (Wei, Gong, Li, Liu, Yu; ICLR 2022), section 4: tuning weights behind activations of which a random half is
quantized makes them robust to perturbations in many directions, not only in those of the calibration data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

#: A mask for a tensor: bool, its shape, True where the quantized value stays; None for everywhere.
Masks = Callable[[Tensor], Tensor | None]


class RandomMasks:
    """Fresh masks at every call, each element True with probability `keep`, drawn on the generator's device.

    keep = 1 draws nothing. Raises FewbitsError unless 0 <= keep <= 1.
    """

    def __init__(self, keep: float, generator: torch.Generator) -> None:
        if not 0 <= keep <= 1:
            raise FewbitsError(f"dropping: keep={keep}; the probability of keeping a quantized value lies in [0, 1]")
        self.keep = keep
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor | None:
        if self.keep == 1:
            return None
        return torch.rand(x.shape, generator=self.generator, device=self.generator.device) < self.keep


def mixed(quantized: Tensor, full: Tensor, mask: Tensor | None) -> Tensor:
    """`quantized` where the mask is True, `full` elsewhere; gradients go to whichever was taken."""
    return quantized if mask is None else torch.where(mask.to(full.device), quantized, full)
