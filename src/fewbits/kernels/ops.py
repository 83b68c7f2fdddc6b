"""Custom ops of packed weights and 8-bit products: one entry each, whatever runs behind it.

`backend` is "auto" (Triton on a GPU, plain torch elsewhere), "triton" or "reference". The ops have fake
implementations, so `torch.compile(fullgraph=True)` and `torch.export` take them, and they can be captured in CUDA
graphs. Triton is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fewbits.errors import FewbitsError
from fewbits.kernels import reference
from fewbits.kernels.operands import ARGUMENTS, Int8Matrix, Norm, PackedWeight, RowGrid

BACKENDS = ("auto", "triton", "reference")


def eager(x: Tensor) -> bool:
    """Whether nothing traces or differentiates what is done to `x`.

    The function behind an op, `run_...`, may then be called in its place: an op made in Python costs some 60
    microseconds a call, more than a small layer.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
        and _get_current_dispatch_mode() is None
    )


def _triton(backend: str, x: Tensor) -> bool:
    if backend not in BACKENDS:
        raise FewbitsError(f"kernel backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    return backend == "triton" or (backend == "auto" and x.is_cuda)


def _launchers() -> Any:
    try:
        from fewbits.kernels import launch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise FewbitsError("this kernel needs triton, which torch brings on Linux: pip install triton") from None
    return launch


def run_packed_matmul(x: Tensor, weight: PackedWeight, backend: str = "auto") -> Tensor:
    """`x` [..., in] times a packed weight, [..., out] in the type of `x`; sums in float32.

    words: [ceil(in / 32) * bits, out] of `kernels.words`.
    """
    run = _launchers().packed_matmul if _triton(backend, x) else reference.packed_matmul
    return _of_rows(run, x, weight)


def run_fragment_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """`run_packed_matmul` on a GPU's matrix units, for float16 and bfloat16 `x`.

    words: [ceil(out / 16), in / 64, bits, 32] of `kernels.fragments`, in nibbles where there is a table. group: a
    multiple of 64 columns, or at least `in`. zero: whole numbers up to 15. Weights are rounded to 16 bits when there
    are more than some tens of rows.
    """
    return _of_rows(_launchers().fragment_matmul, x, weight)


def run_native_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """`run_packed_matmul` by compiled C on a CPU, whose order of the same tensors is another (`kernels.native`).

    words: flat, of `native.packed_rows`; scale, and for `zero` scale times zero point, float32 [out, groups]; table
    float32 [out, 2^bits].
    """
    from fewbits.kernels import native

    return _of_rows(native.product, x, weight)


def _of_rows(run: Callable[[Tensor, PackedWeight], Tensor], x: Tensor, weight: PackedWeight) -> Tensor:
    """`run`, which takes [m, in], on [..., in]."""
    return run(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.outputs).contiguous()


def _op(run: Callable[..., Tensor], options: str = "", device: str | None = None) -> CustomOpDef:
    """The op of torch that does what `run` does; it takes a weight in pieces, `PackedWeight.flat`."""

    def whole(x: Tensor, *pieces: Any, **named: Any) -> Tensor:
        return run(x, PackedWeight.of(pieces), **named)

    def shaped(x: Tensor, *pieces: Any, **_: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], PackedWeight.of(pieces).outputs)

    name = run.__name__.removeprefix("run_")
    schema = f"({ARGUMENTS}{options}) -> Tensor"
    op = torch.library.custom_op(f"fewbits::{name}", whole, mutates_args=(), device_types=device, schema=schema)
    op.register_fake(shaped)
    return op


packed_matmul = _op(run_packed_matmul, options=', *, str backend="auto"')
fragment_matmul = _op(run_fragment_matmul)
native_matmul = _op(run_native_matmul, device="cpu")


def multiply(run: Callable[..., Tensor], op: CustomOpDef, x: Tensor, weight: PackedWeight, **named: str) -> Tensor:
    """`run`, or the op made of it where something traces or differentiates."""
    out: Tensor = run(x, weight, **named) if eager(x) else op(x, *weight.flat(), **named)
    return out


def run_native_int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in int32 of int8 [m, k] and [n, k], by compiled C on a CPU."""
    from fewbits.kernels import native

    return native.int8_product(a, b)


native_int8_product = torch.library.custom_op("fewbits::native_int8_product", mutates_args=(), device_types="cpu")(
    run_native_int8_product
)


@native_int8_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)


def run_quantize_rows(x: Tensor, grid: RowGrid, backend: str = "auto") -> Int8Matrix:
    """Rows of `x` [m, k] on a uniform grid; the codes of one that passes 127 are moved down by 128, as are `zeros`."""
    run = _launchers().quantize_rows if _triton(backend, x) else reference.quantize_rows
    made: Int8Matrix = run(x, grid)
    return made


def run_norm_quantize(
    x: Tensor, norm: Norm, grid: RowGrid, backend: str = "auto", out: Tensor | None = None
) -> Int8Matrix:
    """`run_quantize_rows` of the norm of `x` [m, k], which is written to `out` [m, k], of the type of `x`, or nowhere.

    The sums of a norm are taken in another order than torch's: in 16 bits few results differ, by their last bit.
    """
    if _triton(backend, x):
        made: Int8Matrix = _launchers().quantize_rows(x, grid, norm, out)
        return made
    normed = reference.normalised(x, norm)
    if out is not None:
        out.copy_(normed)
    return reference.quantize_rows(normed, grid)


def run_int8_matmul(
    a: Int8Matrix, b: Int8Matrix, bias: Tensor | None, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """a.scales[m] * b.scales[n] * sum_k (a[m, k] - a.zeros[m]) * (b[n, k] - b.zeros[n]) + bias[n], as `dtype` [m, n].

    Sums and zero points are exact in int32; the rest is float32.
    """
    run = _launchers().int8_matmul if _triton(backend, a.codes) else reference.int8_matmul
    out: Tensor = run(a, b, bias, dtype)
    return out


# The three as ops of torch take and give tensors and numbers. Saved graphs name them: their schemas must not change.


@torch.library.custom_op("fewbits::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    low: int,
    high: int,
    symmetric: bool,
    floor: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`run_quantize_rows`, with the pieces of a `RowGrid`."""
    return run_quantize_rows(x, RowGrid(scale, zero, low, high, symmetric, floor), backend).flat()


@torch.library.custom_op("fewbits::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    scale: Tensor | None,
    zero: Tensor | None,
    low: int,
    high: int,
    symmetric: bool,
    floor: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`run_norm_quantize`, with the pieces of a `Norm` and a `RowGrid`."""
    grid = RowGrid(scale, zero, low, high, symmetric, floor)
    return run_norm_quantize(x, Norm(weight, bias, eps, centred), grid, backend).flat()


def _int8_like(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32),
    )  # fmt: skip


quantize_rows.register_fake(_int8_like)
norm_quantize.register_fake(_int8_like)


@torch.library.custom_op("fewbits::int8_matmul", mutates_args=())
def int8_matmul(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    zeros_a: Tensor,
    sums_a: Tensor,
    scales_b: Tensor,
    zeros_b: Tensor,
    sums_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    symmetric_b: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`run_int8_matmul`, with the pieces of two `Int8Matrix`."""
    left, right = Int8Matrix(a, scales_a, zeros_a, sums_a), Int8Matrix(b, scales_b, zeros_b, sums_b, symmetric_b)
    return run_int8_matmul(left, right, bias, dtype, backend)


@int8_matmul.register_fake
def _(a: Tensor, b: Tensor, *rest: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=rest[7] if dtype is None else dtype)


def quantize(x: Tensor, grid: RowGrid, backend: str = "auto") -> Int8Matrix:
    """`run_quantize_rows`, or the op made of it where something traces or differentiates."""
    return run_quantize_rows(x, grid, backend) if eager(x) else Int8Matrix.of(quantize_rows(x, *grid, backend))


def multiply_int8(
    a: Int8Matrix, b: Int8Matrix, bias: Tensor | None, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """`run_int8_matmul`, or the op made of it where something traces or differentiates."""
    if eager(a.scales):
        return run_int8_matmul(a, b, bias, dtype, backend)
    out: Tensor = int8_matmul(a.codes, b.codes, *a.flat()[1:], *b.flat()[1:], bias, dtype, b.symmetric, backend)
    return out
