"""An integer program: registers of codes, operations on them, and the two places where floats come in and go out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.export.integer.operations import RUN
from fewbits.kernels import fixed_point


@dataclass(frozen=True)
class Grid:
    """real = scale * (code - zero), scale a float32; codes are uint8 in [low, high].

    Of an `accumulator` the codes are int32, zero is 0 and `scale` may be a tuple with one scale per channel.
    """

    scale: float | tuple[float, ...]
    zero: int
    low: int = 0
    high: int = 255
    accumulator: bool = False

    def encode(self, x: Tensor) -> Tensor:
        return fixed_point.quantize(x, self._scale(x), torch.tensor(self.zero), low=self.low, high=self.high)

    def decode(self, codes: Tensor) -> Tensor:
        return fixed_point.dequantize(codes, self._scale(codes), torch.tensor(self.zero))

    def _scale(self, x: Tensor) -> Tensor:
        held = torch.tensor(self.scale, dtype=torch.float32)
        return held if held.dim() == 0 or x.dim() < 2 else held.view(-1, *[1] * (x.dim() - 2))


@dataclass(frozen=True)
class Op:
    """One operation: `kind` (a key of `operations.RUN`), the registers it reads and the one it writes.

    name: the site whose codes it makes, or the place of the recorded call. attributes: plain numbers. tensors: integers
    (weights, biases, multipliers, tables).
    """

    kind: str
    name: str
    reads: tuple[int, ...]
    writes: int
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Port:
    """Where floats come in or go out: a register, its grid, and the number of the model's argument or output."""

    register: int
    grid: Grid
    place: int = 0


@dataclass
class IntegerProgram:
    """Operations in order. Calling it takes float inputs and returns float outputs, bytes in between.

    outputs: of a model with one output, a tensor comes back, otherwise a tuple.
    """

    inputs: list[Port]
    ops: list[Op]
    outputs: list[Port]

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        registers = self.run(self.encode(*inputs))
        made = tuple(port.grid.decode(registers[port.register]) for port in self.outputs)
        return made[0] if len(made) == 1 else made

    def encode(self, *inputs: Tensor) -> dict[int, Tensor]:
        """The input registers of float inputs. Raises `FewbitsError` where one is missing or not finite."""
        registers = {}
        for port in self.inputs:
            if port.place >= len(inputs):
                raise FewbitsError(f"the integer program needs {port.place + 1} inputs, got {len(inputs)}")
            x = inputs[port.place].detach().float().cpu()
            if not bool(torch.isfinite(x).all()):
                raise FewbitsError("an input of the integer program holds NaN or infinity")
            registers[port.register] = port.grid.encode(x)
        return registers

    @torch.no_grad()
    def run(self, registers: dict[int, Tensor]) -> dict[int, Tensor]:
        """Every register, from those of the inputs (uint8). No floating-point tensor takes part: it would raise."""
        held = dict(registers)
        for op in self.ops:
            held[op.writes] = step(op, held)
        return held

    def save(self, folder: Path | str) -> None:
        """Write `program.json` and `program.safetensors` into a folder. See `storage`."""
        from fewbits.export.integer.storage import save

        save(self, Path(folder))

    @classmethod
    def load(cls, folder: Path | str) -> IntegerProgram:
        """Read back what `save` wrote. Raises `FewbitsError` for anything missing, damaged or foreign."""
        from fewbits.export.integer.storage import load

        return load(Path(folder))


def step(op: Op, registers: dict[int, Tensor]) -> Tensor:
    """Run one operation on integer registers."""
    reads = [registers[register] for register in op.reads]
    made = RUN[op.kind](reads, op.attributes, op.tensors)
    for tensor in (*reads, *op.tensors.values(), made):
        if tensor.is_floating_point():
            raise FewbitsError(f"{op.name}: a floating-point tensor in the integer program")
    return made
