"""The integer-only executor: a quantized model as a list of integer operations, run without floating point.

    program = fewbits.export.integer.build(model, example)
    logits = program(images)                    # bytes and 32-bit accumulators inside
    compare(program, model, [images])           # against the simulation, operation by operation
    program.save("folder"); IntegerProgram.load("folder")

It is the oracle for where quantizers sit: a simulation whose quantizers are misplaced differs from it by more than one
step. It runs what the recipe `jacob-integer-only` makes of convolutional networks; what it cannot run it names.
"""

from fewbits.export.integer.build import build
from fewbits.export.integer.compare import compare
from fewbits.export.integer.program import Grid, IntegerProgram, Op

__all__ = ["Grid", "IntegerProgram", "Op", "build", "compare"]
