"""Triton kernels on the matrix units for up to eight rows: weights of 2, 3 or 4 bits, on a grid or with a table.

Codes lie in memory as `kernels.fragments` says, so that each lane decodes its own operands in registers, two to a
32-bit register. Every tensor here has one axis and one element a thread, element 32 w + l in lane l of warp w, whatever
the compiler would otherwise prefer; the matrix product of a warp is an instruction given as such. On a grid, a pair of
codes costs one mask, which also makes them the lower bits of two numbers of known exponent, and one multiply-add, which
takes exponent and zero point off exactly. With a table, bytes of levels are picked out of registers by nibbles.

Products of 16-bit numbers are added in float32. A program's warps share the input axis; their sums are added in a fixed
order, and those of programs that split it once more by `triton_finish`.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The upper bits of a 16-bit number whose lower bits then count in ones: 1024 in float16, 128 in bfloat16, twice each.
MAGIC = {False: 0x64006400, True: 0x43004300}


def configs(tiles: int, chunks: int, processors: int) -> list[triton.Config]:
    """Numbers of warps and splits worth timing."""
    found = []
    for warps in (4, 8):
        for splits in (1, 2, 4):
            if warps * splits > max(chunks, 4) or (splits > 1 and tiles * warps * splits > 48 * processors):
                continue
            for ahead in (False, True):
                found.append(triton.Config({"WARPS": warps, "SPLITS": splits, "AHEAD": ahead}, num_warps=warps))
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
def _low(pair):
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _high(pair):
    return _low(pair >> 16)


@triton.jit
def _product(a, a_later, b, b_later):
    """Emulates half of the instruction: what lane 4 g + q gets of output g, rows 2 q and 2 q + 1, float32."""
    WARPS: tl.constexpr = a.shape[0] // 32
    total = tl.zeros((WARPS, 8, 8), tl.float32)
    for part in tl.static_range(4):
        from_a = a if part < 2 else a_later
        from_b = b if part < 2 else b_later
        value_a = _low(from_a) if part % 2 == 0 else _high(from_a)
        value_b = _low(from_b) if part % 2 == 0 else _high(from_b)
        left = tl.reshape(value_a, (WARPS, 8, 1, 4))
        right = tl.reshape(value_b, (WARPS, 1, 8, 4))
        total += tl.sum(left * right, 3)
    even, odd = tl.split(tl.reshape(total, (WARPS * 32, 2)))
    return even, odd


@triton.jit
def _rescaled(pair, factor, minus, BFLOAT: tl.constexpr, EMULATED: tl.constexpr):
    """Both numbers of a pair times `factor` plus `minus`, each a pair of equal numbers."""
    if EMULATED:
        low = (_low(pair) * _low(factor) + _low(minus)).to(tl.float16).to(tl.int16, bitcast=True)
        high = (_high(pair) * _low(factor) + _low(minus)).to(tl.float16).to(tl.int16, bitcast=True)
        return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    elif BFLOAT:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pair, factor, minus], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [pair, factor, minus], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _twice(value, BFLOAT: tl.constexpr):
    """A pair of the number `value`, float32."""
    if BFLOAT:
        bits = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True)
    return (bits.to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def _pair(w, magic, P: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """Pair P of a lane's words, as the lower bits of two numbers whose upper bits are `magic`."""
    N: tl.constexpr = P // (16 // BITS)
    if N == BITS:  # the pair left over at 3 bits
        value = ((w[0] >> 15) & 0x10001) | ((w[1] >> 14) & 0x20002) | ((w[2] >> 13) & 0x40004)
        return (value | magic.to(tl.uint32)).to(tl.int32, bitcast=True)
    NTH: tl.constexpr = P % (16 // BITS)
    SHARED: tl.constexpr = (7 if BFLOAT else 10) // BITS
    DOWN: tl.constexpr = NTH // SHARED * SHARED * BITS
    value = (w[N] >> DOWN) & (((1 << BITS) - 1) * 0x10001 << NTH % SHARED * BITS)
    return (value | magic.to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def _operand(w, magic, zero, P: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr, EMULATED: tl.constexpr):
    """Pair P of a lane's codes minus the zero point, exactly, as a pair of numbers. zero: float32."""
    N: tl.constexpr = P // (16 // BITS)
    SHARED: tl.constexpr = (7 if BFLOAT else 10) // BITS
    SHIFT: tl.constexpr = 0 if N == BITS else P % (16 // BITS) % SHARED * BITS
    ONE: tl.constexpr = (128.0 if BFLOAT else 1024.0) / (1 << SHIFT)
    factor = _twice(zero * 0.0 + 1.0 / (1 << SHIFT), BFLOAT)
    return _rescaled(_pair(w, magic, P, BITS, BFLOAT), factor, _twice(-(zero + ONE), BFLOAT), BFLOAT, EMULATED)


@triton.jit
def _nibble_word(w, M: tl.constexpr, BITS: tl.constexpr):
    """Eight nibbles, the codes of step M."""
    if BITS == 4:
        return w[M]
    elif BITS == 2:
        return (w[M // 2] >> 2 * (M % 2)) & 0x33333333
    elif M < 3:
        return w[M] & 0x77777777
    else:
        return ((w[0] >> 3) & 0x11111111) | ((w[1] >> 2) & 0x22222222) | ((w[2] >> 1) & 0x44444444)


@triton.jit
def _picked(nibbles, t, BITS: tl.constexpr):
    """Two pairs of the levels that the four lower nibbles choose. t: the levels' bytes, four a register."""
    l0, l1, l2, l3, h0, h1, h2, h3 = t
    if BITS == 4:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 s, t, u, v, lo, hi;
            and.b32 s, $2, 0x7777; shr.u32 t, $2, 1; and.b32 t, t, 0x4444; or.b32 t, t, 0x3210;
            prmt.b32 u, $3, $4, s; prmt.b32 v, $5, $6, s; prmt.b32 lo, u, v, t;
            prmt.b32 u, $7, $8, s; prmt.b32 v, $9, $10, s; prmt.b32 hi, u, v, t;
            prmt.b32 $0, lo, hi, 0x5140; prmt.b32 $1, lo, hi, 0x7362;
            }""",
            "=&r,=&r,r,r,r,r,r,r,r,r,r", [nibbles, l0, l1, l2, l3, h0, h1, h2, h3], dtype=(tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 lo, hi;
            prmt.b32 lo, $3, $4, $2; prmt.b32 hi, $5, $6, $2;
            prmt.b32 $0, lo, hi, 0x5140; prmt.b32 $1, lo, hi, 0x7362;
            }""",
            "=&r,=&r,r,r,r,r,r", [nibbles, l0, l1, h0, h1], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _looked_up(table, nibbles, output, there, outputs):
    """Emulates `_picked`, by loading."""
    pair_0, pair_1 = tl.zeros_like(output), tl.zeros_like(output)
    for v in tl.static_range(4):
        code = (nibbles >> 4 * v & 15).to(tl.int32)
        level = tl.load(table + code * outputs + output, mask=there, other=0.0).to(tl.float16)
        bits = (level.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << 16 * (v % 2)
        if v < 2:
            pair_0 = pair_0 | bits
        else:
            pair_1 = pair_1 | bits
    return pair_0, pair_1


@triton.jit
def _table_bytes(table, output, there, outputs, FIRST: tl.constexpr, LEVELS: tl.constexpr, HIGH: tl.constexpr,
                 BFLOAT: tl.constexpr):  # fmt: skip
    """uint32: the low or HIGH bytes of the levels FIRST to FIRST + 3 of an output."""
    value = tl.zeros_like(output).to(tl.uint32)
    for nth in tl.static_range(4):
        if FIRST + nth < LEVELS:
            level = tl.load(table + (FIRST + nth) * outputs + output, mask=there, other=0.0)
            if BFLOAT:
                bits = level.to(tl.float32).to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
            else:
                bits = level.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            value = value | ((bits >> 8 if HIGH else bits & 255) << 8 * nth)
    return value


@triton.jit
def _levels(table, output, there, outputs, LEVELS: tl.constexpr, BFLOAT: tl.constexpr):
    return (
        _table_bytes(table, output, there, outputs, 0, LEVELS, False, BFLOAT),
        _table_bytes(table, output, there, outputs, 4, LEVELS, False, BFLOAT),
        _table_bytes(table, output, there, outputs, 8, LEVELS, False, BFLOAT),
        _table_bytes(table, output, there, outputs, 12, LEVELS, False, BFLOAT),
        _table_bytes(table, output, there, outputs, 0, LEVELS, True, BFLOAT),
        _table_bytes(table, output, there, outputs, 4, LEVELS, True, BFLOAT),
        _table_bytes(table, output, there, outputs, 8, LEVELS, True, BFLOAT),
        _table_bytes(table, output, there, outputs, 12, LEVELS, True, BFLOAT),
    )


@triton.jit
def _load_words(words, at, BITS: tl.constexpr):
    """A lane's words of a chunk in four places, of which the first BITS are used. at: int64, whose constant parts the
    compiler can leave to the load instruction."""
    return (
        tl.load(words + at).to(tl.uint32, bitcast=True),
        tl.load(words + at + (32 if BITS > 1 else 0)).to(tl.uint32, bitcast=True),
        tl.load(words + at + (64 if BITS > 2 else 0)).to(tl.uint32, bitcast=True),
        tl.load(words + at + (96 if BITS > 3 else 0)).to(tl.uint32, bitcast=True),
    )


@triton.jit
def _first_word(chunk, stop, lane, WORDS: tl.constexpr):
    """int64: where a lane's words of a chunk begin, or of the last one before `stop`."""
    return (tl.minimum(chunk, stop - 1) * (WORDS * 32) + lane).to(tl.int64)


@triton.jit
def _operands(
    w, m: tl.constexpr, magic, zeros, levels, table, output, there, outputs,
    BITS: tl.constexpr, TABLE: tl.constexpr, BFLOAT: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The four registers of weights of step m: outputs g and g + 8 at the first two inputs, then at the next two."""
    if TABLE:
        nibbles = _nibble_word(w, m, BITS)
        if EMULATED:
            a0, a2 = _looked_up(table, nibbles, output, there[0], outputs)
            a1, a3 = _looked_up(table, nibbles >> 16, output + 8, there[1], outputs)
        else:
            a0, a2 = _picked(nibbles, levels[0], BITS)
            a1, a3 = _picked(nibbles >> 16, levels[1], BITS)
        return a0, a1, a2, a3
    else:
        return (
            _operand(w, magic, zeros[0], 4 * m, BITS, BFLOAT, EMULATED),
            _operand(w, magic, zeros[1], 4 * m + 1, BITS, BFLOAT, EMULATED),
            _operand(w, magic, zeros[0], 4 * m + 2, BITS, BFLOAT, EMULATED),
            _operand(w, magic, zeros[1], 4 * m + 3, BITS, BFLOAT, EMULATED),
        )


@triton.jit
def _over_warps(value, WARPS: tl.constexpr):
    """float32 [32]: sums over the warps, lane by lane."""
    return tl.sum(tl.reshape(value, (WARPS, 32)), 0)


@triton.jit(do_not_specialize=["magic"])
def fragment_kernel(
    x, words, scale, zero, table, out, rows, outputs, chunks, chunks_per_split, stride_x, magic,
    BITS: tl.constexpr, TABLE: tl.constexpr, BFLOAT: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr,
    EMULATED: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A program: 16 outputs, eight rows, a split of the input axis. Chunks are UNROLL * 64 inputs.

    GROUP: chunks that share a scale, 0 for all of a row. WARPS: of the program; every tensor is [WARPS * 32].
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    thread = tl.arange(0, WARPS * 32)
    lane, warp = thread % 32, thread // 32
    output = tile * 16 + lane // 4
    there = (output < outputs, output + 8 < outputs)
    # rows past the end read another; what they make is not stored
    row = tl.minimum(tl.program_id(1) * 8 + lane // 4, rows - 1)
    activations = (x + row.to(tl.int64) * stride_x + lane % 4 * 16).to(tl.pointer_type(tl.int64))
    start = split * chunks_per_split
    stop = tl.minimum(start + chunks_per_split, chunks)
    words += tile.to(tl.int64) * chunks * (UNROLL * BITS * 32)
    nil = tl.zeros((WARPS * 32,), tl.float32)
    t0, t1, t2, t3 = nil, nil, nil, nil
    levels = (0, 0)
    if TABLE and not EMULATED:
        levels = (
            _levels(table, output, there[0], outputs, 1 << BITS, BFLOAT),
            _levels(table, output + 8, there[1], outputs, 1 << BITS, BFLOAT),
        )
    at_word = _first_word(start + warp, stop, lane, UNROLL * BITS)
    w, v = _load_words(words, at_word, BITS), _load_words(words, at_word + (UNROLL - 1) * BITS * 32, BITS)
    for at in range(start, stop, WARPS):
        inside = at + warp < stop
        chunk = tl.minimum(at + warp, stop - 1)  # what is read twice counts once: its scale is zero
        if AHEAD:
            next_word = _first_word(at + WARPS + warp, stop, lane, UNROLL * BITS)
            w_next = _load_words(words, next_word, BITS)
            v_next = _load_words(words, next_word + (UNROLL - 1) * BITS * 32, BITS)
        else:
            at_word = _first_word(at + warp, stop, lane, UNROLL * BITS)
            w, v = _load_words(words, at_word, BITS), _load_words(words, at_word + (UNROLL - 1) * BITS * 32, BITS)
        if TABLE:
            zeros = (nil, nil)
            s0, s1 = tl.where(inside, 1.0, 0.0), tl.where(inside, 1.0, 0.0)
        else:
            group = ((chunk // GROUP if GROUP else chunk * 0) * outputs + output).to(tl.int64)
            s0 = tl.load(scale + group, mask=inside & there[0], other=0.0).to(tl.float32)
            s1 = tl.load(scale + group + 8, mask=inside & there[1], other=0.0).to(tl.float32)
            zeros = (
                tl.load(zero + group, mask=there[0], other=0).to(tl.float32),
                tl.load(zero + group + 8, mask=there[1], other=0).to(tl.float32),
            )
        c = (nil, nil, nil, nil)
        for m in tl.static_range(4 * UNROLL):
            four = tl.load(activations + ((chunk * (16 * UNROLL)).to(tl.int64) + (m // 4 * 16 + m % 4)))
            b = (four.to(tl.int32), (four >> 32).to(tl.int32))
            a = _operands(
                w if m < 4 else v, m % 4, magic, zeros, levels, table, output, there, outputs, BITS, TABLE, BFLOAT,
                EMULATED,
            )  # fmt: skip
            c = _times(a, b, c, BFLOAT, EMULATED)
        t0, t1, t2, t3 = t0 + s0 * c[0], t1 + s0 * c[1], t2 + s1 * c[2], t3 + s1 * c[3]
        if AHEAD:
            w, v = w_next, v_next
    lane = tl.arange(0, 32)
    output = tile * 16 + lane // 4
    row = tl.program_id(1) * 8 + lane % 4 * 2
    place = out + (split * rows + row).to(tl.int64) * outputs + output
    tl.store(place, _over_warps(t0, WARPS), mask=(row < rows) & (output < outputs))
    tl.store(place + outputs, _over_warps(t1, WARPS), mask=(row + 1 < rows) & (output < outputs))
    tl.store(place + 8, _over_warps(t2, WARPS), mask=(row < rows) & (output + 8 < outputs))
    tl.store(place + outputs + 8, _over_warps(t3, WARPS), mask=(row + 1 < rows) & (output + 8 < outputs))


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
    zeros, levels, s0, s1 = (nil, nil), (0, 0), nil, nil
    if TABLE and not EMULATED:
        levels = (
            _levels(table, output, there[0], outputs, 1 << BITS, BFLOAT),
            _levels(table, output + 8, there[1], outputs, 1 << BITS, BFLOAT),
        )
    if not TABLE:
        group = (chunk // GROUP if GROUP else chunk * 0) * outputs + output
        s0 = tl.load(scale + group, mask=there[0], other=0.0).to(tl.float32)
        s1 = tl.load(scale + group + 8, mask=there[1], other=0.0).to(tl.float32)
        zeros = (
            tl.load(zero + group, mask=there[0], other=0).to(tl.float32),
            tl.load(zero + group + 8, mask=there[1], other=0).to(tl.float32),
        )
    f0, f1, none = _twice(s0, BFLOAT), _twice(s1, BFLOAT), _twice(nil, BFLOAT)
    inputs = chunks * (UNROLL * 64)
    place = output.to(tl.int64) * inputs + lane % 4 * 16
    out = out.to(tl.pointer_type(tl.int64))
    words += (tile.to(tl.int64) * chunks + chunk) * (UNROLL * BITS * 32) + lane
    for m in tl.static_range(4 * UNROLL):
        w = _load_words(words, m // 4 * BITS * 32, BITS)
        a0, a1, a2, a3 = _operands(
            w, m % 4, magic, zeros, levels, table, output, there, outputs, BITS, TABLE, BFLOAT, EMULATED
        )
        if not TABLE:
            a0, a2 = _rescaled(a0, f0, none, BFLOAT, EMULATED), _rescaled(a2, f0, none, BFLOAT, EMULATED)
            a1, a3 = _rescaled(a1, f1, none, BFLOAT, EMULATED), _rescaled(a3, f1, none, BFLOAT, EMULATED)
        at = (place + chunk * (UNROLL * 64) + m // 4 * 64 + m % 4 * 4) // 4
        tl.store(out + at, _four(a0, a2), mask=there[0])
        tl.store(out + at + 2 * inputs, _four(a1, a3), mask=there[1])
