"""AWQ checkpoints in the GEMM layout: `qweight`, `qzeros` and `scales` for every quantized linear module.

qweight: int32 [in, out / 8], eight 4-bit codes of neighbouring outputs in a word, in the order 0 2 4 6 1 3 5 7 from the
lowest bits up. qzeros: int32 [groups, out / 8], zero points in the same order. scales: float16 [groups, out].
One group size holds for all layers. Symmetric grids are stored with their zero point, 8.

The simulation computes with float32 scales; their rounding to float16 (at most 2^-11 of each) is measured and reported.
`check` lets compressed-tensors' converter for AutoAWQ decode the files and runs the model in transformers.

Source: the released code of AutoAWQ, vLLM's `quantization/awq.py`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.export.base import Obstacle, Subject, Target
from fewbits.export.linears import group_of, half, linears, stored, unfit
from fewbits.export.transformers_folder import check_dense, write_folder

#: Which of eight neighbours lies at each place of a word, from the lowest bits up.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4


class Export(Target):
    """`dtype`: float16 or bfloat16, of the scales and of what stays in floating point."""

    name = "awq"
    about = "AWQ checkpoints (GEMM layout) for vLLM, AutoAWQ"
    profile_name = "awq"
    packages = ("transformers", "compressed_tensors")
    kinds = ("transformers",)

    def obstacles(self, subject: Subject) -> list[Obstacle]:
        found = super().obstacles(subject) or unfit(subject, self.name)
        if found or not subject.layers:
            return found
        common = Counter(map(group_of, subject.layers)).most_common(1)[0][0]
        for layer in subject.layers:
            out = len(layer.codes)
            if out % len(ORDER):
                found.append(Obstacle(layer.site.name, f"awq needs rows in multiples of {len(ORDER)}, not {out}"))
            if layer.module.rpartition(".")[2] == "lm_head":
                found.append(Obstacle(layer.site.name, "awq keeps the head in floating point"))
            if group_of(layer) != common:
                found.append(
                    Obstacle(
                        layer.site.name,
                        f"awq has one group size for all layers, {_words(common)} here; this one has "
                        f"{_words(group_of(layer))}",
                    )
                )
        return found

    def write(self, subject: Subject, folder: Path, *, dtype: str = "float16") -> dict[str, Any]:  # type: ignore[override]
        kept = half(dtype)
        replaced: dict[str, Tensor] = {}
        worst = 0.0
        for layer in subject.layers:
            codes, zero = (value.cpu() for value in layer.unsigned())
            scale, change = stored(layer, layer.scales()[0].cpu(), kept)
            replaced |= {
                f"{layer.module}.qweight": pack(codes.T),
                f"{layer.module}.qzeros": pack(zero.T),
                f"{layer.module}.scales": scale.T.contiguous(),
            }
            worst = max(worst, change)
        coded = {layer.module for layer in subject.layers}
        config = {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": group_of(subject.layers[0]) if subject.layers else 128,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [name for name in linears(subject.loaded.model) if name not in coded],
        }
        write_folder(subject, folder, replaced, config, kept)
        return {"layers": len(subject.layers), "dtype": dtype, "scale_change": worst, **config}

    def check(self, subject: Subject, folder: Path) -> list[dict[str, Any]]:
        return check_dense(subject, folder, _decode, "compressed-tensors", "converter")


def pack(codes: Tensor) -> Tensor:
    """Integers 0..15 [rows, columns] -> int32 [rows, columns / 8], along the rows."""
    eights = codes.to(torch.int64).unflatten(1, (-1, len(ORDER)))[..., list(ORDER)]
    words = (eights << torch.arange(0, 32, _BITS)).sum(-1)
    # the same 32 bits as a signed number
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def _decode(config: dict[str, Any], module: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """A module's weight from what its file holds, by compressed-tensors' converter and decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if "qweight" not in tensors:
        return None
    converter = AutoAWQConverter.from_autoawq_config(config)
    found = converter.process({f"{module}.{name}": value for name, value in tensors.items()})
    local = {name.removeprefix(f"{module}."): value for name, value in found.items()}
    local["weight_scale"] = local["weight_scale"].float()
    size = config["group_size"]
    weights = QuantizationArgs(
        num_bits=config["bits"],
        symmetric=False,
        strategy="channel" if size == -1 else "group",
        group_size=None if size == -1 else size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    dense: Tensor = BaseCompressor.get_value_from_registry("pack-quantized").decompress(local, scheme)["weight"]
    return dense


def _words(group: int) -> str:
    return "a whole row" if group == -1 else str(group)
