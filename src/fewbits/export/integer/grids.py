"""Quantizers as grids of an integer program, and functions of one value as tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.export.integer.program import Grid
from fewbits.formats import Uniform
from fewbits.graph.types import Call, Ref
from fewbits.kernels import fixed_point
from fewbits.quantizer import Quantizer


class Refusal(Exception):
    """Why a call has no integer form; empty where it only reads what was refused before."""


def grid_of(quantizer: Quantizer, name: str) -> Grid:
    """The grid of an activation quantizer, moved to unsigned codes. Raises `Refusal` where it is no grid of bytes."""
    fmt = quantizer.spec.format
    if quantizer.spec.dynamic:
        raise Refusal(f"{name}: a quantizer that is fitted on every call has no integer form")
    if not isinstance(fmt, Uniform) or fmt.bits > 8 or fmt.zero_point == "real":
        raise Refusal(f"{name}: a {fmt.kind} grid of {fmt.bits} bits without an integer zero point is no grid of bytes")
    scale = fmt.scale_of(quantizer.params)
    if scale.numel() != 1:
        raise Refusal(f"{name}: {quantizer.spec.granularity.describe()} activations have no integer form; use tensor")
    offset = offset_of(quantizer)
    zero = quantizer.params.get("zero_point")
    middle = 0 if zero is None else int(zero.reshape(()).round())
    if not fmt.q_min <= middle <= fmt.q_max:
        raise Refusal(f"{name}: its zero point {middle} is outside of its codes")
    return Grid(float(scale.reshape(())), middle + offset, fmt.q_min + offset, fmt.q_max + offset)


def offset_of(quantizer: Quantizer) -> int:
    """What is added to a quantizer's codes to make them unsigned."""
    fmt = quantizer.spec.format
    return 2 ** (fmt.bits - 1) if isinstance(fmt, Uniform) and fmt.signed else 0


def within(grid: Grid, kind: str | None) -> tuple[int, int]:
    """The clamp, in codes, that is ReLU (`before_relu`), ReLU6 or nothing but the ends of the grid."""
    low, high = grid.low, grid.high
    if kind is not None:
        low = max(low, grid.zero)
    if kind == "before_relu6":
        high = min(high, int(grid.encode(torch.tensor(6.0))))
    return low, high


def table_of(call: Call, grid: Grid, out: Grid) -> Tensor:
    """What an elementwise call makes of each of the 256 codes, uint8; codes off the grid act as its nearest end."""
    codes = torch.arange(256, dtype=torch.int32).clamp(grid.low, grid.high)
    values = grid.decode(codes)

    def fill(item: Any) -> Any:
        return values.clone() if isinstance(item, Ref) else item

    args = tuple(fill(item) for item in call.args)
    kwargs = {key: fill(item) for key, item in call.kwargs.items()}
    made = call.func(*args, **kwargs)
    return fixed_point.quantize(made, torch.tensor(out.scale), torch.tensor(out.zero), low=out.low, high=out.high)
