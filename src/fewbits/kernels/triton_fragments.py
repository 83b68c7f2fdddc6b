"""Triton kernels on the matrix units for up to eight rows: weights of 2, 3 or 4 bits, on a grid or with a table.

Codes lie in memory as `kernels.fragments` says, so that each lane decodes its own operands in registers, two to a
32-bit register. Every tensor here has one axis and one element a thread, element 32 w + l in lane l of warp w, whatever
the compiler would otherwise prefer; the matrix product of a warp is an instruction given as such. How codes become
operands is in `triton_operands`.

Products of 16-bit numbers are added in float32. A program's warps share the input axis; their sums are added in a fixed
order, and those of programs that split it once more by `triton_finish`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbits.kernels.triton_operands import four_words, high, levels_of, load_words, low, operands, rescaled, twice

#: The upper bits of a 16-bit number whose lower bits then count in ones: 1024 in float16, 128 in bfloat16, twice each.
MAGIC = {False: 0x64006400, True: 0x43004300}


def configs(tiles: int, downs: int, chunks: int, processors: int) -> list[triton.Config]:
    """Numbers of warps, splits and tiles a program worth timing, for `tiles` of outputs and `downs` eights of rows.

    A program's tiles are all there: two only where they divide the outputs' tiles.
    """
    found = []
    for each, warps, splits in ((1, 4, 1), (1, 8, 1), (2, 4, 1), (2, 8, 1), (1, 4, 2), (1, 8, 2), (1, 4, 4), (1, 8, 4)):
        busy = splits > 1 and tiles * downs * warps * splits > 48 * processors
        if tiles % each == 0 and warps * splits <= max(chunks, 4) and not busy:
            found.append(triton.Config({"WARPS": warps, "SPLITS": splits, "TILES": each}, num_warps=warps))
    return found


DECODE_CONFIGS = [triton.Config({}, num_warps=warps) for warps in (4, 8)]


@triton.jit
def _times(a, b, c, BFLOAT: tl.constexpr, EMULATED: tl.constexpr):
    """c + a times b of each warp: 16 outputs by 16 inputs, 16 inputs by 8 rows; operands as the instruction wants them.

    EMULATED: the same in tensors of the warp, for Triton's interpreter.
    """
    a0, a1, a2, a3 = a
    b0, b1 = b
    c0, c1, c2, c3 = c
    if EMULATED:
        e0, e1 = _product(a0, a2, b0, b1)
        e2, e3 = _product(a1, a3, b0, b1)
        return c0 + e0, c1 + e1, c2 + e2, c3 + e3
    elif BFLOAT:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, "
            "{$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, "
            "{$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _product(a, a_later, b, b_later):
    """Emulates half of the instruction: what lane 4 g + q gets of output g, rows 2 q and 2 q + 1, float32."""
    WARPS: tl.constexpr = a.shape[0] // 32
    total = tl.zeros((WARPS, 8, 8), tl.float32)
    for part in tl.static_range(4):
        from_a = a if part < 2 else a_later
        from_b = b if part < 2 else b_later
        value_a = low(from_a) if part % 2 == 0 else high(from_a)
        value_b = low(from_b) if part % 2 == 0 else high(from_b)
        left = tl.reshape(value_a, (WARPS, 8, 1, 4))
        right = tl.reshape(value_b, (WARPS, 1, 8, 4))
        total += tl.sum(left * right, 3)
    even, odd = tl.split(tl.reshape(total, (WARPS * 32, 2)))
    return even, odd


@triton.jit
def _chunk(
    words, scale, zero, chunk, stop, lane, output, outputs,
    BITS: tl.constexpr, TABLE: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr, EVEN: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """All that a lane needs of a chunk, or of the last before `stop`: its words, and of two outputs scales and, twice
    each, zero points."""
    chunk = tl.minimum(chunk, stop - 1)
    words += (chunk * (UNROLL * BITS * 32)).to(tl.int64)
    w = load_words(words, lane, BITS, EMULATED)
    v = w
    if UNROLL == 2:
        v = load_words(words + BITS * 32, lane, BITS, EMULATED)
    if TABLE:
        none = output * 0
        return w, v, (none, none), (none, none)
    else:
        group = (chunk // GROUP if GROUP else chunk * 0) * outputs
        scale += group.to(tl.int64) + output
        zero += group.to(tl.int64) + output
        if EVEN:
            s = (tl.load(scale), tl.load(scale + 8))
            z = (tl.load(zero), tl.load(zero + 8))
        else:
            low, high = output < outputs, output + 8 < outputs
            s = (tl.load(scale, mask=low, other=0.0), tl.load(scale + 8, mask=high, other=0.0))
            z = (tl.load(zero, mask=low, other=0), tl.load(zero + 8, mask=high, other=0))
        return w, v, s, (z[0].to(tl.int32) * 0x10001, z[1].to(tl.int32) * 0x10001)


@triton.jit
def _issued(chunk, EMULATED: tl.constexpr):
    """`chunk`, once all loads before this point are on their way; the compiler would put them off to save registers."""
    if EMULATED:
        return chunk
    else:
        return tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [chunk], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _rows(activations, chunk, stop, UNROLL: tl.constexpr, EMULATED: tl.constexpr):
    """A lane's activations of a chunk. They are asked for before the weights of the chunk: loads come back in order."""
    activations += (tl.minimum(chunk, stop - 1) * (32 * UNROLL)).to(tl.int64)
    first = four_words(activations, EMULATED, False)
    second = four_words(activations + 4, EMULATED, False)
    if UNROLL == 2:
        third = four_words(activations + 32, EMULATED, False)
        fourth = four_words(activations + 36, EMULATED, False)
        return first, second, third, fourth
    else:
        return first, second


@triton.jit
def _added(
    sums, rows, held, chunk, stop, levels, table, output, outputs, magic,
    BITS: tl.constexpr, TABLE: tl.constexpr, BFLOAT: tl.constexpr, UNROLL: tl.constexpr, EVEN: tl.constexpr,
    EMULATED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sums of each tile and the product with a chunk of it; a chunk beyond the last counts nothing."""
    nil = tl.zeros_like(sums[0][0])
    c, d = (nil, nil, nil, nil), (nil, nil, nil, nil)
    for m in tl.static_range(4 * UNROLL):
        four = rows[m // 2]
        b = (four[m % 2 * 2].to(tl.int32, bitcast=True), four[m % 2 * 2 + 1].to(tl.int32, bitcast=True))
        a = operands(
            held[0][m // 4], m % 4, magic, held[0][3], levels[0], table, output, outputs, BITS, TABLE, BFLOAT, EMULATED
        )
        c = _times(a, b, c, BFLOAT, EMULATED)
        if TILES == 2:
            a = operands(
                held[1][m // 4], m % 4, magic, held[1][3], levels[1], table, output + 16, outputs, BITS, TABLE, BFLOAT,
                EMULATED,
            )  # fmt: skip
            d = _times(a, b, d, BFLOAT, EMULATED)
    first = _scaled(sums[0], c, held[0][2], chunk < stop, TABLE, EVEN)
    second = first
    if TILES == 2:
        second = _scaled(sums[1], d, held[1][2], chunk < stop, TABLE, EVEN)
    return first, second


@triton.jit
def _scaled(t, c, scales, inside, TABLE: tl.constexpr, EVEN: tl.constexpr):
    """The sums t plus the scales times c."""
    if TABLE:
        f0, f1 = tl.zeros_like(t[0]) + 1.0, tl.zeros_like(t[0]) + 1.0
    else:
        f0, f1 = scales[0].to(tl.float32), scales[1].to(tl.float32)
    if not EVEN:
        f0, f1 = tl.where(inside, f0, 0.0), tl.where(inside, f1, 0.0)
    return t[0] + f0 * c[0], t[1] + f0 * c[1], t[2] + f1 * c[2], t[3] + f1 * c[3]


@triton.jit
def _chunks(
    words, scale, zero, chunk, chunks, stop, lane, output, outputs,
    BITS: tl.constexpr, TABLE: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr, EVEN: tl.constexpr,
    EMULATED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`_chunk` of each tile of a program."""
    first = _chunk(words, scale, zero, chunk, stop, lane, output, outputs, BITS, TABLE, GROUP, UNROLL, EVEN, EMULATED)
    second = first
    if TILES == 2:
        words += chunks.to(tl.int64) * (UNROLL * BITS * 32)
        second = _chunk(
            words, scale, zero, chunk, stop, lane, output + 16, outputs, BITS, TABLE, GROUP, UNROLL, EVEN, EMULATED
        )
    return first, second


@triton.jit
def _over_warps(t0, t1, t2, t3, WARPS: tl.constexpr):
    """float32 [32, 2, 2]: sums over the warps, lane by lane."""
    four = tl.join(tl.join(t0, t1), tl.join(t2, t3))
    return tl.sum(tl.reshape(four, (WARPS, 32, 2, 2)), 0)


@triton.jit(do_not_specialize=["magic", "chunks"])
def fragment_kernel(
    x, words, scale, zero, table, out, rows, outputs, chunks, chunks_per_split, stride_x, magic,
    BITS: tl.constexpr, TABLE: tl.constexpr, BFLOAT: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr,
    EVEN: tl.constexpr, EMULATED: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program: one or two TILES of 16 outputs, eight rows, a split of the input axis. Chunks are UNROLL * 64 inputs.

    GROUP: chunks that share a scale, 0 for all of a row. WARPS: of the program; every tensor is [WARPS * 32]. EVEN:
    outputs fill all tiles, and chunks of a split all warps twice. A single chunk is a number like any other: Triton
    would make it a constant of Python.
    """
    tile, split = tl.program_id(0) * TILES, tl.program_id(2)
    thread = tl.arange(0, WARPS * 32)
    lane, warp = thread % 32, thread // 32
    output = tile * 16 + lane // 4
    # rows past the end read another; what they make is not stored
    row = tl.minimum(tl.program_id(1) * 8 + lane // 4, rows - 1)
    activations = (x + row.to(tl.int64) * stride_x + lane % 4 * 16).to(tl.pointer_type(tl.int32))
    start = split * chunks_per_split
    stop = tl.minimum(start + chunks_per_split, chunks)
    words += tile.to(tl.int64) * chunks * (UNROLL * BITS * 32)
    nil = tl.zeros((WARPS * 32,), tl.float32)
    sums = ((nil, nil, nil, nil), (nil, nil, nil, nil))
    # two chunks are held; as soon as one is multiplied, the one after the other is on its way
    held = _chunks(
        words, scale, zero, start + warp, chunks, stop, lane, output, outputs, BITS, TABLE, GROUP, UNROLL, EVEN,
        EMULATED, TILES,
    )  # fmt: skip
    later = _chunks(
        words, scale, zero, start + WARPS + warp, chunks, stop, lane, output, outputs, BITS, TABLE, GROUP, UNROLL, EVEN,
        EMULATED, TILES,
    )  # fmt: skip
    levels = ((0, 0), (0, 0))
    if TABLE and not EMULATED:
        first = (levels_of(table, output, outputs, BITS, BFLOAT), levels_of(table, output + 8, outputs, BITS, BFLOAT))
        levels = (first, first)
        if TILES == 2:
            at = output + 16
            levels = (
                first,
                (levels_of(table, at, outputs, BITS, BFLOAT), levels_of(table, at + 8, outputs, BITS, BFLOAT)),
            )
    chunk = start + warp
    rows_held = _rows(activations, chunk, stop, UNROLL, EMULATED)
    rows_later = _rows(activations, chunk + WARPS, stop, UNROLL, EMULATED)
    for _ in range(start + 2 * WARPS, stop, 2 * WARPS):
        chunk = _issued(chunk, EMULATED)
        sums = _added(
            sums, rows_held, held, chunk, stop, levels, table, output, outputs, magic, BITS, TABLE, BFLOAT, UNROLL,
            EVEN, EMULATED, TILES,
        )  # fmt: skip
        rows_held = _rows(activations, chunk + 2 * WARPS, stop, UNROLL, EMULATED)
        held = _chunks(
            words, scale, zero, chunk + 2 * WARPS, chunks, stop, lane, output, outputs, BITS, TABLE, GROUP, UNROLL,
            EVEN, EMULATED, TILES,
        )  # fmt: skip
        chunk = _issued(chunk, EMULATED)
        sums = _added(
            sums, rows_later, later, chunk + WARPS, stop, levels, table, output, outputs, magic, BITS, TABLE, BFLOAT,
            UNROLL, EVEN, EMULATED, TILES,
        )  # fmt: skip
        rows_later = _rows(activations, chunk + 3 * WARPS, stop, UNROLL, EMULATED)
        later = _chunks(
            words, scale, zero, chunk + 3 * WARPS, chunks, stop, lane, output, outputs, BITS, TABLE, GROUP, UNROLL,
            EVEN, EMULATED, TILES,
        )  # fmt: skip
        chunk += 2 * WARPS
    sums = _added(
        sums, rows_held, held, chunk, stop, levels, table, output, outputs, magic, BITS, TABLE, BFLOAT, UNROLL, EVEN,
        EMULATED, TILES,
    )  # fmt: skip
    sums = _added(
        sums, rows_later, later, chunk + WARPS, stop, levels, table, output, outputs, magic, BITS, TABLE, BFLOAT,
        UNROLL, EVEN, EMULATED, TILES,
    )  # fmt: skip
    # element [l, r, h]: lane l's output h, row r
    lane = tl.arange(0, 32)[:, None, None]
    odd, upper = tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None, :]
    output = tile * 16 + lane // 4 + 8 * upper
    row = tl.program_id(1) * 8 + lane % 4 * 2 + odd
    place = out + (split * rows + row).to(tl.int64) * outputs + output
    tl.store(place, _over_warps(*sums[0], WARPS), mask=(row < rows) & (output < outputs))
    if TILES == 2:
        tl.store(place + 16, _over_warps(*sums[1], WARPS), mask=(row < rows) & (output + 16 < outputs))


@triton.jit
def _four(low, high):
    """int64: two pairs side by side."""
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit(do_not_specialize=["magic"])
def decode_kernel(
    words, scale, zero, table, out, outputs, chunks, magic,
    BITS: tl.constexpr, TABLE: tl.constexpr, BFLOAT: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr,
    EMULATED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The weight [outputs, inputs] itself, of 16-bit numbers: 16 outputs and a chunk a warp."""
    tile = tl.program_id(0)
    thread = tl.arange(0, WARPS * 32)
    lane, chunk = thread % 32, tl.program_id(1) * WARPS + thread // 32
    inside = chunk < chunks
    chunk = tl.minimum(chunk, chunks - 1)
    output = tile * 16 + lane // 4
    there = (inside & (output < outputs), inside & (output + 8 < outputs))
    nil = tl.zeros((WARPS * 32,), tl.float32)
    zeros, levels, s0, s1 = (output, output), (0, 0), nil, nil
    if TABLE and not EMULATED:
        levels = (levels_of(table, output, outputs, BITS, BFLOAT), levels_of(table, output + 8, outputs, BITS, BFLOAT))
    if not TABLE:
        group = (chunk // GROUP if GROUP else chunk * 0) * outputs + output
        s0 = tl.load(scale + group, mask=there[0], other=0.0).to(tl.float32)
        s1 = tl.load(scale + group + 8, mask=there[1], other=0.0).to(tl.float32)
        zeros = (
            tl.load(zero + group, mask=there[0], other=0).to(tl.int32) * 0x10001,
            tl.load(zero + group + 8, mask=there[1], other=0).to(tl.int32) * 0x10001,
        )
    f0, f1, none = twice(s0, BFLOAT), twice(s1, BFLOAT), twice(nil, BFLOAT)
    inputs = chunks * (UNROLL * 64)
    place = output.to(tl.int64) * inputs + lane % 4 * 16
    out = out.to(tl.pointer_type(tl.int64))
    words += (tile.to(tl.int64) * chunks + chunk) * (UNROLL * BITS * 32)
    for m in tl.static_range(4 * UNROLL):
        w = load_words(words + m // 4 * BITS * 32, lane, BITS, EMULATED)
        a0, a1, a2, a3 = operands(w, m % 4, magic, zeros, levels, table, output, outputs, BITS, TABLE, BFLOAT, EMULATED)
        if not TABLE:
            a0, a2 = rescaled(a0, f0, none, BFLOAT, EMULATED), rescaled(a2, f0, none, BFLOAT, EMULATED)
            a1, a3 = rescaled(a1, f1, none, BFLOAT, EMULATED), rescaled(a3, f1, none, BFLOAT, EMULATED)
        at = (place + chunk * (UNROLL * 64) + m // 4 * 64 + m % 4 * 4) // 4
        tl.store(out + at, _four(a0, a2), mask=there[0])
        tl.store(out + at + 2 * inputs, _four(a1, a3), mask=there[1])
