"""Packing is exact for every width and length, and refuses what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.formats import pack_codes, packing, symmetric, unpack_codes


@given(bits=st.integers(1, 16), shape=st.lists(st.integers(0, 9), min_size=0, max_size=3), seed=st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_round_trip(bits: int, shape: list[int], seed: int) -> None:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-codes.numel() * bits // 8)
    back = unpack_codes(packed, bits, shape)
    assert back.shape == codes.shape and torch.equal(back.int(), codes)
    assert back.dtype == (torch.uint8 if bits <= 8 else torch.int16 if bits <= 15 else torch.int32)
    # the bit string, written out
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes.flatten().tolist())
    text += "0" * (-len(text) % 8)
    assert packed.tolist() == [int(text[at : at + 8][::-1], 2) for at in range(0, len(text), 8)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_codes(bits: int) -> None:
    fmt = symmetric(bits, narrow=False)
    codes = torch.arange(fmt.code_min, fmt.code_max + 1, dtype=torch.int8)
    packed = pack_codes(codes, fmt.code_bits, offset=fmt.code_min)
    back = unpack_codes(packed, fmt.code_bits, codes.shape, offset=fmt.code_min)
    assert back.dtype == torch.int8 and torch.equal(back, codes)


def test_chunks_meet_on_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (1003,), generator=torch.Generator().manual_seed(0))
    whole = pack_codes(codes, 3)
    monkeypatch.setattr(packing, "_CHUNK", 64)
    assert torch.equal(pack_codes(codes, 3), whole)
    assert torch.equal(unpack_codes(whole, 3, codes.shape), codes.to(torch.uint8))


def test_refusals() -> None:
    for codes, bits in (
        (torch.tensor([8]), 3),
        (torch.tensor([-1]), 3),
        (torch.tensor([1.0]), 3),
        (torch.tensor([1]), 17),
    ):
        with pytest.raises(FewbitsError):
            pack_codes(codes, bits)
    packed = pack_codes(torch.tensor([1, 2, 3]), 3)
    for bad in (packed[:1], packed.float(), packed.reshape(1, -1)):
        with pytest.raises(FewbitsError, match="must be 2 bytes"):
            unpack_codes(bad, 3, (3,))
