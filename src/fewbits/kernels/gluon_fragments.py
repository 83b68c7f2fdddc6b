"""The matrix kernel for one row of activations, in Gluon, Triton's lower level, where shared memory is ours to fill.

Reading a weight at the rate of memory takes more bytes on their way than `triton_fragments` has room for. Here
activations, scales and zero points are in shared memory, and the registers of a warp have AHEAD chunks of its weight on
their way. A code costs half a mask and little else: it is multiplied as it is (`triton_operands.raw_operands`), and the
zero point, times the sum of the activations, is taken off each chunk's sum.

Tensors are [warps, 8, 4], one element a thread: 8 outputs of a tile (and 8 more), 4 runs of inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fewbits.kernels.triton_fragments import _issued, _times
from fewbits.kernels.triton_operands import levels_of, load_words, odd, operands, raw_operands, unit

PLAIN = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


@functools.cache
def configs(chunks: int, unroll: int, early: bool, shared: int) -> list[triton.Config]:
    """Warps, chunks of each on their way, and when the NEXT kernel may begin, of which few warps read chunks in vain.

    It may "after" this one has ended, and where `early` allows "at once" or "late", with the last chunks on their way.
    shared: bytes of shared memory, of which there must be enough for a row and its grids.
    """
    tried = [(8, 2, "after"), (4, 4, "after")]
    if early:
        tried = [(8, 2, "after"), (8, 2, "at once"), (8, 2, "late"), (8, 4, "late"), (8, 7, "at once")]
        tried += [(4, 2, "late"), (4, 4, "at once"), (4, 7, "at once"), (4, 8, "at once"), (2, 8, "at once")]
    least = min(covered(chunks, warps, ahead) for warps, ahead, _ in tried)
    return [
        triton.Config({"AHEAD": ahead, "NEXT": then}, num_warps=warps)
        for warps, ahead, then in tried
        if covered(chunks, warps, ahead) <= least + chunks // 8
        and 128 * (unroll + 1) * room(chunks, warps, ahead) + 1024 <= shared
    ]


def covered(chunks: int, warps: int, ahead: int) -> int:
    """How many chunks warps go over that take equally many of them, a multiple of `ahead`."""
    return triton.cdiv(chunks, warps * ahead) * warps * ahead


def room(chunks: int, warps: int, ahead: int) -> int:
    """How many chunks there is room for in shared memory."""
    return triton.next_power_of_2(covered(chunks, warps, ahead))


def layouts(warps: int, unroll: int) -> dict[str, Any]:
    """Layouts by the names that `row_kernel` has for them.

    LANES: a warp's lanes. ROW and ONES: a step's activations [warps unroll 8, 4] as they leave shared memory, for the
    product and for their sum. HALVES: its scales [warps, 16], of outputs g and g + 8 in the lanes of g. COLUMNS: all
    warps' sums of an output in one thread. COPY and FOURS: a row, and scales, on their way into shared memory.
    """
    inside = [[0, 1], [0, 2], [1, 0], [8, 0]][: 2 + unroll]
    among = [[8 * unroll << bit, 0] for bit in range(warps.bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]]
    ones = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0], [8, 0]][: 4 + unroll]
    outputs = [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]]
    warp = [[1 << bit, 0] for bit in range(warps.bit_length() - 1)]
    return {
        "LANES": gl.BlockedLayout([1, 1, 1], [1, 8, 4], [warps, 1, 1], [2, 1, 0]),
        "ROW": gl.DistributedLinearLayout(inside, lanes, among, [], [warps * unroll * 8, 4]),
        "ONES": gl.DistributedLinearLayout(ones[: unroll - 1], ones[unroll - 1 :], among, [], [warps * unroll * 8, 4]),
        "HALVES": gl.DistributedLinearLayout([[0, 8]], outputs, warp, [], [warps, 16]),
        "COLUMNS": gl.BlockedLayout([warps, 1], [1, 32], [1, warps], [0, 1]),
        "COPY": gl.BlockedLayout([1, 4], [32, 1], [warps, 1], [1, 0]),
        "FOURS": gl.BlockedLayout([1, 4], [8, 4], [warps, 1], [1, 0]),
    }


@gluon.jit
def _asked(words, chunk, lane, BITS: gl.constexpr, UNROLL: gl.constexpr, CHUNKS: gl.constexpr, EVEN: gl.constexpr):
    """A lane's words of a chunk, or of the last of CHUNKS, which then meet no activations but zeros."""
    if not EVEN:
        chunk = gl.minimum(chunk, CHUNKS - 1)
    words += chunk * (UNROLL * BITS * 32)
    w = load_words(words, lane, BITS, False)
    v = w
    if UNROLL == 2:
        v = load_words(words + BITS * 32, lane, BITS, False)
    return w, v


@gluon.jit
def _grids(
    scale, zero, tile, outputs, GROUP: gl.constexpr, CHUNKS: gl.constexpr, ROOM: gl.constexpr, FOURS: gl.constexpr
):  # fmt: skip
    """A tile's scales and zero points of every chunk: [ROOM, 16], zero beyond the last of CHUNKS."""
    chunk, output = gl.arange(0, ROOM, gl.SliceLayout(1, FOURS)), gl.arange(0, 16, gl.SliceLayout(0, FOURS))
    there = (chunk < CHUNKS)[:, None] & (output >= 0)[None, :]
    group = chunk // GROUP if GROUP else chunk * 0
    place = group[:, None] * outputs + tile * 16 + output[None, :]
    return gl.load(scale + place, mask=there, other=0), gl.load(zero + place, mask=there, other=0)


@gluon.jit
def _in_units(scale, zero, BITS: gl.constexpr, BFLOAT: gl.constexpr, FOURS: gl.constexpr):
    """float32: scales for units of `raw_operands`, and what is too much in these for a unit of activation."""
    scale = scale.to(gl.float32)
    less = zero.to(gl.float32) * scale
    LOWER: gl.constexpr = unit(0, BITS, BFLOAT)
    UPPER: gl.constexpr = unit(1, BITS, BFLOAT)
    scale *= gl.where(gl.arange(0, 16, gl.SliceLayout(0, FOURS)) < 8, LOWER, UPPER)[None, :]
    return scale, (less + 128.0 * scale if BFLOAT else less)


@gluon.jit
def _of_two(row, HALVES: gl.constexpr, LANES: gl.constexpr):
    """A lane's two outputs of a step's values in shared memory, [warps, 16]: twice [warps, 8, 1]."""
    first, second = gl.split(row.load(HALVES).reshape([row.shape[0], 2, 8]).permute([0, 2, 1]))
    S: gl.constexpr = gl.SliceLayout(2, LANES)
    first = gl.convert_layout(first, S, assert_trivial=True).expand_dims(2)
    return first, gl.convert_layout(second, S, assert_trivial=True).expand_dims(2)


@gluon.jit
def _total(row, like, BFLOAT: gl.constexpr, UNROLL: gl.constexpr, LANES: gl.constexpr, ONES: gl.constexpr):
    """A lane's part of the sum of a chunk's activations, of which four lanes have all. row: in shared memory.

    The matrix units multiply them by ones, eight columns at once.
    """
    WARPS: gl.constexpr = like.shape[0]
    x = row.load(ONES)
    if UNROLL == 2:
        x0, x1 = gl.split(x.reshape([WARPS, 8, 4, 2]))
        b = (gl.convert_layout(x0, LANES, assert_trivial=True), gl.convert_layout(x1, LANES, assert_trivial=True))
    else:
        b = (gl.convert_layout(x.reshape([WARPS, 8, 4]), LANES, assert_trivial=True), like)
    one, nil = like + (0x3F803F80 if BFLOAT else 0x3C003C00), like.to(gl.float32)
    c = _times((one, one, one, one), b, (nil, nil, nil, nil), BFLOAT, False)
    return c[0] + c[1]


@gluon.jit
def _placed(part, LANES: gl.constexpr):
    """[warps, 4], in which the lanes of an output agree, as [warps, 1, 4]."""
    return gl.convert_layout(part, gl.SliceLayout(1, LANES), assert_trivial=True).expand_dims(1)


@gluon.jit
def _quarters(part, UNROLL: gl.constexpr, LANES: gl.constexpr):
    """One of the two words of each product: [warps, 4, UNROLL, 2, 2] -> 4 UNROLL times [warps, 1, 4]."""
    even, odd = gl.split(part)
    p0, p2 = gl.split(even)
    p1, p3 = gl.split(odd)
    if UNROLL == 2:
        p0, p4 = gl.split(p0)
        p1, p5 = gl.split(p1)
        p2, p6 = gl.split(p2)
        p3, p7 = gl.split(p3)
        return (
            _placed(p0, LANES), _placed(p1, LANES), _placed(p2, LANES), _placed(p3, LANES),
            _placed(p4, LANES), _placed(p5, LANES), _placed(p6, LANES), _placed(p7, LANES),
        )  # fmt: skip
    else:
        WARPS: gl.constexpr = part.shape[0]
        return (
            _placed(p0.reshape([WARPS, 4]), LANES), _placed(p1.reshape([WARPS, 4]), LANES),
            _placed(p2.reshape([WARPS, 4]), LANES), _placed(p3.reshape([WARPS, 4]), LANES),
        )  # fmt: skip


@gluon.jit
def _added(
    sums, held, row, scales, zeros, levels, table, output, outputs, magic,
    BITS: gl.constexpr, TABLE: gl.constexpr, BFLOAT: gl.constexpr, UNROLL: gl.constexpr, LANES: gl.constexpr,
    ROW: gl.constexpr, ONES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """`sums` and the product of a chunk with the row's words in shared memory, where scales and zeros are too.

    sums: of two outputs; and, of the same, a lane's part of what these count too much.
    """
    WARPS: gl.constexpr = output.shape[0]
    w, v = held
    x = row.load(ROW).reshape([WARPS, UNROLL, 4, 2, 2, 2]).permute([0, 2, 1, 3, 4, 5])
    x0, x1 = gl.split(x)
    b0, b1 = _quarters(x0, UNROLL, LANES), _quarters(x1, UNROLL, LANES)
    nil = output.to(gl.float32) * 0.0
    c, d = (nil, nil, nil, nil), (nil, nil, nil, nil)
    ONE: gl.constexpr = TABLE or odd(0, BITS, BFLOAT) == 1
    for m in gl.static_range(4 * UNROLL):
        of = w if m < 4 else v
        if TABLE:
            a = operands(of, m % 4, magic, (0, 0), levels, table, output, outputs, BITS, True, BFLOAT, False)
        else:
            a = raw_operands(of, m % 4, magic, BITS, BFLOAT)
        if m % 2 == 0 or ONE:
            c = _times(a, (b0[m], b1[m]), c, BFLOAT, False)
        else:
            d = _times(a, (b0[m], b1[m]), d, BFLOAT, False)
    first, second, less, fewer = sums
    if TABLE:
        return first + c[0], second + c[2], less, fewer
    else:
        if not ONE:
            LOWER: gl.constexpr = odd(0, BITS, BFLOAT)
            UPPER: gl.constexpr = odd(1, BITS, BFLOAT)
            c = (c[0] + LOWER * d[0], c[1], c[2] + UPPER * d[2], c[3])
        s, z = _of_two(scales, HALVES, LANES), _of_two(zeros, HALVES, LANES)
        total = _total(row, output * 0, BFLOAT, UNROLL, LANES, ONES)
        return first + s[0] * c[0], second + s[1] * c[2], less + z[0] * total, fewer + z[1] * total


@gluon.jit(do_not_specialize=["magic"])
def row_kernel(
    x, words, scale, zero, table, out, outputs, magic,
    BITS: gl.constexpr, TABLE: gl.constexpr, BFLOAT: gl.constexpr, GROUP: gl.constexpr, UNROLL: gl.constexpr,
    CHUNKS: gl.constexpr, WARPS: gl.constexpr, STEPS: gl.constexpr, AHEAD: gl.constexpr, NEXT: gl.constexpr,
    EARLY: gl.constexpr, LANES: gl.constexpr, ROW: gl.constexpr, ONES: gl.constexpr, HALVES: gl.constexpr,
    COLUMNS: gl.constexpr, COPY: gl.constexpr, FOURS: gl.constexpr, PLAIN: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """A program: 16 outputs; STEPS chunks a warp, a multiple of AHEAD, the last of which may be beyond CHUNKS.

    `x` as int32, two numbers each; ROOM is the next power of two of the chunks gone over. EARLY: the launch may begin
    while the kernel before it still runs; what the weight is is read at once then, and `x` when that kernel is done.
    NEXT: see `configs`. The rest is as for `triton_fragments.fragment_kernel`.
    """
    EVEN: gl.constexpr = STEPS * WARPS == CHUNKS
    if EARLY and NEXT == "at once":
        gdc_launch_dependents()
    tile = gl.program_id(0)
    W: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LANES))
    G: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LANES))
    Q: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LANES))
    chunk = gl.arange(0, WARPS, W)[:, None, None]
    g, q = gl.arange(0, 8, G)[None, :, None], gl.arange(0, 4, Q)[None, None, :]
    alike = (chunk + g + q) * 0
    lane, output = g * 4 + q + alike, tile * 16 + g + alike
    words += tile.to(gl.int64) * (CHUNKS * UNROLL * BITS * 32)
    # what is waited for first is asked for first, since loads come back in order
    levels = ((0, 0), (0, 0))
    if TABLE:
        levels = (levels_of(table, output, outputs, BITS, BFLOAT), levels_of(table, output + 8, outputs, BITS, BFLOAT))
    else:
        scales, zeros = _grids(scale, zero, tile, outputs, GROUP, CHUNKS, ROOM, FOURS)
        chunk = _issued(chunk, False)
    held = ()
    for place in gl.static_range(AHEAD):
        asked = _asked(words, chunk + place * WARPS, lane, BITS, UNROLL, CHUNKS, EVEN)
        held = held + (asked,)  # type: ignore[assignment] # noqa: RUF005 (Triton knows no stars)
    chunk = _issued(chunk, False)
    if not TABLE:
        scales, zeros = _in_units(scales, zeros, BITS, BFLOAT, FOURS)
        scales = gl.allocate_shared_memory(gl.float32, [ROOM, 16], PLAIN, scales)
        zeros = gl.allocate_shared_memory(gl.float32, [ROOM, 16], PLAIN, zeros)
        scales = scales._reinterpret(gl.float32, [ROOM // WARPS, WARPS, 16], PLAIN)
        zeros = zeros._reinterpret(gl.float32, [ROOM // WARPS, WARPS, 16], PLAIN)
    if EARLY:
        gdc_wait()
    piece, part = gl.arange(0, ROOM * UNROLL * 8, gl.SliceLayout(1, COPY)), gl.arange(0, 4, gl.SliceLayout(0, COPY))
    there = (piece < CHUNKS * UNROLL * 8)[:, None] & (part >= 0)[None, :]
    row = gl.load(x + piece[:, None] * 4 + part[None, :], mask=there, other=0)
    row = gl.allocate_shared_memory(gl.int32, [ROOM * UNROLL * 8, 4], PLAIN, row)
    row = row._reinterpret(gl.int32, [ROOM // WARPS, WARPS * UNROLL * 8, 4], PLAIN)
    if TABLE:
        scales, zeros = row, row
    nil = output.to(gl.float32) * 0.0
    sums = (nil, nil, nil, nil)
    for step in range(0, STEPS - AHEAD, AHEAD):
        for place in gl.static_range(AHEAD):
            chunk = _issued(chunk, False)
            now = step + place
            sums = _added(
                sums, held[place], row.index(now), scales.index(now), zeros.index(now), levels, table, output, outputs,
                magic, BITS, TABLE, BFLOAT, UNROLL, LANES, ROW, ONES, HALVES,
            )  # fmt: skip
            asked = _asked(words, chunk + (now + AHEAD) * WARPS, lane, BITS, UNROLL, CHUNKS, EVEN)
            held = held[:place] + (asked,) + held[place + 1 :]  # noqa: RUF005
    if EARLY and NEXT == "late":
        gdc_launch_dependents()
    for place in gl.static_range(AHEAD):
        now = STEPS - AHEAD + place
        sums = _added(
            sums, held[place], row.index(now), scales.index(now), zeros.index(now), levels, table, output, outputs,
            magic, BITS, TABLE, BFLOAT, UNROLL, LANES, ROW, ONES, HALVES,
        )  # fmt: skip
    # four lanes have the sums of one output, and a part each of what these count too much
    first = gl.sum(sums[0] * 0.25 - sums[2], 2)
    second = gl.sum(sums[1] * 0.25 - sums[3], 2)
    every = gl.allocate_shared_memory(gl.float32, [WARPS, 16], PLAIN)
    every.slice(0, 8, 1).store(first)
    every.slice(8, 8, 1).store(second)
    output = tile * 16 + gl.arange(0, 16, gl.SliceLayout(0, COLUMNS))
    gl.store(out + output, gl.sum(every.load(COLUMNS), 0).to(out.dtype.element_ty))
