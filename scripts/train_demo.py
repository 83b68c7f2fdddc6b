"""Make the demo models and their data: what src/fewbits/demo/ ships comes out of this script.

    python scripts/train_demo.py corpus                # the standard library's text -> .demo/corpus.safetensors
    python scripts/train_demo.py text --device cuda    # the language model (3 minutes on one H100)
    python scripts/train_demo.py digits --device cuda  # the vision model (one minute)
    python scripts/train_demo.py ship                  # float16 weights, data and metadata -> src/fewbits/demo/

Text: every `.py` file of the running Python's standard library (Python 3.11.7 for the shipped weights), in sorted
order, except the character tables in `encodings/`. Four files in a hundred (tests aside), chosen by the hash of their
path, are held out; windows of 257 bytes drawn from them with a fixed seed, half of them each, become the calibration
and the evaluation data. The rest is trained on.
Digits: scikit-learn's copy of the UCI handwritten digits (1797 images of 8 x 8 pixels with 17 grey levels), split in
the data set's own order and not at random, because neighbouring images are often by the same hand.

Everything is seeded. bfloat16 kernels differ between GPUs, so another card gives weights of the same quality, not the
same bits.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbits.demo.model import ByteLM, DigitViT, ImageConfig, TextConfig, normalise

WORK = Path(".demo")
PACKAGE = Path("src/fewbits/demo")
WINDOW = 257  # 256 inputs and the byte that follows the last
WINDOWS = 256  # of each of the two held-out sets


def held_out(path: str) -> bool:
    """Whether a standard library file (posix path relative to the library) is kept from training: 4 in 100, no
    tests.
    """
    return "test" not in path and int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100 < 4


def read_corpus() -> tuple[bytes, list[tuple[str, bytes]]]:
    """Training text, and the held-out files with their names."""
    root = Path(os.__file__).parent
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    files = [f for f in files if "site-packages" not in f and not f.startswith("encodings/")]
    train = [f for f in files if not held_out(f)]
    return b"\n".join((root / f).read_bytes() for f in train), [
        (f, (root / f).read_bytes()) for f in files if held_out(f)
    ]


def corpus() -> None:
    """Write the training bytes and the two held-out sets of windows."""
    train, rest = read_corpus()
    text = b"".join(content for _, content in rest)
    pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[: 2 * WINDOWS]
    if len(chosen) < 2 * WINDOWS:
        raise SystemExit(f"only {len(chosen)} held-out windows in {len(rest)} files; is the standard library complete?")
    WORK.mkdir(exist_ok=True)
    save_file(
        {
            "train": torch.frombuffer(bytearray(train), dtype=torch.uint8),
            "calibration": pieces[chosen[:WINDOWS].sort().values].contiguous(),
            "eval": pieces[chosen[WINDOWS:].sort().values].contiguous(),
        },
        WORK / "corpus.safetensors",
        {"python": platform.python_version(), "held_out": "\n".join(name for name, _ in rest)},
    )
    print(f"{len(train)} bytes to train on, {len(pieces)} held-out windows from {len(rest)} files")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 per cent of the steps, then a cosine to 1 per cent of the peak."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def optimiser(model: nn.Module, peak: float, decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def progress(name: str, curve: list[dict[str, float]], step: int, start: float, train: float, held_out: float) -> None:
    """Append a point to the curve and print it."""
    seconds = round(time.perf_counter() - start, 1)
    curve.append({"step": step, "train": round(train, 4), "eval": round(held_out, 4), "seconds": seconds})
    print(name, json.dumps(curve[-1]), flush=True)


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """Mean cross-entropy of the next byte, in bits, over windows [n, 257] of uint8."""
    windows = windows.to(next(model.parameters()).device).long()
    losses = [
        F.cross_entropy(model(part[:, :-1]).float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum").double()
        for part in windows.split(64)
    ]
    return float(torch.stack(losses).sum() / windows[:, 1:].numel() / math.log(2))


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose block weights are rounded to the nearest of 2^bits levels between each row's smallest and
    largest.
    """
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            w = module.weight
            low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero = (-low / scale).round()
            w.copy_(((w / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale)
    return model


def text(args: argparse.Namespace) -> None:
    """Train the language model and store it with its curve."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    data = load_file(WORK / "corpus.safetensors")
    stream = data["train"].to(device)
    config = replace(TextConfig(), width=args.width, depth=args.depth, heads=args.width // 32)
    model = ByteLM(config).to(device)
    optim = optimiser(model, args.lr, args.decay)

    def loss_of(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of
    generator = torch.Generator(device).manual_seed(args.seed)
    offsets = torch.arange(WINDOW, device=device)
    start = time.perf_counter()
    curve: list[dict[str, float]] = []
    for step in range(args.steps):
        for group in optim.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        first = torch.randint(len(stream) - WINDOW, (args.batch, 1), generator=generator, device=device)
        loss = step_loss(stream[first + offsets].long())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        if step % max(1, args.steps // 20) == 0 or step == args.steps - 1:
            progress(args.name, curve, step, start, loss.item() / math.log(2), bits_per_byte(model, data["eval"][:64]))
    store(
        model,
        config.to_dict(),
        training_record(args, start, curve),
        args.name,
        lambda m: bits_per_byte(m, data["eval"]),
    )


def digits_data() -> dict[str, Tensor]:
    """Images [n, 8, 8] uint8 in 0..16 and labels [n] uint8; the first two thirds to train on, the rest to evaluate
    on.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.uint8)
    labels = torch.tensor(bunch.target, dtype=torch.uint8)
    split = len(images) * 2 // 3
    return {
        "train_images": images[:split],
        "train_labels": labels[:split],
        "eval_images": images[split:],
        "eval_labels": labels[split:],
    }


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [n, 1, 8, 8] turned, scaled and shifted a little, at random."""
    n = len(images)
    angle, wide, high, right, down = (torch.rand(5, n, generator=generator, device=images.device) - 0.5).unbind()
    cos, sin = (0.6 * angle).cos(), (0.6 * angle).sin()
    theta = torch.stack([cos * (1 + 0.3 * wide), -sin, 0.5 * right, sin, cos * (1 + 0.3 * high), 0.5 * down], 1)
    grid = F.affine_grid(theta.view(n, 2, 3), list(images.shape), align_corners=False)
    empty = images.amin()  # what is turned in from outside the image is background, not grey
    return F.grid_sample(images - empty, grid, align_corners=False) + empty


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images classified right."""
    return float((model(images).argmax(1) == labels).double().mean())


def digits(args: argparse.Namespace) -> None:
    """Train the vision model and store it with its curve."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    data = {key: value.to(device) for key, value in digits_data().items()}
    images, labels = normalise(data["train_images"]), data["train_labels"].long()
    test, answers = normalise(data["eval_images"]), data["eval_labels"].long()
    config = replace(ImageConfig(), width=args.width, depth=args.depth)
    model = DigitViT(config).to(device)
    optim = optimiser(model, args.lr, args.decay)
    generator = torch.Generator(device).manual_seed(args.seed)
    start = time.perf_counter()
    curve: list[dict[str, float]] = []
    for step in range(args.steps):
        for group in optim.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        chosen = torch.randint(len(images), (args.batch,), generator=generator, device=device)
        loss = F.cross_entropy(model(moved(images[chosen], generator)), labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        if step % max(1, args.steps // 20) == 0 or step == args.steps - 1:
            progress(args.name, curve, step, start, loss.item(), accuracy(model, test, answers))
    store(model, config.to_dict(), training_record(args, start, curve), args.name, lambda m: accuracy(m, test, answers))


def training_record(args: argparse.Namespace, start: float, curve: list[dict[str, float]]) -> dict[str, Any]:
    """How a model was trained, for its metadata."""
    return {
        **{key: getattr(args, key) for key in ("seed", "steps", "batch", "lr", "decay")},
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "curve": curve,
    }


def store(model: nn.Module, config: dict[str, Any], training: dict[str, Any], name: str, metric: Any) -> None:
    """Write float16 weights and what was measured, float and rounded, to the output folder."""
    model = model.half().float().eval()  # what is measured is what is shipped
    measured = {"float": metric(model), **{f"rtn-W{b}": metric(rounded(model, b)) for b in (8, 6, 4, 3, 2)}}
    print(name, json.dumps(measured), flush=True)
    out = Path(os.environ.get("OUT", WORK))
    save_file({k: v.half().cpu().contiguous() for k, v in model.state_dict().items()}, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(
        json.dumps({"config": config, "training": training, "measured": measured}, indent=1)
    )


LICENCES = {
    "text": "Text of the Python standard library, Python Software Foundation License Version 2 (PYTHON-LICENSE.txt).",
    "digits": "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
    "CC BY 4.0.",
}


def ship() -> None:
    """Put weights, data and metadata of both models where the package reads them."""
    for name in ("text", "digits"):
        shutil.copyfile(WORK / f"{name}.safetensors", PACKAGE / f"{name}.safetensors")
        record = json.loads((WORK / f"{name}.json").read_text())
        (PACKAGE / f"{name}.json").write_text(json.dumps({**record, "data": LICENCES[name]}, indent=1) + "\n")
    corpus = load_file(WORK / "corpus.safetensors")
    save_file({key: corpus[key] for key in ("calibration", "eval")}, PACKAGE / "text-data.safetensors")
    images = digits_data()
    chosen = torch.randperm(len(images["train_images"]), generator=torch.Generator().manual_seed(0))[:256].sort().values
    shipped = {f"calibration_{key}": images[f"train_{key}"][chosen] for key in ("images", "labels")}
    shipped |= {f"eval_{key}": images[f"eval_{key}"].contiguous() for key in ("images", "labels")}
    save_file(shipped, PACKAGE / "digits-data.safetensors")
    total = sum(path.stat().st_size for path in PACKAGE.iterdir() if path.suffix in (".safetensors", ".json"))
    print(f"{total / 1e6:.2f} MB shipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("corpus")
    commands.add_parser("ship")
    for name, width, depth, steps, batch, lr, decay in (
        ("text", 128, 7, 10000, 256, 3e-3, 0.02),
        ("digits", 64, 2, 8000, 128, 3e-3, 0.02),
    ):
        sub = commands.add_parser(name)
        sub.add_argument("--name", default=name)
        sub.add_argument("--width", type=int, default=width)
        sub.add_argument("--depth", type=int, default=depth)
        sub.add_argument("--steps", type=int, default=steps)
        sub.add_argument("--batch", type=int, default=batch)
        sub.add_argument("--lr", type=float, default=lr)
        sub.add_argument("--decay", type=float, default=decay)
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--device", default="cpu")
    args = parser.parse_args()
    {"corpus": lambda _: corpus(), "ship": lambda _: ship(), "text": text, "digits": digits}[args.command](args)


if __name__ == "__main__":
    main()
