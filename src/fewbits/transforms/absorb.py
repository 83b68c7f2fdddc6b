"""High biases handed to the next layer (Nagel et al., ICCV 2019, section 4.1.3)."""

from __future__ import annotations

from torch import Tensor


def absorbable(beta: Tensor, gamma: Tensor, *, clipped: bool, sigmas: float = 3.0) -> Tensor:
    """c [C]: how much of each channel's bias the next layer can take over.

    beta, gamma: mean and (signed) standard deviation of the channels' values, [C]. `clipped`: a ReLU follows; then
    c = max(0, beta - sigmas |gamma|), for which relu(z - c) = relu(z) - c but for 0.135 % of Gaussian inputs at three
    sigmas. With nothing in between c = beta, exactly. Subtract c from the bias before, add W c to the bias after.
    """
    return (beta - sigmas * gamma.abs()).clamp_min(0) if clipped else beta.clone()
