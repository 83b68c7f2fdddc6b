"""What is timed of a model: the forward, or for language models reading a prompt and writing one token more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.kernels.choose import milliseconds

if TYPE_CHECKING:
    from fewbits.hub.loaded import LoadedModel

#: Seconds spent on one figure, and tokens a prompt has where nothing else is said.
SECONDS, PROMPT = 1.0, 128


@dataclass(frozen=True)
class Phase:
    """One thing that a model is timed at. rows: of the matrices its linear layers multiply."""

    name: str
    rows: int
    run: Callable[[nn.Module], Any]

    def time(self, model: nn.Module, device: torch.device, seconds: float = SECONDS) -> float:
        """Median milliseconds."""
        with torch.no_grad():
            return milliseconds(lambda: self.run(model), device, seconds)


def phases(loaded: LoadedModel, batch: int, seqlen: int | None) -> list[Phase]:
    """The phases of a model. Raises `FewbitsError` where `seqlen` does not suit it."""
    if loaded.domain == "text-generation" and loaded.kind == "transformers":
        return _language(loaded, batch, seqlen)
    if seqlen is not None:
        raise FewbitsError(f"--seqlen is for language models; {loaded.ref} is of domain {loaded.domain}")
    from fewbits.engine.tree import as_call

    args, kwargs = as_call(loaded.example_batch(batch))
    return [Phase("forward", batch, lambda model: model(*args, **kwargs))]


def _language(loaded: LoadedModel, batch: int, seqlen: int | None) -> list[Phase]:
    from fewbits.hub.examples import max_length

    limit = max_length(loaded)
    length = min(PROMPT, (limit or PROMPT + 1) - 1) if seqlen is None else seqlen
    if length < 1 or (limit is not None and length >= limit):
        raise FewbitsError(f"--seqlen {seqlen}: {loaded.ref} reads 1 to {(limit or 2) - 1} tokens and writes one more")
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length + 1), generator=generator).to(loaded.device)
    prompt, token = ids[:, :-1], ids[:, -1:]
    return [
        Phase(f"prefill {length}", batch * length, lambda model: model(input_ids=prompt, use_cache=True)),
        Phase("decode", batch, _Decode(prompt, token)),
    ]


class _Decode:
    """One token after the prompt. The cache of keys and values is cut back after each step, so all steps are alike."""

    def __init__(self, prompt: Tensor, token: Tensor) -> None:
        self.prompt, self.token = prompt, token
        self.caches: dict[int, Any] = {}

    def __call__(self, model: nn.Module) -> Any:
        cache = self.caches.get(id(model))
        if cache is None:
            cache = model(input_ids=self.prompt, use_cache=True).past_key_values
            self.caches = {id(model): cache}
        if not hasattr(cache, "crop"):  # states that cannot be taken back
            return model(input_ids=self.token, past_key_values=copy.deepcopy(cache), use_cache=True)
        out = model(input_ids=self.token, past_key_values=cache, use_cache=True)
        cache.crop(-1)  # the last token
        return out

    def forget(self) -> None:
        """Let the caches go: the model has changed."""
        self.caches.clear()
