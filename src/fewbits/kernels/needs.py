"""What each kernel needs of a product: the weight, the activations and the device it can take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fewbits.kernels import external, fragments
from fewbits.kernels.available import has_triton


@dataclass(frozen=True)
class Case:
    """A product to be done: [rows, inputs] times a weight [outputs, inputs].

    kind: of `kernels.choose.KERNELS`. bits: of a stored code. group: columns that share a scale. table: the codes index
    levels. extras: something is kept beside the codes, or the columns are reordered. small: zero points are whole
    numbers of a code's size, and levels 16-bit numbers.
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


def unable(kernel: str, case: Case) -> str | None:
    """Why a kernel cannot do a case; None where it can."""
    return _NEEDS[kernel](case)


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


_NEEDS: dict[str, Callable[[Case], str | None]] = {
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
