"""A format with its parameters at a granularity, applied to a whole tensor; and what that costs to store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from fewbits.formats.base import Format, Params
from fewbits.formats.granularity import Granularity, PerTensor

_WHOLE = PerTensor()


def expand_params(fmt: Format, gran: Granularity, params: Mapping[str, Tensor], shape: Sequence[int]) -> Params:
    """`params` as fitted (param shape) so that they broadcast against a tensor of `shape`."""
    return {
        spec.name: (gran if spec.per == "block" else _WHOLE).expand(params[spec.name], shape)
        for spec in fmt.param_specs()
    }


def quantize(x: Tensor, fmt: Format, gran: Granularity, params: Mapping[str, Tensor]) -> Tensor:
    """`x` on the grid: `fmt.quantize` with `params` of param shape."""
    return fmt.quantize(x, expand_params(fmt, gran, params, x.shape))


def encode(x: Tensor, fmt: Format, gran: Granularity, params: Mapping[str, Tensor]) -> Tensor:
    """Integer codes of `x`: `fmt.encode` with `params` of param shape."""
    return fmt.encode(x, expand_params(fmt, gran, params, x.shape))


def decode(codes: Tensor, fmt: Format, gran: Granularity, params: Mapping[str, Tensor]) -> Tensor:
    """float32 values of `codes`: `fmt.decode` with `params` of param shape."""
    return fmt.decode(codes, expand_params(fmt, gran, params, codes.shape))


def storage_bits(fmt: Format, gran: Granularity, shape: Sequence[int]) -> int:
    """Bits to store a tensor of `shape`: its codes and every parameter that is not implied by the format."""
    return fmt.count_bits(math.prod(shape), gran.count(shape))
