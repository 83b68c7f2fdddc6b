"""Logarithmic grids for non-negative values such as attention probabilities: s * 2**-q and s * sqrt(2)**-q."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params, ParamSpec, formats

# below 2**-126 of the scale a float32 quotient is subnormal: such values are zero on every log grid
_OCTAVES = 126


@dataclass(frozen=True)
class _Log(Format):
    """Code q counts steps down from the scale; the last code means exactly zero.

    zero_code=False, as published: codes 0..2^b-1 are powers and zero is one more level (2^b + 1 levels, `code_bits`
    b+1).
    zero_code=True: a true b-bit code, the top one, 2^b - 1, reserved for zero.
    scaled: s is the upper end of the range; otherwise s = 1. Values at or below zero take the zero code, values above s
    code 0.
    """

    bits: int = 4
    zero_code: bool = False
    scaled: bool = True
    eps: float = 1e-20

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise FewbitsError(f"{self.kind} format: bits must be an integer from 1 to 8, got {self.bits!r}")
        if not self.eps > 0:
            raise FewbitsError(f"{self.kind} format: eps must be positive")

    @property
    @abstractmethod
    def per_octave(self) -> int:
        """Codes per factor of two."""

    @abstractmethod
    def power(self, code: Tensor) -> Tensor:
        """Unscaled value of float codes that are not the zero code."""

    @property
    def code_min(self) -> int:
        return 0

    @property
    def code_max(self) -> int:
        return 2**self.bits - 1 if self.zero_code else 2**self.bits

    @property
    def last_power(self) -> int:
        """Largest code that is a power."""
        return min(self.code_max - 1, _OCTAVES * self.per_octave)

    def param_specs(self) -> tuple[ParamSpec, ...]:
        return (ParamSpec("scale", 32 if self.scaled else 0, learnable=self.scaled, positive=True),)

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        hi = hi.float()
        if not self.scaled:
            return {"scale": torch.ones_like(hi)}
        return {"scale": torch.where(hi > 0, hi, torch.ones_like(hi)).clamp_min(self.eps)}

    def _steps(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Rounded number of steps below the scale, before clamping; infinite for what has no logarithm."""
        steps = torch.round(-1 * (x / params["scale"]).log2() * self.per_octave)
        return torch.where(x > 0, steps, torch.full_like(steps, torch.inf))

    def _value(self, code: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        value = self.power(code.clamp(0, self.last_power)) * params["scale"]
        return torch.where(code > self.last_power, torch.zeros_like(value), value)

    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        steps = self._steps(x, params)
        value = self._value(steps, params)
        return torch.where(torch.isnan(x), x, value), (steps >= 0) & (steps <= self.last_power)

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        steps = self._steps(x.to(torch.promote_types(x.dtype, torch.float32)), params)
        code = torch.where(steps > self.last_power, torch.full_like(steps, float(self.code_max)), steps)
        return code.clamp(0, self.code_max).to(self.code_dtype)

    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return self._value(codes.float(), params)


def shift_right(places: Tensor) -> Tensor:
    """2**-places for whole numbers 0..126 held as float, exactly: the exponent is written, no power is computed."""
    return ((127 - places.to(torch.int32)) << 23).view(torch.float32)


@formats.register
@dataclass(frozen=True)
class Log2(_Log):
    """s * 2**-q, q = round(-log2(x / s)). FQ-ViT uses it on attention maps with scaled=False."""

    kind: ClassVar[str] = "log2"

    @property
    def per_octave(self) -> int:
        return 1

    def power(self, code: Tensor) -> Tensor:
        return shift_right(code)


@formats.register
@dataclass(frozen=True)
class LogSqrt2(_Log):
    """s * sqrt(2)**-q, q = round(-2 log2(x / s)), decoded as a shift by ceil(q/2) and a factor sqrt(2) for odd q
    (RepQ-ViT)."""

    kind: ClassVar[str] = "log_sqrt2"

    @property
    def per_octave(self) -> int:
        return 2

    def power(self, code: Tensor) -> Tensor:
        odd = code % 2
        return shift_right(torch.ceil(code / 2)) * (odd * (math.sqrt(2) - 1) + 1)
