"""Two small models that were really trained, with the data to calibrate and to measure them, all inside the package.

- `text`: a decoder-only language model over bytes (7 blocks of width 128, 1.5 million parameters), trained on the
  source text of Python's standard library; calibration and evaluation windows come from library files it never saw.
- `digits`: a vision transformer (2 blocks of width 64) for the 8 x 8 handwritten digits of scikit-learn and UCI; the
  evaluation images are the last third of the data set.

`scripts/train_demo.py` makes everything here, and each model's `.json` tells how it was trained and what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DemoData", "data", "load", "names"]

_NAMES = ("digits", "text")
_SPLITS = {"calibration": "calibration", "evaluation": "eval", "eval": "eval"}


def names() -> list[str]:
    """Names of the demo models, sorted. Does not import torch."""
    return list(_NAMES)


def load(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A demo model in eval mode with float32 parameters, and its JSON-able description.

    The description has `domain` ("text-generation" or "image"), `config` (the constructor's arguments), `training`,
    `measured` (the training script's figures for the float model and for plain rounding) and `data` (origin and
    licence). Of `text` also `vocab_size` and `max_length`; of `digits` also `input_size` and `preprocessing` (mean and
    deviation for pixels in 0..1).

    Raises:
        FewbitsError: there is no demo of that name.
    """
    from fewbits.demo.model import ByteLM, DigitViT, ImageConfig, TextConfig

    described = json.loads(_read(name, ".json"))
    config = described["config"]
    if name == "text":
        model: nn.Module = ByteLM(TextConfig(**config))
        extra = {"domain": "text-generation", "vocab_size": config["vocabulary"], "max_length": config["context"]}
    else:
        from fewbits.demo.model import PIXEL_DEVIATION, PIXEL_MEAN

        model = DigitViT(ImageConfig(**config))
        size = [1, config["size"], config["size"]]
        plain = {"kind": "plain", "input_size": size, "interpolation": "bilinear", "crop_pct": 1.0}
        scaling = {"mean": [PIXEL_MEAN / 16], "std": [PIXEL_DEVIATION / 16]}
        extra = {"domain": "image", "input_size": size, "preprocessing": {**plain, **scaling}}
    model.load_state_dict({key: value.float() for key, value in _tensors(name, ".safetensors").items()})
    return model.eval(), {**extra, **described}


def data(name: str, split: str) -> DemoData:
    """The calibration data or the evaluation data of a demo model.

    Args:
        name: "text" or "digits".
        split: "calibration", or "evaluation" ("eval" for short). No sample is in both.

    Returns:
        For `text` 256 windows: inputs int64 [256, 256], labels int64 [256, 256], the byte after each input byte.
        For `digits` inputs float32 [n, 1, 8, 8], normalised, labels int64 [n]; n is 256 and 599.

    Raises:
        FewbitsError: there is no demo or no split of that name.
    """
    from fewbits.demo.model import normalise

    _check(name)
    if split not in _SPLITS:
        raise FewbitsError(f"demo data has no split {split!r}; there are: calibration, evaluation")
    tensors, key = _tensors(name, "-data.safetensors"), _SPLITS[split]
    if name == "text":
        windows = tensors[key].long()
        return DemoData("tokens", "language-modeling", windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
    return DemoData(
        "images", "image-classification", normalise(tensors[f"{key}_images"]), tensors[f"{key}_labels"].long()
    )


class DemoData(Sequence[Any]):
    """Samples of a demo: a sequence of (input, label), and the same as two tensors.

    Attributes:
        kind: "tokens" or "images".
        task: "language-modeling" or "image-classification".
        inputs: model inputs of all samples, stacked.
        labels: what each output position should be.
    """

    def __init__(self, kind: str, task: str, inputs: Tensor, labels: Tensor) -> None:
        self.kind, self.task, self.inputs, self.labels = kind, task, inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Any) -> Any:
        """One (input, label) for a number, a list of them for a slice."""
        if isinstance(index, slice):
            return list(zip(self.inputs[index], self.labels[index], strict=True))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.inputs[index], self.labels[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.inputs, self.labels, strict=True))


def _check(name: str) -> None:
    if name not in _NAMES:
        raise FewbitsError(f"there is no demo {name!r}; there are: {', '.join(_NAMES)}")


def _read(name: str, suffix: str) -> bytes:
    _check(name)
    return resources.files(__name__).joinpath(name + suffix).read_bytes()


def _tensors(name: str, suffix: str) -> dict[str, Tensor]:
    from safetensors.torch import load as parse

    return parse(_read(name, suffix))
