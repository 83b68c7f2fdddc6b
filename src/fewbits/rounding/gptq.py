"""The blocked Cholesky column solver: round one input column, let the columns still to come absorb its error.

GPTQ (Frantar et al., ICLR 2023), algorithm 1 and section 3.3. All rows share one column order, so the inverse Hessians
that greedy OBQ downdates row by row are the rows of a single triangular factor U with U^T U = H^-1. Columns may be
kept in full precision at the end of that order, where they take up the error of all others (OWQ, Lee et al., AAAI
2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format, Params, Uniform
from fewbits.kernels.available import has_triton
from fewbits.rounding.column_grids import ColumnGrids
from fewbits.rounding.factor import inverse_factor
from fewbits.rounding.precision import full_float32

if TYPE_CHECKING:
    from fewbits.ranges import Range


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
    grid = ColumnGrids(fmt, range_, group_size, columns, free)
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
    w: Tensor, u: Tensor, grid: ColumnGrids, order: Tensor | None, block_size: int, stale: bool, stop_at: int
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
    if not grid.fitted:  # every column is kept
        grid.grow(w.new_zeros(batch, out, 1))
    for at in range(stop_at, columns):
        nothing = w.new_zeros(batch * out, 1)
        codes[:, at] = grid.fmt.encode(nothing, grid.column(at, order, out)).view(batch, out)
    return codes.transpose(1, 2).contiguous(), loss


def _walk_block(
    w: Tensor, codes: Tensor, u: Tensor, grid: ColumnGrids, order: Tensor | None, start: int, end: int, stale: bool,
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
    w: Tensor, codes: Tensor, u: Tensor, grid: ColumnGrids, order: Tensor | None, start: int, end: int, stale: bool,
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
