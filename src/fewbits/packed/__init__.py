"""Quantized layers in their packed form: codes instead of floating-point weights, and a kernel that multiplies them."""

from fewbits.packed.swap import PackedLayer, PackResult, pack

__all__ = ["PackResult", "PackedLayer", "pack"]
