"""Products by the kernels of other packages, humming-kernels and gemlite, which are imported where one is used.

Both read codes in the words of `kernels.words`: gemlite as they are, humming after moving them into an order of its
own. humming compiles a kernel for every shape, and for every range of rows as it first meets one (some seconds, kept on
disk); gemlite tunes Triton kernels for every shape and power of two of rows (some seconds, in every process). Few rows
are summed by gemlite with atomic additions, whose order differs from call to call.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import ops
from fewbits.kernels.words import pack_words

#: humming's kernels count finished parts of a sum in so many int32 numbers, and leave zeros behind.
LOCKS = 2048
#: gemlite's kernels read scales of a block of columns at a time, up to so many beyond the last.
BEYOND = 1024


class PackageError(FewbitsError, RuntimeError):
    """Another package failed at something that it is said to do; its own error is the cause."""


def missing(package: str) -> str | None:
    """Why a package cannot be imported; None where it is installed."""
    if find_spec(package) is not None:
        return None
    return f"the package {package} is not installed (pip install 'fewbits[{package}]')"


@contextmanager
def _of(package: str) -> Iterator[None]:
    """Errors inside become `PackageError`, but for memory that ran out."""
    try:
        yield
    except (torch.OutOfMemoryError, PackageError):
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise PackageError(f"{package} failed: {type(error).__name__}{': ' if said else ''}{said}") from error


# -- humming -------------------------------------------------------------------------------------------------------


def humming_layout(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype
) -> tuple[str, dict[str, Tensor]]:
    """humming's description of a weight, and its tensors on the GPU of `codes`: "weight", "weight_scale", "zero_point".

    codes: uint8 [out, in]. scale: [groups, out]. zero: whole numbers [groups, out] of a code's size, or None where all
    are 2^(bits-1). dtype: of the activations; humming keeps scales in it. Raises `PackageError`.
    """
    outputs, inputs = codes.shape
    groups = len(scale)
    tensors = {
        "weight": pack_words(codes, bits).T.contiguous(),
        "weight_scale": scale.T.to(codes.device, dtype).contiguous(),
    }
    if zero is not None:
        tensors["zero_point"] = pack_words(zero.to(codes.device, torch.uint8), bits)
    with _of("humming"):
        schema = import_module("humming.schema").HummingWeightSchema(
            b_dtype=f"uint{bits}",
            weight_scale_group_size=inputs // groups if groups > 1 else 0,
            has_zero_point=zero is not None,
        )
        config, made = import_module("humming.transform").prepare_and_transform_humming_tensors(
            tensors, shape_n=outputs, shape_k=inputs, weight_schema=schema, torch_dtype=dtype, device=codes.device
        )
        return config.to_str(), made


def humming_scales(config: str, scale: Tensor, outputs: int) -> Tensor:
    """The scales [out, groups] of a "weight_scale" of `humming_layout`. Raises `PackageError`."""
    with _of("humming"):
        layout = import_module("humming.config").LayerConfig(**json.loads(config))
        place = torch.arange(scale.numel(), device=scale.device).view(outputs, -1)
        moved = import_module("humming.transform").transform_humming_weight_scale(place, layout.should_apply_bs_on_c)
    plain = torch.empty_like(scale.flatten())
    plain[moved.flatten()] = scale.flatten()
    return plain.view(outputs, -1)


@functools.cache
def _humming_tuning(config: str, rows: int, device: int) -> str:
    """What humming's rules say for so many rows; without it, kernels for any number of them are compiled at once."""
    found = import_module("humming.tune").get_heuristics_config(json.loads(config), shape_m=rows, device=device)
    return json.dumps(found)


def run_humming_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, locks: Tensor, config: str, outputs: int
) -> Tensor:
    """`x` [..., in] times a weight of `humming_layout`, [..., out] in the type of `x`, the one it was laid out for.

    locks: `LOCKS` zeros, int32, of this layer alone. Raises `PackageError`.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], outputs)
    with _of("humming"):
        out: Tensor = import_module("humming.ops").humming_gemm(
            layer_config=config, tuning_config=_humming_tuning(config, len(flat), x.get_device()), inputs=flat,
            weight=weight, weight_scale=scale, zero_point=zero, locks=locks,
        )  # fmt: skip
    return out.view(*x.shape[:-1], outputs)


# -- gemlite -------------------------------------------------------------------------------------------------------


def guarded(table: Tensor) -> Tensor:
    """A table [groups, out] laid out flat, with zeros after it that kernels may read."""
    return torch.cat([table.flatten(), table.new_zeros(BEYOND)])


def unguarded(table: Tensor, groups: int, outputs: int) -> Tensor:
    """The table [groups, out] that was `guarded`, in its place."""
    return table[: groups * outputs].view(groups, outputs)


def run_gemlite_matmul(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> Tensor:
    """`x` [..., in] times a weight, [..., out] in the type of `x`, float16 or bfloat16.

    words: [in / 32 * bits, out] of `kernels.words`; bits: 1, 2, 4 or 8. group: columns that share a scale. scale, zero:
    [in / group, out] of one type, `guarded`; or zero is one int32 number, [], which all columns share. Sums are
    float32. Raises `PackageError`.
    """
    inputs, outputs = x.shape[-1], words.shape[1]
    flat = x.reshape(-1, inputs).contiguous()
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], outputs)
    with _of("gemlite"):
        core, dtypes = import_module("gemlite.core"), import_module("gemlite.dtypes")
        kind = core.get_matmul_type(len(flat), bits)
        # the other kinds add parts of a sum up in memory: in 16 bits each addition would round
        kept = x.dtype if kind == "GEMM" else torch.float32
        types = [dtypes.TORCH_TO_DTYPE[held].value for held in (x.dtype, kept, torch.float32, scale.dtype)]
        tuned_for = dtypes.DType.FP16.value * 100 + bits  # both 16-bit types alike, as the package has it
        beside = [held if held.ndim == 0 else unguarded(held, inputs // group, outputs) for held in (scale, zero)]
        out: Tensor = core.GEMLITE_TRITON_MAPPING[kind].forward(
            flat, words, *beside, None, bits, group, (1 << bits) - 1, 32 // bits, *types,
            0, 3, True, tuned_for,  # scales inside the sum, (code - zero) * scale, words side by side
        )  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], outputs)


# -- ops -----------------------------------------------------------------------------------------------------------


# humming's locks are as they were once a product is done, so they do not count as changed
humming_matmul = torch.library.custom_op("fewbits::humming_matmul", mutates_args=(), device_types="cuda")(
    run_humming_matmul
)
gemlite_matmul = torch.library.custom_op("fewbits::gemlite_matmul", mutates_args=(), device_types="cuda")(
    run_gemlite_matmul
)


@humming_matmul.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, locks: Tensor, config: str, outputs: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@gemlite_matmul.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[1])


def multiply_humming(x: Tensor, *pieces: Any) -> Tensor:
    """`run_humming_matmul`, or the op made of it where something traces or differentiates."""
    out: Tensor = (run_humming_matmul if ops.eager(x) else humming_matmul)(x, *pieces)
    return out


def multiply_gemlite(x: Tensor, *pieces: Any) -> Tensor:
    """`run_gemlite_matmul`, or the op made of it where something traces or differentiates."""
    out: Tensor = (run_gemlite_matmul if ops.eager(x) else gemlite_matmul)(x, *pieces)
    return out
