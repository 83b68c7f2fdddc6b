"""Number grids, how finely their parameters vary, and what they cost to store."""

from fewbits.formats.apply import decode, encode, expand_params, quantize, storage_bits
from fewbits.formats.base import Format, Params, ParamSpec, format_from_dict
from fewbits.formats.blocks import PerBlock
from fewbits.formats.channel_bits import ChannelBits
from fewbits.formats.codebook import Codebook
from fewbits.formats.fp8 import Float8
from fewbits.formats.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    PerToken,
    granularity_from_dict,
)
from fewbits.formats.log import Log2, LogSqrt2
from fewbits.formats.packing import pack_codes, unpack_codes
from fewbits.formats.power_of_two import PowerOfTwo, snap_to_power_of_two
from fewbits.formats.rounding import round_to_integer
from fewbits.formats.ternary import Ternary
from fewbits.formats.twin import GELU_BOUND, TwinMagnitude, TwinSign
from fewbits.formats.uniform import Uniform, affine, gptq_grid, integer_affine, raw_affine, symmetric

__all__ = [
    "GELU_BOUND",
    "ChannelBits",
    "Codebook",
    "Float8",
    "Format",
    "Granularity",
    "Log2",
    "LogSqrt2",
    "ParamSpec",
    "Params",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerHead",
    "PerTensor",
    "PerToken",
    "PowerOfTwo",
    "Ternary",
    "TwinMagnitude",
    "TwinSign",
    "Uniform",
    "affine",
    "decode",
    "encode",
    "expand_params",
    "format_from_dict",
    "gptq_grid",
    "granularity_from_dict",
    "integer_affine",
    "pack_codes",
    "quantize",
    "raw_affine",
    "round_to_integer",
    "snap_to_power_of_two",
    "storage_bits",
    "symmetric",
    "unpack_codes",
]
