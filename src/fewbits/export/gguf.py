"""GGUF files for llama.cpp: integer grids whose groups are runs of 32 columns (or more, repeated) as ggml's blocks.

| grid | block | value |
| --- | --- | --- |
| 8 bits, zero at code 0 | Q8_0 | d q, q in -128..127 |
| 4 bits, zero in the middle | Q4_0 | d (q - 8) |
| 5 bits, zero in the middle | Q5_0 | d (q - 16) |
| 4 or 5 bits, any zero point | Q4_1, Q5_1 | d q + m |

d and m are float16; their rounding (at most 2^-11 of each) is measured and reported. Everything else is stored as
float16 (`dtype`), vectors as float32. Architectures are those whose weights llama.cpp takes by renaming, with the rows
of rotary queries and keys in its order for LLaMA. Of tokenizers, byte-level BPE with GPT-2's rule for splitting words
is written; another is left out (the file then takes token numbers only).

Source: the gguf package (names, writer, reader) and llama.cpp's `ggml-common.h`, `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import contextlib
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.engine.tree import as_call
from fewbits.errors import FewbitsError
from fewbits.export.base import Obstacle, Subject, Target
from fewbits.export.comparison import answer, answers, compared, insist
from fewbits.export.layers import Layer, unquantized_state
from fewbits.export.linears import HALF_TOLERANCE, stored, unfit
from fewbits.export.transformers_folder import read_folder
from fewbits.hub.loaded import dtype_of

FILE = "model.gguf"
RUN = 32
#: transformers' model type -> (llama.cpp's architecture, whether rows of queries and keys are interleaved there)
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_DTYPES = ("float16", "float32")
#: llama.cpp rounds the input of a product with a block to 8 bits, in runs of 32, which the simulation does not.
LLAMA_TOLERANCE = 0.03


class Export(Target):
    """`dtype`: float16 or float32, of matrices that stay in floating point."""

    name = "gguf"
    about = "GGUF files for llama.cpp"
    profile_name = "gguf"
    packages = ("transformers", "gguf")
    kinds = ("transformers",)

    def obstacles(self, subject: Subject) -> list[Obstacle]:
        found = super().obstacles(subject)
        if found:
            return found
        config: Any = subject.loaded.model.config
        kind = config.model_type
        if kind not in ARCHITECTURES:
            return [Obstacle("the model", f"gguf is written for {', '.join(ARCHITECTURES)} only, not for {kind}")]
        if _rope(config).get("rope_type", "default") != "default":
            return [Obstacle("the model", f"gguf is not written with {_rope(config)['rope_type']} rotary embeddings")]
        found = unfit(subject, self.name)
        for layer in subject.layers:
            columns = layer.codes.shape[1]
            if columns % RUN:
                found.append(Obstacle(layer.site.name, f"gguf needs columns in multiples of {RUN}, not {columns}"))
        return found

    def write(self, subject: Subject, folder: Path, *, dtype: str = "float16") -> dict[str, Any]:  # type: ignore[override]
        import gguf

        if dtype not in _DTYPES:
            raise FewbitsError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}")
        model: Any = subject.loaded.model
        config = model.config
        architecture, interleaved = ARCHITECTURES[config.model_type]
        writer = gguf.GGUFWriter(folder / FILE, architecture)
        _describe(writer, config, subject)
        tokenizer = _write_tokenizer(writer, subject, folder)
        names = gguf.get_tensor_name_map(_architecture(architecture), config.num_hidden_layers)
        kinds: dict[str, int] = {}
        worst = 0.0
        for layer in subject.layers:
            data, kind, change = blocks(layer, _heads(layer.module, config) if interleaved else None)
            writer.add_tensor(_named(names, f"{layer.module}.weight"), data, raw_dtype=gguf.GGMLQuantizationType[kind])
            kinds[kind] = kinds.get(kind, 0) + 1
            worst = max(worst, change)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        for name, value in unquantized_state(subject.attachment, subject.layers).items():
            if name in tied:
                continue
            heads = _heads(name.rpartition(".")[0], config) if interleaved else None
            value = value if heads is None else _interleave(value, heads)
            kept = torch.float32 if value.dim() < 2 else dtype_of(dtype)
            writer.add_tensor(_named(names, name), value.to(kept).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {
            "file": FILE,
            "architecture": architecture,
            "blocks": kinds,
            "dtype": dtype,
            "scale_change": worst,
            "tokenizer": tokenizer,
        }

    def check(self, subject: Subject, folder: Path) -> list[dict[str, Any]]:
        import gguf

        model: Any = subject.loaded.model
        config = model.config
        architecture, interleaved = ARCHITECTURES[config.model_type]
        names = gguf.get_tensor_name_map(_architecture(architecture), config.num_hidden_layers)
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
        expected, found = [], []
        for layer in subject.layers:
            tensor = read[_named(names, f"{layer.module}.weight")]
            expected.append(layer.values().cpu())
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            heads = _heads(layer.module, config) if interleaved else None
            found.append(values if heads is None else _interleave(values, heads, back=True))
        entry = compared(f"gguf {version('gguf')} (reader: weights)", expected, found)
        # a block's values err by half a unit in the last place of d and of m, each no larger than the block's largest
        insist(entry, 2**-10)
        entries = [{**entry, "agreement": None, "samples": len(expected)}]
        if find_spec("accelerate") is not None:  # which transformers needs to read such files
            import transformers

            loaded = read_folder(subject, folder, gguf_file=FILE)
            batches = subject.inputs()
            entry = compared(
                f"transformers {transformers.__version__}", answers(model, batches), answers(loaded, batches)
            )
            insist(entry, HALF_TOLERANCE)
            entries.append(entry)
        if find_spec("llama_cpp") is not None:
            entries.append(_in_llama_cpp(folder / FILE, model, subject.inputs()))
        return entries


@torch.no_grad()
def _in_llama_cpp(path: Path, model: Any, batches: list[Any]) -> dict[str, Any]:
    """The entry of `check` for llama.cpp itself, on the CPU: the rows of the batches one by one, without masks."""
    import llama_cpp

    calls = [as_call(batch) for batch in batches]
    ids = [row for args, kwargs in calls for row in (args[0] if args else kwargs["input_ids"]).cpu()]
    runner = llama_cpp.Llama(
        str(path), n_ctx=max(map(len, ids)), n_gpu_layers=0, seed=0, logits_all=True, verbose=False
    )
    expected, found = [], []
    with contextlib.closing(runner):
        for row in ids:
            runner.reset()
            runner.eval(row.tolist())
            found.append(torch.from_numpy(runner.scores[: len(row)].copy())[None])
            expected.append(answer(model(input_ids=row[None].to(model.device))))
    entry = compared(f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", expected, found)
    insist(entry, LLAMA_TOLERANCE)
    return entry


# -- blocks ----------------------------------------------------------------------------------------------------------
def blocks(layer: Layer, heads: int | None = None) -> tuple[np.ndarray[Any, Any], str, float]:
    """(bytes [out, columns / 32 * bytes a block], ggml's name of the kind, largest relative change of d and m).

    heads: interleave the two halves of each of that many heads of rows. Raises `FewbitsError`, naming the site, where
    float16 cannot hold the scales.
    """
    fmt = layer.uniform
    symmetric = fmt.zero_point in ("none", "middle")
    codes, zero = layer.signed() if fmt.bits == 8 else layer.unsigned()
    scale = layer.scales()[0].cpu()
    runs = codes.shape[1] // RUN
    repeat = runs // scale.shape[1]
    d, change = stored(layer, scale, torch.float16)
    parts: list[Tensor] = [d]
    if not symmetric:
        low = -zero.cpu() * scale
        m = low.to(torch.float16)
        if not bool(torch.isfinite(m).all()):
            raise FewbitsError(f"{layer.site.name}: the lower ends of its groups do not fit float16")
        change = max(change, float(((m.float() - low).abs() / low.abs().clamp_min(scale)).max()))
        parts.append(m)
    head = [part.repeat_interleave(repeat, 1).unsqueeze(-1).contiguous().view(torch.uint8) for part in parts]
    block = torch.cat([*head, *_packed(codes.cpu().unflatten(1, (runs, RUN)), fmt.bits)], -1).flatten(1)
    if heads is not None:
        block = _interleave(block, heads)
    name = "Q8_0" if fmt.bits == 8 else f"Q{fmt.bits}_{int(not symmetric)}"
    return block.contiguous().numpy(), name, change


def _packed(codes: Tensor, bits: int) -> list[Tensor]:
    """Codes [out, runs, 32] as the bytes of a block: of 5 bits the highest first, then the low halves side by side."""
    if bits == 8:
        return [codes.view(torch.uint8)]
    low, high = (codes & 15).chunk(2, -1)
    made = [low | (high << 4)]
    if bits == 5:
        digits = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
        made.insert(0, digits.sum(-1).to(torch.uint8))
    return made


def _interleave(rows: Tensor, heads: int, *, back: bool = False) -> Tensor:
    """Rows of each head (first half, second half) as pairs, as llama.cpp rotates them; `back` undoes it."""
    split = (heads, -1, 2) if back else (heads, 2, -1)
    return rows.unflatten(0, split).transpose(1, 2).flatten(0, 2)


def _heads(module: str, config: Any) -> int | None:
    last = module.rpartition(".")[2]
    if last == "q_proj":
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if last == "k_proj" else None


# -- metadata --------------------------------------------------------------------------------------------------------
def _describe(writer: Any, config: Any, subject: Subject) -> None:
    """What llama.cpp needs to know of the architecture."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(str(subject.loaded.ref)).name or config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(window)


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _write_tokenizer(writer: Any, subject: Subject, folder: Path) -> str:
    """Tokens, merges and special tokens; returns what was done."""
    import gguf

    tokenizer = subject.loaded.tokenizer
    described = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    splits = described.get("pre_tokenizer") or {}
    if (described.get("model") or {}).get("type") != "BPE" or splits.get("type") != "ByteLevel":
        writer.add_tokenizer_model("no_vocab")
        return "none of the model's" if tokenizer is None else "left out: not byte-level BPE split as GPT-2 does"
    model: Any = subject.loaded.model
    size = int(model.config.vocab_size)
    special = {entry["id"]: entry for entry in described.get("added_tokens", ())}
    words: dict[int, str] = {index: word for word, index in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(
        [
            kinds.UNUSED
            if index not in words
            else kinds.NORMAL
            if index not in special
            else kinds.CONTROL
            if special[index]["special"]
            else kinds.USER_DEFINED
            for index in range(size)
        ]
    )
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for role in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{role}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    return "byte-level BPE"


def _architecture(name: str) -> Any:
    import gguf

    return next(kind for kind, held in gguf.MODEL_ARCH_NAMES.items() if held == name)


def _named(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise FewbitsError(f"{name}: the gguf package has no name for it in this architecture")
    return str(found)
