"""What vLLM makes of exported folders: the scheme that its own configuration classes choose for each layer.

    python scripts/vllm_reads.py DIR ...

For an environment with vLLM in it, which fixes a torch of its own; no GPU is needed, and nothing is run. Fails where
vLLM refuses a configuration, or would take a layer that is stored in floating point for a quantized one, or the other
way round.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def stored(folder: Path) -> tuple[set[str], set[str]]:
    """(linear layers stored in codes, layers stored as matrices of numbers)."""
    quantized, plain = set(), set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                layer, _, kind = name.rpartition(".")
                if kind in ("weight_packed", "qweight", "weight_scale"):
                    quantized.add(layer)
                elif kind == "weight" and len(file.get_slice(name).get_shape()) == 2 and "embed" not in layer:
                    plain.add(layer)
    return quantized, plain - quantized


def chosen(config: dict[str, Any]) -> Any:
    """vLLM's answer to a layer's name: the name of the scheme or method, None for floating point."""
    if config["quant_method"] == "compressed-tensors":
        from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
            CompressedTensorsConfig,
        )

        read = CompressedTensorsConfig.from_config(config)
        read._check_scheme_supported = lambda *_, **__: True  # a question to the GPU
        linear = torch.nn.Linear(1, 1)

        def scheme(layer: str) -> str | None:
            found = read.get_scheme(linear, layer)
            return None if found is None else type(found).__name__

        return scheme
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    made = get_quantization_config(config["quant_method"]).from_config(config)

    def method(layer: str) -> str | None:
        kind = ParallelLMHead if layer == "lm_head" else LinearBase
        module = kind.__new__(kind)  # what it is, without the weights that a GPU would hold
        torch.nn.Module.__init__(module)
        if config["quant_method"] == "gptq":  # the method itself asks the GPU: what it would be made of instead
            found = get_linear_quant_method(made, module, layer, lambda of: f"{of.weight_bits} bits, {of.group_size}")
        else:
            found = made.get_quant_method(module, layer)
        if found is None or "Unquantized" in type(found).__name__:
            return None
        return found if isinstance(found, str) else type(found).__name__

    return method


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    import vllm

    wrong = 0
    for folder in map(Path, sys.argv[1:]):
        config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
        scheme = chosen(config)
        quantized, plain = stored(folder)
        kinds: dict[str, int] = {}
        for layer in quantized:
            kind = scheme(layer)
            kinds[str(kind)] = kinds.get(str(kind), 0) + 1
            wrong += kind is None
        taken = sorted(layer for layer in plain if scheme(layer) is not None)
        wrong += len(taken)
        print(f"{folder}: vLLM {vllm.__version__}: {kinds}, {len(plain) - len(taken)} in floating point", *taken)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
