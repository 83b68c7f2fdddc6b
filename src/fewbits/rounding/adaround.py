"""Learned rounding: for every weight, up or down, as a rectified sigmoid annealed to 0 or 1.

AdaRound (Nagel et al., ICML 2020), sections 3.2-3.4; the same variables serve BRECQ, QDrop and their descendants. Here
are the variables, the weights they stand for and the regulariser that anneals them; what output error drives them is
the caller's (`fewbits.reconstruction`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.formats import ChannelBits, Granularity, Params, Uniform, expand_params
from fewbits.kernels.available import has_triton

GAMMA, ZETA = -0.1, 1.1  # stretch limits of the sigmoid: h reaches 0 and 1 at finite alpha, with zero gradient beyond

Schedule = Literal["linear", "cosine"]


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha) = clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1); the share by which a weight is rounded up."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """The alpha with h(alpha) = share, for share in [0, 1]; within +-ln 11."""
    return -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)


def rounding_penalty(h: Tensor, beta: float | Tensor) -> Tensor:
    """Scalar sum over all weights (never a mean) of 1 - |2h - 1|^beta: 0 where every h is 0 or 1, at most the count."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def temperature(
    step: int,
    total: int,
    *,
    warm_start: float = 0.2,
    start: float = 20.0,
    end: float = 2.0,
    schedule: Schedule = "linear",
) -> float | None:
    """The exponent beta at `step` of `total`, or None while the regulariser is off (step < warm_start * total).

    beta goes from `start` right after the warm start to `end` at step = total, on a line (BRECQ, QDrop) or on a half
    cosine (the AdaRound authors' library). Whether the first step is 0 or 1 is the caller's convention.
    """
    warm = warm_start * total
    if step < warm:
        return None
    progress = min((step - warm) / (total - warm), 1.0) if total > warm else 1.0
    if schedule == "linear":
        return end + (start - end) * (1 - progress)
    if schedule == "cosine":
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
    raise FewbitsError(f"temperature: schedule {schedule!r}; use 'linear' or 'cosine'")


class LearnedRounding(nn.Module):
    """One rounding variable per weight on a fixed uniform grid.

    weight: float weight of any shape and float dtype. params: the grid (`scale`, `zero_point`, of a `ChannelBits`
    format also `bits`), of the granularity's param shape; it is not learned and never re-estimated. `alpha` (float32,
    shape of the weight) is the only parameter. At construction the soft weight equals the float weight wherever that
    lies inside the grid's clipping range.

    `forward()` gives the soft weight while `soft` is true, else the hard one; both float32. On a GPU with Triton, soft
    weight and penalty of a matrix are one kernel each (`fewbits.kernels.triton_rounding`).
    Raises FewbitsError where a scale is not positive and finite (a bad grid is never clamped silently).
    """

    low: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, fmt: Uniform | ChannelBits, params: Params, granularity: Granularity) -> None:
        super().__init__()
        # The variables decide the rounding; whatever mode the format rounds by plays no part, and grid values must stay
        # put.
        self.format = dataclasses.replace(fmt, rounding="half_even") if isinstance(fmt, Uniform) else fmt
        self.soft = True
        weight = weight.detach().float()
        spread = expand_params(fmt, granularity, {k: v.detach().float() for k, v in params.items()}, weight.shape)
        scale = fmt.scale_of(spread)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise FewbitsError(
                "learned rounding: every scale must be positive and finite; refit the grid of this weight"
            )
        zero = spread.get("zero_point", torch.zeros_like(scale))
        # Working state, rebuilt from weight and grid: it does not belong in a state_dict.
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero_point", zero, persistent=False)
        if "bits" in spread:
            self.register_buffer("bits", spread["bits"], persistent=False)
        position = weight / scale
        # Where the zero point is added before rounding it may move the lattice: the fraction is taken after the shift.
        self._shift_first = not isinstance(fmt, Uniform) or fmt.order == "shift_then_round"
        if self._shift_first:
            position = position + zero
        self.register_buffer("low", position.floor(), persistent=False)
        self.alpha = nn.Parameter(inverse_rectified_sigmoid(position - self.low))

    def h(self) -> Tensor:
        """Shares in [0, 1], the weight's shape."""
        return rectified_sigmoid(self.alpha)

    def soft_weight(self) -> Tensor:
        """float32, differentiable in alpha; gradient zero where h is clamped or the code is clipped."""
        if not self._fused():
            return self._weight(self.h())
        from fewbits.kernels.triton_rounding import soft_weight

        bounds: tuple[int, int] = self.format.code_bounds(self._params())  # type: ignore[assignment]
        return soft_weight(
            self.alpha, self.low, self.scale, self.zero_point, bounds, shifted=self._shift_first, stretch=(GAMMA, ZETA)
        )

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Final integer codes, up where alpha >= 0; `format.decode(codes, params)` is the hard weight."""
        return self.format.encode(self._weight((self.alpha >= 0).float()), self._params())

    @torch.no_grad()
    def hard_weight(self) -> Tensor:
        """float32, every entry on the grid: the very bits that decoding the stored codes gives."""
        return self.format.decode(self.codes(), self._params())

    def penalty(self, beta: float | Tensor) -> Tensor:
        """`rounding_penalty` of this weight's variables; a tensor `beta` has no axes."""
        if not self._fused():
            return rounding_penalty(self.h(), beta)
        from fewbits.kernels.triton_rounding import penalty

        exponent = torch.as_tensor(beta, dtype=torch.float32, device=self.alpha.device)
        return penalty(self.alpha, exponent, stretch=(GAMMA, ZETA))

    def forward(self) -> Tensor:
        return self.soft_weight() if self.soft else self.hard_weight()

    def _fused(self) -> bool:
        """Whether the GPU's kernels can stand for the formulas: a matrix whose code bounds are the same everywhere."""
        return self.alpha.is_cuda and self.alpha.dim() == 2 and isinstance(self.format, Uniform) and has_triton()

    def _params(self) -> Params:
        names = [spec.name for spec in self.format.param_specs()]
        return {name: getattr(self, name) for name in names}

    def _weight(self, up: Tensor) -> Tensor:
        code = self.low + up if self._shift_first else self.low + up + self.zero_point
        low, high = self.format.code_bounds(self._params())
        return (code.clamp(low, high) - self.zero_point) * self.scale  # type: ignore[arg-type]


class RoundingRegulariser:
    """lambda * sum of penalties over a unit's learned roundings, annealed over the steps of an optimisation.

    weight: lambda, 0.01 in both papers; right only for a data loss summed over channels. first_count: the number of the
    first step, 0 (AdaRound) or 1 (BRECQ). Calling it with a 0-based step gives a scalar tensor, or None during the warm
    start, where the total loss is the data loss exactly. `course` and `at` are the two halves of that: the exponents of
    all steps, and the term for an exponent.
    """

    def __init__(
        self,
        roundings: Iterable[LearnedRounding],
        *,
        iterations: int,
        weight: float = 0.01,
        warm_start: float = 0.2,
        start: float = 20.0,
        end: float = 2.0,
        schedule: Schedule = "linear",
        first_count: int = 1,
    ) -> None:
        self.roundings = list(roundings)
        self.iterations = iterations
        self.weight = weight
        self.warm_start, self.start, self.end = warm_start, start, end
        self.schedule: Schedule = schedule
        self.first_count = first_count

    def __call__(self, step: int) -> Tensor | None:
        return self.at(self.exponent(step))

    def exponent(self, step: int) -> float | None:
        """beta at a 0-based step, None during the warm start."""
        return temperature(
            step + self.first_count,
            self.iterations,
            warm_start=self.warm_start,
            start=self.start,
            end=self.end,
            schedule=self.schedule,
        )

    def course(self) -> list[float | None]:
        """The exponents of all steps."""
        return [self.exponent(step) for step in range(self.iterations)]

    def at(self, beta: float | Tensor | None) -> Tensor | None:
        """The term for an exponent (a tensor has no axes); None for none."""
        if beta is None or not self.roundings:
            return None
        total = self.roundings[0].penalty(beta)
        for rounding in self.roundings[1:]:
            total = total + rounding.penalty(beta)
        return self.weight * total
