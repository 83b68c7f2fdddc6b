"""What a quantized model weighs: every stored bit of its weights, counted part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from fewbits.attach import Attachment
from fewbits.formats import storage_bits


@dataclass(frozen=True)
class WeightSize:
    """Stored bits of one quantized weight: codes, grid parameters (scales, zero points, tables) and other parts."""

    site: str
    values: int
    codes: int
    parameters: int
    parts: int

    @property
    def bits(self) -> int:
        return self.codes + self.parameters + self.parts

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.values


def weight_sizes(attachment: Attachment) -> list[WeightSize]:
    """One entry per quantized weight, in call order."""
    out: list[WeightSize] = []
    for site, quantizer in attachment.items():
        if site.role != "weight":
            continue
        codes = attachment.codes.get(site.name)
        shape = site.shape if codes is None else tuple(codes.shape)
        values = math.prod(shape)
        fmt, granularity = quantizer.spec.format, quantizer.spec.granularity
        parameters = storage_bits(fmt, granularity, shape) - values * fmt.code_bits
        index = attachment.group_index.get(site.name)
        if index is not None:
            parameters += index.numel() * 32
        code_bits = round(values * fmt.mean_code_bits(quantizer.params))
        parts = sum(part.storage_bits() for part in attachment.parts.get(site.name, ()))
        out.append(WeightSize(site.name, values, code_bits, parameters, parts))
    return out


def summary(attachment: Attachment, model: nn.Module) -> dict[str, Any]:
    """JSON-able: `bits_per_weight` over the quantized weights, all overhead included; `weights` of them;
    `float_values` that stay in floating point and `model_bits_per_value` over both (32 for a float32 value)."""
    sizes = weight_sizes(attachment)
    weights, bits = sum(size.values for size in sizes), sum(size.bits for size in sizes)
    held = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}.values()
    everything = sum(t.numel() for t in held)
    rest = max(0, everything - weights)
    width = max((t.element_size() * 8 for t in held if t.is_floating_point()), default=32)
    return {
        "weights": weights,
        "bits_per_weight": bits / weights if weights else None,
        "code_bits": sum(size.codes for size in sizes),
        "parameter_bits": sum(size.parameters for size in sizes),
        "part_bits": sum(size.parts for size in sizes),
        "float_values": rest,
        "model_bits_per_value": (bits + rest * width) / (weights + rest) if weights + rest else None,
    }
