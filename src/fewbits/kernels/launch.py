"""Launching the Triton kernels: grids and workspaces. Imports triton, so it is imported only where one runs.

Nothing here waits for the device, and no launch depends on values, so all of it can be captured into a CUDA graph once
a first call has compiled and tuned (`kernels.tuning`). How often the input axis is split follows from the shape alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fewbits.kernels import fragments, triton_finish, triton_fragments, triton_group, triton_int8, triton_vector
from fewbits.kernels.operands import Beside, Int8Matrix, Norm, PackedWeight, RowGrid
from fewbits.kernels.tuning import INTERPRETED, copies, tuned

#: The bits of 1.0f, given at run time: see `triton_vector._mantissa`.
ONE = 0x3F800000
#: Rows up to which the kernels for vectors are used, a row at a time; beyond, tiles pay.
VECTOR_ROWS = 4
#: Rows up to which fragments are decoded for each eight; beyond, the weight is decoded once and multiplied whole.
FRAGMENT_ROWS = 32
#: How the vector kernels read activations.
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """`ops.packed_matmul` for `x` [m, in], on a GPU or in Triton's interpreter."""
    rows = x.shape[0]
    if rows == 0:
        return x.new_empty(rows, weight.outputs)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return (_vectors if rows <= VECTOR_ROWS and x.dtype in KINDS else _matrix)(x, weight)


def _vectors(x: Tensor, weight: PackedWeight) -> Tensor:
    """A row at a time."""
    rows, inputs = x.shape
    words, scale, zero, table, bits, group, outputs, beside = weight
    runs = words.shape[0] // bits
    given = x
    if inputs % 32 or x.stride(0) % 4 or x.data_ptr() % 8:
        given = F.pad(x, (0, runs * 32 - inputs)).contiguous()
    constants: dict[str, Any] = {"BITS": bits, "KIND": KINDS[x.dtype]}
    kernel: Any
    held: tuple[Any, ...]
    if table is not None:
        kernel, held = triton_vector.table_kernel, (table,)
        constants["PICK"] = table.dtype == torch.float16 and not INTERPRETED
    else:
        kernel, held = triton_vector.grid_kernel, (scale, zero)
        constants["GROUP"] = 0 if group >= inputs else group // 32

    def run(config: Any) -> Tensor:
        meta = dict(config.kwargs)
        per_split = -(-runs // meta.pop("SPLITS"))
        splits = -(-runs // per_split)
        plain = splits == 1 and beside.empty
        partial = x.new_empty(rows, outputs) if plain else _workspace(splits, rows, outputs, x.device)
        even = outputs % meta["BLOCK_N"] == 0
        kernel[(triton.cdiv(outputs, meta["BLOCK_N"]), rows, splits)](
            given, words, *held, partial, outputs, runs, per_split, given.stride(0), rows,
            *(() if table is not None else (ONE,)), **constants, **meta, EVEN=even, num_warps=config.num_warps,
        )  # fmt: skip
        return partial if plain else _finished(partial, x, beside)

    key = (kernel.__name__, rows, inputs, outputs, x.dtype, x.device.index, *constants.items())
    configs = triton_vector.configs(outputs, runs, _processors(x.device))
    return tuned(key, configs, run)


def _matrix(x: Tensor, weight: PackedWeight) -> Tensor:
    """Tiles of rows."""
    rows, inputs = x.shape
    words, scale, zero, table, bits, group, outputs, beside = weight
    runs = words.shape[0] // bits
    block_rows = min(128, max(16, triton.next_power_of_2(rows)))
    splits, per_split = _splits(-(-rows // block_rows), outputs, runs, x.device)
    dummy = words
    held = tuple(dummy if given is None else given for given in (scale, zero, table))
    plain = splits == 1 and beside.empty

    def run(config: Any) -> Tensor:
        partial = x.new_empty(rows, outputs) if plain else _workspace(splits, rows, outputs, x.device)
        grid = triton.cdiv(rows, block_rows), triton.cdiv(outputs, config.kwargs["BLOCK_N"]), splits
        triton_group._matrix_kernel[grid](
            x, words, *held, partial, inputs, outputs, runs, -(-group // 32), per_split, x.stride(0), rows,
            BITS=bits, TABLE=table is not None, **config.kwargs, num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
        return partial if plain else _finished(partial, x, beside)

    key = ("matrix", block_rows, inputs, outputs, bits, table is not None, x.dtype, x.device.index)
    return tuned(key, [c for c in triton_group.MATRIX_CONFIGS if c.kwargs["BLOCK_M"] == block_rows], run)


def fragment_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """`ops.fragment_matmul` for `x` [m, in], on a GPU or in Triton's interpreter."""
    rows, inputs = x.shape
    words, scale, zero, table, bits, group, outputs, beside = weight
    if rows == 0:
        return x.new_empty(rows, outputs)
    whole = group >= inputs
    unroll = 2 if inputs % 128 == 0 and (whole or group % 128 == 0) else 1
    bfloat = x.dtype == torch.bfloat16
    magic = triton_fragments.MAGIC[bfloat]
    dummy = words
    if table is not None:
        table = table.T.contiguous()  # no copy for `FragmentLinear`, which keeps it that way
    held = tuple(dummy if given is None else given for given in (scale, zero, table))
    constants = {
        "BITS": bits, "TABLE": table is not None, "BFLOAT": bfloat, "UNROLL": unroll,
        "GROUP": 0 if whole else group // (unroll * fragments.CHUNK), "EMULATED": INTERPRETED,
    }  # fmt: skip
    chunks = inputs // (unroll * fragments.CHUNK)
    key = (inputs, outputs, x.dtype, x.device.index, *constants.items())
    if rows > FRAGMENT_ROWS:
        dense = x.new_empty(outputs, inputs)

        def decode(config: Any) -> Tensor:
            warps = config.num_warps
            triton_fragments.decode_kernel[(len(words), triton.cdiv(chunks, warps))](
                words, *held, dense, outputs, chunks, magic, WARPS=warps, **constants, num_warps=warps
            )
            return dense

        beside.lay_over(tuned(("decode", *key), triton_fragments.DECODE_CONFIGS, decode))
        return F.linear(x, dense, None if beside.bias is None else beside.bias.to(x.dtype))
    if x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    kernels = _gluon("gluon_fragments", 8) if rows == 1 and outputs % fragments.OUTPUTS == 0 else None
    configs = kernels and kernels.configs(chunks, unroll, _generation() >= 9, _shared_memory(x.device))
    if configs:

        def run_with(words: Tensor) -> Callable[[Any], Tensor]:
            return functools.partial(_row, kernels, x, weight._replace(words=words), held, constants, chunks)

        kind = ("row", *key, *(given is None for given in beside))
        return tuned(kind, configs, run_with(words), lambda: [run_with(copy) for copy in copies(words)])
    downs = triton.cdiv(rows, 8)

    def run(config: Any) -> Tensor:
        meta = dict(config.kwargs)
        per_split = -(-chunks // meta.pop("SPLITS"))
        splits = -(-chunks // per_split)
        plain = splits == 1 and beside.empty
        partial = x.new_empty(rows, outputs) if plain else _workspace(splits, rows, outputs, x.device)
        even = outputs % fragments.OUTPUTS == 0 and per_split % (2 * meta["WARPS"]) == 0 and chunks % per_split == 0
        triton_fragments.fragment_kernel[(len(words) // meta["TILES"], downs, splits)](
            x, words, *held, partial, rows, outputs, chunks, per_split, x.stride(0), magic, **constants, **meta,
            EVEN=even, num_warps=config.num_warps,
        )  # fmt: skip
        return partial if plain else _finished(partial, x, beside)

    configs = triton_fragments.configs(len(words), downs, chunks, _processors(x.device))
    return tuned(("fragments", downs, *key, *(given is None for given in beside)), configs, run)


def _row(
    kernels: Any, x: Tensor, weight: PackedWeight, held: tuple[Tensor, ...], constants: dict[str, Any], chunks: int,
    config: Any,
) -> Tensor:  # fmt: skip
    """`fragment_matmul` of one row, by `gluon_fragments`."""
    warps, unroll, outputs = config.num_warps, constants["UNROLL"], weight.outputs
    plain = weight.beside.empty
    partial = x.new_empty(1, outputs) if plain else _workspace(1, 1, outputs, x.device)
    shape = (chunks, warps, config.kwargs["AHEAD"])
    # in a graph the kernel before this one writes activations, never weights
    early = config.kwargs["NEXT"] != "after" and torch.cuda.is_current_stream_capturing()
    kernels.row_kernel[(len(weight.words),)](
        x.view(torch.int32), weight.words, *held, partial, outputs, triton_fragments.MAGIC[constants["BFLOAT"]],
        **{name: value for name, value in constants.items() if name != "EMULATED"}, **config.kwargs, EARLY=early,
        CHUNKS=chunks, WARPS=warps, STEPS=kernels.covered(*shape) // warps, **kernels.layouts(warps, unroll),
        PLAIN=kernels.PLAIN, ROOM=kernels.room(*shape), num_warps=warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return partial if plain else _finished(partial, x, weight.beside)


def _workspace(splits: int, rows: int, outputs: int, device: torch.device) -> Tensor:
    return torch.empty(splits, rows, outputs, dtype=torch.float32, device=device)


def _finished(partial: Tensor, x: Tensor, beside: Beside) -> Tensor:
    """What the splits `partial` [splits, rows, out] and the parts beside the codes add up to, in the type of `x`."""
    splits, rows, outputs = partial.shape
    out = x.new_empty(rows, outputs)
    kept, sparse = 0 if beside.index is None else len(beside.index), beside.starts is not None

    def run(config: Any) -> Tensor:
        triton_finish._finish_kernel[(triton.cdiv(outputs, config.kwargs["BLOCK_N"]), rows)](
            partial, x, *(partial if given is None else given for given in beside), out, splits, rows, outputs,
            x.stride(0), kept,
            BIAS=beside.bias is not None, COLUMNS=kept > 0, SPARSE=sparse, ENTRIES=16, **config.kwargs,
            num_warps=config.num_warps,
        )  # fmt: skip
        return out

    key = ("finish", min(rows, 64), x.shape[1], outputs, splits, kept, sparse, x.dtype, x.device.index)
    return tuned(key, triton_finish.CONFIGS, run)


def quantize_rows(x: Tensor, grid: RowGrid, norm: Norm | None = None, out: Tensor | None = None) -> Int8Matrix:
    """`ops.run_quantize_rows` and `ops.run_norm_quantize` for `x` [m, k]."""
    rows, columns = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scales, zeros = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    sums = torch.empty(rows, dtype=torch.int32, device=x.device)
    made = Int8Matrix(codes, scales, zeros, sums)
    if rows == 0:
        return made
    block = triton.next_power_of_2(columns)
    weight, bias, eps, centred, twice = (None, None, 0.0, False, False) if norm is None else norm
    held = (x if given is None else given for given in (weight, bias, grid.scale, grid.zero, out))
    # few warps for a row, so that many rows are on their way at once
    warps = max(min(4, max(1, block // 512)), min(16, block // 2048))
    triton_int8._quantize_rows_kernel[(rows,)](
        x, *held, *made.flat(), columns, x.stride(0), float(grid.low), float(grid.high), float(grid.middle),
        float(grid.shift), grid.floor, eps,
        STATIC=grid.scale is not None, SYMMETRIC=grid.symmetric, NORM=0 if norm is None else 1 + centred,
        TWICE=twice, BIAS=bias is not None, KEEP=out is not None, BLOCK=block, WHOLE=block == columns,
        EMULATED=INTERPRETED, num_warps=warps,
    )  # fmt: skip
    return made


def int8_matmul(a: Int8Matrix, b: Int8Matrix, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`ops.run_int8_matmul` by one kernel."""
    (m, k), n, device = a.codes.shape, len(b.codes), a.codes.device
    out = torch.empty(m, n, dtype=dtype, device=device)
    if m == 0:
        return out
    small = triton.next_power_of_2(m)
    beside = (*a.flat()[1:], *b.flat()[1:], a.codes if bias is None else bias, out, m, n, k)
    constants = {"BIAS": bias is not None, "ZERO_B": not b.symmetric}
    specialized = _gluon("gluon_int8", 9, 9) if m >= 128 and k % 16 == 0 else None
    if specialized is not None:
        configs = specialized.configs(m, n, _processors(device))
    else:
        configs = [c for c in triton_int8.MATRIX_CONFIGS if c.kwargs["BLOCK_M"] <= max(16, 2 * small)]

    def run(config: Any) -> Tensor:
        meta = config.kwargs
        tiles = triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"])
        settings = {**constants, **meta, "num_warps": config.num_warps}
        if specialized is None:
            even = k % 256 == 0
            triton_int8._matrix_kernel[(tiles,)](
                a.codes, b.codes, *beside, EVEN=even, **settings, num_stages=config.num_stages
            )
        else:
            left, right = (
                specialized.described(*of) for of in ((a.codes, meta["BLOCK_M"]), (b.codes, meta["BLOCK_N"]))
            )
            specialized.matrix_kernel[(min(tiles, _processors(device)),)](
                left, right, *beside, tiles, DEPTH=specialized.DEPTH, **settings
            )
        return out

    return tuned(("int8", small, n, k, dtype, device.index, specialized is None, *constants.items()), configs, run)


# -- the GPU at hand ------------------------------------------------------------------------------------------------


@functools.cache
def _generation() -> int:
    """The major number of the GPU's compute capability."""
    return torch.cuda.get_device_capability()[0]


@functools.cache
def _gluon(name: str, least: int, most: int = 99) -> Any:
    """A module of kernels in Gluon on GPUs of these generations, with Triton 3.6 or later; else None."""
    known = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
    if INTERPRETED or not known or not least <= _generation() <= most:
        return None
    return importlib.import_module(f"fewbits.kernels.{name}")


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _splits(blocks_down: int, outputs: int, runs: int, device: torch.device) -> tuple[int, int]:
    """(splits of the input axis, runs a split): until there is a program for each processor, and 16 runs for each."""
    programs = blocks_down * -(-outputs // 64)
    wanted = max(1, min(16, _processors(device) // programs, runs // 16))
    per_split = -(-runs // wanted)
    per_split = -(-per_split // 8) * 8
    return -(-runs // per_split), per_split
