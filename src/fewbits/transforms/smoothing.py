"""How much of an activation channel's size to move into the weights that read it.

SmoothQuant (Xiao et al., ICML 2023), section 4, equation 4. The fold itself is in `fewbits.transforms.fold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

FLOOR = 1e-5


@torch.no_grad()
def smoothing_scales(
    act_absmax: Tensor,
    weights: Sequence[Tensor],
    alpha: float = 0.5,
    *,
    dead: Literal["keep", "clamp"] = "keep",
) -> Tensor:
    """s [C], float32: divide activation channel j by s_j and multiply column j of EVERY weight by it.

    act_absmax: [C], max |x_j| over all calibration tokens of the unsmoothed model. weights: every linear that reads
    this input, each [out, C] (convolutions: [out, C, *kernel]); all share one s. alpha: migration strength, 0 (all
    difficulty stays in the activations) to 1 (all goes to the weights); 0.5 suits most models.

    s_j = act_j^alpha / w_j^(1 - alpha), with w_j the largest |W_ij| of all weights, both w and s at least 1e-5.
    A channel that is zero on all calibration data keeps s = 1 (`dead="keep"`). The released code lets the clamp decide
    (`dead="clamp"`), which multiplies that channel's norm weight by 1e5.
    Raises FewbitsError where shapes differ, no weight is given, or a statistic is negative, NaN or infinite.
    """
    if not weights:
        raise FewbitsError("smoothing: no weight reads this activation; nothing to balance it with")
    if not 0 <= alpha <= 1:
        raise FewbitsError(f"smoothing: alpha={alpha}; choose a migration strength between 0 and 1")
    act = act_absmax.detach().float()
    if not bool((act.isfinite() & (act >= 0)).all()):
        raise FewbitsError("smoothing: activation maxima must be finite and not negative; check the calibration pass")
    for weight in weights:
        if weight.ndim < 2 or act.ndim != 1 or weight.shape[1] != act.shape[0]:
            raise FewbitsError(
                f"smoothing: weight {tuple(weight.shape)} does not read the {tuple(act.shape)} channels measured; "
                "all weights sharing the input need that many input columns"
            )
    columns = [weight.detach().abs().transpose(0, 1).flatten(1).amax(1).to(act) for weight in weights]
    weight_max = torch.stack(columns).amax(0).clamp(min=FLOOR)
    scales = (act.pow(alpha) / weight_max.pow(1 - alpha)).clamp(min=FLOOR)
    return torch.where(act == 0, torch.ones_like(scales), scales) if dead == "keep" else scales
