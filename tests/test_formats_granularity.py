"""Granularities: what belongs to which block, and that nothing loops over blocks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fewbits.errors import FewbitsError
from fewbits.formats import (
    Granularity,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    PerToken,
    granularity_from_dict,
    quantize,
    symmetric,
)
from fewbits.ranges import MinMax
from formats_cases import FORMATS, GRANULARITIES

quick = settings(max_examples=60, deadline=None)


def test_param_shapes() -> None:
    conv, acts = (6, 4, 3, 3), (2, 5, 8)
    assert PerTensor().param_shape(conv) == ()
    assert PerChannel(0).param_shape(conv) == (6, 1, 1, 1)
    assert PerChannel(1).param_shape(conv) == (1, 4, 1, 1)
    assert PerChannel(-1).param_shape(acts) == (1, 1, 8)
    assert PerToken().param_shape(acts) == (2, 5, 1)
    assert PerToken(1).param_shape(conv) == (6, 1, 3, 3)
    assert PerHead(1).param_shape((2, 3, 5, 8)) == (1, 3, 1, 1)
    assert PerHead(-1, heads=4).param_shape(acts) == (1, 1, 4)
    assert PerGroup(4).param_shape((6, 10)) == (6, 3)
    assert PerGroup(128).param_shape((6, 10)) == (6, 1)
    assert PerGroup(3, axis=0).param_shape((7, 2)) == (3, 2)
    assert PerGroup(10, rows=True).param_shape(conv) == (6, 4)
    assert PerGroup(4).count((6, 10)) == 18


@st.composite
def placed(draw: st.DrawFn) -> tuple[Granularity, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    heads = draw(st.sampled_from([d for d in range(1, 8) if shape[axis] % d == 0]))
    size = draw(st.integers(1, 9))
    chosen: Granularity = draw(
        st.sampled_from(
            [
                PerTensor(),
                PerChannel(axis),
                PerToken(axis),
                PerHead(axis),
                PerHead(axis, heads),
                PerGroup(size, axis),
                PerGroup(size, rows=True),
            ]
        )
    )
    return chosen, shape


@given(placed())
@quick
def test_blocks_expand_and_assemble_agree(case: tuple[Granularity, tuple[int, ...]]) -> None:
    """Numbering the blocks in param shape and expanding labels each value; grouping by label gives back the blocks."""
    gran, shape = case
    count = math.prod(gran.param_shape(shape))
    labels = gran.expand(torch.arange(count).reshape(gran.param_shape(shape)), shape).expand(shape)
    # each row that `blocks` gives carries one label, all values are there, and assembling the labels numbers the blocks
    rows = gran.blocks(labels)
    assert all(bool((row == row[:, :1]).all()) for row in rows)
    assert sum(row.numel() for row in rows) == math.prod(shape)
    assert torch.equal(gran.assemble([row[:, 0] for row in rows], shape).flatten(), torch.arange(count))
    # leading axes survive both ways
    wide = gran.assemble([torch.stack([row[:, 0], -row[:, 0]]) for row in rows], shape)
    assert wide.shape == (2, *gran.param_shape(shape))
    assert torch.equal(gran.expand(wide, shape)[1].expand(shape), -labels)


@given(placed(), st.integers(0, 1000))
@quick
def test_reduce_is_exact(case: tuple[Granularity, tuple[int, ...]], seed: int) -> None:
    gran, shape = case
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    top = gran.reduce(x, lambda block: block.amax(dim=1))
    count = math.prod(gran.param_shape(shape))
    labels = gran.expand(torch.arange(count).reshape(gran.param_shape(shape)), shape).expand(shape).flatten()
    expected = torch.full((count,), -torch.inf).scatter_reduce(0, labels, x.flatten(), "amax")
    assert torch.equal(top, expected.reshape(gran.param_shape(shape)))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(FewbitsError, match="axis 3"):
        PerChannel(3).param_shape((2, 2))
    with pytest.raises(FewbitsError, match="heads"):
        PerHead(-1, heads=3).param_shape((2, 8))
    with pytest.raises(FewbitsError, match="does not fit"):
        PerChannel(0).expand(torch.ones(3, 1), (4, 5))
    with pytest.raises(FewbitsError, match="size"):
        PerGroup(0)
    for data in ({"kind": "group", "size": 0}, {"kind": "row"}, {"kind": "channel", "axes": 1}, "channel"):
        with pytest.raises(FewbitsError):
            granularity_from_dict(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("gran", [*GRANULARITIES.values(), PerGroup(7, rows=True), PerHead(2)])
def test_description_round_trip(gran: Granularity) -> None:
    assert granularity_from_dict(json.loads(json.dumps(gran.to_dict()))) == gran


def test_ragged_group_is_fitted_on_its_own_values() -> None:
    x = torch.cat([torch.ones(2, 8), torch.full((2, 2), 0.25)], dim=1)
    params = MinMax().fit(x, symmetric(4), PerGroup(4))
    assert torch.equal(params["scale"], torch.tensor([[1.0, 1.0, 0.25]] * 2) / 7)
    assert torch.equal(quantize(x, symmetric(4), PerGroup(4), params), x)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("gran", GRANULARITIES.values(), ids=GRANULARITIES.keys())
def test_work_does_not_depend_on_the_number_of_blocks(fmt, gran) -> None:  # type: ignore[no-untyped-def]
    counts = []
    for size in (8, 64):
        x = torch.randn(size, size)
        with _Count() as count:
            quantize(x, fmt, gran, MinMax().fit(x, fmt, gran))
        counts.append(count.calls)
    assert counts[0] == counts[1]
