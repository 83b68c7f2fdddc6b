"""Driver of the kill test: quantize in child processes, kill -9 them at random moments, resume, compare every bit.

Usage: kill_and_resume.py FOLDER CASE TRIALS KILLS. So many trials, and more (at most four times as many) until so many
kills hit a run that had committed something and was not finished: how many there were is printed. Exits with 0 when
every trial ended with the uninterrupted run's bits.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # optimisers import it at first use: once here, so that the kills hit work and not that
from safetensors.torch import load_file, save_file

from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.papers import build_recipe

CASES = {
    "brecq": lambda: (skipnet(), build_recipe("brecq", "W3A4", {"iters_w": 12, "iters_a": 6}), images(8)),
    "smoothquant+gptq": lambda: (encoder(), build_recipe("smoothquant+gptq", "W4A8"), tokens(8)),
    "repq-vit+brecq": lambda: (
        encoder(),
        build_recipe("repq-vit+brecq", "W4A4", {"iters_w": 8, "iters_a": 4}),
        tokens(8),
    ),
}


def run(case: str, work: Path, out: Path) -> None:
    torch.set_num_threads(1)
    model, recipe, batches = CASES[case]()
    result = quantize(model, recipe, batches, seed=3, work_dir=work, resume=True)
    held = {f"p/{name}": value.contiguous().clone() for name, value in model.state_dict().items()}
    for site, quantizer in result.attachment.items():
        held |= (
            {f"q/{site.name}/{name}": value.clone() for name, value in quantizer.params.items()}
            if quantizer.ready
            else {}
        )
    held |= {f"c/{name}": codes.contiguous().clone() for name, codes in result.attachment.codes.items()}
    with torch.no_grad():
        held["output"] = model(batches[0]).contiguous()
    save_file(held, out)


def child(case: str, work: Path, out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(case, work, out)
            code = 0
        finally:
            os._exit(code)
    return pid


def commits(work: Path) -> int:
    return len(list(work.glob("sweep*.safetensors")))


def killed(pid: int, work: Path, pause: float) -> int:
    """Kill a child at a random moment after it committed none, one or two units more; the child's wait status."""
    goal = commits(work) + random.randint(0, 2)
    while commits(work) < goal:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    time.sleep(random.random() * pause)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def main(folder: Path, case: str, trials: int, kills: int) -> int:
    random.seed(0)
    useful = 0
    base = folder / "base.safetensors"
    started = time.monotonic()
    pid = child(case, folder / "work", base)
    if os.waitpid(pid, 0)[1] != 0:
        print("the uninterrupted run failed")
        return 1
    pause = (time.monotonic() - started) / commits(folder / "work")
    expected = load_file(base)
    for trial in range(4 * trials):
        if trial >= trials and useful >= kills:
            break
        work, out = folder / f"work-{trial}", folder / f"out-{trial}.safetensors"
        status = -1
        for _ in range(4):
            status = killed(child(case, work, out), work, pause)
            if not os.WIFSIGNALED(status):
                break
            useful += commits(work) > 0
        else:
            status = os.waitpid(child(case, work, out), 0)[1]
        if status != 0:
            print("resuming failed")
            return 1
        got = load_file(out)
        different = [key for key in expected if key not in got or not torch.equal(expected[key], got[key])]
        if different or set(got) != set(expected):
            print(f"trial {trial}: {len(different)} tensors differ: {different[:5]}")
            return 1
    print(useful)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
