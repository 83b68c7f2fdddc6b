"""What a lane of the matrix kernels holds of a weight: its words, read whole, and the pairs of numbers they stand for.

Codes lie in memory as `kernels.fragments` says. On a grid, a pair of codes costs one mask, which also makes them the
lower bits of two numbers of known exponent, and one multiply-add, which takes exponent and zero point off exactly. With
a table, bytes of levels are picked out of registers by nibbles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low(pair):
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high(pair):
    return low(pair >> 16)


@triton.jit
def rescaled(pair, factor, minus, BFLOAT: tl.constexpr, EMULATED: tl.constexpr):
    """Both numbers of a pair times `factor` plus `minus`, each a pair of equal numbers."""
    if EMULATED:
        lower = (low(pair) * low(factor) + low(minus)).to(tl.float16).to(tl.int16, bitcast=True)
        upper = (high(pair) * low(factor) + low(minus)).to(tl.float16).to(tl.int16, bitcast=True)
        return (lower.to(tl.int32) & 0xFFFF) | (upper.to(tl.int32) << 16)
    elif BFLOAT:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pair, factor, minus], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [pair, factor, minus], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def twice(value, BFLOAT: tl.constexpr):
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
def _operand(w, magic, zeros, P: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr, EMULATED: tl.constexpr):
    """Pair P of a lane's codes minus the zero point, exactly, as a pair of numbers. zeros: the zero point, twice.

    A code shifted left by S, below the exponent of the magic number, is the number 2^M + 2^S code. Times 2^-S that is
    2^(M - S) + code, and what has to go, 2^(M - S) + zero, has the same form: its bits are put together too.
    """
    N: tl.constexpr = P // (16 // BITS)
    SHARED: tl.constexpr = (7 if BFLOAT else 10) // BITS
    SHIFT: tl.constexpr = 0 if N == BITS else P % (16 // BITS) % SHARED * BITS
    ONE: tl.constexpr = (0x3F80 if BFLOAT else 0x3C00) - SHIFT * (128 if BFLOAT else 1024)
    LESS: tl.constexpr = (0xC300 if BFLOAT else 0xE400) - SHIFT * (128 if BFLOAT else 1024)
    factor = zeros * 0 + ONE * 0x10001
    minus = (zeros << SHIFT) + (LESS * 0x10001 - 0x100000000)
    return rescaled(_pair(w, magic, P, BITS, BFLOAT), factor, minus, BFLOAT, EMULATED)


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
def _looked_up(table, nibbles, output, outputs, BITS: tl.constexpr):
    """Emulates `_picked`, by loading."""
    pair_0, pair_1 = tl.zeros_like(output), tl.zeros_like(output)
    for v in tl.static_range(4):
        code = (nibbles >> 4 * v & 15).to(tl.int32)
        level = tl.load(table + (tl.minimum(output, outputs - 1) << BITS) + code).to(tl.float16)
        bits = (level.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << 16 * (v % 2)
        if v < 2:
            pair_0 = pair_0 | bits
        else:
            pair_1 = pair_1 | bits
    return pair_0, pair_1


@triton.jit
def four_words(pointer, EMULATED: tl.constexpr, KNOWN: tl.constexpr):
    """uint32 of four neighbours in memory, 16 bytes at once. KNOWN: nothing writes there while the kernel runs."""
    if EMULATED:
        return (
            tl.load(pointer).to(tl.uint32, bitcast=True), tl.load(pointer + 1).to(tl.uint32, bitcast=True),
            tl.load(pointer + 2).to(tl.uint32, bitcast=True), tl.load(pointer + 3).to(tl.uint32, bitcast=True),
        )  # fmt: skip
    elif KNOWN:
        return tl.inline_asm_elementwise(
            "ld.global.L1::no_allocate.v4.b32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,l", [pointer.to(tl.int64)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,l", [pointer.to(tl.int64)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _two_words(pointer, EMULATED: tl.constexpr):
    """uint32 of two neighbours in memory, 8 bytes at once, where nothing writes while the kernel runs."""
    if EMULATED:
        return tl.load(pointer).to(tl.uint32, bitcast=True), tl.load(pointer + 1).to(tl.uint32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.L1::no_allocate.v2.b32 {$0,$1}, [$2];", "=r,=r,l", [pointer.to(tl.int64)],
            dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def load_words(words, lane, BITS: tl.constexpr, EMULATED: tl.constexpr):
    """A lane's words of the chunk that begins at `words`, in four places of which the first BITS are used."""
    if BITS == 4:
        return four_words(words + lane * 4, EMULATED, True)
    first, second = _two_words(words + lane * 2, EMULATED)
    third = second
    if BITS == 3:
        third = tl.load(words + 64 + lane).to(tl.uint32, bitcast=True)
    return first, second, third, third


@triton.jit
def _bytes_apart(a, b, c, d, BFLOAT: tl.constexpr):
    """The low and the high bytes of eight levels, four a register: low, low, high, high. a to d: pairs of float16."""
    if BFLOAT:
        a, b, c, d = _rounded(a), _rounded(b), _rounded(c), _rounded(d)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $4, $5, 0x6420; prmt.b32 $1, $6, $7, 0x6420; prmt.b32 $2, $4, $5, 0x7531; "
        "prmt.b32 $3, $6, $7, 0x7531;",
        "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _rounded(pair):
    """A pair of float16 as one of bfloat16."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 l, h; .reg .f32 a, b;
        mov.b32 {l, h}, $1; cvt.f32.f16 a, l; cvt.f32.f16 b, h; cvt.rn.bf16x2.f32 $0, b, a;
        }""",
        "=r,r", [pair], dtype=tl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def levels_of(table, output, outputs, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """The levels' bytes of an output as `_picked` wants them. table: [outputs, 2^BITS]."""
    row = table + (tl.minimum(output, outputs - 1) * (1 << BITS)).to(tl.int64)
    row = row.to(tl.pointer_type(tl.int32))
    if BITS == 2:
        a, b = _two_words(row, False)
        l0, l1, h0, h1 = _bytes_apart(a, b, a, b, BFLOAT)
        return l0, l1, l0, l1, h0, h1, h0, h1
    a, b, c, d = four_words(row, False, True)
    l0, l1, h0, h1 = _bytes_apart(a, b, c, d, BFLOAT)
    if BITS == 3:
        return l0, l1, l0, l1, h0, h1, h0, h1
    a, b, c, d = four_words(row + 4, False, True)
    l2, l3, h2, h3 = _bytes_apart(a, b, c, d, BFLOAT)
    return l0, l1, l2, l3, h0, h1, h2, h3


@triton.jit
def operands(
    w, m: tl.constexpr, magic, zeros, levels, table, output, outputs,
    BITS: tl.constexpr, TABLE: tl.constexpr, BFLOAT: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The four registers of weights of step m: outputs g and g + 8 at the first two inputs, then at the next two."""
    if TABLE:
        nibbles = _nibble_word(w, m, BITS)
        if EMULATED:
            a0, a2 = _looked_up(table, nibbles, output, outputs, BITS)
            a1, a3 = _looked_up(table, nibbles >> 16, output + 8, outputs, BITS)
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


@triton.constexpr_function
def shift(m: int, h: int, bits: int, bfloat: bool) -> int:
    """By how many bits codes of step m and output g + 8 h stay shifted in `raw_operands`; it depends on m % 2 alone.

    One number an output and parity of steps, so that what they add up to can be scaled; as many bits as leave the
    fewest shifts to do, in a mantissa of 10 bits or, in bfloat16, 7 beside the 1 in front.
    """
    if bfloat:
        return 2 * h if bits == 2 else 0
    if bits == 4:
        return 4 * h
    if bits == 3:
        return 3 * h if m % 2 == 0 else 3 - 3 * h
    return 2 * h if m % 2 == 0 else 8 - 2 * h


@triton.constexpr_function
def unit(h: int, bits: int, bfloat: bool) -> float:
    """What a code's unit is of a sum over the even steps of `raw_operands`, for output g + 8 h."""
    return 2.0 ** ((0 if bfloat else 24) - shift(0, h, bits, bfloat))


@triton.constexpr_function
def odd(h: int, bits: int, bfloat: bool) -> float:
    """A sum over the odd steps in the unit of the even ones."""
    return 2.0 ** (shift(0, h, bits, bfloat) - shift(1, h, bits, bfloat))


@triton.jit
def _raw_pair(w, magic, P: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """Pair P of a lane's codes, shifted left by S, as the lower bits of two numbers."""
    N: tl.constexpr = P // (16 // BITS)
    if N == BITS:  # the pair left over at 3 bits
        value = ((w[0] >> 15) & 0x10001) | ((w[1] >> 14) & 0x20002) | ((w[2] >> 13) & 0x40004)
    else:
        DOWN: tl.constexpr = P % (16 // BITS) * BITS - S
        value = (w[N] >> DOWN) & (((1 << BITS) - 1) * 0x10001 << S)
    if BFLOAT:
        value = value | magic.to(tl.uint32)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def raw_operands(w, m: tl.constexpr, magic, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """The four registers of weights of step m as in `operands`, but without zero point and in units of their own.

    float16: the number of bits b is 2^-24 b where it is below 1024, and matrix units take such numbers as they are. So
    a masked code is a number, 2^(shift - 24) times the code. bfloat16's are too small to be multiplied; with the bits
    of 128 above it, a code is 128 + 2^shift times the code.
    """
    LOWER: tl.constexpr = shift(m, 0, BITS, BFLOAT)
    UPPER: tl.constexpr = shift(m, 1, BITS, BFLOAT)
    return (
        _raw_pair(w, magic, 4 * m, LOWER, BITS, BFLOAT), _raw_pair(w, magic, 4 * m + 1, UPPER, BITS, BFLOAT),
        _raw_pair(w, magic, 4 * m + 2, LOWER, BITS, BFLOAT), _raw_pair(w, magic, 4 * m + 3, UPPER, BITS, BFLOAT),
    )  # fmt: skip
