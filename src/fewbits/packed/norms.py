"""Norms that quantize what they make, and which layer norm or RMS norm a module is.

That is found by trying it: classes write norms out in many ways.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewbits.kernels import ops, reference
from fewbits.kernels.operands import Norm

if TYPE_CHECKING:
    from fewbits.packed.int8 import Int8Linear

#: How much of a 16-bit output must be the same bits; the rest differs by the order of sums in float32.
SAME = 0.95


def formula(module: nn.Module) -> tuple[float, bool, bool] | None:
    """(eps, centred, twice) of `kernels.operands.Norm` where a module's forward is one of its weight and bias; or None.

    Rows of many sizes, with and without a mean, go through the module and through each formula in the type of its
    weight. Neither is the module changed nor do its values matter: others are put in their place for the trial.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if not _may_be(module) or weight is None:
        return None
    x, held = _trial(weight, bias)
    try:
        with torch.no_grad():
            wanted = torch.func.functional_call(module, held, (x,))
    except Exception:  # whatever the forward of a module that is no such norm raises
        return None
    if not isinstance(wanted, Tensor) or (wanted.shape, wanted.dtype) != (x.shape, x.dtype):
        return None
    best: tuple[float, tuple[float, bool, bool] | None] = (SAME, None)
    for made in itertools.product(_numbers(module, weight.dtype), (False, True), (False, True)):
        found = reference.normalised(x, Norm(held["weight"], held.get("bias"), *made))
        if (same := _agreement(found, wanted)) > best[0]:
            best = same, made
    return best[1]


def _may_be(module: nn.Module) -> bool:
    """Whether a module holds what a norm of rows holds, and runs the forward of its class."""
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    return (
        "weight" in names <= {"weight", "bias"}
        and all(parameter.dim() == 1 and parameter.is_floating_point() for parameter in held)
        and len({(parameter.dtype, parameter.device, len(parameter)) for parameter in held}) == 1
        and not module._modules
        and not module._buffers
        and "forward" not in vars(module)
    )


def _numbers(module: nn.Module, dtype: torch.dtype) -> list[float]:
    """What may be the epsilon: the small numbers that the module holds, or those of a type where it leaves it open."""
    held = [value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 1]
    return list(dict.fromkeys([*held, torch.finfo(dtype).eps, torch.finfo(torch.float32).eps]))


def _trial(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows [2, 8, k] and other parameters of the same types."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    columns = len(weight)
    sizes = torch.logspace(-4, 1, 8)[:, None]
    x = torch.stack([drawn(8, columns), drawn(8, columns) + 1]) * sizes
    held = {"weight": drawn(columns)} | ({} if bias is None else {"bias": drawn(columns)})
    return x.to(weight), {name: value.to(weight) for name, value in held.items()}


def _agreement(found: Tensor, wanted: Tensor) -> float:
    """The share of equal numbers (float32: 1), where none is further off than rounding makes it; else 0."""
    gap, size = (found.double() - wanted.double()).abs(), wanted.double().abs()
    slack = 32 * torch.finfo(torch.float32).eps * size.amax(-1, keepdim=True)
    if found.dtype == torch.float32:
        return float((gap <= slack).all())
    near = gap <= slack + 2 * torch.finfo(found.dtype).eps * size
    return float((found == wanted).double().mean()) if bool(near.all()) else 0.0


class NormForward:
    """The forward of a norm that quantizes what it makes for the layers that share it.

    Where it cannot (where something traces or differentiates, under autocast, in other types than its weight's) it is
    the forward of the norm's class.
    """

    def __init__(self, norm: nn.Module, made: tuple[float, bool, bool], layer: Int8Linear) -> None:
        self.norm = norm
        self.made = made
        self.layer = layer

    def __call__(self, *args: object, **kwargs: object) -> object:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and self._fits(x):
            return self._fused(x)
        return type(self.norm).forward(self.norm, *args, **kwargs)

    def _fits(self, x: Tensor) -> bool:
        held, link = self._parameters(), self.layer.shared
        return (
            link is not None
            and ops.eager(x)
            and x.numel() > 0
            and all((value.dtype, value.device, value.shape) == (x.dtype, x.device, x.shape[-1:]) for value in held)
            and all(value.is_contiguous() for value in held)
            and not (torch.is_grad_enabled() and any(value.requires_grad for value in held))
            and not torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and link.shared.open(x)
            and link.holds()
        )

    def _fused(self, x: Tensor) -> Tensor:
        grid, link, weight, *bias = self.layer.grid(), self.layer.shared, *self._parameters()
        assert grid is not None and link is not None
        norm = Norm(weight, bias[0] if bias else None, *self.made)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        flat = -1, x.shape[-1]
        rows = ops.run_norm_quantize(x.reshape(flat), norm, grid, self.layer.backend, out.view(flat))
        link.shared.keep(out, rows)
        return out

    def _parameters(self) -> list[Tensor]:
        held = (self.norm._parameters.get(name) for name in ("weight", "bias"))
        return [value for value in held if value is not None]
