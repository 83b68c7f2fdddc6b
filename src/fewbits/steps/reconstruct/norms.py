"""Batch norms of which folding has left a constant to add, run as that addition on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.engine.context import UnitContext
from fewbits.graph import operands
from fewbits.kernels.available import has_triton


def cheap_norms(unit: UnitContext) -> AbstractContextManager[Any]:
    """Inside, on a GPU, batch norms of the unit that only add a constant are run as that addition, whose gradient costs
    nothing."""
    if unit.device.type != "cuda":
        return nullcontext()
    return _AddedConstants(unit)


class _AddedConstants(TorchFunctionMode):
    """Runs batch norms with the running variances given to it as additions."""

    def __init__(self, unit: UnitContext) -> None:
        super().__init__()
        self.variances: list[Tensor] = []
        for index in unit.unit.calls:
            call = unit.graph.calls[index]
            names = [unit.graph.stored_in(call, slot) for slot in ("running_mean", "running_var", "weight", "bias")]
            if call.op != "batch_norm" or None in names:
                continue
            mean, var, weight, _ = (operands.parameter(unit.model, str(name)) for name in names)
            eps = call.kwargs.get("eps", call.args[7] if len(call.args) > 7 else 1e-5)
            if bool((mean == 0).all() & (weight == 1).all() & ((var - (1 - eps)).abs() < 1e-7).all()):
                self.variances.append(var)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and not kwargs.get("training") and not (len(args) > 5 and args[5]):
            var = kwargs["running_var"] if "running_var" in kwargs else args[2]
            bias = kwargs["bias"] if "bias" in kwargs else args[4] if len(args) > 4 else None
            if bias is not None and any(var is known for known in self.variances):
                return _added(args[0], bias.detach())
        return func(*args, **kwargs)


def _added(x: Tensor, bias: Tensor) -> Tensor:
    """x plus a constant for each entry of its second axis, in its type."""
    if has_triton():
        from fewbits.kernels.triton_channels import add_constants, fits

        if fits(x, bias):
            return add_constants(x, bias)
    return x + bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
