"""`native.c` compiled for the processor at hand, and called: products with packed weights on a CPU.

The file is compiled when it is first used, in a second or two, by the C compiler that `CC` names or that is found
(Triton and torch.compile need one too); what comes out is kept in the user's cache. Without a compiler, or with
FEWBITS_NATIVE=0, packed models run by other kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels.operands import PackedWeight
from fewbits.kernels.words import RUN

#: Rows of activations up to which codes are decoded on the fly; beyond, the weight is decoded once a product.
FLY_ROWS = 8
_POINTERS = "x sums words scale offset table bias index columns starts places entries out".split()
_COUNTS = "rows outputs runs group_runs kept".split()


class _Product(ctypes.Structure):
    """As in native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("bits", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def unavailable() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if os.environ.get("FEWBITS_NATIVE", "1") == "0":
        return "FEWBITS_NATIVE=0 switches it off"
    return None if _compiler() else "no C compiler is found (set CC)"


@functools.cache
def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )


@functools.cache
def _library() -> Any:
    """The compiled functions. Raises `RuntimeError` with the compiler's words where that fails."""
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C compiler is found")
    source = resources.files("fewbits.kernels").joinpath("native.c").read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"
    key = hashlib.sha256(b"\0".join([source, compiler.encode(), _processor().encode(), torch.__version__.encode()]))
    target = folder / f"native-{key.hexdigest()[:16]}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _compile(compiler, source, Path(work), target)
    library = ctypes.CDLL(str(target))
    for name in ("fewbits_product", "fewbits_decode"):
        getattr(library, name).argtypes = [ctypes.POINTER(_Product)]
        getattr(library, name).restype = None
    library.fewbits_int8.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_int32]
    library.fewbits_int8.restype = None
    return library


def _compile(compiler: str, source: bytes, work: Path, target: Path) -> None:
    file, made = work / "native.c", work / "native.so"
    file.write_bytes(source)
    # the OpenMP that torch has already started, where it brings one: two would fight for the processors
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")) + sorted(
        (Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*")
    )
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-std=gnu11"]
    for threads in ([["-fopenmp", str(own[0])]] if own else []) + [["-fopenmp"], []]:
        command = [compiler, *flags, *threads, "-shared", "-o", str(made), str(file)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            os.replace(made, target)
            return
    raise RuntimeError(f"{compiler} cannot compile native.c: {run.stderr.strip()[:300]}")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def packed_rows(words: Tensor) -> Tensor:
    """Words [runs * bits, out] of `kernels.words` as the C code reads them: row by row, flat, two words to spare."""
    return F.pad(words.T.reshape(-1), (0, 2))


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    """`ops.native_matmul` for `x` [m, in] on the CPU, in float32."""
    rows, inputs = x.shape
    words, scale, offset, table, bits, group, outputs, beside = weight
    runs = -(-inputs // RUN)
    group_runs = min(-(-group // RUN), runs)
    wide = x.float()
    if inputs % RUN:
        wide = F.pad(wide, (0, runs * RUN - inputs))
    given = {"words": words, "scale": scale, "offset": offset, "table": table, **beside._asdict()}
    counts = {"rows": rows, "outputs": outputs, "runs": runs, "group_runs": group_runs}
    if rows <= FLY_ROWS:
        groups = -(-runs // group_runs)
        lacking = (groups * group_runs - runs) * RUN
        padded = F.pad(wide, (0, lacking)) if lacking else wide
        sums = None if scale is None else padded.reshape(rows, groups, group_runs * RUN).sum(-1)
        out = torch.empty(rows, outputs)
        held = {"x": wide, "sums": sums, "out": out, **given}
        _call("fewbits_product", held, counts | {"kept": 0 if beside.index is None else len(beside.index)}, bits)
        return out.to(x.dtype)
    dense = torch.empty(outputs, runs * RUN)
    _call("fewbits_decode", {"out": dense, **given}, counts, bits)
    beside.lay_over(dense)
    return F.linear(x, dense[:, :inputs].to(x.dtype), None if beside.bias is None else beside.bias.to(x.dtype))


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in int32 of int8 [m, k] and [n, k] on the CPU."""
    (rows, inputs), outputs = a.shape, len(b)
    a, b, out = a.contiguous(), b.contiguous(), torch.empty(rows, outputs, dtype=torch.int32)
    threads = torch.get_num_threads()
    _library().fewbits_int8(a.data_ptr(), b.data_ptr(), out.data_ptr(), rows, outputs, inputs, threads)
    return out


def _call(name: str, held: dict[str, Tensor | None], counts: dict[str, int], bits: int) -> None:
    kept = {key: value.contiguous() for key, value in held.items() if value is not None}
    for key, value in kept.items():
        expected = _TYPES.get(key, torch.float32)
        if value.dtype != expected:
            kept[key] = value.to(expected)
    pointers = {key: value.data_ptr() for key, value in kept.items()}
    getattr(_library(), name)(ctypes.byref(_Product(**pointers, **counts, bits=bits, threads=torch.get_num_threads())))


_TYPES = {"words": torch.int32, "index": torch.int64, "starts": torch.int32, "places": torch.int32}
