"""Packed codes in the order in which a GPU's matrix units take them.

A warp multiplies 16 outputs with 16 inputs at a time, and each of its 32 lanes supplies eight of these weights. Words
in that order go from memory into the lane that needs them, with nothing exchanged; see `triton_fragments`.

Output 16 t + 8 h + g and input 64 c + 16 q + 4 m + v belong to tile t and chunk c, to lane 4 g + q, and to its step m;
h < 2, g < 8, q < 4, m < 4, v < 4. Within a lane's `bits` words of a chunk the codes lie in pairs or in nibbles:

- pairs, for codes that are shifted into a number: the codes of v = 2 u and 2 u + 1 lie 16 bits apart, so that one mask
  takes out both. Pair 4 m + 2 u + h is one of the 16 // bits pairs of a word. At 3 bits a sixteenth pair is left over:
  its bits lie in bits 15 and 31 of the three words.
- nibbles, for codes that choose a level: nibble 4 h + v of word m. At 2 bits two steps share a word; at 3 bits the
  codes of step 3 lie in the upper bits of the nibbles of the three words.

The words of a chunk lie in memory so that a lane loads 8 or 16 bytes at once: two or four words of a lane side by side,
lane after lane; at 3 bits the third words of all lanes follow the first two of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

OUTPUTS, CHUNK, LANES = 16, 64, 32
BITS = (2, 3, 4)
#: How many of a lane's words lie side by side, by bits.
SIDE_BY_SIDE = {2: [2], 3: [2, 1], 4: [4]}


def pack_fragments(codes: Tensor, bits: int, *, nibbles: bool) -> Tensor:
    """codes [out, in], integers below 2^bits -> int32 words [ceil(out / 16), in / 64, 32 bits].

    Missing outputs of the last tile are filled with code 0. Raises FewbitsError unless bits is 2, 3 or 4 and `in` a
    multiple of 64.
    """
    outputs, inputs = codes.shape
    if bits not in BITS or inputs % CHUNK:
        raise FewbitsError(f"fragments hold 2, 3 or 4 bits and multiples of {CHUNK} inputs, not {bits} and {inputs}")
    tiles, chunks = -(-outputs // OUTPUTS), inputs // CHUNK
    filled = torch.zeros(tiles * OUTPUTS, inputs, dtype=torch.int64, device=codes.device)
    filled[:outputs] = codes
    # [t, h, g, c, q, m, v] -> [t, c, lane, m, h, v]
    code = filled.view(tiles, 2, 8, chunks, 4, 4, 4).permute(0, 3, 2, 4, 5, 1, 6).reshape(tiles, chunks, LANES, 4, 2, 4)
    words = code.new_zeros(tiles, chunks, bits, LANES)
    for word, bit, source, taken in _places(bits, nibbles):
        words[:, :, word] |= ((code[(..., *source)] >> taken.start) & ((1 << len(taken)) - 1)) << bit
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return torch.cat([part.transpose(-1, -2).flatten(-2) for part in words.split(SIDE_BY_SIDE[bits], 2)], -1)


def unpack_fragments(words: Tensor, bits: int, outputs: int, *, nibbles: bool) -> Tensor:
    """int32 words of `pack_fragments` -> codes uint8 [outputs, in]."""
    tiles, chunks = words.shape[:2]
    parts = words.split([LANES * count for count in SIDE_BY_SIDE[bits]], -1)
    word = torch.cat([part.unflatten(-1, (LANES, -1)).transpose(-1, -2) for part in parts], 2).long() & 0xFFFFFFFF
    code = word.new_zeros(tiles, chunks, LANES, 4, 2, 4)
    for at, bit, source, taken in _places(bits, nibbles):
        code[(..., *source)] |= ((word[:, :, at] >> bit) & ((1 << len(taken)) - 1)) << taken.start
    code = code.view(tiles, chunks, 8, 4, 4, 2, 4).permute(0, 5, 2, 1, 3, 4, 6)
    return code.reshape(tiles * OUTPUTS, chunks * CHUNK)[:outputs].to(torch.uint8).contiguous()


def _places(bits: int, nibbles: bool) -> list[tuple[int, int, tuple[int, int, int], range]]:
    """(word, bit, (m, h, v), which bits of the code lie there) of everything in a lane's words."""
    found = []
    for m in range(4):
        for h in range(2):
            for v in range(4):
                if nibbles:
                    spread, word, bit = bits == 3 and m == 3, m * bits // 4, 4 * (4 * h + v) + m * bits % 4
                    if bits == 3:
                        word, bit = m, 4 * (4 * h + v)
                    lone = 4 * (4 * h + v) + 3
                else:
                    pair = 4 * m + 2 * (v // 2) + h
                    word, nth = divmod(pair, 16 // bits)
                    bit, lone = nth * bits + 16 * (v % 2), 15 + 16 * (v % 2)
                    spread = word == bits
                if spread:
                    found += [(n, lone, (m, h, v), range(n, n + 1)) for n in range(3)]
                else:
                    found.append((word, bit, (m, h, v), range(bits)))
    return found
