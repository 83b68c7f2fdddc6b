"""GPTQ checkpoints: `qweight`, `qzeros`, `scales` and `g_idx` for every quantized linear module.

qweight: int32 [in * bits / 32, out], 32 codes of one column after another along the input as a dense string of bits.
qzeros: int32 [groups, out * bits / 32], zero points packed the same way along the output; in the first form of the
format ("gptq") they are stored less one, in the second ("gptq_v2") as they are. scales: float16 [groups, out]. g_idx:
int32 [in], each column's group, which holds the groups of columns that were quantized in the order of activations.
Layers that differ in bits or groups, and linear modules left in floating point, are listed under `dynamic`, which vLLM
and GPTQModel read. Of all this, vLLM (0.32, 0.33) takes symmetric weights of 4 and 8 bits that are not in the order of
activations, and refuses the rest when it reads the configuration; `write` says so.

The simulation computes with float32 scales; their rounding to float16 (at most 2^-11 of each) is measured and reported.

Source: the released code of AutoGPTQ and GPTQModel, vLLM's `quantization/gptq.py`, later `auto_gptq.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.export.base import Obstacle, Subject, Target
from fewbits.export.layers import Layer
from fewbits.export.linears import group_of, half, linears, stored, unfit
from fewbits.export.transformers_folder import check_dense, write_folder
from fewbits.kernels.words import pack_words

FORMATS = ("gptq", "gptq_v2")
#: Linear modules that vLLM runs as one, by the name that it looks up for them.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
#: Bits, group size, and whether symmetric.
Form = tuple[int, int, bool]


class Export(Target):
    """`checkpoint_format`: gptq (zero points less one) or gptq_v2; by default the first, unless a zero point is 0, on
    which its readers disagree. `dtype`: float16 or bfloat16, of the scales and of what stays in floating point.
    """

    name = "gptq"
    about = "GPTQ checkpoints for vLLM, ExLlama, GPTQModel"
    profile_name = "gptq"
    packages = ("transformers", "compressed_tensors")
    kinds = ("transformers",)
    holds = frozenset({"order"})

    def obstacles(self, subject: Subject) -> list[Obstacle]:
        found = super().obstacles(subject) or unfit(subject, self.name)
        return found or [
            Obstacle(layer.site.name, f"gptq needs rows and columns in multiples of 32, not {out} x {columns}")
            for layer in subject.layers
            for out, columns in [tuple(layer.codes.shape)]
            if out % 32 or columns % 32
        ]

    def write(  # type: ignore[override]
        self, subject: Subject, folder: Path, *, checkpoint_format: str | None = None, dtype: str = "float16"
    ) -> dict[str, Any]:
        if checkpoint_format is None:
            lowest = any(bool((layer.unsigned()[1] == 0).any()) for layer in subject.layers)
            checkpoint_format = FORMATS[lowest]
        if checkpoint_format not in FORMATS:
            raise FewbitsError(f"checkpoint_format={checkpoint_format!r}: choose one of {', '.join(FORMATS)}")
        kept = half(dtype)
        replaced: dict[str, Tensor] = {}
        worst = 0.0
        for layer in subject.layers:
            made, change = _tensors(layer, checkpoint_format, kept)
            replaced |= {f"{layer.module}.{name}": value for name, value in made.items()}
            worst = max(worst, change)
        config = _config(subject, checkpoint_format)
        write_folder(subject, folder, replaced, config, kept)
        refused = _refused(subject)
        notes = [] if refused is None else [f"vLLM refuses {refused}; awq or compressed-tensors may do"]
        facts = {"layers": len(subject.layers), "dtype": dtype, "scale_change": worst}
        return {**facts, "vllm_refuses": refused, "notes": notes, **config}

    def check(self, subject: Subject, folder: Path) -> list[dict[str, Any]]:
        return check_dense(subject, folder, _decode, "compressed-tensors", "unpacking")


def _form(layer: Layer) -> Form:
    """(bits, columns a group or -1, whether every zero point lies in the middle)."""
    return layer.uniform.bits, group_of(layer), layer.uniform.zero_point in ("none", "middle")


def _fused(forms: dict[str, Form | None]) -> dict[str, set[Form | None]]:
    """The forms of the linear modules that vLLM runs as one, where all of them are there, by the name that it then
    looks up."""
    found = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in forms):
        for fused, parts in FUSED.items():
            names = [f"{parent}.{part}" for part in parts]
            if all(name in forms for name in names):
                found[f"{parent}.{fused}"] = {forms[name] for name in names}
    return found


def _refused(subject: Subject) -> str | None:
    """What vLLM refuses in this model; None where it takes it."""
    mixed = [name for name, forms in _fused(_forms(subject)).items() if len(forms) > 1]
    found = {f"{name}, in which layers differ" for name in mixed}
    for layer in subject.layers:
        bits, _, symmetric = _form(layer)
        if bits not in (4, 8):
            found.add(f"{bits} bits")
        if not symmetric:
            found.add("zero points")
        if layer.group_index is not None:
            found.add("groups in the order of activations (act_order)")
    return ", ".join(sorted(found)) or None


def _tensors(layer: Layer, checkpoint_format: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    bits = layer.uniform.bits
    codes, zero = (value.cpu() for value in layer.unsigned())
    if checkpoint_format == "gptq":
        if bool((zero == 0).any()):
            raise FewbitsError(
                f"{layer.site.name}: a group has its zero point at code 0, which readers of the first GPTQ form do not "
                "agree on; set checkpoint_format=gptq_v2"
            )
        zero = zero - 1
    scale, change = stored(layer, layer.scales()[0].cpu(), dtype)
    columns = codes.shape[1]
    index = layer.group_index
    if index is None:
        index = torch.arange(columns) // (layer.group_size or columns)
    return {
        "qweight": pack_words(codes, bits).contiguous(),
        "qzeros": pack_words(zero.T.to(torch.int64), bits).T.contiguous(),
        "scales": scale.T.contiguous(),
        "g_idx": index.cpu().to(torch.int32),
    }, change


def _forms(subject: Subject) -> dict[str, Form | None]:
    """The form of every linear module; None of one in floating point."""
    found: dict[str, Form | None] = dict.fromkeys(linears(subject.loaded.model))
    return found | {layer.module: _form(layer) for layer in subject.layers}


def _config(subject: Subject, checkpoint_format: str) -> dict[str, Any]:
    forms = _forms(subject)
    common = Counter(form for form in forms.values() if form is not None).most_common(1)[0][0]
    alike = {name: next(iter(of)) for name, of in _fused(forms).items() if len(of) == 1}
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(name)}$": dict(zip(("bits", "group_size", "sym"), form, strict=True))
        for name, form in (forms | alike).items()
        if form not in (common, None)
    }
    dynamic |= {f"-:^{re.escape(name)}$": {} for name, form in (forms | alike).items() if form is None}
    bits, group, symmetric = common
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": any(layer.group_index is not None for layer in subject.layers),
        "static_groups": False,
        "true_sequential": False,
        "lm_head": forms.get("lm_head") is not None,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def _decode(config: dict[str, Any], module: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """A module's weight from what its file holds, the words unpacked by another package."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    if "qweight" not in tensors:
        return None
    bits = config["dynamic"].get(f"+:^{re.escape(module)}$", config)["bits"]
    qweight, qzeros, scales, index = (tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
    groups, out = scales.shape
    middle = 1 << (bits - 1)  # that package's codes are signed
    codes = unpack_from_int32(qweight.T.contiguous(), bits, torch.Size((out, len(index)))).float() + middle
    zeros = unpack_from_int32(qzeros, bits, torch.Size((groups, out))).float() + middle
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    where = index.long()
    return (codes - zeros.T[:, where]) * scales.float().T[:, where]
