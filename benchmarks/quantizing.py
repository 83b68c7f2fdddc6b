"""How long quantizing takes: GPTQ and AWQ on a LLaMA shape, BRECQ on a ResNet shape, with random weights.

    python benchmarks/quantizing.py --device cuda --out quantizing.jsonl

One JSON line per run: seconds for each unit and in all, peak memory of the device, the machine. Weights are random, so
only time and memory mean anything. Activations between layers lie in host memory for GPTQ, which has a target for
memory too, and on the device for AWQ, which has one for time alone (`--activations`, in gigabytes). `--layers 8` builds
fewer of the 32 layers; the line then also says what 32 would take at the median layer's time. `--scale 64` divides all
widths, for a try on a CPU. `--arithmetic` is what BRECQ's blocks run in while they are learned. The targets and the
figures of other tools are printed beside ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits.bench.run import machine
from fewbits.engine import Budget
from fewbits.engine.progress import Progress
from fewbits.engine.source import Streamed

#: What each run is measured against: (figure, where it comes from).
ANCHORS = {
    "gptq": [(45.0, "target, seconds"), (226.0, "llm-compressor 0.14 on one H200, seconds; 3.9 GB")],
    "awq": [(90.0, "target, seconds")],
    "brecq": [(60.0, "target, seconds")],
}
#: Targets for the peak of GPU memory, gigabytes.
MEMORY = {"gptq": 4.0}
#: Gigabytes of activations that may lie on the device.
ACTIVATIONS = {"gptq": 0.0, "awq": 16.0}
LAYERS, TOKENS, SEQUENCES = 32, 2048, 128


class Stopwatch(Progress):
    """Seconds of each unit."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def start(self, total: int, forecast: str) -> None:
        print(forecast, flush=True)
        self._last = time.perf_counter()

    def advance(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(round(now - self._last, 3))
        self._last = now
        print(f"  unit {len(self.seconds)}: {self.seconds[-1]:.2f} s", flush=True)


def llama(layers: int, scale: int, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """LLaMA-3-8B's shape with `layers` layers, itself without weights: random ones are written to the folder, as
    safetensors files, unless it has them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096 // scale, intermediate_size=14336 // scale, num_hidden_layers=layers,
        num_attention_heads=max(32 // scale, 1), num_key_value_heads=max(8 // scale, 1), head_dim=128,
        vocab_size=max(128256 // scale, 64), max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    for number, (name, shape) in enumerate(shapes.items()):
        path = folder / f"{number:05d}.safetensors"
        if not path.exists():
            drawn = torch.randn(shape, generator=generator, device=device) * 0.02
            value = torch.ones(shape) if len(shape) == 1 else drawn
            save_file({name: value.to(dtype).cpu()}, path)
            del drawn, value
    model = LlamaForCausalLM._from_config(LlamaConfig.from_dict({**config.to_dict(), "num_hidden_layers": 0}))
    with torch.device("meta"):
        hollow = LlamaForCausalLM(config)
    hollow.model.rotary_emb = model.model.rotary_emb  # buffers hold values that no file has
    return hollow.to(dtype).eval()


def run_llama(
    recipe: str, bits: str, options: argparse.Namespace, device: torch.device, weights: Path
) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    room = ACTIVATIONS[recipe] if options.activations is None else options.activations
    with tempfile.TemporaryDirectory() as scratch:
        model = llama(options.layers, options.scale, weights, dtype, device)
        tokens = torch.randint(
            0, model.config.vocab_size, (options.sequences, options.tokens), generator=torch.Generator().manual_seed(1)
        )
        batches = [{"input_ids": part} for part in tokens.split(options.batch)]
        watch = Stopwatch(device)
        started = time.perf_counter()
        result = fewbits.quantize(
            model, recipe, batches, bits=bits, device=device, source=Streamed(weights, dtype), progress=watch,
            work_dir=Path(scratch) / "work", budget=Budget(device=int(room * 1e9)),
        )  # fmt: skip
        total = time.perf_counter() - started
    layer = statistics.median(watch.seconds)
    return {
        "run": f"{recipe} {bits}, LLaMA-8B shape / {options.scale}, {options.layers} layers, "
        f"{options.sequences} x {options.tokens} tokens, activations {'on the device' if room else 'in host memory'}",
        "recipe": recipe,
        "layers": options.layers,
        "scale": options.scale,
        "seconds": round(total, 2),
        "seconds_a_layer": layer,
        "seconds_for_32_layers": round(total + layer * (LAYERS - options.layers), 2),
        "units": watch.seconds,
        "peak_memory_bytes": result.peak_bytes,
    }


def run_resnet(arithmetic: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    import timm

    torch.manual_seed(0)
    size = max(224 // options.scale, 32)
    model = timm.create_model("resnet18", num_classes=1000).eval()
    images = torch.randn(options.images, 3, size, size, generator=torch.Generator().manual_seed(1))
    watch = Stopwatch(device)
    started = time.perf_counter()
    result = fewbits.quantize(
        model, "brecq", list(images.split(32)), bits="W4A16", device=device, progress=watch,
        options={"iters_w": options.iterations, "arithmetic": arithmetic},
    )  # fmt: skip
    return {
        "run": f"brecq W4A16, ResNet-18 at {size} pixels, {options.iterations} steps a block, {options.images} images, "
        f"{arithmetic}",
        "recipe": "brecq",
        "arithmetic": arithmetic,
        "scale": options.scale,
        "iterations": options.iterations,
        "seconds": round(time.perf_counter() - started, 2),
        "units": watch.seconds,
        "peak_memory_bytes": result.peak_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", choices=sorted(ANCHORS), default=sorted(ANCHORS))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--scale", type=int, default=1, help="divides all widths")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a forward")
    parser.add_argument("--activations", type=float, help="gigabytes of them that may lie on the device")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument(
        "--arithmetic", nargs="*", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"],
        help="what brecq runs in, once each",
    )  # fmt: skip
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as weights:
        for name in options.only:
            for arithmetic in options.arithmetic if name == "brecq" else [None]:
                measure(name, arithmetic, options, device, Path(weights))


def measure(
    name: str, arithmetic: str | None, options: argparse.Namespace, device: torch.device, weights: Path
) -> None:
    """One run, its row and what it is compared with. arithmetic: of brecq. weights: where the LLaMA shape's are, or
    will be."""
    print(f"{name}:", flush=True)
    if arithmetic is not None:
        row = run_resnet(arithmetic, options, device)
    else:
        row = run_llama(name, "W4A16g128", options, device, weights)
    row |= {"machine": machine(options.device), "torch": torch.__version__}
    with options.out.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")
    taken = row.get("seconds_for_32_layers", row["seconds"])
    print(f"{row['run']}: {taken:.1f} s, peak {row['peak_memory_bytes'] / 1e9:.2f} GB ({row['machine']})")
    for figure, what in ANCHORS[name] if options.scale == 1 else ():
        print(f"  {figure:g}: {what}")


if __name__ == "__main__":
    main()
