"""Exported integers against float32 in onnxruntime on the CPU at hand, measured in turn in one run.

    python benchmarks/onnx_speed.py --zoo ZOO --data DATA --threads 2 --out onnx_speed.jsonl

Three questions. W8A8 classifiers of the ZOO against their float32 files (the ResNet with bytes at the inputs of layers,
as most recipes have them, and where integer devices make them); the same in onnxruntime's precise mode, which CPUs
without VNNI need for right answers. A chain of 4096 x 4096 layers whose 4-bit weights exceed the last cache, one
row at a time, as decoding does. And a small language model of the ZOO on one token, whose weights lie in the cache.
Language models come without a cache of keys and values here: this is the cost of the weights, not of generation.
Each row holds the median and the least time of each file; ratios are of medians, `best_ratio`s of least times, which a
machine that others use distorts less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import nn

from fewbits.api import quantize
from fewbits.attach import attachment_of
from fewbits.export.base import Subject
from fewbits.export.onnx.runtimes import PRECISE, saturates
from fewbits.export.onnx.trace import Call, traced
from fewbits.export.targets import load_target
from fewbits.hub import checkpoint
from fewbits.hub.loaded import LoadedModel
from fewbits.hub.models import load_model
from fewbits.workflow import quantize_reference

CLASSIFIERS = (("resnet10t_w32", "rtn"), ("resnet10t_w32", "jacob-integer-only"), ("vit_tiny", "rtn"))
WIDTH, DEPTH = 4096, 8


def session(file: Path, threads: int, precise: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others may need the cores
    if precise:
        options.add_session_config_entry(PRECISE, "1")
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def measure(
    sessions: dict[str, ort.InferenceSession], inputs: dict[str, np.ndarray], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every run of each, in turn so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for held in sessions.values():
        for _ in range(3):
            held.run(None, inputs)
    end = time.monotonic() + seconds
    while time.monotonic() < end or min(map(len, times.values())) < 5:
        for name, held in sessions.items():
            started = time.perf_counter()
            held.run(None, inputs)
            times[name].append(1000 * (time.perf_counter() - started))
    return times


def float_file(loaded: LoadedModel, batch: Any, file: Path) -> None:
    call = Call.of(loaded, batch)
    tensors = call.tensors(batch)
    with torch.no_grad():
        call.run(*tensors)
    ir.save(traced(call, None, tensors, 20)[0], file)


def row(what: str, shape: str, file: Path, found: dict[str, list[float]]) -> dict[str, Any]:
    made: dict[str, Any] = {"what": what, "shape": shape, "megabytes": round(file.stat().st_size / 1e6, 1)}
    plain = found["float32"]
    for name, times in found.items():
        made |= {f"{name}_ms": round(statistics.median(times), 4), f"{name}_best_ms": round(min(times), 4)}
        if name != "float32":
            made[f"{name}_ratio"] = round(statistics.median(plain) / statistics.median(times), 3)
            made[f"{name}_best_ratio"] = round(min(plain) / min(times), 3)
    return made


def classifier(name: str, recipe: str, args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    saved, folder = work / f"{name}-{recipe}", work / f"{name}-{recipe}-onnx"
    quantize_reference(
        args.zoo / name, recipe, "W8A8", out=saved, samples=32, options={"target": "onnxruntime"},
        calib=args.data / "cifar10/calibration.parquet",
    )  # fmt: skip
    loaded = checkpoint.load(saved)
    folder.mkdir()
    attachment = attachment_of(loaded.model)
    assert attachment is not None
    load_target("onnx").write(Subject(loaded, attachment), folder)
    plain = load_model(args.zoo / name)
    batch = plain.example_batch(2)
    float_file(plain, batch, work / f"{name}.onnx")
    file = folder / "model.onnx"
    sessions = {
        "float32": session(work / f"{name}.onnx", args.threads),
        "int8": session(file, args.threads),
        "int8_precise": session(file, args.threads, precise=True),
    }
    found = []
    for size in (1, 16):
        x = torch.randn(size, *batch.shape[1:], generator=torch.Generator().manual_seed(0)).numpy()
        found.append(row(f"{name} {recipe} W8A8", f"batch {size}", file, measure(sessions, {"input": x}, args.seconds)))
    return found


def packed(
    what: str, model: LoadedModel, batch: Any, bits: str, inputs: dict[str, dict[str, np.ndarray]],
    args: argparse.Namespace, work: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """A model in float32 against its MatMulNBits file at both accuracy levels."""
    stem = work / what.replace(" ", "-")
    plain = stem.with_suffix(".onnx")
    float_file(model, batch, plain)
    result = quantize(model.model, "rtn", [batch], bits=bits)
    sessions = {"float32": session(plain, args.threads)}
    for level in (0, 4):
        folder = stem.with_name(f"{stem.name}-{level}")
        folder.mkdir()
        load_target("onnx").write(Subject(model, result.attachment, batches=[batch]), folder, accuracy_level=level)
        sessions[f"level{level}"] = session(folder / "model.onnx", args.threads)
    del result
    file = folder / "model.onnx"
    return [
        row(f"{what} {bits}", shape, file, measure(sessions, given, args.seconds)) for shape, given in inputs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each comparison")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        for item in found:
            item |= {"threads": args.threads, "vnni": not saturates(), "onnxruntime": ort.__version__}
            print(json.dumps(item), flush=True)
        rows.extend(found)

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name, recipe in CLASSIFIERS:
            keep(classifier(name, recipe, args, work))
        opt = load_model(args.zoo / "opt")
        ids = {f"{count} token(s)": {"input_ids": np.full((1, count), 7)} for count in (1, 32)}
        batch = {"input_ids": torch.full((2, 16), 7), "use_cache": False}
        keep(packed("opt", opt, batch, "W4A16g32", ids, args, work))
        chain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))).eval()
        layers = LoadedModel("chain", "module", chain, "other", {}, {"kind": "module"})
        x = {f"{count} row(s)": {"input": np.ones((count, WIDTH), np.float32)} for count in (1, 8)}
        keep(packed(f"{DEPTH} layers of {WIDTH}", layers, torch.ones(2, WIDTH), "W4A16g128", x, args, work))
    args.out.write_text("".join(json.dumps(item) + "\n" for item in rows))


if __name__ == "__main__":
    main()
