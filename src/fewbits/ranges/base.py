"""Range estimation: from a tensor's values (or only its extremes) to a format's parameters.

A range works block by block on 2-D views [blocks, values] that the granularity gives it, all blocks at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params
from fewbits.formats.granularity import Granularity
from fewbits.formats.registry import Described, Registry


class Range(Described, ABC):
    """How parameters are found. Subclasses are frozen dataclasses with a `kind`.

    `at_output`: a step finds them at the layer's output; from values alone this range tells only where that starts.
    """

    at_output: ClassVar[bool] = False

    @abstractmethod
    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        """Parameters [..., n] for finite float32 `blocks` [n, values >= 1]."""

    def fit(self, x: Tensor, fmt: Format, gran: Granularity, *, check: bool = True, where: str = "tensor") -> Params:
        """Parameters of `gran`'s param shape for the values of `x` (any float dtype; fitted in float32, without
        gradient).

        Raises FewbitsError, naming `where`, for an empty tensor and, with `check`, for NaN or infinite values.
        `check=False` never reads a value back from the device: for fitting inside a forward, where a bad token spoils
        only itself.
        """
        if x.numel() == 0:
            raise FewbitsError(f"{where}: cannot fit a range to an empty tensor of shape {tuple(x.shape)}")
        with torch.no_grad():
            x = x.detach().float()
            if check and not bool(torch.isfinite(x).all()):
                bad = int((~torch.isfinite(x)).sum())
                raise FewbitsError(
                    f"{where}: {bad} of {x.numel()} values are NaN or infinite; a range needs finite values "
                    "(float16 overflow in the model, or masked scores? leave that site out of the scheme)"
                )
            parts = [self.fit_blocks(block, fmt) for block in gran.blocks(x)]
            out: Params = {}
            for spec in fmt.param_specs():
                found = [part[spec.name] for part in parts]
                out[spec.name] = gran.assemble(found, x.shape) if spec.per == "block" else found[0]
            return out

    def fit_bounds(self, lo: Tensor, hi: Tensor, fmt: Format) -> Params:
        """Parameters from extremes alone, for statistics that kept nothing else. FewbitsError where values are
        needed."""
        raise FewbitsError(
            f"range {self.kind!r} needs the values, not only their extremes; use 'minmax' or gather values"
        )


ranges: Registry[Range] = Registry("range")


def range_from_dict(data: dict[str, Any]) -> Range:
    """The range described by `Range.to_dict()` output; FewbitsError for anything else."""
    return ranges.from_dict(data)


def extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every block [n, values]: two tensors [n]."""
    return torch.aminmax(blocks, dim=1)
