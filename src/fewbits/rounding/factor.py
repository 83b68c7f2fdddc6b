"""The triangular factor of a damped inverse Hessian, in which a column solver reads how errors spread.

GPTQ (Frantar et al., ICLR 2023), section 3.3: the Cholesky factor of H^-1 holds, row by row, every inverse that greedy
OBQ would downdate on its way. Here it is found without the inverse, for large matrices in their own memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.rounding.hessian import panels

ESCALATION = 10.0  # factor on the damping after a failed factorisation
ATTEMPTS = 16


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
