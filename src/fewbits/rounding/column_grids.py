"""Which grid a column of a weight matrix is rounded on: one per row, one per row and group of columns, or a given one.

Groups are fitted before the solver's sweep over the columns, or when it reaches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format, Params, ParamSpec, PerChannel, PerTensor

if TYPE_CHECKING:
    from fewbits.ranges import Range


def decode_columns(fmt: Format, codes: Tensor, params: Params, group_index: Tensor | None) -> Tensor:
    """The weight that a `Solution`'s codes stand for, float32, shape of the codes."""
    return fmt.decode(codes, spread_columns(fmt, params, group_index, codes.shape))


def spread_columns(fmt: Format, params: Params, group_index: Tensor | None, shape: Sequence[int]) -> Params:
    """A `Solution`'s params so that they broadcast against its codes, of `shape`."""
    spread = {}
    for spec in fmt.param_specs():
        value = params[spec.name]
        if _is_whole(value, spec):
            spread[spec.name] = PerTensor().expand(value, shape)
        elif group_index is None:
            spread[spec.name] = value
        else:
            index = group_index.unsqueeze(-2).expand(tuple(shape))
            spread[spec.name] = value.gather(-1, index.expand(*value.shape[:-1], -1))
    return spread


class ColumnGrids:
    """Which grid a column is rounded on. The rows of all batch entries are stacked: [batch * out] of them.

    `table` holds grids known before the sweep, [..., rows, groups] per parameter (or one for the whole weight); `grown`
    those fitted during it, one [..., rows, 1] per group in processing order. `free` tells the columns that are rounded.
    """

    def __init__(self, fmt: Format, range_: Range | None, width: int | None, columns: int, free: Tensor) -> None:
        self.fmt, self.range = fmt, range_
        self.width = width or columns
        self.grouped = width is not None
        self.columns = columns
        self.free = free
        self.table: Params | None = None
        self.grown: list[Params] = []

    def use(self, params: Params, lead: tuple[int, ...]) -> None:
        """Take fixed params of a weight whose rows have the axes `lead`."""
        self.fmt.check_params(params, "gptq")
        expected = (*lead, -(-self.columns // self.width))
        table = {}
        for spec in self.fmt.param_specs():
            value = params[spec.name]
            whole = _is_whole(value, spec)
            if not whole and value.shape[-len(expected) :] != expected:
                raise FewbitsError(
                    f"gptq: params[{spec.name!r}] has shape {tuple(value.shape)}; a weight with {self.columns} columns "
                    f"in groups of {self.width} needs [..., {', '.join(map(str, expected))}]"
                )
            table[spec.name] = value if whole else value.flatten(-len(expected), -2)
        self.table = table

    def fit(self, w: Tensor) -> None:
        """Fit every group on the columns of w [batch, out, in] that are rounded, now."""
        parts = zip(w.split(self.width, dim=2), self.free.split(self.width), strict=True)
        self.table = self._join(
            [
                self._fit(part[:, :, free] if bool(free.any()) else torch.zeros_like(part[:, :, :1]))
                for part, free in parts
            ]
        )

    @property
    def fitted(self) -> bool:
        """Whether there is any grid yet."""
        return self.table is not None or bool(self.grown)

    def starts_group(self, at: int) -> bool:
        """Whether a group that is still to be fitted begins at place `at` of the order."""
        return self.table is None and at % self.width == 0

    def known(self, start: int, end: int, stale: bool) -> bool:
        """Whether no parameter of these columns waits for a column of the same block to be rounded."""
        return self.table is not None or stale or not any(self.starts_group(at) for at in range(start + 1, end))

    def grow(self, w: Tensor) -> None:
        """Fit the next group on its columns of w [batch, out, columns]."""
        self.grown.append(self._fit(w))

    def column(self, at: int, order: Tensor | None, out: int) -> Params:
        """Params that broadcast against [rows, 1], of the column processed at place `at`."""
        current = self.grown[-1] if self.table is None else self.table
        return {
            spec.name: PerTensor().expand(value, (1, 1))
            if _is_whole(value := current[spec.name], spec)
            else self._pick(value, at, order, out)
            for spec in self.fmt.param_specs()
        }

    def block(
        self, w: Tensor, order: Tensor | None, start: int, end: int, stop_at: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and zero point of a uniform grid for columns start to end of w [batch, in, out], all groups fitted now.

        Returns two float32 [batch, groups, out] and which group is each column's, int32 [batch, columns].
        """
        batch, _, out = w.shape
        first = start // self.width
        places = torch.arange(start, end, device=w.device).expand(batch, -1)
        if self.table is None:
            held = [] if self.starts_group(start) else [self.grown[-1]]
            for at in range(start, end):
                if self.starts_group(at):
                    self.grow(w[:, at : min(at + self.width, stop_at)].transpose(1, 2))
                    held.append(self.grown[-1])
            which = places // self.width - first
        elif order is None:
            last = (end - 1) // self.width + 1
            held = [{name: self._groups(name, slice(first, last)) for name in self.table}]
            which = places // self.width - first
        else:
            held = [self.table]
            which = order[:, start:end] // self.width
        found = []
        for name in ("scale", "zero_point"):
            values = [params[name] for params in held] if name in held[0] else [torch.zeros((), device=w.device)]
            whole = values[0].ndim == 0
            one = values[0].expand(batch * out, 1) if whole else torch.cat(values, -1)
            found.append(one.view(batch, out, -1).transpose(1, 2))
        groups = max(value.shape[1] for value in found)
        scale, zero = (value.expand(-1, groups, -1).contiguous() for value in found)
        return scale, zero, which.to(torch.int32).contiguous()

    def _groups(self, name: str, groups: slice) -> Tensor:
        """A known parameter of some groups [rows, groups], or the one of the whole weight."""
        assert self.table is not None
        value = self.table[name]
        return value if value.ndim == 0 else value[..., groups]

    def _pick(self, value: Tensor, at: int, order: Tensor | None, out: int) -> Tensor:
        if self.table is None or not self.grouped:
            return value
        if order is None:
            group = at // self.width
            return value[..., group : group + 1]
        # Every batch entry has its own order, so its rows may meet another group at the same place.
        group_of_row = (order[:, at] // self.width).repeat_interleave(out)
        rows = torch.arange(len(group_of_row), device=group_of_row.device)
        return value[..., rows, group_of_row].unsqueeze(-1)

    def group_index(self, back: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """Group of every original column [batch, in]; `back` is the place at which each was processed."""
        if not self.grouped:
            return None
        places = torch.arange(self.columns, device=device).expand(batch, -1)
        if back is not None and self.table is None:
            places = back
        groups = places // self.width
        return groups if self.table is not None else groups.clamp_max(len(self.grown) - 1)

    def stored(self, lead: tuple[int, ...]) -> Params:
        """Params with the rows unstacked: [..., out, groups] or [..., batch, out, groups]."""
        table = self.table if self.table is not None else self._join(self.grown)
        return {
            spec.name: value if _is_whole(value := table[spec.name], spec) else value.unflatten(-2, lead)
            for spec in self.fmt.param_specs()
        }

    def _fit(self, w: Tensor) -> Params:
        if self.range is None:
            raise FewbitsError("gptq: give a range to fit the grid with, or fixed params")
        return self.range.fit(w.flatten(0, 1), self.fmt, PerChannel(0), check=False)

    def _join(self, groups: list[Params]) -> Params:
        joined = {}
        for spec in self.fmt.param_specs():
            values = [group[spec.name] for group in groups]
            if not _is_whole(values[0], spec):
                joined[spec.name] = torch.cat(values, -1)
                continue
            if not all(torch.equal(values[0], value) for value in values[1:]):
                raise FewbitsError(
                    f"gptq: {spec.name} of {self.fmt.kind} is one per tensor and cannot be fitted per group"
                )
            joined[spec.name] = values[0]
        return joined


def _is_whole(value: Tensor, spec: ParamSpec) -> bool:
    """Whether a parameter is one for the whole weight; wide parameters have their axis in front either way."""
    return value.ndim == (spec.width > 1)
