"""Triton kernels for few rows: each row of activations times a weight of packed codes, on a grid or with a table.

y[m, n] = sum_k x[m, k] * (code[n, k] - zero[g(k), n]) * scale[g(k), n], or sum_k x[m, k] * table[code[n, k], n].

For shapes and types that `triton_fragments` does not take. Such a product is bound by memory, and where codes are small
then by the integer pipe of a GPU, so that instructions a code are what counts. Everything is unrolled over the 32 codes
of a run, in tiles [runs, outputs] of which a thread holds four neighbouring outputs: one load of 16 bytes a word, and
every activation serves four codes.

On a grid, a code costs one mask and one fused multiply-add in float32. Masked out of its word, it becomes the upper
mantissa of a float32 between 1 and 2, without conversion; the 1 and the zero point are taken off for a whole run. With
a table, bytes are picked out of registers that hold the levels (`prmt`), four codes an instruction.

Sums are float32 in a fixed order: a split of the input axis goes through a workspace [splits, m, n] that
`triton_finish` adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbits.kernels.triton_words import load_words


def configs(outputs: int, runs: int, processors: int) -> list[triton.Config]:
    """Tilings worth timing for a weight of so many outputs and runs: enough warps a processor to hide its memory."""
    found = []
    for block, tall, warps in ((32, 64, 16), (32, 64, 8), (64, 32, 16), (32, 32, 8), (64, 16, 4), (128, 8, 4)):
        for splits in (1, 2, 4, 8):
            work = triton.cdiv(outputs, block) * splits * warps
            least, most = 6 * processors, 48 * processors
            if splits == 1 or (runs >= splits * tall and work <= most and work < 2 * splits * least):
                found.append(triton.Config({"RUNS": tall, "BLOCK_N": block, "SPLITS": splits}, num_warps=warps))
    return found


@triton.jit
def _activation(row, run, C: tl.constexpr, KIND: tl.constexpr):
    """float32 [runs]: activation number C of each run. KIND: 0 float16, 1 bfloat16, 2 float32.

    16-bit activations are read in fours; the compiler joins equal loads.
    """
    if KIND == 2:
        return tl.load(row + run * 32 + C)
    four = tl.load(row.to(tl.pointer_type(tl.int64)) + run * 8 + C // 4)
    two = (four >> (32 * (C % 4 // 2))).to(tl.int32)
    if KIND == 1:
        return (two << 16 if C % 2 == 0 else two & -65536).to(tl.float32, bitcast=True)
    else:
        return (two >> (16 * (C % 2))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _mantissa(w, one, BIT: tl.constexpr, WORD: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    """float32 1 + code * 2^(STEP - 23) of the code that begins at bit BIT of word WORD and may run over into the next.

    one: the bits of 1.0f. Only as a number that the compiler does not know does it join the mask in one instruction.
    """
    SHIFT: tl.constexpr = STEP - BIT
    value = w[WORD] << SHIFT if SHIFT >= 0 else w[WORD] >> -SHIFT
    if BIT + BITS > 32:
        value = value | (w[WORD + 1] << 32 + SHIFT)
    return ((value & (((1 << BITS) - 1) << STEP)) | one.to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def _add_code(sums, w, x, one, C: tl.constexpr, BITS: tl.constexpr, SHARED: tl.constexpr, LOW: tl.constexpr):
    """Add code C of every run, times its activation, to the products and the sums of activations of its place.

    As many codes of a word as fit the upper twelve bits of a mantissa, SHARED, are used at the places where one shift
    of the word puts them. Lower places would lose precision when the 1 is taken off.
    """
    p0, p1, p2, s0, s1, s2 = sums
    WORD: tl.constexpr = C * BITS // 32
    BIT: tl.constexpr = C * BITS % 32
    FIRST: tl.constexpr = (WORD * 32 + BITS - 1) // BITS  # the first code that begins in this word
    NTH: tl.constexpr = 0 if BIT + BITS > 32 else (C - FIRST) % SHARED
    product = x[:, None] * _mantissa(w, one, BIT, WORD, LOW + NTH * BITS, BITS)
    if NTH == 0:
        return p0 + product, p1, p2, s0 + x, s1, s2
    elif NTH == 1:
        return p0, p1 + product, p2, s0, s1 + x, s2
    else:
        return p0, p1, p2 + product, s0, s1, s2 + x


@triton.jit
def _scaled(sums, step, offset, BITS: tl.constexpr, SHARED: tl.constexpr, LOW: tl.constexpr):
    """float32 [runs, outputs]: what the sums of `_add_code` over a run come to on the grid."""
    p0, p1, p2, s0, s1, s2 = sums
    total, taken = (p0 - s0[:, None]) * 2.0 ** (23 - LOW), s0
    if SHARED > 1:
        total, taken = total + (p1 - s1[:, None]) * 2.0 ** (23 - LOW - BITS), taken + s1
    if SHARED > 2:
        total, taken = total + (p2 - s2[:, None]) * 2.0 ** (23 - LOW - 2 * BITS), taken + s2
    return step * (total - offset * taken[:, None])


@triton.jit
def _grid(scale, zero, run, column, inside, outputs, GROUP: tl.constexpr):
    """Scales and zero points of runs, float32 [runs, outputs]; 0 where not `inside`."""
    group = (run // GROUP if GROUP else run * 0)[:, None] * outputs + column[None, :]
    step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    return step, tl.load(zero + group, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["one"])
def grid_kernel(
    x, words, scale, zero, out, outputs, runs, runs_per_split, stride_x, rows, one,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x: rows of `runs` * 32 activations, 8 bytes aligned. GROUP: runs that share a scale, 0 for all of a row.

    EVEN: BLOCK_N divides the outputs.
    """
    SHARED: tl.constexpr = 1 if BITS > 6 else (2 if BITS > 4 else 3)
    LOW: tl.constexpr = 23 - SHARED * BITS
    row, split = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (column < outputs) | EVEN
    start = split * runs_per_split
    stop = tl.minimum(start + runs_per_split, runs)
    acc = tl.zeros((RUNS, BLOCK_N), tl.float32)
    none, nil = acc, tl.zeros((RUNS,), tl.float32)
    for at in range(start, stop, RUNS):
        asked = at + tl.arange(0, RUNS)
        run = tl.minimum(asked, stop - 1)  # what is read twice counts once: its scale is zero
        inside = (asked < stop)[:, None] & there[None, :]
        w = load_words(words, run, column, inside, outputs, BITS)
        step, offset = _grid(scale, zero, run, column, inside, outputs, GROUP)
        sums = (none, none, none, nil, nil, nil)
        for c in tl.static_range(32):
            sums = _add_code(sums, w, _activation(x + row * stride_x, run, c, KIND), one, c, BITS, SHARED, LOW)
        acc += _scaled(sums, step, offset, BITS, SHARED, LOW)
    tl.store(out + (split * rows + row).to(tl.int64) * outputs + column, tl.sum(acc, 0), mask=column < outputs)


@triton.jit
def _nibbles(w, EIGHT: tl.constexpr, BITS: tl.constexpr):
    """uint32 [runs, outputs]: codes 8 EIGHT to 8 EIGHT + 7 of each run, four bits apart. BITS: at most 4."""
    WORD: tl.constexpr = EIGHT * 8 * BITS // 32
    BIT: tl.constexpr = EIGHT * 8 * BITS % 32
    value = w[WORD] >> BIT
    if BIT + 8 * BITS > 32:
        value = value | (w[WORD + 1] << 32 - BIT)
    if BITS < 4:  # halves, quarters and codes apart, each by what is missing to nibbles
        LOOSE: tl.constexpr = 4 - BITS
        FOUR: tl.constexpr = (1 << 4 * BITS) - 1
        value = (value & FOUR) | ((value & FOUR << 4 * BITS) << 4 * LOOSE)
        TWO: tl.constexpr = ((1 << 2 * BITS) - 1) * 0x10001
        value = (value & TWO) | ((value & TWO << 2 * BITS) << 2 * LOOSE)
        ONE: tl.constexpr = ((1 << BITS) - 1) * 0x1010101
        value = (value & ONE) | ((value & ONE << BITS) << LOOSE)
    return value


@triton.jit
def _bytes(table, column, there, outputs, FIRST: tl.constexpr, LEVELS: tl.constexpr, HIGH: tl.constexpr):
    """uint32 [1, outputs]: the low or HIGH bytes of the float16 levels FIRST to FIRST + 3."""
    value = tl.zeros_like(column).to(tl.uint32)
    for nth in tl.static_range(4):
        if FIRST + nth < LEVELS:
            level = tl.load(table + (FIRST + nth) * outputs + column, mask=there, other=0.0)
            level = level.to(tl.uint16, bitcast=True).to(tl.uint32)
            value = value | ((level >> 8 if HIGH else level & 255) << 8 * nth)
    return value[None, :]


#: Eight levels by eight nibbles, for up to 8 and up to 16 levels, out of registers that hold four bytes each.
PICK_8 = tl.constexpr("""{
.reg .b32 s, lo, hi, p; .reg .b16 a, b;
and.b32 s, $8, 0x7777; prmt.b32 lo, $9, $10, s; prmt.b32 hi, $13, $14, s;
prmt.b32 p, lo, hi, 0x5140; mov.b32 {a, b}, p; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;
prmt.b32 p, lo, hi, 0x7362; mov.b32 {a, b}, p; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b;
shr.u32 s, $8, 16; and.b32 s, s, 0x7777; prmt.b32 lo, $9, $10, s; prmt.b32 hi, $13, $14, s;
prmt.b32 p, lo, hi, 0x5140; mov.b32 {a, b}, p; cvt.f32.f16 $4, a; cvt.f32.f16 $5, b;
prmt.b32 p, lo, hi, 0x7362; mov.b32 {a, b}, p; cvt.f32.f16 $6, a; cvt.f32.f16 $7, b;
}""")
PICK_16 = tl.constexpr("""{
.reg .b32 n, s, t, u, v, lo, hi, p; .reg .b16 a, b;
and.b32 s, $8, 0x7777; shr.u32 t, $8, 1; and.b32 t, t, 0x4444; or.b32 t, t, 0x3210;
prmt.b32 u, $9, $10, s; prmt.b32 v, $11, $12, s; prmt.b32 lo, u, v, t;
prmt.b32 u, $13, $14, s; prmt.b32 v, $15, $16, s; prmt.b32 hi, u, v, t;
prmt.b32 p, lo, hi, 0x5140; mov.b32 {a, b}, p; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;
prmt.b32 p, lo, hi, 0x7362; mov.b32 {a, b}, p; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b;
shr.u32 n, $8, 16; and.b32 s, n, 0x7777; shr.u32 t, n, 1; and.b32 t, t, 0x4444; or.b32 t, t, 0x3210;
prmt.b32 u, $9, $10, s; prmt.b32 v, $11, $12, s; prmt.b32 lo, u, v, t;
prmt.b32 u, $13, $14, s; prmt.b32 v, $15, $16, s; prmt.b32 hi, u, v, t;
prmt.b32 p, lo, hi, 0x5140; mov.b32 {a, b}, p; cvt.f32.f16 $4, a; cvt.f32.f16 $5, b;
prmt.b32 p, lo, hi, 0x7362; mov.b32 {a, b}, p; cvt.f32.f16 $6, a; cvt.f32.f16 $7, b;
}""")


@triton.jit
def _levels(nibbles, levels, BITS: tl.constexpr):
    """Eight float32 [runs, outputs]: the levels that eight nibbles name."""
    l0, l1, l2, l3, h0, h1, h2, h3 = levels
    return tl.inline_asm_elementwise(
        PICK_16 if BITS == 4 else PICK_8,
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r,r,r,r,r",
        [nibbles, l0, l1, l2, l3, h0, h1, h2, h3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def table_kernel(
    x, words, table, out, outputs, runs, runs_per_split, stride_x, rows,
    BITS: tl.constexpr, KIND: tl.constexpr, PICK: tl.constexpr, EVEN: tl.constexpr, RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `grid_kernel`. BITS: at most 4. PICK: levels are float16 and picked out of registers; else they are loaded."""
    row, split = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (column < outputs) | EVEN
    start = split * runs_per_split
    stop = tl.minimum(start + runs_per_split, runs)
    acc = tl.zeros((RUNS, BLOCK_N), tl.float32)
    if PICK:
        levels = (
            _bytes(table, column, there, outputs, 0, 1 << BITS, False),
            _bytes(table, column, there, outputs, 4, 1 << BITS, False),
            _bytes(table, column, there, outputs, 8, 1 << BITS, False),
            _bytes(table, column, there, outputs, 12, 1 << BITS, False),
            _bytes(table, column, there, outputs, 0, 1 << BITS, True),
            _bytes(table, column, there, outputs, 4, 1 << BITS, True),
            _bytes(table, column, there, outputs, 8, 1 << BITS, True),
            _bytes(table, column, there, outputs, 12, 1 << BITS, True),
        )
    for at in range(start, stop, RUNS):
        asked = at + tl.arange(0, RUNS)
        run = tl.minimum(asked, stop - 1)
        inside = (asked < stop)[:, None] & there[None, :]
        w = load_words(words, run, column, inside, outputs, BITS)
        total = tl.zeros((RUNS, BLOCK_N), tl.float32)
        for eight in tl.static_range(4):
            nibbles = _nibbles(w, eight, BITS)
            if PICK:
                values = _levels(nibbles, levels, BITS)
            for nth in tl.static_range(8):
                taken = _activation(x + row * stride_x, run, eight * 8 + nth, KIND)
                if PICK:
                    value = values[nth]
                else:
                    place = (nibbles >> 4 * nth & 15).to(tl.int32) * outputs + column[None, :]
                    value = tl.load(table + place, mask=inside, other=0.0).to(tl.float32)
                total += taken[:, None] * value
        acc += tl.where((asked < stop)[:, None], total, 0.0)  # the last run may have been read again
    tl.store(out + (split * rows + row).to(tl.int64) * outputs + column, tl.sum(acc, 0), mask=column < outputs)
