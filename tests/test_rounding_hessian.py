"""The Hessian as a running mean, and convolution patches against the convolution itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.rounding import HessianAccumulator, conv_patches, weight_matrix


def hessian(x: torch.Tensor) -> torch.Tensor:
    rows = x.double().flatten(0, -2)
    return 2 / len(x) * rows.T @ rows


def test_any_split_and_merge_equals_the_whole() -> None:
    x = torch.randn(9, 5, 6)
    whole, parts, left, right = (HessianAccumulator(6) for _ in range(4))
    whole.add(x)
    for part in x.split([1, 4, 4]):
        parts.add(part)
    left.add(x[:2])
    right.add(x[2:])
    left.merge(right)
    for accumulator in (whole, parts, left):
        assert accumulator.samples == 9
        torch.testing.assert_close(accumulator.value, hessian(x).float(), rtol=1e-5, atol=1e-6)
    empty = HessianAccumulator(6)
    empty.merge(HessianAccumulator(6))
    assert empty.samples == 0 and (empty.value == 0).all()
    empty.merge(whole)
    assert torch.equal(empty.value, whole.value)


def test_counts_samples_and_not_tokens() -> None:
    x = torch.randn(4, 10, 6)
    one, twice, windows = HessianAccumulator(6), HessianAccumulator(6), HessianAccumulator(6)
    one.add(x)
    twice.add(torch.cat([x, x], 1))
    windows.add(x.reshape(8, 5, 6), samples=4)
    torch.testing.assert_close(twice.value, 2 * one.value)
    torch.testing.assert_close(windows.value, one.value)
    # samples none of whose tokens reached this layer still count
    windows.add(x.new_zeros(0, 6), samples=4)
    torch.testing.assert_close(windows.value, one.value / 2)


def test_half_inputs_are_accumulated_in_float32_or_better() -> None:
    x = (torch.randn(64, 200, 4) + 30).half()
    single, double = HessianAccumulator(4), HessianAccumulator(4, dtype=torch.float64)
    for sample in x.split(1):
        single.add(sample)
        double.add(sample)
    torch.testing.assert_close(double.value, hessian(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(single.value.double(), hessian(x), rtol=1e-5, atol=0)
    assert single.value.dtype == torch.float32


def test_says_how_products_were_added_up() -> None:
    single, double = HessianAccumulator(4), HessianAccumulator(4, dtype=torch.float64)
    single.add(torch.randn(0, 7, 4))
    assert single.arithmetic == set(), "nothing was added"
    for accumulator in (single, double):
        accumulator.add(torch.randn(2, 3, 4).half())
    assert single.arithmetic == {"float32"} and double.arithmetic == {"float64"}
    single.merge(double)
    assert single.arithmetic == {"float32", "float64"} and double.arithmetic == {"float64"}


def test_bad_inputs() -> None:
    accumulator = HessianAccumulator(4)
    with pytest.raises(FewbitsError, match="expected"):
        accumulator.add(torch.randn(2, 5))
    with pytest.raises(FewbitsError, match="samples=0"):
        accumulator.add(torch.randn(2, 4), samples=0)
    accumulator.add(torch.randn(0, 7, 4))
    assert accumulator.samples == 0
    accumulator.add(torch.tensor([[1.0, torch.nan, 0.0, 0.0]]))
    with pytest.raises(FewbitsError, match="NaN"):
        _ = accumulator.value
    with pytest.raises(FewbitsError, match="merge"):
        accumulator.merge(HessianAccumulator(5))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_patches_times_the_flat_weight_is_the_convolution(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    stride = [data.draw(st.integers(1, 2)) for _ in range(dims)]
    dilation = [data.draw(st.integers(1, 2)) for _ in range(dims)]
    padding = data.draw(st.sampled_from(["same", "valid", 0, 1, [i % 2 + 1 for i in range(dims)]]))
    if padding == "same":
        stride = [1] * dims
    x = torch.randn(2, 4, *[data.draw(st.integers(5, 7)) for _ in range(dims)])
    weight = torch.randn(8, 4 // groups, *kernel)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    expected = conv(x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    patches = conv_patches(x, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    found = patches @ weight_matrix(weight, groups).transpose(-1, -2)  # [N, (groups,) positions, out/groups]
    found = found.transpose(-1, -2).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_grouped_accumulator_holds_one_matrix_per_group() -> None:
    x = torch.randn(3, 6, 8, 8)
    patches = conv_patches(x, (3, 3), padding=1, groups=3)
    grouped = HessianAccumulator(18, groups=3)
    grouped.add(patches[:1])
    grouped.add(patches[1:])
    assert grouped.value.shape == (3, 18, 18)
    for g in range(3):
        torch.testing.assert_close(grouped.value[g], hessian(patches[:, g]).float(), rtol=1e-4, atol=1e-4)
