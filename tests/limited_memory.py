"""Quantize a model from disk under a limit on private memory that the whole does not fit in. Prints one JSON line."""

from __future__ import annotations

import json
import resource
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine_models import Encoder, encoder, tokens
from fewbits import quantize
from fewbits.engine.source import Streamed
from fewbits.papers import build_recipe

WIDTH, DEPTH, VOCABULARY = 384, 32, 64
ALLOWED = 64 << 20


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Written layer by layer: this process never holds the model either.
    small = encoder(width=WIDTH, depth=1, vocabulary=VOCABULARY)
    total = 0
    held = small.state_dict()
    for index in range(DEPTH):
        block = {
            f"blocks.{index}.{k.removeprefix('blocks.0.')}": v.clone()
            for k, v in held.items()
            if k.startswith("blocks.0.")
        }
        total += sum(v.numel() * 4 for v in block.values())
        save_file(block, folder / f"block{index:02d}.safetensors")
    save_file({k: v.clone() for k, v in held.items() if not k.startswith("blocks.")}, folder / "rest.safetensors")
    del small, held, block
    # One run first, so that what libraries allocate once is there before the limit is set.
    quantize(encoder(), build_recipe("gptq", "W4A16"), tokens(4))
    with torch.device("meta"):
        encoder()
    status = Path("/proc/self/status").read_text().splitlines()
    used = int(next(line for line in status if line.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + ALLOWED, used + ALLOWED))

    def attempt(work) -> str:
        try:
            work()
        except (MemoryError, RuntimeError) as error:
            traceback.print_exc()
            return "MemoryError" if isinstance(error, MemoryError) or "memory" in str(error) else repr(error)
        return "ok"

    def whole() -> None:
        model = {}
        for path in sorted(folder.glob("*.safetensors")):
            model |= {k: v.clone() for k, v in load_file(path).items()}

    with torch.device("meta"):
        hollow = Encoder(WIDTH, DEPTH, VOCABULARY).eval()
    results: list = []

    def streamed() -> None:
        results.append(
            quantize(
                hollow,
                build_recipe("gptq", "W4A16"),
                tokens(4, vocabulary=VOCABULARY),
                source=Streamed(folder),
                work_dir=folder / "work",
            )
        )

    outcome = attempt(streamed)
    in_memory = attempt(whole)
    units = len(results[0].units) if results else 0
    forecast = results[0].forecast.peak if results else 0
    print(
        json.dumps(
            {
                "in_memory": in_memory,
                "streamed": outcome,
                "model_bytes": total,
                "allowed_bytes": ALLOWED,
                "units": units,
                "forecast": forecast,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
