"""Compile the Triton kernels for an H100 on any machine, and look at what came out. Run by `test_kernels`."""

from __future__ import annotations

import os
import re
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbits.kernels import triton_finish, triton_fragments, triton_group, triton_int8, triton_vector

POINTERS = {
    "x": "*fp16", "words": "*i32", "scale": "*fp16", "zero": "*u8", "table": "*fp16", "out": "*fp32",
    "partial": "*fp32", "bias": "*fp16", "index": "*i64", "columns": "*fp16",
    "starts": "*i32", "places": "*i32", "entries": "*fp16",
}  # fmt: skip
ROWS = {
    "x": "*fp16", "weight": "*fp16", "bias": "*fp16", "scale": "*fp32", "zero": "*fp32", "normed": "*fp16",
    "codes": "*i8", "scales": "*fp32", "zeros": "*fp32", "sums": "*i32",
    **dict.fromkeys("low high middle shift floor norm_eps".split(), "fp32"),
}  # fmt: skip
INT8 = {
    "a": "*i8", "b": "*i8", "bias": "*fp16", "out": "*fp16",
    **dict.fromkeys("scales_a scales_b zeros_a zeros_b".split(), "*fp32"), "sums_a": "*i32", "sums_b": "*i32",
}  # fmt: skip


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, *, ones: str = "") -> Any:
    """ones: integers that are 1 in the launch, of which Triton makes constants unless the kernel forbids it."""
    names = kernel.arg_names
    kept = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    constants = {**constants, **{name: 1 for name in ones.split() if name not in kept}}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name].startswith("*") or name in ("inputs", "outputs", "stride_x", "n", "k")
    }
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})


def compiled_gluon(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> Any:
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name].startswith("*") or name in ("outputs", "n", "k")
    }
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def int8_of_warp_groups(config: triton.Config) -> Any:
    from fewbits.kernels import gluon_int8

    layout, depth = repr(gluon_int8.LAYOUT), gluon_int8.DEPTH
    tiles = {
        side: f"tensordesc<i8[{config.kwargs[size]}, {depth}],{layout}>"
        for side, size in (("a", "BLOCK_M"), ("b", "BLOCK_N"))
    }
    constants = {"BIAS": True, "ZERO_B": True, "DEPTH": depth, **config.kwargs}
    return compiled_gluon(gluon_int8.matrix_kernel, {**INT8, **tiles}, constants, config.num_warps)


def row(bits: int, config: triton.Config, *, table: bool, unroll: int) -> Any:
    from fewbits.kernels import gluon_fragments

    warps, steps = config.num_warps, 2 * config.kwargs["AHEAD"]
    constants = {
        "BITS": bits, "TABLE": table, "BFLOAT": bits == 3, "GROUP": 1, "UNROLL": unroll, "WARPS": warps, "STEPS": steps,
        "CHUNKS": steps * warps - (bits == 3), "EARLY": config.kwargs["NEXT"] != "after", **config.kwargs,
        **gluon_fragments.layouts(warps, unroll), "PLAIN": gluon_fragments.PLAIN, "ROOM": steps * warps,
    }  # fmt: skip
    types = {**POINTERS, "x": "*i32", "out": "*fp16"}
    return compiled_gluon(gluon_fragments.row_kernel, types, constants, warps)


def count(made: Any, opcode: str) -> int:
    return len(re.findall(rf"\t(?:@!?U?P\w+ )?{opcode}\b", made.asm["sass"]))


def main() -> None:
    from fewbits.kernels import gluon_fragments, gluon_int8

    shape = {"KIND": 0, "EVEN": True, "RUNS": 4, "BLOCK_N": 128}
    for bits in (2, 3, 4, 8):
        grid = {"BITS": bits, "GROUP": 4, **shape}
        made = compiled(triton_vector.grid_kernel, POINTERS, grid, 4)
        codes = 4 * 32 * 128 / (4 * 32)  # of a step, for one thread
        masks = count(made, "LOP3") / codes
        print(f"{bits} bits: {masks:.2f} masks a code, {count(made, 'FFMA') / codes:.2f} multiply-adds")
        assert masks < 1.2 and ".local" not in made.asm["ptx"], "the mask and the exponent no longer join in one LOP3"
    for bits in (2, 3, 4):
        table = {"BITS": bits, "PICK": True, **shape}
        assert "prmt" in compiled(triton_vector.table_kernel, POINTERS, table, 4).asm["ptx"]
        for levels in (False, True):
            step = {"BITS": bits, "TABLE": levels, "BFLOAT": bits == 3, "GROUP": 1, "UNROLL": 2, "EMULATED": False}
            for tiles in (1, 2):
                launch = {"EVEN": tiles == 1, "WARPS": 4, "TILES": tiles}
                made = compiled(triton_fragments.fragment_kernel, POINTERS, {**step, **launch}, 4)
                if bits == 4:
                    compiled(triton_fragments.fragment_kernel, POINTERS, {**step, **launch}, 4, ones="rows chunks")
                # a step of 128 inputs is eight products of matrices; two are in the loop and two behind it
                assert count(made, "HMMA") == 4 * 8 * tiles
                assert count(made, "LDL") == 0, "registers do not suffice"
            loop = made.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
            assert "convert_layout" not in loop, "an operand is not in the lane that decodes it"
            decoded = {**POINTERS, "out": "*fp16"}
            compiled(triton_fragments.decode_kernel, decoded, {**step, "WARPS": 8}, 8, ones="chunks")
    every = gluon_fragments.configs(64, 2, early=True, shared=227 * 1024)
    kinds = [(2, False, 2), (3, True, 2), (4, False, 1), (4, True, 1), (3, False, 2), (4, False, 2), (2, True, 2)]
    for (bits, levels, unroll), config in zip([*kinds, (4, False, 2)], every, strict=True):
        made = row(bits, config, table=levels, unroll=unroll)
        # in the loop and behind it, as many chunks as are on their way, of four products for 64 inputs, and on a grid
        # one of the activations with ones
        assert count(made, "HMMA") == 2 * config.kwargs["AHEAD"] * (4 * unroll + (not levels))
        assert count(made, "LDS") < 2 * count(made, "HMMA"), "activations are not read sixteen bytes at once"
    for table in (False, True):
        matrix = {"BITS": 3, "TABLE": table, "BLOCK_M": 64, "BLOCK_N": 128, "RUNS": 2}
        made = compiled(triton_group._matrix_kernel, POINTERS, matrix, 4)
        assert "wgmma.mma_async" in made.asm["ptx"]
    finish = {"BIAS": True, "COLUMNS": True, "SPARSE": True, "BLOCK_N": 64, "ENTRIES": 16}
    compiled(triton_finish._finish_kernel, {**POINTERS, "out": "*fp16"}, finish, 4)
    for config in gluon_int8.LARGE + gluon_int8.SMALL:
        made = int8_of_warp_groups(config)
        waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d)", made.asm["ptx"])
        assert sorted(waits) == ["0", "1"], "a product waits for the one before it"
        assert "setmaxnreg" in made.asm["ptx"] and made.metadata.shared <= 227 * 1024
    rows = {"STATIC": False, "SYMMETRIC": True, "NORM": 2, "TWICE": True, "BIAS": True, "KEEP": True, "BLOCK": 4096}
    compiled(triton_int8._quantize_rows_kernel, ROWS, {**rows, "WHOLE": True, "EMULATED": False}, 8)
    config = triton_int8.MATRIX_CONFIGS[0]
    tile = {"BIAS": True, "ZERO_B": True, "EVEN": True, **config.kwargs}
    made = compiled(triton_int8._matrix_kernel, INT8, tile, config.num_warps)
    assert "wgmma.mma_async.sync.aligned.m64n" in made.asm["ptx"] and ".s32.s8.s8" in made.asm["ptx"]


if __name__ == "__main__":
    main()
