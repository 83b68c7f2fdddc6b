"""The blocked Cholesky column solver: round one input column, let the columns still to come absorb its error.

GPTQ (Frantar et al., ICLR 2023), algorithm 1 and section 3.3. All rows share one column order, so the inverse Hessians
that greedy OBQ downdates row by row are the rows of a single triangular factor U with U^T U = H^-1. Columns may be
kept in full precision at the end of that order, where they take up the error of all others (OWQ, Lee et al., AAAI
2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format, Params, ParamSpec, PerChannel, PerTensor, Uniform
from fewbits.kernels.available import has_triton
from fewbits.rounding.hessian import panels
from fewbits.rounding.precision import full_float32

if TYPE_CHECKING:
    from fewbits.ranges import Range

ESCALATION = 10.0  # factor on the damping after a failed factorisation
ATTEMPTS = 16


class Solution(NamedTuple):
    """What the solver found; columns are in the order of the weight that came in.

    weight: float32 [out, in] ([batch, out, in]), every entry on its row's or group's grid:
        `weight == decode_columns(fmt, codes, params, group_index)` exactly. Kept columns hold real values instead: the
        original ones plus what they took up of the error of the others.
    codes: integers, shape of the weight; of kept columns the code nearest to zero.
    params: shape [..., out, 1], with groups [..., out, groups]; given params as they came.
    group_index: int64 [..., in], the group of every column, or None without groups. It is j // group_size unless
        act-order or kept columns meet dynamic groups, where a group holds columns that were processed together.
    loss: [] ([batch]), sum of (w - q)^2 / (2 d^2): half of trace((W-Q) H_damped (W-Q)^T) where no column is dead.
    damping: float64 [] ([batch]), the relative damping that worked (larger than asked where a factorisation failed).
    no_data: bool [] ([batch]), H was all zero: plain round-to-nearest of the weight, loss 0.
    """

    weight: Tensor
    codes: Tensor
    params: Params
    group_index: Tensor | None
    loss: Tensor
    damping: Tensor
    no_data: Tensor


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: Format,
    range_: Range | None,
    *,
    group_size: int | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    order_by: Tensor | None = None,
    static_groups: bool = False,
    stale_groups: bool = True,
    kept: Tensor | None = None,
    params: Params | None = None,
    dtype: torch.dtype = torch.float32,
    spend: bool = False,
) -> Solution:
    """Quantize a weight matrix so that its output on the calibration inputs changes least.

    weight: [out, in], or [batch, out, in] to solve several matrices of one shape at once (groups of a convolution,
        experts); any float dtype. hessian: [in, in] ([batch, in, in]), see `HessianAccumulator`. Neither is changed,
        but that with `spend` H's memory may be worked in.
    fmt, range_: the grid and how it is fitted, per row or per row and group of `group_size` consecutive columns (a last
        shorter group is fine). `params` gives a fixed grid instead (a codebook, a shared scale): [out, 1], or
        [out, groups] with group_size ([batch, out, ...] for a batch), or one for the whole weight; wide parameters have
        their axis in front. Nothing is fitted then.
    block_size: columns per lazy batch update; only speed depends on it, unless stale dynamic groups are used.
    damping: added to the diagonal as a share of its mean (0.01). Where the factorisation fails it grows tenfold per
        retry.
    act_order: process columns by descending diagonal of H, or by descending `order_by` ([in] or [batch, in]).
    kept: int64 [k], columns that are never rounded, the same in a whole batch. They come last in the order and take no
        part in fitting a grid; with dynamic groups, groups are made of the other columns.
    static_groups: fit all groups on the incoming weight, by
        original column. Otherwise a group is fitted when the sweep reaches it: with stale_groups on the weights as
        of the start of the block (the published code), else on the fully updated weights.
    dtype: arithmetic of the sweep, float32 (published) or float64.

    Dead inputs (zero diagonal) get weight 0, unless kept, before groups are fitted; per-row grids are fitted before
    that, as published. Raises FewbitsError on wrong shapes, NaN or infinity, or an H no damping can repair.
    """
    w, h = _checked(weight, hessian, dtype, spend)
    if group_size is not None and group_size < 1:
        raise FewbitsError(f"gptq: group_size={group_size}; give a number of columns, or None for one grid per row")
    if block_size < 1 or damping < 0:
        raise FewbitsError(f"gptq: block_size={block_size}, damping={damping}; need block_size >= 1 and damping >= 0")
    batch, out, columns = w.shape
    lead = (batch, out) if weight.ndim == 3 else (out,)
    free = torch.ones(columns, dtype=torch.bool, device=w.device)
    last = _checked_kept(kept, columns, w.device)
    free[last] = False
    grid = _Grid(fmt, range_, group_size, columns, free)
    if params is not None:
        grid.use(params, lead)
    elif group_size is None:
        grid.fit(w)

    diagonal = torch.diagonal(h, dim1=-2, dim2=-1)
    dead = diagonal == 0
    no_data = dead.all(-1)
    # Without any data H becomes the identity, under which the sweep is round-to-nearest of the weight, kept as it is.
    w.masked_fill_((dead & free & ~no_data[:, None])[:, None, :], 0)
    diagonal.add_(dead)
    if params is None and group_size is not None and static_groups:
        grid.fit(w)

    order = back = None
    if act_order or len(last):
        order = _order(diagonal if order_by is None else order_by, free, last, batch, act_order)
        back = order.argsort(dim=-1)
        w = w.gather(2, order[:, None, :].expand_as(w))
        h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None, :].expand_as(h))
    # Columns are the unit of work: laid out as rows, each is one contiguous run over all output rows.
    w = w.transpose(1, 2).contiguous()
    with full_float32(w.device):
        u, used = inverse_factor(h, damping)
        del h
        codes, loss = _sweep(w, u, grid, order, block_size, stale_groups, columns - len(last))
        del u
    q = w.transpose(1, 2).float().contiguous()
    group_index = grid.group_index(back, batch, w.device)
    if back is not None:
        index = back[:, None, :].expand(batch, out, columns)
        q, codes = q.gather(2, index), codes.gather(2, index)
    loss = loss.masked_fill(no_data, 0)
    stored = params if params is not None else grid.stored(lead)
    if weight.ndim == 2:
        q, codes, loss, used, no_data = q[0], codes[0], loss[0], used[0], no_data[0]
        group_index = None if group_index is None else group_index[0]
    return Solution(q, codes, stored, group_index, loss, used, no_data)


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


def inverse_factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper U [batch, n, n] with U^T U = (H + damping mean(diag H) I)^-1, and the damping [batch] that made it
    possible.

    H = R R^T with R upper triangular is an ordinary Cholesky factorisation of H with rows and columns reversed, and U
    is R^-1: the factor of the inverse without ever forming the inverse, which would lose half the digits.
    Only the matrices that fail are retried, with ten times the damping each time. A large matrix on a GPU is factorised
    block by block in its own memory: h is U then.
    """
    if h.is_cuda and h.shape[-1] > _BLOCK:
        return h, torch.stack([_factorise_in_place(one, damping) for one in h])
    batch, n, _ = h.shape
    diagonal = torch.diagonal(h, dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    used = torch.full((batch,), damping, dtype=torch.float64, device=h.device)
    eye = torch.eye(n, dtype=h.dtype, device=h.device)
    u = torch.empty_like(h)
    todo = torch.arange(batch, device=h.device)
    for _ in range(ATTEMPTS):
        shifted = h[todo].flip(-1, -2) + (used[todo].to(h.dtype) * mean[todo])[:, None, None] * eye
        inverse, info = _inverse_of_reversed(shifted, eye)
        good = (info == 0) & torch.isfinite(inverse).all(-1).all(-1)
        u[todo[good]] = inverse[good]
        todo = todo[~good]
        if not len(todo):
            return u, used
        used[todo] = _escalated(used[todo], h)
    raise _unfactorisable(used)


def _inverse_of_reversed(reversed_: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """U [..., n, n] and the factorisation's error codes [...], from H with its rows and columns in reverse order."""
    factor, info = torch.linalg.cholesky_ex(reversed_)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False).flip(-1, -2), info


def _escalated(used: Tensor, h: Tensor) -> Tensor:
    """The damping to try after these."""
    return torch.clamp(used * ESCALATION, min=torch.finfo(h.dtype).eps * h.shape[-1])


def _unfactorisable(used: Tensor) -> FewbitsError:
    return FewbitsError(
        f"gptq: H cannot be factorised even with damping {used.max().item():.1e}; it is not a Gram matrix of "
        "finite inputs"
    )


_BLOCK = 2048  # columns that the library's own factorisation gets at once


def _factorise_in_place(h: Tensor, damping: float) -> Tensor:
    """Turn one large H [n, n] into U; returns the damping that made it possible, float64 [].

    Blocks below the diagonal ones keep H until U is found, so that an attempt that fails can start anew.
    """
    parts = panels(len(h), _BLOCK)
    blocks = [h[start:stop, start:stop].clone() for start, stop in parts]
    mean = h.diagonal().mean()
    used = torch.full((), damping, dtype=torch.float64, device=h.device)
    for attempt in range(ATTEMPTS):
        for (start, stop), block in zip(parts, blocks, strict=True):
            h[start:stop, start:stop] = block
            if attempt:
                h[:start, start:stop] = h[start:stop, :start].T
        h.diagonal().add_(used.to(h.dtype) * mean)
        failed: list[Tensor] = []
        _invert_blocks(h, failed)
        if not bool(torch.stack(failed).any()):
            for start, stop in parts:
                h[start:stop, :start] = 0
            return used
        used = _escalated(used, h)
    raise _unfactorisable(used)


def _invert_blocks(h: Tensor, failed: list[Tensor]) -> None:
    """On and above the diagonal blocks of h [n, n], put U in place of H; lower blocks are neither read nor written.

    With H = [[A, B], [B^T, C]] and R = [[P, Q], [0, S]]: S S^T = C, Q = B S^-T, P P^T = A - Q Q^T, and
    R^-1 = [[P^-1, -P^-1 Q S^-1], [0, S^-1]]. `failed` gets a flag for each diagonal block.
    """
    size = len(h)
    if size <= _BLOCK:
        inverse, info = _inverse_of_reversed(h.flip(-1, -2), torch.eye(size, dtype=h.dtype, device=h.device))
        failed.append((info != 0) | ~torch.isfinite(inverse).all())
        h.copy_(inverse)
        return
    split = (size // 2 + _BLOCK - 1) // _BLOCK * _BLOCK
    head, tail, side = h[:split, :split], h[split:, split:], h[:split, split:]
    _invert_blocks(tail, failed)
    side.copy_(side @ tail.triu().T)  # lower blocks still hold H
    for start, stop in panels(split, _BLOCK):
        head[:stop, start:stop].addmm_(side[:stop], side[start:stop].T, alpha=-1)
    _invert_blocks(head, failed)
    product = (side @ tail.triu()).neg_()
    torch.mm(head.triu(), product, out=side)


def _checked(weight: Tensor, hessian: Tensor, dtype: torch.dtype, spend: bool) -> tuple[Tensor, Tensor]:
    """Copies [batch, out, in] and [batch, in, in] in the solve's dtype, private but for an H that may be spent."""
    columns = weight.shape[-1] if weight.ndim else 0
    if weight.ndim not in (2, 3) or hessian.shape != (*weight.shape[:-2], columns, columns) or not weight.numel():
        raise FewbitsError(
            f"gptq: weight {tuple(weight.shape)} and H {tuple(hessian.shape)} do not fit; "
            "expected [out, in] with [in, in], or [batch, out, in] with [batch, in, in], none of them empty"
        )
    w = weight.detach().to(dtype, copy=True)
    h = hessian.detach().to(device=w.device, dtype=dtype, copy=not spend)
    for name, value in (("weight", w), ("H", h)):
        # The extremes of a tensor that holds NaN are NaN; finding them takes no memory of its size.
        if not bool(torch.stack(torch.aminmax(value)).isfinite().all()):
            raise FewbitsError(
                f"gptq: {name} holds NaN or infinity; check the model and the calibration data in float32"
            )
    return (w, h) if weight.ndim == 3 else (w[None], h[None])


def _checked_kept(kept: Tensor | None, columns: int, device: torch.device) -> Tensor:
    """Indices of the kept columns, int64 [k], empty where there are none."""
    if kept is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    last = kept.detach().to(device=device, dtype=torch.int64)
    inside = last.ndim == 1 and (not len(last) or (int(last.min()) >= 0 and int(last.max()) < columns))
    if not inside or len(last.unique()) != len(last):
        raise FewbitsError(f"gptq: kept columns must be distinct indices of {columns} columns, got {kept.tolist()}")
    return last


def _order(by: Tensor, free: Tensor, last: Tensor, batch: int, sort: bool) -> Tensor:
    """The columns in the order they are processed in [batch, in]: those that are rounded, then the kept ones."""
    columns = len(free)
    if by.shape not in ((columns,), (batch, columns)):
        raise FewbitsError(f"gptq: order_by of shape {tuple(by.shape)} does not rank {columns} columns")
    rest = free.nonzero().squeeze(1)
    first = rest.expand(batch, -1)
    if sort:
        ranks = by.detach().to(free.device).expand(batch, -1)[:, rest]
        first = rest[ranks.argsort(dim=-1, descending=True, stable=True)]
    return torch.cat([first, last.expand(batch, -1)], 1)


def _sweep(
    w: Tensor, u: Tensor, grid: _Grid, order: Tensor | None, block_size: int, stale: bool, stop_at: int
) -> tuple[Tensor, Tensor]:
    """Round the first `stop_at` columns of w [batch, in, out] in order, in place; the others only take up error.

    Returns codes [batch, out, in] and the loss [batch].
    """
    batch, columns, out = w.shape
    codes = torch.zeros(w.shape, dtype=grid.fmt.code_dtype, device=w.device)
    loss = w.new_zeros(batch)
    fused = fuses(grid.fmt, w)
    for start in range(0, stop_at, block_size):
        end = min(start + block_size, stop_at)
        solve = _solve_block if fused and grid.known(start, end, stale) else _walk_block
        errors = solve(w, codes, u, grid, order, start, end, stale, stop_at)
        loss += errors.square().sum((1, 2)) / 2
        w[:, end:].baddbmm_(u[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    if grid.table is None and not grid.grown:  # every column is kept
        grid.grow(w.new_zeros(batch, out, 1))
    for at in range(stop_at, columns):
        nothing = w.new_zeros(batch * out, 1)
        codes[:, at] = grid.fmt.encode(nothing, grid.column(at, order, out)).view(batch, out)
    return codes.transpose(1, 2).contiguous(), loss


def _walk_block(
    w: Tensor, codes: Tensor, u: Tensor, grid: _Grid, order: Tensor | None, start: int, end: int, stale: bool,
    stop_at: int,
) -> Tensor:  # fmt: skip
    """Round columns start to end of w [batch, in, out], one after another, on any grid.

    They and their codes are put in place. Returns the errors [batch, columns, out] over the factor's diagonal.
    """
    batch, _, out = w.shape
    block = w[:, start:end].clone()
    rounded, errors = torch.empty_like(block), torch.empty_like(block)
    for i in range(end - start):
        at = start + i
        if grid.starts_group(at):
            stop = min(at + grid.width, stop_at)
            if stale:
                fresh = w[:, at:stop]
            else:
                # Columns past this block still lack the block's errors: bring just those up to date.
                beyond = w[:, end:stop] - u[:, start:at, end:stop].transpose(1, 2) @ errors[:, :i]
                fresh = torch.cat([block[:, i : stop - start], beyond], 1)
            grid.grow(fresh.transpose(1, 2))
        params = grid.column(at, order, out)
        column = block[:, i].reshape(-1, 1)
        code = grid.fmt.encode(column, params)
        q = grid.fmt.decode(code, params)
        error = (column - q).view(batch, out) / u[:, at, at, None]
        block[:, i + 1 :].addcmul_(u[:, at, at + 1 : end, None], error[:, None, :], value=-1)
        errors[:, i] = error
        rounded[:, i] = q.view(batch, out)
        codes[:, at] = code.view(batch, out)
    w[:, start:end] = rounded
    return errors


def _solve_block(
    w: Tensor, codes: Tensor, u: Tensor, grid: _Grid, order: Tensor | None, start: int, end: int, stale: bool,
    stop_at: int,
) -> Tensor:  # fmt: skip
    """As `_walk_block`, in one kernel, for uniform grids whose parameters do not wait for the block."""
    from fewbits.kernels.triton_gptq import solve_block

    scale, zero, which = grid.block(w, order, start, end, stop_at)
    fmt = grid.fmt
    assert isinstance(fmt, Uniform)
    return solve_block(w, codes, u[:, start:end, start:end], scale, zero, which, start, fmt.q_min, fmt.q_max)


def fuses(fmt: Format, w: Tensor) -> bool:
    """Whether a weight is solved block by block in one kernel: on a GPU, in float32, on a plain uniform grid."""
    if type(fmt) is not Uniform or w.dtype != torch.float32 or not w.is_cuda:
        return False
    plain = fmt.rounding == "half_even" and fmt.order == "round_then_shift" and not fmt.fractional
    return plain and has_triton()


def _is_whole(value: Tensor, spec: ParamSpec) -> bool:
    """Whether a parameter is one for the whole weight; wide parameters have their axis in front either way."""
    return value.ndim == (spec.width > 1)


class _Grid:
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

    def starts_group(self, at: int) -> bool:
        return self.table is None and at % self.width == 0

    def known(self, start: int, end: int, stale: bool) -> bool:
        """Whether no parameter of these columns waits for a column of the same block to be rounded."""
        return self.table is not None or stale or not any(self.starts_group(at) for at in range(start + 1, end))

    def grow(self, w: Tensor) -> None:
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
