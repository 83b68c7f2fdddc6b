"""From a quantized weight to what the kernels read: unsigned codes, scales or a table, and what lies beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.export.layers import Layer
from fewbits.formats import Uniform
from fewbits.kernels.words import RUN
from fewbits.outliers.parts import Columns, Sparse

#: Levels that a table may have.
TABLE_LEVELS = 16
#: Largest relative change of a number that is stored in 16 bits.
HALF_ERROR = 2.0**-10
#: Largest change of a level stored in 16 bits, as a part of its row's largest: a level near zero may change by more of
#: itself than others, for it is added to products with those.
LEVEL_ERROR = 2.0**-20


class NotPackable(Exception):
    """The reason why a weight has no packed form."""


@dataclass
class KernelWeight:
    """A weight [out, in] as kernels read it; see `kernels.ops.packed_matmul` for what the tensors mean.

    codes: uint8 [out, in], columns in the kernel's order. order: int64 [in], the model's column at each place, or None
    where they are the same. `index` and `places` count columns in the kernel's order. integer_zero: all zero points
    are whole numbers.
    """

    codes: Tensor
    bits: int
    group: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    table: Tensor | None = None
    order: Tensor | None = None
    index: Tensor | None = None
    columns: Tensor | None = None
    starts: Tensor | None = None
    places: Tensor | None = None
    entries: Tensor | None = None

    @property
    def extras(self) -> bool:
        """Whether there is more than codes on a grid in the model's order."""
        return any(held is not None for held in (self.order, self.index, self.starts))

    @property
    def small(self) -> bool:
        """Whether zero points are whole numbers of a code's size, and levels 16-bit numbers."""
        if self.table is not None:
            return self.table.dtype == torch.float16
        zero = self.zero
        return zero is not None and self.integer_zero and bool(((zero >= 0) & (zero < 1 << self.bits)).all())

    @property
    def integer_zero(self) -> bool:
        return self.zero is not None and bool((self.zero == self.zero.round()).all())


def kernel_weight(layer: Layer, dtype: torch.dtype) -> KernelWeight:
    """The kernels' form of a weight in a model of type `dtype`. Raises `NotPackable` with the reason.

    Scales, levels and parts are float32; beside 16-bit activations float16, where that changes none of them by more
    than 2^-10 of itself, or of a level 2^-20 of the largest in its row. Zero points are uint8 where they are whole
    numbers of a byte.
    """
    fmt = layer.quantizer.spec.format
    if isinstance(fmt, Uniform) and not fmt.fractional and fmt.bits <= 8:
        made = _uniform(layer)
    else:
        made = _table(layer)
    _lay_over(layer, made)
    small = dtype in (torch.float16, torch.bfloat16)
    for name in ("scale", "table", "columns", "entries"):
        held = getattr(made, name)
        if held is not None and small:
            least = LEVEL_ERROR * held.abs().amax(0) if name == "table" else 0.0
            setattr(made, name, _half(held, least))
    if made.zero is not None and made.integer_zero and 0 <= int(made.zero.min()) <= int(made.zero.max()) <= 255:
        made.zero = made.zero.to(torch.uint8)
    return made


def _half(value: Tensor, least: Tensor | float) -> Tensor:
    """`value` in 16 bits; as it is where that would change a number by more than HALF_ERROR of it and than `least`."""
    kept = value.half()
    error = (kept.float() - value).abs()
    return kept if bool(((error <= HALF_ERROR * value.abs()) | (error <= least)).all()) else value


def _uniform(layer: Layer) -> KernelWeight:
    codes, zero = layer.unsigned()
    scale, _ = layer.scales()
    inputs = codes.shape[1]
    grain = layer.quantizer.spec.granularity.kind
    if grain not in ("tensor", "channel", "group") or getattr(layer.quantizer.spec.granularity, "axis", 0) not in (
        0,
        -1,
        1,
    ):
        raise NotPackable(f"kernels know scales per row or per group of columns, not per {grain}")
    group = min(layer.group_size or inputs, inputs)
    order = None
    if layer.group_index is not None:
        order, codes = _ordered(layer.group_index.cpu(), group, codes)
    if group < inputs and group % RUN:
        raise NotPackable(f"kernels take groups of a multiple of {RUN} columns, not of {group}")
    return KernelWeight(
        codes, layer.uniform.bits, group, scale.T.contiguous().cpu(), zero.T.contiguous().cpu(), order=order
    )


def _ordered(group_of: Tensor, group: int, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The order that puts the columns of each group side by side, and the codes in it."""
    order = torch.argsort(group_of, stable=True)
    if not torch.equal(group_of[order], torch.arange(len(order)) // group):
        raise NotPackable("its groups have different numbers of columns")
    return order, codes[:, order].contiguous()


def _table(layer: Layer) -> KernelWeight:
    """Any grid of few levels that is the same along a row: the levels are what its codes decode to."""
    quantizer, codes = layer.quantizer, layer.codes
    fmt, grain = quantizer.spec.format, quantizer.spec.granularity
    if fmt.levels > TABLE_LEVELS:
        raise NotPackable(f"its {fmt.kind} grid has {fmt.levels} levels; tables hold {TABLE_LEVELS}")
    if layer.group_index is not None or grain.kind not in ("tensor", "channel") or getattr(grain, "axis", 0) != 0:
        raise NotPackable(
            f"a {fmt.kind} grid is packed with one table a row, not with parameters per {grain.describe()}"
        )
    bits = fmt.code_bits
    every = torch.arange(fmt.code_min, fmt.code_max + 1, device=next(iter(quantizer.params.values())).device)
    levels = quantizer.decode(every.expand(codes.shape[0], -1)).float().cpu()
    table = torch.zeros(1 << bits, codes.shape[0])
    table[: levels.shape[1]] = levels.T
    moved = (codes.to(torch.int32) - fmt.code_min).to(torch.uint8)
    return KernelWeight(moved, bits, codes.shape[1], table=table)


def _lay_over(layer: Layer, made: KernelWeight) -> None:
    """The parts beside the codes, net of what the codes decode to."""
    kinds = [part.kind for part in layer.parts]
    if kinds not in ([], ["columns"], ["sparse"], ["columns", "sparse"]):
        raise NotPackable(f"kernels lay over a grid columns, then a sparse part; here {', '.join(kinds)}")
    inputs = layer.codes.shape[1]
    place = torch.arange(inputs)
    if made.order is not None:
        place = torch.empty_like(made.order)
        place[made.order] = torch.arange(inputs)
    for part in layer.parts:
        if isinstance(part, Columns) and len(part.index):
            index = place[part.index]
            made.index = index
            made.columns = (part.values.float() - _grid_columns(made, index)).T.contiguous()
        elif isinstance(part, Sparse) and len(part.values):
            made.starts, made.entries = part.rows, part.values.float()
            made.places = place[part.columns.long()].to(torch.int32)


def _grid_columns(made: KernelWeight, index: Tensor) -> Tensor:
    """What the codes alone put into the columns `index`, float32 [out, kept]."""
    codes = made.codes[:, index]
    if made.table is not None:
        return made.table.T.gather(1, codes.long())
    assert made.scale is not None and made.zero is not None
    group = index // made.group
    return (codes.float() - made.zero.T[:, group]) * made.scale.T[:, group]
