"""Which packed form a quantized weight takes, and the module that holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fewbits.export.layers import Layer
from fewbits.formats import Float8
from fewbits.packed.external import GemliteLinear, HummingLinear
from fewbits.packed.float8 import Float8Linear, float8_activations, float8_codes
from fewbits.packed.int8 import Int8Linear, integer_activations
from fewbits.packed.modules import CodesLinear, FragmentLinear, NativeLinear, Packed, TorchInt4Linear
from fewbits.packed.weight import KernelWeight, kernel_weight
from fewbits.quantizer import Quantizer

#: Layers laid out on the device that they run on, for its kind.
LAID_OUT: dict[str, Callable[..., Packed]] = {
    "torch_int4": TorchInt4Linear,
    "humming": HummingLinear,
    "gemlite": GemliteLinear,
}
#: Weights of at most so many bits stay packed beside 8-bit activations: halving them again is worth more than int8.
NARROW_BITS = 4


@dataclass(frozen=True)
class Form:
    """A weight as it will be packed.

    kind: of `kernels.choose.KERNELS`. bits, group, table, extras, small: as in `kernels.needs.Case`. takes_input: the
    product quantizes its input itself. note: what happens to the activations. make: the module for a kernel's name.
    """

    kind: str
    bits: int
    group: int
    table: bool
    extras: bool
    small: bool
    takes_input: bool
    note: str
    make: Callable[[str], Packed]


def form_of(layer: Layer, old: nn.Module, entering: Quantizer | None) -> Form:
    """The form of a weight in the module `old`, whose input the quantizer `entering` acts on.

    Raises `NotPackable` with the reason where there is none.
    """
    fmt = layer.quantizer.spec.format
    return _float8(layer, old, entering) if isinstance(fmt, Float8) else _codes(layer, old, entering)


def _float8(layer: Layer, old: nn.Module, entering: Quantizer | None) -> Form:
    held, scale = float8_codes(layer)
    bias = getattr(old, "bias", None)
    inside, note = None, ""
    if entering is not None:
        why = float8_activations(entering)
        if why is None and held.dtype != torch.float8_e4m3fn:
            why = "the weight is not E4M3 floats"
        inside = entering if why is None else None
        note = f"activations stay in simulation: {why}" if why else "activations are 8-bit floats in the kernel"

    def make(name: str) -> Packed:
        return Float8Linear(held, scale, bias, name, inside)

    kind = "float8" if inside is not None else "float8_weight"
    return Form(kind, 8, held.shape[1], False, False, False, inside is not None, note, make)


def _codes(layer: Layer, old: nn.Module, entering: Quantizer | None) -> Form:
    parameter = old.get_parameter("weight")
    weight = kernel_weight(layer, parameter.dtype)
    bias = getattr(old, "bias", None)
    inside, note = None, ""
    if entering is not None:
        why = integer_activations(entering) or _not_integer(weight)
        inside = entering if why is None else None
        note = f"activations stay in simulation: {why}" if why else "activations are integers in the kernel"

    def make(name: str) -> Packed:
        if inside is not None:
            return Int8Linear(weight, bias, name, inside)
        if name in LAID_OUT:
            return LAID_OUT[name](weight, bias, parameter.dtype, parameter.device)
        if name == "triton_mma":
            return FragmentLinear(weight, bias)
        return NativeLinear(weight, bias) if name == "native" else CodesLinear(weight, bias, name)

    kind = "codes" if inside is None else "int8"
    return Form(
        kind, weight.bits, weight.group, weight.table is not None, weight.extras, weight.small, inside is not None,
        note, make,
    )  # fmt: skip


def _not_integer(weight: KernelWeight) -> str | None:
    """Why a weight is not multiplied as int8; None where it is."""
    if weight.scale is None or weight.group < weight.codes.shape[1]:
        return "the weight's scales are not one a row"
    if weight.extras or not weight.integer_zero:
        return "the weight is not codes with whole zero points alone"
    return f"weights of at most {NARROW_BITS} bits stay packed" if weight.bits <= NARROW_BITS else None
