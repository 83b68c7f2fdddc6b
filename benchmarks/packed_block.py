"""A block of a LLaMA-8B shape in W8A8, activations per token: what quantizing an input once for all layers gains.

    python benchmarks/packed_block.py --out packed_block.jsonl

Milliseconds of one block with random weights on one GPU, under CUDA graphs, medians, for a prompt of 2,048 tokens and
for 16: in floating point; packed with every layer quantizing its own input; packed as `fewbits.pack` leaves it but for
norms; and as `fewbits.pack` leaves it, norms quantizing as they norm. Outputs of the packed blocks are compared before
they are timed. `--scale 16` divides all widths.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from kernels import graph_time
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.formats import affine
from fewbits.packed import pack
from fewbits.packed.int8 import Int8Linear
from fewbits.papers.common import HEAD, token_rules, weight_rules
from fewbits.ranges import MinMax
from fewbits.recipe import Bits, Calibration, Recipe, Scheme
from fewbits.steps.calibrate import CalibrateActivations
from fewbits.steps.nearest import RoundNearest

TOKENS = (2048, 16)


def built(dtype: torch.dtype, scale: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=4096 // scale, intermediate_size=14336 // scale, num_hidden_layers=1,
        num_attention_heads=32 // scale, num_key_value_heads=max(1, 8 // scale), vocab_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(dtype).eval()


def rounded() -> Recipe:
    """Weights to nearest at 8 bits, inputs of layers on a grid per token."""
    bits = Bits.parse("W8A8")
    scheme = Scheme(weight_rules(bits, affine(8), MinMax(), without=HEAD), token_rules(bits, without=HEAD))
    return Recipe("rtn", bits, scheme, (CalibrateActivations(), RoundNearest()), Calibration(samples=1))


def blocks(model: LlamaForCausalLM) -> dict[str, nn.Module]:
    """The model's block in floating point and packed in three ways."""
    plain = copy.deepcopy(model.model.layers[0])
    ids = torch.randint(0, 128, (1, 16), device="cuda")
    fewbits.quantize(model, rounded(), [{"input_ids": ids}], device="cuda")
    print(pack(model, kernel="triton").sharing())
    fused = model.model.layers[0]
    shared = copy.deepcopy(fused)
    for module in shared.modules():
        vars(module).pop("forward", None)  # the norm's own again
    alone = copy.deepcopy(shared)
    for module in alone.modules():
        if isinstance(module, Int8Linear):
            module.shared = None
    return {"float": plain, "each its own": alone, "once for all": shared, "norms too": fused}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the rows there, one JSON line each")
    parser.add_argument("--scale", type=int, default=1)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("this table needs a CUDA GPU", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float16):
        model = built(dtype, asked.scale)
        made = blocks(model)
        for tokens in TOKENS:
            x = torch.randn(1, tokens, 4096 // asked.scale, device="cuda", dtype=dtype)
            places = model.model.rotary_emb(x, torch.arange(tokens, device="cuda")[None])

            def run(block: nn.Module, x: Tensor = x, places: Any = places) -> Tensor:
                out = block(x, position_embeddings=places)
                return out[0] if isinstance(out, tuple) else out

            with torch.no_grad():
                outs = {name: run(block).float() for name, block in made.items()}
                if not torch.equal(outs["once for all"], outs["each its own"]):
                    raise AssertionError("sharing changes the result")
                times = {name: graph_time([lambda block=block: run(block)]) / 1e3 for name, block in made.items()}
            base = outs["each its own"]
            apart = {name: float((out - base).norm() / base.norm()) for name, out in outs.items()}
            for name, took in times.items():
                row = {
                    "dtype": str(dtype)[6:], "tokens": tokens, "block": name, "ms": round(took, 4),
                    "times float": round(times["float"] / took, 2), "distance from each its own": apart[name],
                    "machine": torch.cuda.get_device_name(), "torch": torch.__version__,
                }  # fmt: skip
                rows.append(row)
                print(row["dtype"], tokens, f"{name:13} {took:.3f} ms  {row['times float']} times float", flush=True)
    if asked.out is not None:
        asked.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
