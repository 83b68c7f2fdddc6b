"""Integer programs on disk: `program.json`, what is done, and `program.safetensors`, the integers it is done with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.export.integer.operations import LAYOUT, RUN
from fewbits.export.integer.program import Grid, IntegerProgram, Op, Port

PROGRAM, TENSORS = "program.json", "program.safetensors"
VERSION = 1
_DTYPES = (torch.uint8, torch.int32)


def save(program: IntegerProgram, folder: Path) -> None:
    """Write both files, each under another name first. Raises `FewbitsError` where the folder cannot be written."""
    tensors = {
        f"{number}.{name}": value.contiguous() for number, op in enumerate(program.ops)
        for name, value in op.tensors.items()
    }  # fmt: skip
    raw = save_tensors(tensors)
    described = {
        "fewbits_integer_program": VERSION,
        "tensors_sha256": hashlib.sha256(raw).hexdigest(),
        "inputs": [asdict(port) for port in program.inputs],
        "outputs": [asdict(port) for port in program.outputs],
        "ops": [
            {"kind": op.kind, "name": op.name, "reads": list(op.reads), "writes": op.writes,
             "attributes": op.attributes, "tensors": sorted(op.tensors)}
            for op in program.ops
        ],
    }  # fmt: skip
    text = json.dumps(described, indent=1).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((TENSORS, raw), (PROGRAM, text)):
            temporary = folder / f".{name}.{os.getpid()}.part"
            try:
                temporary.write_bytes(content)
                os.replace(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FewbitsError(f"{folder}: cannot write the integer program ({error})") from error


def load(folder: Path) -> IntegerProgram:
    """Read both files and check that they are whole, belong together and hold integers only."""
    file = folder / PROGRAM
    try:
        text, raw = file.read_bytes(), (folder / TENSORS).read_bytes()
    except OSError as error:
        raise FewbitsError(f"{folder}: no integer program of fewbits ({error})") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FewbitsError(f"{file}: damaged ({error})") from error
    if not isinstance(data, dict) or data.get("fewbits_integer_program") != VERSION:
        raise FewbitsError(f"{file}: not an integer program of this version of fewbits")
    if data.get("tensors_sha256") != hashlib.sha256(raw).hexdigest():
        raise FewbitsError(f"{folder / TENSORS}: its contents are not what was saved with {PROGRAM}; export again")
    try:
        tensors = load_tensors(raw)
        program = IntegerProgram(
            [_port(item) for item in data["inputs"]],
            [_op(number, item, tensors) for number, item in enumerate(data["ops"])],
            [_port(item) for item in data["outputs"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise FewbitsError(f"{file}: damaged ({error!r})") from error
    _check(program, file)
    return program


def _port(data: dict[str, Any]) -> Port:
    grid = data["grid"]
    scale = grid["scale"]
    scale = tuple(float(item) for item in scale) if isinstance(scale, list) else float(scale)
    made = Grid(scale, int(grid["zero"]), int(grid["low"]), int(grid["high"]), bool(grid["accumulator"]))
    return Port(int(data["register"]), made, int(data["place"]))


def _op(number: int, data: dict[str, Any], tensors: dict[str, Tensor]) -> Op:
    held = {name: tensors[f"{number}.{name}"] for name in data["tensors"]}
    reads = tuple(int(register) for register in data["reads"])
    return Op(str(data["kind"]), str(data["name"]), reads, int(data["writes"]), dict(data["attributes"]), held)


def _check(program: IntegerProgram, file: Path) -> None:
    """Known operations on registers that are there by then, integer tensors, ports that exist."""

    def fault(wrong: Callable[[Op], bool]) -> Op | None:
        return next((op for op in program.ops if wrong(op)), None)

    foreign = fault(lambda op: op.kind not in RUN or (op.kind == "layout" and op.attributes.get("op") not in LAYOUT))
    if foreign is not None:
        raise FewbitsError(f"{file}: {foreign.name} is an operation {foreign.kind!r} that is not known")
    floating = fault(lambda op: any(tensor.dtype not in _DTYPES for tensor in op.tensors.values()))
    if floating is not None:
        raise FewbitsError(f"{file}: {floating.name} holds a tensor that is neither uint8 nor int32")
    made = {port.register for port in program.inputs}
    for op in program.ops:
        if not set(op.reads) <= made:
            raise FewbitsError(f"{file}: {op.name} reads a register that nothing wrote")
        made.add(op.writes)
    if not program.inputs or not program.outputs or not {port.register for port in program.outputs} <= made:
        raise FewbitsError(f"{file}: an output reads a register that nothing wrote")
