"""The product of int8 matrices for GPUs whose warps work in groups (Hopper), in Gluon, Triton's lower level.

One warp copies tiles into shared memory, as many ahead as fit; two groups of four warps multiply them, each product
begun before the one before it is done, which Triton's own loop does for floating point but not for integers. Programs
stay and take tile after tile, so that copies go on while results are stored.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fewbits.kernels.triton_int8 import corner, store

#: Bytes of the input axis in a tile, and the layout of tiles in shared memory.
DEPTH, LAYOUT = 128, gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8)
#: Tiles of (rows, columns) and how many steps of them are held; the small ones for results of few large tiles.
LARGE, SMALL = (
    [triton.Config({"BLOCK_M": m, "BLOCK_N": n, "GROUP": 8, "STAGES": stages}, num_warps=8) for m, n, stages in sizes]
    for sizes in (((256, 128, 4), (128, 256, 4)), ((128, 128, 6),))
)


def configs(m: int, n: int, processors: int) -> list[triton.Config]:
    """Tilings worth timing of a result [m, n]."""
    return LARGE if m * n >= 8 * processors * 256 * 128 else LARGE + SMALL


@gluon.jit
def _copy(
    a, b, held, m, n, k, tiles,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch what the products need, in their order, each time a place is free."""
    tiles_a, tiles_b, full, free = held
    bytes_a_step: gl.constexpr = (BLOCK_M + BLOCK_N) * DEPTH
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = corner(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
        for at in range(0, k, DEPTH):
            place = step % STAGES
            mbarrier.wait(free.index(place), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(place), bytes_a_step)
            tma.async_copy_global_to_shared(a, [row, at], full.index(place), tiles_a.index(place))
            tma.async_copy_global_to_shared(b, [column, at], full.index(place), tiles_b.index(place))
            step += 1


@gluon.jit
def _multiply(
    held, beside, m, n, k, tiles,
    BIAS: gl.constexpr, ZERO_B: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Multiply what has come; a place is free once the product after the one that read it has begun."""
    tiles_a, tiles_b, full, free = held
    scales_a, zeros_a, sums_a, scales_b, zeros_b, sums_b, bias, out = beside
    # of integers Triton takes at most 224 columns in one instruction, and powers of two
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 32])
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, sums)
        for at in range(0, k, DEPTH):
            place = step % STAGES
            mbarrier.wait(full.index(place), step // STAGES & 1)
            acc = warpgroup_mma(tiles_a.index(place), tiles_b.index(place).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=at > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        row, column = corner(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
        row += gl.arange(0, BLOCK_M, gl.SliceLayout(1, sums))
        column += gl.arange(0, BLOCK_N, gl.SliceLayout(0, sums))
        store(
            acc, row, column, scales_a, zeros_a, sums_a, scales_b, zeros_b, sums_b, bias, out, m, n, k, BIAS, ZERO_B
        )  # fmt: skip


@gluon.jit
def matrix_kernel(
    a, b, scales_a, zeros_a, sums_a, scales_b, zeros_b, sums_b, bias, out, m, n, k, tiles,
    BIAS: gl.constexpr, ZERO_B: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`triton_int8._matrix_kernel`, with `a` and `b` as descriptors of tiles [BLOCK, DEPTH]; `tiles` of the result."""
    tiles_a = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, DEPTH], a.layout)
    tiles_b = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, DEPTH], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(free.index(place), count=1)
    held = (tiles_a, tiles_b, full, free)
    beside = (scales_a, zeros_a, sums_a, scales_b, zeros_b, sums_b, bias, out)
    WARPS: gl.constexpr = gl.num_warps()
    gl.warp_specialize(
        [
            (_multiply, (held, beside, m, n, k, tiles, BIAS, ZERO_B, BLOCK_M, BLOCK_N, DEPTH, GROUP, STAGES, WARPS)),
            (_copy, (a, b, held, m, n, k, tiles, BLOCK_M, BLOCK_N, DEPTH, GROUP, STAGES)),
        ],
        [1], [24],
    )  # fmt: skip


def described(matrix: Tensor, rows: int) -> TensorDescriptor:
    """An int8 matrix in tiles of so many rows."""
    return TensorDescriptor.from_tensor(matrix, [rows, DEPTH], LAYOUT)
