"""How like two outputs of a layer are, for searches that judge a quantizer by what it does to the layer's output.

PTQ4ViT (Yuan et al., ECCV 2022), section 3.2, and the measures that it is compared with there. All are similarities:
larger is better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.errors import FewbitsError


class Features:
    """The last axis of an output, whole or in blocks: sums and means over each block's features.

    labels: int64 [features], the block of every feature, for `blocks` blocks; None for one block.
    """

    def __init__(self, count: int, labels: Tensor | None = None, blocks: int = 1) -> None:
        self.labels = labels
        self.count: Tensor | int = count
        if labels is not None:
            self._member = torch.nn.functional.one_hot(labels, blocks).float()
            self.count = self._member.sum(0)

    def sum(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., blocks]."""
        return x.sum(-1, keepdim=True) if self.labels is None else x @ self._member.to(x.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., blocks]."""
        return self.sum(x) / self.count

    def spread(self, x: Tensor) -> Tensor:
        """[..., blocks] -> what broadcasts against [..., features]."""
        return x if self.labels is None else x.index_select(-1, self.labels)


#: (float output [1, ..., features], outputs under the candidates [candidates, ..., features], gradient of the task loss
#: at the float output or None, features) -> [candidates, ..., blocks]
Metric = Callable[[Tensor, Tensor, "Tensor | None", Features], Tensor]


def hessian(raw: Tensor, made: Tensor, gradient: Tensor | None, features: Features) -> Tensor:
    """-(g (O - O'))^2: the diagonal of the Fisher information stands for the Hessian of the task loss."""
    if gradient is None:
        raise FewbitsError("the metric 'hessian' needs the gradient of a task loss at the layer's output")
    return -features.mean((made - raw).mul_(gradient).square_())


def l2(raw: Tensor, made: Tensor, gradient: Tensor | None, features: Features) -> Tensor:
    return -features.mean((made - raw).square_())


def l1(raw: Tensor, made: Tensor, gradient: Tensor | None, features: Features) -> Tensor:
    return -features.mean((made - raw).abs_())


def linear_weighted_l2(raw: Tensor, made: Tensor, gradient: Tensor | None, features: Features) -> Tensor:
    """-|O| (O - O')^2."""
    return -features.mean((made - raw).square_().mul_(raw.abs()))


def square_weighted_l2(raw: Tensor, made: Tensor, gradient: Tensor | None, features: Features) -> Tensor:
    """-(O (O - O'))^2."""
    return -features.mean((made - raw).mul_(raw).square_())


def cosine(raw: Tensor, made: Tensor, gradient: Tensor | None, features: Features) -> Tensor:
    """Cosine of the angle between O and O' over a block's features (EasyQuant; the base PTQ of PTQ4ViT)."""
    lengths = features.sum(raw.square()).sqrt().clamp_min(1e-8) * features.sum(made.square()).sqrt().clamp_min(1e-8)
    return features.sum(made * raw) / lengths


def pearson(raw: Tensor, made: Tensor, gradient: Tensor | None, features: Features) -> Tensor:
    """Cosine of O and O' less their means over a block's features."""
    raw, made = raw - features.spread(features.mean(raw)), made - features.spread(features.mean(made))
    return cosine(raw, made, gradient, features)


METRICS: dict[str, Metric] = {
    "hessian": hessian,
    "cosine": cosine,
    "pearson": pearson,
    "l2": l2,
    "l1": l1,
    "linear_weighted_l2": linear_weighted_l2,
    "square_weighted_l2": square_weighted_l2,
}


def output_metric(name: str) -> Metric:
    """The similarity of that name. Raises `FewbitsError` for an unknown one."""
    if name not in METRICS:
        raise FewbitsError(f"unknown output metric {name!r}; there are: {', '.join(METRICS)}")
    return METRICS[name]
