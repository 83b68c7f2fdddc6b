"""Which kernel multiplies a packed weight: the fastest of those able to, measured on the shape at hand.

What torch brings comes first in the list, other packages where they are installed after it, then own C and Triton
code, plain torch last: that can do everything and is what runs where nothing else can. A choice says why it was made.
It is measured once a shape and kept; naming a kernel, or the variable FEWBITS_KERNEL, decides without measuring. Other
packages compile for every shape that they are measured on: FEWBITS_SKIP_KERNELS, names with commas between them, says
which kernels are left out of what is measured.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fewbits.errors import FewbitsError
from fewbits.kernels.needs import Case, unable

VARIABLE, SKIP = "FEWBITS_KERNEL", "FEWBITS_SKIP_KERNELS"
#: Rows of a prompt, which kernels for fewer rows meet too. Only those within this factor of the fastest are asked it.
PROMPT, CLOSE = 128, 3.0
Run = Callable[[int], Any]
#: By what the weight is: packed codes; int8 beside 8-bit activations; 8-bit floats beside such activations, or alone.
KERNELS = {
    "codes": ("torch_int4", "humming", "gemlite", "native", "triton_mma", "triton", "reference"),
    "int8": ("torch_int_mm", "native", "triton", "reference"),
    "float8": ("torch_scaled_mm", "reference"),
    "float8_weight": ("reference",),
}


@dataclass(frozen=True)
class Choice:
    """The kernel chosen, the reason in a sentence, and the milliseconds of each one measured."""

    kernel: str
    why: str
    milliseconds: dict[str, float] = field(default_factory=dict)


def check_name(kernel: str) -> None:
    """Raises `FewbitsError` for anything but "auto" and the names of kernels."""
    known = sorted({name for names in KERNELS.values() for name in names})
    if kernel not in ("auto", *known):
        raise FewbitsError(f"kernel {kernel!r}: choose auto or one of {', '.join(known)}")


def choose(case: Case, make: Callable[[str], Run], kernel: str = "auto") -> Choice:
    """The kernel for a case. `make(name)` returns a function that runs the product on so many rows with that kernel.

    kernel: "auto", or the name of the one to take. Raises `FewbitsError` for a name that is unknown, or that cannot do
    the case.
    """
    names = KERNELS[case.kind]
    wanted = os.environ.get(VARIABLE, "") or "auto" if kernel == "auto" else kernel
    if wanted != "auto":
        check_name(wanted)
        if wanted not in names:
            return Choice("reference", f"{wanted} is for other weights")
        why = unable(wanted, case)
        if why is not None:
            raise FewbitsError(f"kernel {wanted} cannot multiply this weight: {why}")
        return Choice(wanted, "asked for")
    found = _choices.get(case)
    if found is None:
        found = _choices[case] = _measured(case, names, make)
    return found


_choices: dict[Case, Choice] = {}


def _measured(case: Case, names: Sequence[str], make: Callable[[str], Run]) -> Choice:
    skipped = _skipped()
    reasons = {name: f"{SKIP} says so" if name in skipped else unable(name, case) for name in names}
    able = [name for name in names if reasons[name] is None]
    out = "; ".join(f"not {name}: {why}" for name, why in reasons.items() if why is not None)
    if len(able) == 1:
        return Choice(able[0], f"the only one able to ({out})")
    runs: dict[str, Run] = {}
    timed: dict[str, float] = {}
    for name in able:
        try:
            runs[name] = run = make(name)
            timed[name] = milliseconds(functools.partial(run, case.rows), case.device)
        except (RuntimeError, NotImplementedError) as error:  # an op that this build of torch lacks, or a package
            if name == "reference":
                raise
            out = "; ".join(filter(None, (out, f"not {name}: {str(error).splitlines()[0][:120]}")))
    score, when = timed, f"{case.rows} rows"
    close = [name for name, value in timed.items() if value < CLOSE * min(timed.values())]
    if case.rows < PROMPT and len(close) > 1:
        # a prompt is read before so many rows follow it
        score = {
            name: timed[name] + milliseconds(functools.partial(runs[name], PROMPT), case.device, 0, 1) / PROMPT
            for name in close
        }
        when = f"{case.rows} rows with a prompt of {PROMPT} to as many"
    best = min(score, key=lambda name: score[name])
    shown = ", ".join(f"{name} {value:.3g} ms" for name, value in sorted(score.items(), key=lambda item: item[1]))
    far = ", ".join(f"{name} {value:.3g} ms" for name, value in timed.items() if name not in score)
    return Choice(best, f"fastest at {when} ({'; '.join(filter(None, (shown, far, out)))})", timed)


def _skipped() -> set[str]:
    names = [name.strip() for name in os.environ.get(SKIP, "").split(",") if name.strip()]
    for name in names:
        check_name(name)
    return set(names) - {"reference"}


def milliseconds(run: Callable[[], Any], device: torch.device, seconds: float = 0.05, least: int = 3) -> float:
    """Median time of a call: after one or two to warm up, as many as fit `seconds`, from `least` to fifty."""
    for _ in range(min(2, least)):
        run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < least or (time.perf_counter() - started < seconds and len(times) < 50):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            before = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)
