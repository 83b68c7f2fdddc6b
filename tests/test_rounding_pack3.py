from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.kernels.pack3 import pack3, unpack3


@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 10**6))
def test_packing_is_exact(out: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 8, (out, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack3(codes)
    assert words.dtype == torch.int32 and words.shape == (-(-columns // 32) * 3, out)
    assert torch.equal(unpack3(words, columns), codes)


def test_each_code_takes_its_three_bits_of_a_96_bit_number() -> None:
    for k in range(32):
        codes = torch.zeros(1, 32, dtype=torch.uint8)
        codes[0, k] = 7
        number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(pack3(codes)[:, 0].tolist()))
        assert number == 7 << (3 * k)


@pytest.mark.parametrize(
    "codes", [torch.full((1, 32), 8), torch.full((1, 32), -1), torch.ones(1, 32), torch.ones(32).int()]
)
def test_anything_but_three_bit_codes_is_refused(codes: torch.Tensor) -> None:
    with pytest.raises(FewbitsError, match="pack3"):
        pack3(codes)


def test_wrong_word_count_is_refused() -> None:
    with pytest.raises(FewbitsError, match="unpack3"):
        unpack3(torch.zeros(3, 2, dtype=torch.int32), 33)
