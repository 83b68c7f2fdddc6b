"""What vLLM answers to exported folders, against what the simulation answers.

    python scripts/vllm_runs.py simulate DIR ... --data TEXT --answers FOLDER    # where fewbits is installed
    python scripts/vllm_runs.py run DIR ... --answers FOLDER                     # where vLLM is installed

The two need not live in one environment: vLLM fixes a torch of its own. `simulate` lets the checkpoint that a folder
was exported from (or the folder itself, where it is a model in floating point) continue windows of TEXT's tokens at
every position, and keeps the tokens and the answers. `run` gives the same tokens to vLLM as prompts and prints one
line of JSON a folder: model, recipe, vLLM's version, the machine, the tokens compared, the share of positions with the
same most likely token, the differences of log probabilities, and both perplexities. It fails where vLLM does, and
where the share is below `--least`; what vLLM refuses is a row with an error.

`run` takes the GPU, or the CPU with vLLM's build for that (VLLM_CPU_KVCACHE_SPACE=1 keeps it small). vLLM's 8-bit
products saturate on CPUs without VNNI, and its build for CPUs without AVX512 lacks the kernel for 4-bit weights. With
`--torch-products` torch multiplies in place of these two kernels; that tests everything in vLLM but them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def kept(options: argparse.Namespace, folder: Path) -> Path:
    """The file with the answers for a folder."""
    return Path(options.answers) / f"{folder.resolve().name}.safetensors"


def simulate(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write what the simulation answers; what is written, without the numbers.

    tokens: int64 [windows, tokens]. For all of these but the first of a window, [windows, tokens - 1]: best (int64),
    the most likely token there; best_logprob, second_logprob, next_logprob, of it, of the one after it, and of the
    token that stands there.
    """
    from fewbits.engine.tree import as_call
    from fewbits.hub import checkpoint
    from fewbits.hub.data import load_data
    from fewbits.hub.models import load_model

    report = folder / "fewbits-export.json"
    source = Path(json.loads(report.read_text("utf-8"))["checkpoint"]) if report.exists() else folder
    made = checkpoint.description(source) if report.exists() else {}
    loaded = load_model(source)
    data = load_data(options.data, loaded, samples=options.windows, seqlen=options.tokens, purpose="evaluation")
    parts: dict[str, list[Tensor]] = {}
    for batch in data.batches():
        args, kwargs = as_call(batch)
        with torch.no_grad():
            logprobs = loaded.model(*args, **kwargs).logits[:, :-1].float().log_softmax(-1).cpu()
        tokens = (kwargs["input_ids"] if kwargs else args[0]).cpu()
        values, indices = logprobs.topk(2)
        found = {"tokens": tokens, "best": indices[..., 0], "best_logprob": values[..., 0]}
        found |= {"second_logprob": values[..., 1], "next_logprob": logprobs.gather(-1, tokens[:, 1:, None])[..., 0]}
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    recipe = f"{made['recipe']['name']} {made['recipe']['bits']}" if made else "floating point"
    facts = {"model": Path(loaded.rebuild_spec["ref"]).name, "recipe": recipe}
    file = kept(options, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.cat(values).contiguous() for name, values in parts.items()}, file, facts)
    return {"dir": folder.name, **facts, "answers": file.name}


def machine() -> str:
    """What vLLM runs on."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    return str(current_platform.get_device_name())


def torch_products() -> None:
    """Put exact products, of the same arguments, in place of vLLM's 8-bit and 4-bit kernels for CPUs."""
    from vllm import _custom_ops as ops

    prepare: Any = ops.create_onednn_scaled_mm
    shifts = torch.arange(0, 32, 4)

    def prepared(weight: Tensor, scales: Tensor, *rest: Any) -> Any:
        handler = prepare(weight, scales, *rest)
        handler.held = weight.double(), scales.double().flatten()
        return handler

    def of_8_bits(
        handler: Any, x: Tensor, output: Tensor, scale: Tensor, zero: Any, _: Any, bias: Tensor | None
    ) -> Tensor:
        codes, scales = handler.held
        found = ((x.double() - (0 if zero is None else zero)) @ codes) * scale.double() * scales
        return output.copy_(found if bias is None else found + bias)

    def of_4_bits(
        input: Tensor, q_weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *_: Any, **__: Any
    ) -> Tensor:
        groups, out = scales.shape
        columns = q_weight.numel() * 8 // out  # words of 8 codes for 8 outputs, blocks of 16 outputs
        codes = (q_weight.view(-1, columns, 2, 1) >> shifts & 15).view(-1, columns, 16).transpose(0, 1)
        zero = 8 if zeros is None else (zeros[..., None] >> shifts & 15).view(groups, 1, out)
        weight = (codes.reshape(groups, -1, out) - zero) * scales[:, None]
        return torch.nn.functional.linear(input, weight.view(columns, out).T, bias)

    ops.create_onednn_scaled_mm, ops.onednn_scaled_mm, ops.cpu_gemm_wna16 = prepared, of_8_bits, of_4_bits


def ask(options: argparse.Namespace, folder: Path, tokens: Tensor) -> tuple[dict[str, Tensor], str]:
    """(best, best_logprob and next_logprob as vLLM finds them, the type that it computed in)."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder), dtype=options.dtype, enforce_eager=True, max_model_len=tokens.shape[1] + 1,
        enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    prompts: Any = [{"prompt_token_ids": window} for window in tokens.tolist()]
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    found: dict[str, list[list[float]]] = {"best": [], "best_logprob": [], "next_logprob": []}
    for window, output in zip(tokens.tolist(), llm.generate(prompts, asked, use_tqdm=False), strict=True):
        places = [dict(place) for place in output.prompt_logprobs[1:]]
        best = [min(place, key=lambda token: place[token].rank) for place in places]
        found["best"].append(best)
        found["best_logprob"].append([place[token].logprob for place, token in zip(places, best, strict=True)])
        found["next_logprob"].append([place[token].logprob for place, token in zip(places, window[1:], strict=True)])
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    return {name: torch.tensor(value) for name, value in found.items()}, dtype


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One folder's row."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors with their own words
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    import vllm

    if options.torch_products:
        torch_products()
    with safe_open(kept(options, folder), "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        row = {"dir": folder.name, **file.metadata(), "vllm": vllm.__version__, "machine": machine()}
    row["products"] = "torch" if options.torch_products else "vllm"
    try:
        found, row["dtype"] = ask(options, folder, expected["tokens"])
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
    same = found["best"] == expected["best"]
    away = (found["next_logprob"] - expected["next_logprob"]).abs()
    margin = (expected["best_logprob"] - expected["second_logprob"])[~same]
    return row | {
        "tokens": same.numel(),
        "same_top1": round(float(same.float().mean()), 6),
        "largest_margin_lost": float(f"{margin.max():.4g}") if len(margin) else 0.0,
        "logprob_difference": {"largest": float(f"{away.max():.4g}"), "mean": float(f"{away.mean():.4g}")},
        "perplexity": round(float((-found["next_logprob"].double().mean()).exp()), 4),
        "perplexity_simulated": round(float((-expected["next_logprob"].double().mean()).exp()), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("simulate", "run"))
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="what `fewbits export` wrote, or a model")
    parser.add_argument("--answers", type=Path, required=True, help="folder of the simulation's answers")
    parser.add_argument("--data", help="simulate: text, as `fewbits export --data` takes it")
    parser.add_argument("--windows", type=int, default=16, help="simulate: windows of tokens (default 16)")
    parser.add_argument("--tokens", type=int, default=257, help="simulate: tokens a window (default 257)")
    parser.add_argument("--dtype", default="auto", help="run: what vLLM computes in (default: as it chooses)")
    parser.add_argument("--least", type=float, default=0.0, help="run: least share of the same top-1 (default 0)")
    parser.add_argument("--torch-products", action="store_true", help="run: torch multiplies on the CPU; see above")
    options = parser.parse_args()
    if options.mode == "simulate" and not options.data:
        parser.error("simulate needs --data")
    wrong = 0
    for folder in options.dirs:
        # a process for each: vLLM gives nothing back, and what it dies of should end one row
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            row = pool.submit({"simulate": simulate, "run": run}[options.mode], options, folder).result()
        wrong += "error" in row or row.get("same_top1", 1) < options.least
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
