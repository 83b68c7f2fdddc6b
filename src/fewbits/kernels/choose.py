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
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import external, fragments
from fewbits.kernels.available import has_triton

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
class Case:
    """A product to be done: [rows, inputs] times a weight [outputs, inputs].

    kind: of `KERNELS`. bits: of a stored code. group: columns that share a scale. table: the codes index levels.
    extras: something is kept beside the codes, or the columns are reordered. small: zero points are whole numbers of a
    code's size, and levels 16-bit numbers.
    """

    kind: str
    bits: int
    group: int
    outputs: int
    inputs: int
    rows: int
    dtype: torch.dtype
    device: torch.device
    table: bool = False
    extras: bool = False
    small: bool = True


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


def unable(kernel: str, case: Case) -> str | None:
    """Why a kernel cannot do a case; None where it can."""
    return _UNABLE[kernel](case)


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


# -- what each kernel needs ----------------------------------------------------------------------------------------


def _torch_int4(case: Case) -> str | None:
    if case.bits != 4:
        return "it takes 4-bit codes on a uniform grid"
    if (why := _not_plain(case)) is not None:
        return why
    if case.group not in (32, 64, 128, 256) or case.inputs % case.group:
        return "it takes groups of 32, 64, 128 or 256 columns that divide the row"
    if case.device.type == "cuda":
        if case.dtype != torch.bfloat16:
            return "on a GPU it takes bfloat16 activations"
        if case.inputs % 128 or case.outputs % 8:
            return "on a GPU it takes multiples of 128 columns and 8 rows"
        return None
    if case.device.type != "cpu":
        return f"it does not run on {case.device.type}"
    if case.outputs % 32 or case.inputs % 32:
        return "it takes multiples of 32 rows and columns"
    return None


def _not_plain(case: Case) -> str | None:
    if case.table:
        return "it takes codes on a uniform grid"
    return "it holds no parts beside the codes and no other order of columns" if case.extras else None


def _torch_int_mm(case: Case) -> str | None:
    if case.device.type == "cuda":
        return "it takes multiples of 8 rows and columns" if case.inputs % 8 or case.outputs % 8 else None
    return None if case.device.type == "cpu" else f"it does not run on {case.device.type}"


def _torch_scaled_mm(case: Case) -> str | None:
    if case.outputs % 16 or case.inputs % 16:
        return "it takes multiples of 16 rows and columns"
    if case.device.type == "cuda" and torch.cuda.get_device_capability(case.device) < (8, 9):
        return "this GPU has no 8-bit floats"
    if case.device.type == "cpu" and not _scales_rows_on_cpu():
        return "this build of torch gives a matrix of 8-bit floats one scale on a CPU, not one a row"
    return None if case.device.type in ("cpu", "cuda") else f"it does not run on {case.device.type}"


@functools.cache
def _scales_rows_on_cpu() -> bool:
    """Whether `torch._scaled_mm` takes a scale a row there; some releases do not, and nothing else tells."""
    codes, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def _native(case: Case) -> str | None:
    if case.device.type != "cpu":
        return "it is for CPUs"
    from fewbits.kernels import native

    return native.unavailable()


def _triton(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "it needs a GPU"
    return None if has_triton() else "the package triton is not installed"


def _triton_mma(case: Case) -> str | None:
    if (why := _triton(case)) is not None:
        return why
    if torch.cuda.get_device_capability(case.device) < (8, 0):
        return "this GPU's matrix units are of another kind"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return "it takes 16-bit activations"
    if case.bits not in fragments.BITS:
        return "it takes codes of 2, 3 or 4 bits"
    if case.inputs % fragments.CHUNK or (case.group < case.inputs and case.group % fragments.CHUNK):
        return f"it takes groups and rows of multiples of {fragments.CHUNK} columns"
    return None if case.small else "zero points are no whole numbers of a code's size, or levels need 32 bits"


def _humming(case: Case) -> str | None:
    if (why := _package("humming", case, (7, 5))) is not None:
        return why
    return "it takes multiples of 128 rows and 64 columns" if case.outputs % 128 or case.inputs % 64 else None


def _gemlite(case: Case) -> str | None:
    if (why := _package("gemlite", case, (7, 0))) is not None:
        return why
    if case.bits not in (1, 2, 4, 8):
        return "it takes codes of 1, 2, 4 or 8 bits"
    return "it takes multiples of 32 rows and columns" if case.inputs % 32 or case.outputs % 32 else None


def _package(package: str, case: Case, capability: tuple[int, int]) -> str | None:
    """What humming and gemlite both need. capability: the least that a GPU is of."""
    if case.device.type != "cuda":
        return "it needs a GPU"
    if (why := external.missing(package)) is not None:
        return why
    if case.dtype not in (torch.float16, torch.bfloat16):
        return "it takes 16-bit activations"
    least = max(capability, (8, 0)) if case.dtype == torch.bfloat16 else capability
    if torch.cuda.get_device_capability(case.device) < least:
        return "this GPU is of an older kind"
    if (why := _not_plain(case)) is not None:
        return why
    if case.group < case.inputs and (case.group < 16 or case.group & (case.group - 1) or case.inputs % case.group):
        return "it takes groups of a power of two columns, from 16, that divide the row"
    return None if case.small else "zero points are no whole numbers of a code's size"


_UNABLE: dict[str, Callable[[Case], str | None]] = {
    "torch_int4": _torch_int4,
    "humming": _humming,
    "gemlite": _gemlite,
    "torch_int_mm": _torch_int_mm,
    "torch_scaled_mm": _torch_scaled_mm,
    "native": _native,
    "triton_mma": _triton_mma,
    "triton": _triton,
    "reference": lambda case: None,
}


def padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in int32 by torch, for int8 [m, k] and [n, k]; few rows are filled up where a GPU wants more than 16."""
    rows = a.shape[0]
    if a.is_cuda and rows <= 16:
        a = torch.nn.functional.pad(a, (0, 0, 0, 32 - rows))
    return torch._int_mm(a, b.t())[:rows]
