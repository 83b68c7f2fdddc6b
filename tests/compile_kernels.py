"""Compile the Triton kernels for an H100 on any machine, and look at what came out. Run by `test_kernels`."""

from __future__ import annotations

import os
import re
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbits.kernels import triton_finish, triton_group, triton_int8

POINTERS = {
    "x": "*fp16", "words": "*i32", "scale": "*fp16", "zero": "*u8", "table": "*fp16", "out": "*fp32",
    "partial": "*fp32", "bias": "*fp16", "index": "*i64", "columns": "*fp16",
    "starts": "*i32", "places": "*i32", "entries": "*fp16",
}  # fmt: skip
ROWS = {
    "x": "*fp16", "weight": "*fp16", "bias": "*fp16", "scale": "*fp32", "zero": "*fp32", "codes": "*i8",
    "scales": "*fp32", "zeros": "*fp32", "sums": "*i32",
    **dict.fromkeys("low high middle shift floor norm_eps".split(), "fp32"),
}  # fmt: skip
INT8 = {
    "a": "*i8", "b": "*i8", "bias": "*fp16", "out": "*fp16",
    **dict.fromkeys("scales_a scales_b zeros_a zeros_b".split(), "*fp32"), "sums_a": "*i32", "sums_b": "*i32",
}  # fmt: skip


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> Any:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name].startswith("*") or name in ("inputs", "outputs", "stride_x", "n", "k")
    }
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})


def count(made: Any, opcode: str) -> int:
    return len(re.findall(rf"\b{opcode}\b", made.asm["sass"]))


def main() -> None:
    for bits in (2, 3, 4, 8):
        vector = {"BITS": bits, "TABLE": False, "RUNS": 4, "BLOCK_N": 128}
        made = compiled(triton_group._vector_kernel, POINTERS, vector, 4)
        codes = 4 * 32 * 128 / (4 * 32)  # of a step, for one thread
        masks = count(made, "LOP3.LUT") / codes
        print(f"{bits} bits: {masks:.2f} masks a code, {count(made, 'FFMA') / codes:.2f} multiply-adds")
        assert masks < 1.4 and ".local" not in made.asm["ptx"], "the mask and the exponent no longer join in one LOP3"
    for table in (False, True):
        matrix = {"BITS": 3, "TABLE": table, "BLOCK_M": 64, "BLOCK_N": 128, "RUNS": 2}
        made = compiled(triton_group._matrix_kernel, POINTERS, matrix, 4)
        assert "wgmma.mma_async" in made.asm["ptx"]
    vector = {"BITS": 3, "TABLE": True, "RUNS": 4, "BLOCK_N": 128}
    compiled(triton_group._vector_kernel, POINTERS, vector, 4)
    finish = {"BIAS": True, "COLUMNS": True, "SPARSE": True, "BLOCK_N": 64, "ENTRIES": 16}
    compiled(triton_finish._finish_kernel, {**POINTERS, "out": "*fp16"}, finish, 4)
    rows = {"STATIC": False, "SYMMETRIC": True, "NORM": 2, "BIAS": True, "BLOCK": 4096}
    compiled(triton_int8._quantize_rows_kernel, ROWS, rows, 8)
    config = triton_int8.MATRIX_CONFIGS[0]
    tile = {"BIAS": True, "ZERO_B": True, "EVEN": True, **config.kwargs}
    made = compiled(triton_int8._matrix_kernel, INT8, tile, config.num_warps)
    assert "wgmma.mma_async.sync.aligned.m64n" in made.asm["ptx"] and ".s32.s8.s8" in made.asm["ptx"]


if __name__ == "__main__":
    main()
