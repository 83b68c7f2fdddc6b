"""Adam in one launch a parameter, which reads its count of steps and its learning rate on the device.

torch's fused step gives each thread block 65,536 numbers, so that a few small parameters keep a few of the device's
processors busy and take as long as large ones; here blocks are small.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _adam_kernel(
    parameter, gradient, first, second, count, rate, total, FIRST: tl.constexpr, SECOND: tl.constexpr,
    LOG_FIRST: tl.constexpr, LOG_SECOND: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    # 1 - 0.999 loses half its digits in float32
    steps = tl.load(count).to(tl.float64)
    first_share = (1.0 - tl.exp(steps * LOG_FIRST)).to(tl.float32)
    second_share = (1.0 - tl.exp(steps * LOG_SECOND)).to(tl.float32)
    g = tl.load(gradient + at, mask=there, other=0.0)
    m = tl.load(first + at, mask=there, other=0.0)
    v = tl.load(second + at, mask=there, other=0.0)
    m += (g - m) * (1.0 - FIRST)
    v = v * SECOND + (1.0 - SECOND) * g * g
    step = tl.load(rate) / first_share
    value = tl.load(parameter + at, mask=there, other=0.0) - step * m / (tl.sqrt(v) / tl.sqrt(second_share) + EPS)
    tl.store(first + at, m, mask=there)
    tl.store(second + at, v, mask=there)
    tl.store(parameter + at, value, mask=there)


class Adam:
    """`torch.optim.Adam` without its options, for contiguous float32 parameters on one GPU.

    groups: dictionaries of `params`, `betas` and `lr`, one float32 number on the device, read anew at every step.
    A parameter without a gradient is passed over, its count of steps too.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self._state: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        due = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in due:
            if parameter not in self._state:
                moments = torch.zeros_like(parameter), torch.zeros_like(parameter)
                self._state[parameter] = (*moments, torch.zeros((), device=parameter.device))
        torch._foreach_add_([self._state[parameter][2] for parameter, _ in due], 1.0)
        for parameter, group in due:
            first, second = group["betas"]
            assert parameter.grad is not None
            _adam_kernel[(triton.cdiv(parameter.numel(), BLOCK),)](
                parameter, parameter.grad.contiguous(), *self._state[parameter], group["lr"], parameter.numel(),
                FIRST=first, SECOND=second, LOG_FIRST=math.log(first), LOG_SECOND=math.log(second), EPS=1e-8,
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; `set_to_none` is there for the sake of torch's optimisers and has one meaning only."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
