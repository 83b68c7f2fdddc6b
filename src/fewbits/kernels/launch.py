"""Launching the Triton kernels: grids, workspaces and tuning. Imports triton, so it is imported only where one runs.

Nothing here waits for the device, and no launch depends on values, so all of it can be captured into a CUDA graph once
a first call has compiled and tuned. A kernel is tuned once a shape (rows rounded up to a power of two) by timing its
configurations; `FEWBITS_TUNE=0` takes the first that suits instead, the same on every run. How often the input axis is
split follows from the shape alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fewbits.kernels import triton_finish, triton_group, triton_int8

#: The bits of 1.0f, given at run time: see `triton_words.mantissas`.
ONE = 0x3F800000
INTERPRETED = bool(getattr(triton.knobs.runtime, "interpret", False))
#: Rows up to which the kernel for vectors is used, a row at a time; beyond, tiles pay.
VECTOR_ROWS = 4


def packed_matmul(
    x: Tensor,
    words: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
    places: Tensor | None = None,
    entries: Tensor | None = None,
) -> Tensor:
    """`ops.packed_matmul` for `x` [m, in], on a GPU or in Triton's interpreter."""
    rows, inputs = x.shape
    outputs = words.shape[1]
    runs = words.shape[0] // bits
    out = x.new_empty(rows, outputs)
    if rows == 0:
        return out
    if x.stride(-1) != 1:
        x = x.contiguous()
    vector = rows <= VECTOR_ROWS
    block_rows = 1 if vector else _tile_rows(rows)
    splits, per_split = _splits(-(-rows // block_rows), outputs, runs, x.device)
    grouped = -(-group // 32)
    dummy = words
    arguments = (
        x, words, dummy if scale is None else scale, dummy if zero is None else zero,
        dummy if table is None else table,
    )  # fmt: skip
    plain = splits == 1 and bias is None and index is None and starts is None
    partial = out if plain else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    sizes = (inputs, outputs, runs, grouped, per_split, x.stride(0), rows, ONE)
    constants = {"BITS": bits, "TABLE": table is not None}
    shape = (rows if vector else block_rows, inputs, outputs, bits, table is not None, x.dtype, x.device.index)
    if vector:
        kernel, configs = triton_group._vector_kernel, triton_group.VECTOR_CONFIGS

        def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
            return triton.cdiv(outputs, meta["BLOCK_N"]), rows, splits
    else:
        kernel = triton_group._matrix_kernel
        configs = [config for config in triton_group.MATRIX_CONFIGS if config.kwargs["BLOCK_M"] == block_rows]

        def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
            return triton.cdiv(rows, meta["BLOCK_M"]), triton.cdiv(outputs, meta["BLOCK_N"]), splits

    _launch(kernel, configs, shape, grid, (*arguments, partial, *sizes), constants)
    if plain:
        return out

    def over_columns(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(outputs, meta["BLOCK_N"]), rows

    extras = (bias, index, columns, starts, places, entries)
    kept = 0 if index is None else len(index)
    _launch(
        triton_finish._finish_kernel,
        triton_finish.CONFIGS,
        (min(rows, 64), inputs, outputs, splits, kept, starts is not None, x.dtype, x.device.index),
        over_columns,
        (
            partial,
            x,
            *(dummy if given is None else given for given in extras),
            out,
            splits,
            rows,
            outputs,
            x.stride(0),
            kept,
        ),
        {"BIAS": bias is not None, "COLUMNS": kept > 0, "SPARSE": starts is not None, "ENTRIES": 16},
    )
    return out


def quantize_rows(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    low: int,
    high: int,
    symmetric: bool,
    floor: float,
    norm: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.quantize_rows` and `ops.norm_quantize` for `x` [m, k]; norm: 0 none, 1 RMS, 2 layer norm."""
    rows, columns = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scales, zeros = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    sums = torch.empty(rows, dtype=torch.int32, device=x.device)
    if rows == 0:
        return codes, scales, zeros, sums
    block = triton.next_power_of_2(columns)
    shift = 128.0 if high > 127 else 0.0
    middle = float((low + high + 1) // 2) if low >= 0 else 0.0
    dummy = x
    triton_int8._quantize_rows_kernel[(rows,)](
        x, dummy if weight is None else weight, dummy if bias is None else bias, dummy if scale is None else scale,
        dummy if zero is None else zero, codes, scales, zeros, sums, columns, x.stride(0), float(low), float(high),
        middle, shift, floor, norm_eps,
        STATIC=scale is not None, SYMMETRIC=symmetric, NORM=norm, BIAS=bias is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return codes, scales, zeros, sums


def int8_matmul(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    zeros_a: Tensor,
    sums_a: Tensor,
    scales_b: Tensor,
    zeros_b: Tensor,
    sums_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    symmetric_b: bool,
) -> Tensor:
    """`ops.int8_matmul` by one kernel."""
    (m, k), n = a.shape, len(b)
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    if m == 0:
        return out
    small = triton.next_power_of_2(m)
    configs = [c for c in triton_int8.MATRIX_CONFIGS if c.kwargs["BLOCK_M"] <= max(16, 2 * small)]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    arguments = (a, b, scales_a, zeros_a, sums_a, scales_b, zeros_b, sums_b, a if bias is None else bias, out, m, n, k)
    constants = {"BIAS": bias is not None, "ZERO_B": not symmetric_b, "EVEN": k % 256 == 0}
    _launch(triton_int8._matrix_kernel, configs, (small, n, k, dtype, a.device.index), grid, arguments, constants)
    return out


# -- splits and tuning ---------------------------------------------------------------------------------------------


def _tile_rows(rows: int) -> int:
    return min(128, max(16, triton.next_power_of_2(rows)))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _splits(blocks_down: int, outputs: int, runs: int, device: torch.device) -> tuple[int, int]:
    """(splits of the input axis, runs a split): until there is a program for each processor, and 16 runs for each."""
    programs = blocks_down * -(-outputs // 64)
    wanted = max(1, min(16, _processors(device) // programs, runs // 16))
    per_split = -(-runs // wanted)
    per_split = -(-per_split // 8) * 8
    return -(-runs // per_split), per_split


_tuned: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    configs: Sequence[Any],
    shape: tuple[Any, ...],
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Run the kernel with the configuration that is fastest for a shape; the first call of a shape measures."""
    key = (kernel.__name__ if hasattr(kernel, "__name__") else str(kernel), *shape, *sorted(constants.items()))
    config = _tuned.get(key)
    if config is None:
        config = _tuned[key] = _fastest(kernel, configs, grid, arguments, constants)
    _run(kernel, config, grid, arguments, constants)


def _run(kernel: Any, config: Any, grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    meta = {**constants, **config.kwargs}
    kernel[grid(meta)](*arguments, **meta, num_warps=config.num_warps, num_stages=config.num_stages)


def _fastest(
    kernel: Any, configs: Sequence[Any], grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if INTERPRETED or capturing or len(configs) == 1 or os.environ.get("FEWBITS_TUNE", "1") == "0":
        return configs[0]
    found: list[tuple[float, int]] = []
    for place, config in enumerate(configs):
        try:
            timed = triton.testing.do_bench(
                functools.partial(_run, kernel, config, grid, arguments, constants),
                warmup=3,
                rep=12,
                return_mode="median",
            )
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory or registers than this GPU has
        found.append((float(timed), place))
    if not found:
        raise RuntimeError(f"no configuration of {kernel} fits this GPU")
    return configs[min(found)[1]]
