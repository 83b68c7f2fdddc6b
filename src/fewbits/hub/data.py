"""Data references to batches: `load_data`. How raw samples become input is the model's own affair
(`LoadedModel.preprocessing`, `tokenizer`).

Which samples are used is stated and repeatable:

- calibration: `samples` of them, drawn without replacement with the seed (128, or all where there are fewer, if not
  said). Language models: windows of `seqlen` tokens at random places of the joined text.
- evaluation: the first `samples` in the order of the data, all by default. Language models: windows of `seqlen`
  tokens every `stride` tokens; every window predicts each of its next tokens, and only the last `stride` of them
  count after the first window. Windows that the text does not fill are dropped.

Documents (lines of a jsonl file, rows of a table, several text files) are joined each after the tokenizer's
end-of-text token; one plain text file is taken as it is.
"""

from __future__ import annotations

import hashlib
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.hub.examples import max_length
from fewbits.hub.loaded import LoadedModel
from fewbits.hub.preprocess import channels, image_transform
from fewbits.hub.requires import require
from fewbits.hub.sources import Record, Source, TextFiles, open_source

CALIBRATION_SAMPLES = 128
SEQLEN = 2048  # at most, where neither the caller nor the model says less
IGNORED = -100  # target positions that do not count

_TEXT_DOMAINS = (
    "text-classification",
    "fill-mask",
    "text-to-text",
    "token-classification",
    "question-answering",
    "other",
)
_IMAGE_DOMAINS = ("image", "object-detection", "image-segmentation", "depth-estimation", "other")


@dataclass(frozen=True)
class Batch:
    """Model input (tensor, or dict of keyword arguments) and what is expected of the output, [batch] or [batch,
    length], or None.
    """

    inputs: Any
    targets: Tensor | None


class Data(ABC):
    """Samples prepared for one model. Iterating gives `Batch`es on the CPU; every pass gives the same ones.

    Attributes:
        ref: the data reference; domain: the model's domain; purpose: "calibration" or "evaluation".
        samples: how many samples (images, sentences, windows) a pass gives.
        description: JSON-able: which samples were chosen and how they were cut.
    """

    def __init__(
        self, ref: str, loaded: LoadedModel, purpose: str, batch_size: int, samples: int, description: dict[str, Any]
    ) -> None:
        self.ref, self.domain, self.purpose = ref, loaded.domain, purpose
        self.batch_size, self.samples, self.dtype = batch_size, samples, loaded.dtype
        self.description = {"data": ref, "samples": samples, **description}
        self._fingerprint: str | None = None

    @abstractmethod
    def _items(self) -> Iterator[tuple[Any, Any]]:
        """(input, target) of every sample, not yet batched."""

    def _collate(self, items: list[Any]) -> Any:
        return torch.stack(items)

    def _targets(self, targets: list[Any]) -> Tensor | None:
        if targets[0] is None:
            return None
        return torch.stack(targets) if isinstance(targets[0], Tensor) else torch.tensor(targets)

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(self.samples / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        digest = hashlib.sha256()
        held: list[tuple[Any, Any]] = []
        for item, target in self._items():
            _update(digest, item)
            held.append((item, target))
            if len(held) == self.batch_size:
                yield self._batch(held)
                held = []
        if held:
            yield self._batch(held)
        self._fingerprint = digest.hexdigest()

    def _batch(self, held: list[tuple[Any, Any]]) -> Batch:
        return Batch(self._collate([item for item, _ in held]), self._targets([target for _, target in held]))

    def batches(self) -> Iterator[Any]:
        """The model inputs alone."""
        return (batch.inputs for batch in self)

    @property
    def fingerprint(self) -> str:
        """sha256 over the inputs of all samples as they go into the model, in order; the batch size does not matter."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for item, _ in self._items():
                _update(digest, item)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _update(digest: Any, item: Any) -> None:
    if isinstance(item, dict):
        for key in sorted(item):
            digest.update(key.encode())
            _update(digest, item[key])
        return
    tensor = item if isinstance(item, Tensor) else torch.tensor(item)
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def load_data(
    ref: str | Path,
    loaded: LoadedModel,
    *,
    samples: int | None = None,
    seed: int = 0,
    split: str | None = None,
    batch_size: int = 32,
    purpose: str = "calibration",
    seqlen: int | None = None,
    stride: int | None = None,
    default_samples: int = CALIBRATION_SAMPLES,
) -> Data:
    """Samples of `ref` prepared for `loaded`; the module's text says which and how.

    Args:
        ref: `FILE.parquet`, an image folder, a `.txt`, `.jsonl`, `.tsv` or `.csv` file, a folder of these,
            `hf-dataset:NAME[:CONFIG][:SPLIT]` or `demo:NAME[:SPLIT]`.
        samples: how many images, sentences or token windows.
        seed: draws the calibration samples; evaluation of diffusion models draws its noise with it.
        split: which file of a folder or split of a data set.
        purpose: "calibration" or "evaluation".
        seqlen: tokens of a window; by default the model's longest text, 2048 at most.
        stride: tokens between two evaluation windows; by default `seqlen`, so that they do not overlap.
        default_samples: calibration samples where `samples` is not given; fewer where there are fewer.

    Raises:
        FewbitsError: nothing there, a corrupt file, no samples, more samples asked for than there are, data of a
            kind that the model does not take, no known preprocessing or tokenizer.
    """
    if purpose not in ("calibration", "evaluation"):
        raise FewbitsError(f"purpose {purpose!r} is neither calibration nor evaluation")
    for name, value in (("samples", samples), ("batch size", batch_size), ("seqlen", seqlen), ("stride", stride)):
        if value is not None and value < 1:
            raise FewbitsError(f"{name} {value}: at least 1 is needed")
    text = str(ref).strip()
    plan = _Plan(text, loaded, purpose, batch_size, samples, seed, default_samples)
    if text.startswith("demo:"):
        return _demo(plan, split)
    source = open_source(text, split=split, default_split="train" if purpose == "calibration" else "test")
    if loaded.domain == "diffusion":
        return NoisyImages(plan, _of_kind(source, plan, "images"))
    if loaded.domain == "text-generation":
        return Windows(plan, _of_kind(source, plan, "texts"), seqlen, stride)
    if source.kind == "images" and loaded.domain in _IMAGE_DOMAINS:
        return Images(plan, source)
    if source.kind != "images" and loaded.domain in _TEXT_DOMAINS:
        return Sentences(plan, source.lines() if isinstance(source, TextFiles) else source)
    raise FewbitsError(
        f"data {text!r} holds {source.kind}, which a model of domain {loaded.domain!r} ({loaded.ref}) does not take"
    )


@dataclass(frozen=True)
class _Plan:
    """What was asked for."""

    ref: str
    loaded: LoadedModel
    purpose: str
    batch_size: int
    samples: int | None
    seed: int
    default_samples: int

    def choose(self, count: int) -> tuple[list[int], dict[str, Any]]:
        """Indices into `count` samples and the sentence that says how they were chosen."""
        wanted = self.samples
        if wanted is None:
            wanted = min(self.default_samples, count) if self.purpose == "calibration" else count
        if wanted > count:
            raise FewbitsError(f"data {self.ref!r} holds {count} samples, fewer than the {wanted} asked for")
        if self.purpose == "calibration":
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
            return order[:wanted].tolist(), {
                "subset": f"{wanted} of {count}, drawn with seed {self.seed}",
                "seed": self.seed,
            }
        return list(range(wanted)), {"subset": "all" if wanted == count else f"the first {wanted} of {count}"}

    def data_args(
        self, samples: int, description: dict[str, Any]
    ) -> tuple[str, LoadedModel, str, int, int, dict[str, Any]]:
        return self.ref, self.loaded, self.purpose, self.batch_size, samples, description


def _of_kind(source: Source, plan: _Plan, kind: str) -> Source:
    if (source.kind == "images") != (kind == "images"):
        raise FewbitsError(
            f"data {plan.ref!r} holds {source.kind}; model {plan.loaded.ref!r} ({plan.loaded.domain}) takes {kind}"
        )
    return source


class Images(Data):
    """Images through the model's transform, with class labels where the data has them."""

    def __init__(self, plan: _Plan, source: Source) -> None:
        loaded = plan.loaded
        if loaded.preprocessing is None:
            raise FewbitsError(
                f"model {loaded.ref!r} states no preprocessing (input_size, mean, std), so images cannot be "
                "prepared for it"
            )
        indices, description = plan.choose(len(source))
        super().__init__(*plan.data_args(len(indices), description))
        self._source, self._indices = source, indices
        self._mode = "L" if channels(loaded.preprocessing) == 1 else "RGB"
        self._transform = image_transform(loaded.preprocessing)
        self._names = _Labels(loaded, source)
        self._keyword = getattr(loaded.model, "main_input_name", None) if loaded.kind == "transformers" else None
        self._listed = loaded.domain == "object-detection" and loaded.kind == "torchvision"

    def _items(self) -> Iterator[tuple[Any, Any]]:
        for record in self._source.records(self._indices):
            yield self._transform(decode(record, self._mode)).to(self.dtype), self._names.number(record)

    def _collate(self, items: list[Any]) -> Any:
        if self._listed:
            return (items,), {}
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise FewbitsError(
                f"data {self.ref!r}: the model's preprocessing leaves images of different sizes ({shapes}); use "
                "batch size 1"
            )
        batch = torch.stack(items)
        return {self._keyword: batch} if self._keyword else batch


def decode(record: Record, mode: str) -> Any:
    """A record's bytes as a PIL image in `mode`."""
    image = require("PIL.Image", "reading images")
    try:
        return image.open(io.BytesIO(record.item)).convert(mode)
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken files of its many formats
        raise FewbitsError(f"{record.where} is no readable image: {error}") from None


class _Labels:
    """Labels as the model's class numbers: numbers stay; names are looked up in the model's, else in the data's own."""

    def __init__(self, loaded: LoadedModel, source: Source) -> None:
        names = loaded.config.get("label_names")
        if names is None and loaded.config.get("id2label"):
            pairs = loaded.config["id2label"]
            names = [pairs[key] for key in sorted(pairs, key=int)]
        of_model = {str(name): number for number, name in enumerate(names or ())}
        of_data = {str(name): number for number, name in enumerate(source.label_names or ())}
        # the model's names decide only where they know every class of the data
        self._known = of_model if not of_data or all(name in of_model for name in of_data) else of_data
        self._model = loaded.ref

    def number(self, record: Record) -> int | None:
        if record.label is None or isinstance(record.label, int):
            return record.label
        if str(record.label) not in self._known:
            raise FewbitsError(
                f"{record.where}: label {record.label!r} is none of the classes of {self._model!r}: "
                f"{', '.join(list(self._known)[:8])}"
            )
        return self._known[str(record.label)]


class Sentences(Data):
    """Single texts, tokenized, padded to the longest of their batch; truncated at the model's longest text."""

    def __init__(self, plan: _Plan, source: Source) -> None:
        self._tokenizer = _tokenizer(plan.loaded)
        indices, description = plan.choose(len(source))
        self._length = min(max_length(plan.loaded) or 512, 512)
        super().__init__(*plan.data_args(len(indices), {**description, "truncated_at_tokens": self._length}))
        self._source, self._indices, self._names = source, indices, _Labels(plan.loaded, source)

    def _items(self) -> Iterator[tuple[Any, Any]]:
        for record in self._source.records(self._indices):
            encoded = self._tokenizer(record.item, truncation=True, max_length=self._length)
            yield {key: list(value) for key, value in encoded.items()}, self._names.number(record)

    def _collate(self, items: list[Any]) -> Any:
        return dict(self._tokenizer.pad(items, padding=True, return_tensors="pt"))


def _tokenizer(loaded: LoadedModel) -> Any:
    if loaded.tokenizer is None:
        raise FewbitsError(f"model {loaded.ref!r} comes without a tokenizer, so text cannot be prepared for it")
    return loaded.tokenizer


class Windows(Data):
    """Windows of tokens for language models.

    Targets are the next tokens, `IGNORED` where another window has counted them.
    """

    def __init__(self, plan: _Plan, source: Source, seqlen: int | None, stride: int | None) -> None:
        longest = max_length(plan.loaded)
        self.seqlen = seqlen or min(longest or SEQLEN, SEQLEN)
        if longest is not None and self.seqlen > longest:
            raise FewbitsError(f"seqlen {self.seqlen}: model {plan.loaded.ref!r} takes {longest} tokens at most")
        self.stride = stride or self.seqlen
        if self.stride > self.seqlen:
            raise FewbitsError(
                f"stride {self.stride} is larger than seqlen {self.seqlen}: tokens between the windows would be "
                "left out"
            )
        self._tokens = _join(source, _tokenizer(plan.loaded), plan)
        available = len(self._tokens) - 1 - self.seqlen  # one more token than the window, to be predicted by its last
        if available < 0:
            raise FewbitsError(
                f"data {plan.ref!r} holds {len(self._tokens)} tokens, fewer than one window of {self.seqlen} and "
                "its next token"
            )
        if plan.purpose == "calibration":
            count = plan.samples or plan.default_samples
            generator = torch.Generator().manual_seed(plan.seed)
            self._starts = torch.randint(available + 1, (count,), generator=generator).tolist()
            description = {
                "subset": f"{count} windows at random places, drawn with seed {plan.seed}",
                "seed": plan.seed,
            }
        else:
            self._starts, description = plan.choose(available // self.stride + 1)
            self._starts = [number * self.stride for number in self._starts]
            description["stride"] = self.stride
        description |= {"window": self.seqlen, "tokens_of_data": len(self._tokens)}
        super().__init__(*plan.data_args(len(self._starts), description))
        names = plan.loaded.kind == "transformers"
        self._options: dict[str, Any] | None = (
            {"use_cache": False} if names and _takes(plan.loaded.model, "use_cache") else ({} if names else None)
        )

    def _items(self) -> Iterator[tuple[Any, Any]]:
        for number, start in enumerate(self._starts):
            target = self._tokens[start + 1 : start + 1 + self.seqlen]
            if number and self.purpose == "evaluation" and self.stride < self.seqlen:
                target = target.clone()
                target[: self.seqlen - self.stride] = IGNORED
            yield self._tokens[start : start + self.seqlen], target

    def _collate(self, items: list[Any]) -> Any:
        batch = torch.stack(items)
        return batch if self._options is None else {"input_ids": batch, **self._options}


def _takes(model: torch.nn.Module, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters


def _join(source: Source, tokenizer: Any, plan: _Plan) -> Tensor:
    """All tokens of the text, int64 [n]."""
    single = isinstance(source, TextFiles) and len(source) == 1
    eos = tokenizer.eos_token_id
    if eos is None and not single:
        raise FewbitsError(
            f"model {plan.loaded.ref!r}: its tokenizer has no end-of-text token to put between documents; give "
            "one text file"
        )
    tokens: list[int] = []
    for record in source.records(range(len(source))):
        if not single:
            tokens.append(eos)
        tokens += _encode(tokenizer, record.item)
    return torch.tensor(tokens, dtype=torch.int64)


def _encode(tokenizer: Any, text: str) -> Sequence[int]:
    """Token ids without special tokens; no warning about the length, the text is cut into windows afterwards."""
    if callable(tokenizer):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.encode(text, add_special_tokens=False)


class NoisyImages(Data):
    """Images noised by the model's own scheduler at random time steps, for pixel-space denoisers; the target is what
    it is trained to predict.

    Noise and steps are drawn with the seed for all samples together: noise first, then steps.
    """

    def __init__(self, plan: _Plan, source: Source) -> None:
        loaded = plan.loaded
        diffusers = require("diffusers", f"model {loaded.ref!r}")
        settings = loaded.rebuild_spec.get("scheduler")
        if not settings or loaded.preprocessing is None or _takes(loaded.model, "encoder_hidden_states"):
            raise FewbitsError(
                f"model {loaded.ref!r}: images can be noised only for unconditional pixel-space denoisers that "
                "come with a scheduler "
                "configuration; pass batches of your own"
            )
        self._scheduler = diffusers.DDPMScheduler.from_config(settings)
        self._kind = self._scheduler.config.prediction_type
        if self._kind not in ("epsilon", "sample", "v_prediction"):
            raise FewbitsError(f"model {loaded.ref!r}: unknown prediction type {self._kind!r} of its scheduler")
        indices, description = plan.choose(len(source))
        super().__init__(
            *plan.data_args(len(indices), {**description, "noise_seed": plan.seed, "predicts": self._kind})
        )
        self._source, self._indices, self._seed, self._shape = (
            source,
            indices,
            plan.seed,
            tuple(loaded.preprocessing["input_size"]),
        )
        self._transform = image_transform(loaded.preprocessing)
        self._mode = "L" if channels(loaded.preprocessing) == 1 else "RGB"

    def _items(self) -> Iterator[tuple[Any, Any]]:
        generator = torch.Generator().manual_seed(self._seed)
        noise = torch.randn(self.samples, *self._shape, generator=generator)
        steps = torch.randint(0, self._scheduler.config.num_train_timesteps, (self.samples,), generator=generator)
        for number, record in enumerate(self._source.records(self._indices)):
            image = self._transform(decode(record, self._mode))[None]
            step, added = steps[number : number + 1], noise[number : number + 1]
            noisy = self._scheduler.add_noise(image, added, step)
            if self._kind == "epsilon":
                target = added
            else:
                target = image if self._kind == "sample" else self._scheduler.get_velocity(image, added, step)
            yield {"sample": noisy[0].to(self.dtype), "timestep": step[0]}, target[0]

    def _collate(self, items: list[Any]) -> Any:
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class Prepared(Data):
    """Samples that need no preparation: pairs (input tensor, target)."""

    def __init__(self, plan: _Plan, pairs: Any, description: dict[str, Any]) -> None:
        indices, chosen = plan.choose(len(pairs))
        super().__init__(*plan.data_args(len(indices), {**chosen, **description}))
        self._pairs, self._indices = pairs, indices

    def _items(self) -> Iterator[tuple[Any, Any]]:
        for index in self._indices:
            item, target = self._pairs[index]
            yield (item.to(self.dtype) if item.is_floating_point() else item), target


def _demo(plan: _Plan, split: str | None) -> Data:
    """`demo:NAME[:SPLIT]`; the split is by default the one for the purpose."""
    from fewbits import demo
    from fewbits.hub.references import check_demo

    name, _, stated = plan.ref.removeprefix("demo:").partition(":")
    check_demo(name)
    chosen = stated or split or plan.purpose
    if plan.loaded.kind != "demo" or plan.loaded.rebuild_spec.get("name") != name:
        raise FewbitsError(f"data {plan.ref!r} belongs to the model demo:{name}, not to {plan.loaded.ref!r}")
    pairs = demo.data(name, chosen)
    description: dict[str, Any] = {"split": chosen}
    if plan.loaded.domain == "text-generation":
        length = len(pairs[0][0])
        description |= {"window": length, "stride": length}
    return Prepared(plan, pairs, description)
