"""`fewbits export DIR --to integer`: an integer program, and its comparison with the simulation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from fewbits.attach import Attachment
from fewbits.errors import FewbitsError
from fewbits.export.base import Obstacle, Subject, Target
from fewbits.export.integer.build import build
from fewbits.export.integer.compare import compare
from fewbits.export.integer.program import IntegerProgram


class Export(Target):
    """Bytes and 32-bit accumulators only: the integer executor of `fewbits.export.integer` runs it."""

    name: ClassVar[str] = "integer"
    about: ClassVar[str] = "uint8 codes, int32 accumulators and fixed-point multipliers, run by fewbits itself"
    profile_name: ClassVar[str] = "integer"
    holds: ClassVar[frozenset[str]] = frozenset({"replacements"})

    def obstacles(self, subject: Subject) -> list[Obstacle]:
        """Those of the grids, then those of the ops."""
        found = super().obstacles(subject)
        if found:
            return found
        try:
            _program(subject)
        except FewbitsError as error:
            return [Obstacle("the model", str(error))]
        return []

    def write(self, subject: Subject, folder: Path, **options: Any) -> dict[str, Any]:
        """`program.json` and `program.safetensors`. Takes no options."""
        if options:
            raise FewbitsError(f"export to integer has no option {next(iter(options))!r}")
        program = _program(subject)
        program.save(folder)
        weights = sum(op.tensors["weight"].numel() for op in program.ops if "weight" in op.tensors)
        return {"ops": dict(Counter(op.kind for op in program.ops)), "weights": weights}

    def check(self, subject: Subject, folder: Path) -> list[dict[str, Any]]:
        """The program as read back, against the simulation.

        Raises `FewbitsError` where an operation, given the simulation's codes, makes one that is more than a step off.
        """
        program = IntegerProgram.load(folder)
        found = compare(program, subject.loaded.model, subject.inputs())
        if found.most > 1:
            name = max(found.sites, key=lambda site: found.sites[site].most)
            raise FewbitsError(
                f"{name}: the integer program is {found.most} steps off the simulation there; a quantizer sits where "
                "no integer operation makes bytes"
            )
        return [{"runtime": "fewbits integer executor", **found.to_dict()}]


def _program(subject: Subject) -> IntegerProgram:
    attachment: Attachment = subject.attachment
    return build(attachment.model, subject.loaded.example_batch(1))
