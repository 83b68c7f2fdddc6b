"""Linear layers whose codes other packages multiply: humming-kernels and gemlite (`kernels.external`)."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbits.kernels import external
from fewbits.kernels.words import pack_words, unpack_words
from fewbits.packed.modules import Packed

if TYPE_CHECKING:
    from fewbits.packed.weight import KernelWeight


class _Foreign(Packed):
    """Codes on a grid, beside 16-bit activations of the type `dtype`, on a GPU."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight: KernelWeight, bias: Tensor | None, kernel: str, dtype: torch.dtype) -> None:
        super().__init__(weight.codes.shape, bias, kernel)
        self.bits, self.group, self.dtype = weight.bits, min(weight.group, weight.codes.shape[1]), dtype

    def product(self, x: Tensor) -> Tensor:
        out = self._multiply(x.to(self.dtype))
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype)

    @abstractmethod
    def _multiply(self, x: Tensor) -> Tensor:
        """x, in the layer's type, times the weight."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group={self.group}"


class HummingLinear(_Foreign):
    """Codes of 1 to 8 bits in the order of humming's kernels, which differs between kinds of GPU; scales in the type of
    the activations. No zero points are kept where all lie in the middle of the grid.

    Raises `PackageError` where humming cannot compile what lays the codes out.
    """

    locks: Tensor

    def __init__(self, weight: KernelWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, bias, "humming", dtype)
        assert weight.scale is not None and weight.zero is not None
        zero = None if bool((weight.zero == 1 << (self.bits - 1)).all()) else weight.zero
        self.config, made = external.humming_layout(weight.codes.to(device), weight.scale, zero, self.bits, dtype)
        self.register_buffer("words", made["weight"])
        self.register_buffer("scale", made["weight_scale"])
        self.register_buffer("zero", made.get("zero_point"))
        locks = torch.zeros(external.LOCKS, dtype=torch.int32, device=device)
        self.register_buffer("locks", locks, persistent=False)

    def _multiply(self, x: Tensor) -> Tensor:
        return self._times(x, self.scale)

    def _times(self, x: Tensor, scale: Tensor) -> Tensor:
        return external.multiply_humming(x, self.words, scale, self.zero, self.locks, self.config, self.out_features)

    def decoded(self) -> Tensor:
        # beside scales of 1 the product is of whole numbers below 256, which both 16-bit types hold exactly
        eye = torch.eye(self.in_features, device=self.words.device, dtype=self.dtype)
        codes = self._times(eye, torch.ones_like(self.scale)).T.float()
        scale = external.humming_scales(self.config, self.scale, self.out_features).float()
        return codes * scale.repeat_interleave(self.group, 1)


class GemliteLinear(_Foreign):
    """Codes of 1, 2, 4 or 8 bits along the input axis (`kernels.words`) and flat tables of scales and zero points; one
    zero point where all are the same."""

    zero: Tensor

    def __init__(self, weight: KernelWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, bias, "gemlite", dtype)
        assert weight.scale is not None and weight.zero is not None
        self.register_buffer("words", pack_words(weight.codes.to(device), self.bits))
        self.register_buffer("scale", external.guarded(weight.scale.to(device)))
        first = weight.zero.flatten()[0]
        if bool((weight.zero == first).all()):
            zero = first.to(device, torch.int32)
        else:
            zero = external.guarded(weight.zero.to(device, weight.scale.dtype))
        self.register_buffer("zero", zero)

    def _multiply(self, x: Tensor) -> Tensor:
        return external.multiply_gemlite(x, self.words, self.scale, self.zero, self.bits, self.group)

    def decoded(self) -> Tensor:
        codes = unpack_words(self.words, self.bits, self.in_features).float()
        return (codes - self._spread(self.zero)) * self._spread(self.scale)

    def _spread(self, held: Tensor) -> Tensor:
        """A table as float32 [out, in]."""
        if held.ndim == 0:
            return held.float()
        table = external.unguarded(held, self.in_features // self.group, self.out_features)
        return table.T.float().repeat_interleave(self.group, 1)
