"""Language models with a cache: what one step of generation takes and returns, and how a file answers in steps.

Names are those that onnxruntime's and Optimum's users know: `input_ids`, `attention_mask`, `position_ids` where the
model takes them, `past_key_values.N.key` and `.value` go in; `logits`, `present.N.key` and `.value` come out, which are
the next step's past. The first step has a past of length 0.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.export.onnx.runtimes import Run, input_shapes

if TYPE_CHECKING:
    import onnx_ir as ir

PAST, PRESENT = "past_key_values", "present"
#: Names of the axes in the file.
BATCH, SEQUENCE, PAST_AXIS, TOTAL = "batch", "sequence", "past", "past + sequence"
#: Sizes that a model is traced with, unlike each other so that torch does not take one for another.
_ROWS, _NEW, _BEFORE = 2, 3, 5
#: How many tokens are taken one by one where a file is checked.
_SINGLE = 4


@dataclass
class CachedCall:
    """One step of generation: new tokens and the keys and values of those before them.

    arguments: the inputs before the cache. argument: the name under which the forward takes the cache. sizes: heads and
    width of every layer's keys and of its values, in turn.
    """

    model: nn.Module
    arguments: list[str]
    argument: str
    sizes: list[tuple[int, int]]

    @classmethod
    def of(cls, model: nn.Module) -> CachedCall:
        """Raises `FewbitsError` for a model whose states between calls are not keys and values of every layer."""
        name = type(model).__name__
        taken = list(inspect.signature(model.forward).parameters)
        argument = next((held for held in ("cache", "past_key_values") if held in taken), None)
        if argument is None or not {"input_ids", "attention_mask", "use_cache"} <= set(taken):
            raise FewbitsError(
                f"cache: {name} is no causal language model of transformers that keeps keys and values; set cache=false"
            )
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        ids = torch.zeros(_ROWS, _NEW, dtype=torch.long)
        with torch.no_grad():
            cache = getattr(model(input_ids=ids, use_cache=True), argument, None)
        layers = list(getattr(cache, "layers", ()))
        plain = (DynamicLayer, DynamicSlidingWindowLayer)  # exactly: others hold further states
        pairs = [held for layer in layers if type(layer) in plain for held in (layer.keys, layer.values)]
        if not pairs or len(pairs) < 2 * len(layers) or not all(map(_is_state, pairs)):
            raise FewbitsError(
                f"cache: {name} keeps states other than keys and values [batch, heads, tokens, width] of every layer; "
                "set cache=false"
            )
        sizes = [(held.shape[1], held.shape[3]) for held in pairs]
        more = ["position_ids"] if "position_ids" in taken else []
        return cls(model, ["input_ids", "attention_mask", *more], argument, sizes)

    # -- as `trace.traced` takes it ----------------------------------------------------------------------------------
    @property
    def inputs(self) -> list[str]:
        return [*self.arguments, *self._pairs(PAST)]

    @property
    def outputs(self) -> list[str]:
        return ["logits", *self._pairs(PRESENT)]

    def _pairs(self, prefix: str) -> list[str]:
        return [f"{prefix}.{layer}.{part}" for layer in range(len(self.sizes) // 2) for part in ("key", "value")]

    def free(self, name: str, tensor: Tensor) -> dict[int, str]:
        if name.startswith(PAST):
            return {0: BATCH, 2: PAST_AXIS}
        return {0: BATCH, 1: TOTAL if name == "attention_mask" else SEQUENCE}

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(logits [batch, sequence, vocabulary], keys and values [batch, heads, past + sequence, width] by layer)."""
        from transformers import DynamicCache

        given: dict[str, Any] = dict(zip(self.arguments, tensors, strict=False))
        past = tensors[len(self.arguments) :]
        # without a configuration: layers that look at a window of the past keep all of it, and mask what they must
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        logits = self.model(**given, **{self.argument: cache}, use_cache=True).logits
        return (logits, *(held for layer in cache.layers for held in (layer.keys, layer.values)))

    def example(self) -> list[Tensor]:
        """Tensors to trace with; their values do not matter."""
        total = _BEFORE + _NEW
        mask = torch.ones(_ROWS, total, dtype=torch.long)
        given = {
            "input_ids": torch.zeros(_ROWS, _NEW, dtype=torch.long),
            "attention_mask": mask,
            "position_ids": positions(mask)[:, _BEFORE:].contiguous(),
        }
        past = [torch.zeros(_ROWS, heads, _BEFORE, width) for heads, width in self.sizes]
        return [*(given[name] for name in self.arguments), *past]

    def finish(self, model: ir.Model, axes: list[str]) -> None:
        """Name the axes of what comes out. Raises `FewbitsError` where torch fixed an axis that generation varies."""
        wanted = [
            f"{name}[{axis}]"
            for name, tensor in zip(self.inputs, self.example(), strict=True)
            for axis in self.free(name, tensor).values()
        ]
        fixed = [axis for axis in wanted if axis not in axes]
        if fixed:
            raise FewbitsError(f"cache: the forward of {type(self.model).__name__} fixes {fixed[0]}; set cache=false")
        for value in model.graph.outputs:
            assert value.shape is not None
            if str(value.name).startswith(PRESENT):
                value.shape[0], value.shape[2] = BATCH, TOTAL


def _is_state(held: Any) -> bool:
    """Whether a layer's state is a tensor over the tokens of the call before: [batch, heads, tokens, width]."""
    return isinstance(held, Tensor) and held.dim() == 4 and (held.shape[0], held.shape[2]) == (_ROWS, _NEW)


def positions(mask: Tensor) -> Tensor:
    """The places of the tokens that a mask [batch, tokens] shows, counted in each row from 0; int64."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


# -- running a file --------------------------------------------------------------------------------------------------
def has_cache(file: Path) -> bool:
    return any(name.startswith(PAST) for name in input_shapes(file))


class Steps:
    """A file's logits for whole texts: the first half at once, some tokens one by one, and the rest on top.

    Called with what the model without a cache is called with, by the names of `inputs`.
    """

    def __init__(self, file: Path, inputs: list[str]) -> None:
        self.inputs = inputs
        shapes = input_shapes(file)
        self.past = {name: (shape[1], shape[3]) for name, shape in shapes.items() if name.startswith(PAST)}
        self.arguments = [name for name in shapes if name not in self.past]
        if "input_ids" not in inputs:
            raise FewbitsError("cache: texts to compare on are dicts with input_ids")

    def __call__(self, run: Run, tensors: list[Tensor]) -> list[Tensor]:
        """Returns one tensor, logits [batch, tokens, vocabulary]. Raises `FewbitsError` for padded texts: what a model
        answers at a place that its mask hides is undefined."""
        given = dict(zip(self.inputs, tensors, strict=True))
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids))
        if not bool(mask.all()):
            raise FewbitsError("cache: texts to compare on must not be padded")
        past = {
            name: np.zeros((ids.shape[0], int(heads), 0, int(width)), dtype=np.float32)
            for name, (heads, width) in self.past.items()
        }
        found = []
        for start, end in _steps_of(ids.shape[1]):
            step = {
                "input_ids": ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions(mask)[:, start:end],
            }
            arrays = {name: step[name].long().contiguous().numpy() for name in self.arguments}
            logits, *present = run(arrays | past)
            past = dict(zip(self.past, present, strict=True))
            found.append(torch.from_numpy(logits))
        return [torch.cat(found, 1).float()]


def _steps_of(tokens: int) -> list[tuple[int, int]]:
    """(start, end) of every step."""
    first = max(tokens // 2, 1)
    ends = sorted({first, *range(first, min(first + _SINGLE, tokens) + 1), tokens})
    return list(zip([0, *ends[:-1]], ends, strict=True))
