"""The matrix kernel for one row of activations, in Gluon, Triton's lower level, where shared memory is ours to fill.

Reading a weight at the rate of memory takes more bytes on their way than `triton_fragments` has room for: it holds
activations in registers too, since what it reads from the cache comes back only after the weights asked for before.
Here activations are in shared memory, and a warp has AHEAD chunks of its weight on their way. Tensors are
[warps, 8, 4], one element a thread: 8 outputs of a tile (and 8 more), 4 runs of inputs.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fewbits.kernels.triton_fragments import _issued, _times
from fewbits.kernels.triton_operands import levels_of, load_words, operands

PLAIN = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
#: Inputs of a row that shared memory holds beside other programs' rows.
LONGEST = 1 << 15


def configs(chunks: int, early: bool) -> list[triton.Config]:
    """Warps, chunks of each on their way, and when the NEXT kernel may begin, for as many chunks as they divide.

    It may "after" this one has ended, and where `early` allows "at once" or "late", with the last chunks on their way.
    """
    return [
        triton.Config({"AHEAD": ahead, "NEXT": then}, num_warps=warps)
        for warps, ahead, then in (
            (8, 2, "after"), (4, 2, "after"), (4, 2, "late"), (8, 2, "at once"), (8, 2, "late"), (8, 4, "late"),
        )
        if chunks % (warps * ahead) == 0 and (early or then == "after")
    ]  # fmt: skip


def layouts(warps: int, unroll: int) -> dict[str, Any]:
    """Of a warp's lanes, and of a step's activations [warps unroll 8, 4] as they leave shared memory."""
    inside = [[0, 1], [0, 2], [1, 0], [8, 0]][: 2 + unroll]
    among = [[8 * unroll << bit, 0] for bit in range(warps.bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]]
    return {
        "LANES": gl.BlockedLayout([1, 1, 1], [1, 8, 4], [warps, 1, 1], [2, 1, 0]),
        "ROW": gl.DistributedLinearLayout(inside, lanes, among, [], [warps * unroll * 8, 4]),
        "COPY": gl.BlockedLayout([1, 4], [32, 1], [warps, 1], [1, 0]),
    }


@gluon.jit
def _asked(
    words, scale, zero, chunk, lane, output, outputs,
    BITS: gl.constexpr, TABLE: gl.constexpr, GROUP: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """A lane's words of a chunk and, of two outputs, scales and zero points, which tables do not have."""
    words += chunk * (UNROLL * BITS * 32)
    w = load_words(words, lane, BITS, False)
    v = w
    if UNROLL == 2:
        v = load_words(words + BITS * 32, lane, BITS, False)
    if TABLE:
        return w, v, (output, output), (output, output)
    else:
        group = (chunk // GROUP if GROUP else chunk * 0) * outputs + output
        s = (gl.load(scale + group), gl.load(scale + group + 8))
        z = (gl.load(zero + group).to(gl.int32), gl.load(zero + group + 8).to(gl.int32))
        return w, v, s, z


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
    sums, held, row, levels, table, output, outputs, magic,
    BITS: gl.constexpr, TABLE: gl.constexpr, BFLOAT: gl.constexpr, UNROLL: gl.constexpr, WARPS: gl.constexpr,
    LANES: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """The sums of two outputs and the product of a chunk with the row's words in shared memory."""
    w, v, s, z = held
    x = row.load(ROW).reshape([WARPS, UNROLL, 4, 2, 2, 2]).permute([0, 2, 1, 3, 4, 5])
    x0, x1 = gl.split(x)
    b0, b1 = _quarters(x0, UNROLL, LANES), _quarters(x1, UNROLL, LANES)
    nil = output.to(gl.float32) * 0.0
    c = (nil, nil, nil, nil)
    zeros = (z[0] * 0x10001, z[1] * 0x10001)
    for m in gl.static_range(4 * UNROLL):
        a = operands(w if m < 4 else v, m % 4, magic, zeros, levels, table, output, outputs, BITS, TABLE, BFLOAT, False)
        c = _times(a, (b0[m], b1[m]), c, BFLOAT, False)
    if TABLE:
        return sums[0] + c[0], sums[1] + c[2]
    else:
        return sums[0] + s[0].to(gl.float32) * c[0], sums[1] + s[1].to(gl.float32) * c[2]


@gluon.jit(do_not_specialize=["magic"])
def row_kernel(
    x, words, scale, zero, table, out, outputs, magic,
    BITS: gl.constexpr, TABLE: gl.constexpr, BFLOAT: gl.constexpr, GROUP: gl.constexpr, UNROLL: gl.constexpr,
    WARPS: gl.constexpr, STEPS: gl.constexpr, AHEAD: gl.constexpr, NEXT: gl.constexpr, EARLY: gl.constexpr,
    LANES: gl.constexpr, ROW: gl.constexpr, COPY: gl.constexpr, PLAIN: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """A program: 16 outputs; STEPS chunks a warp, a multiple of AHEAD.

    `x` as int32, two numbers each; ROOM is the next power of two of its 16-byte units. EARLY: the launch may begin
    while the kernel before it still runs; what the weight is is read at once then, and `x` when that kernel is done.
    NEXT: see `configs`. The rest is as for `triton_fragments.fragment_kernel`.
    """
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
    words += tile.to(gl.int64) * (STEPS * WARPS * UNROLL * BITS * 32)
    held = ()
    for place in gl.static_range(AHEAD):
        asked = _asked(words, scale, zero, chunk + place * WARPS, lane, output, outputs, BITS, TABLE, GROUP, UNROLL)
        held = held + (asked,)  # type: ignore[assignment] # noqa: RUF005 (Triton knows no stars)
    levels = ((0, 0), (0, 0))
    if TABLE:
        levels = (levels_of(table, output, outputs, BITS, BFLOAT), levels_of(table, output + 8, outputs, BITS, BFLOAT))
    if EARLY:
        gdc_wait()
    SPAN: gl.constexpr = WARPS * UNROLL * 8
    unit, part = gl.arange(0, ROOM, gl.SliceLayout(1, COPY)), gl.arange(0, 4, gl.SliceLayout(0, COPY))
    there = (unit < STEPS * SPAN)[:, None] & (part >= 0)[None, :]
    row = gl.load(x + unit[:, None] * 4 + part[None, :], mask=there, other=0)
    row = gl.allocate_shared_memory(gl.int32, [ROOM, 4], PLAIN, row)
    row = row._reinterpret(gl.int32, [ROOM // SPAN, SPAN, 4], PLAIN)
    nil = output.to(gl.float32) * 0.0
    sums = (nil, nil)
    for step in range(0, STEPS - AHEAD, AHEAD):
        for place in gl.static_range(AHEAD):
            chunk = _issued(chunk, False)
            sums = _added(
                sums, held[place], row.index(step + place), levels, table, output, outputs, magic, BITS, TABLE, BFLOAT,
                UNROLL, WARPS, LANES, ROW,
            )  # fmt: skip
            asked = _asked(
                words, scale, zero, chunk + (step + place + AHEAD) * WARPS, lane, output, outputs, BITS, TABLE, GROUP,
                UNROLL,
            )  # fmt: skip
            held = held[:place] + (asked,) + held[place + 1 :]  # noqa: RUF005
    if EARLY and NEXT == "late":
        gdc_launch_dependents()
    for place in gl.static_range(AHEAD):
        sums = _added(
            sums, held[place], row.index(STEPS - AHEAD + place), levels, table, output, outputs, magic, BITS, TABLE,
            BFLOAT, UNROLL, WARPS, LANES, ROW,
        )  # fmt: skip
    pair = gl.sum(gl.join(sums[0], sums[1]), 0)  # [8, 4, 2]; the four are alike
    PAIR: gl.constexpr = pair.type.layout
    g = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, PAIR)))[:, None, None]
    q = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, PAIR)))[None, :, None]
    upper = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, PAIR)))[None, None, :]
    place = tile * 16 + g + 8 * upper + q * 0
    gl.store(out + place, pair.to(out.dtype.element_ty), mask=q + place * 0 == 0)
