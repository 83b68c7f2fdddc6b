"""An integer program against the simulation it was built from, operation by operation and end to end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.attach import Attachment, attachment_of
from fewbits.engine.gradients import first_output
from fewbits.engine.tree import Batch, as_call, to
from fewbits.errors import FewbitsError
from fewbits.export.integer.grids import offset_of
from fewbits.export.integer.program import IntegerProgram, step


@dataclass
class SiteCount:
    """Codes made at one site: how many, how many differ from the simulation's, and by how many steps at most.

    `differing` and `most` compare an operation run on the simulation's own codes; `free_differing` and `free_most` the
    program run by itself, where earlier differences add up.
    """

    codes: int = 0
    differing: int = 0
    most: int = 0
    free_differing: int = 0
    free_most: int = 0


@dataclass
class Comparison:
    """Counts by site; of the outputs: samples, how many top-1 answers agree, largest absolute difference and value."""

    sites: dict[str, SiteCount] = field(default_factory=dict)
    samples: int = 0
    agreeing: int = 0
    difference: float = 0.0
    scale: float = 0.0

    @property
    def most(self) -> int:
        """Steps that any operation is away from the simulation, given the same codes."""
        return max((count.most for count in self.sites.values()), default=0)

    @property
    def share(self) -> float:
        """Share of all codes that an operation makes otherwise than the simulation, given the same codes."""
        return self._share("differing")

    @property
    def free_share(self) -> float:
        """Share of all codes that differ when the program runs by itself."""
        return self._share("free_differing")

    @property
    def agreement(self) -> float:
        """Share of samples with the same top-1 answer."""
        return self.agreeing / max(self.samples, 1)

    def _share(self, name: str) -> float:
        total = sum(count.codes for count in self.sites.values())
        return sum(getattr(count, name) for count in self.sites.values()) / max(total, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary."""
        return {
            "sites": len(self.sites),
            "codes": sum(count.codes for count in self.sites.values()),
            "most_steps": self.most,
            "share_differing": self.share,
            "share_differing_free": self.free_share,
            "most_steps_free": max((count.free_most for count in self.sites.values()), default=0),
            "agreement": self.agreement,
            "difference": self.difference,
            "scale": self.scale,
            "samples": self.samples,
        }


@torch.no_grad()
def compare(program: IntegerProgram, model: nn.Module, batches: Iterable[Batch]) -> Comparison:
    """Run simulation and program on the same inputs.

    Every operation whose codes a quantizer of the simulation also makes is run on the simulation's codes (there a
    difference of one step is possible at near ties, more is a quantizer in the wrong place), and the whole program on
    the inputs.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise FewbitsError("the model carries no quantizers to compare with")
    found = Comparison()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for batch in batches:
        args, kwargs = as_call(to(batch, device))
        codes, output = _simulated(attachment, model, args, kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        _count(program, program.encode(*tensors), codes, found)
        made = program(*tensors)
        first = made if isinstance(made, Tensor) else made[0]
        found.samples += len(output)
        found.agreeing += int((first.flatten(0, -2).argmax(-1) == output.flatten(0, -2).argmax(-1)).sum())
        found.difference = max(found.difference, float((first - output).abs().max()))
        found.scale = max(found.scale, float(output.abs().max()))
    return found


def _simulated(
    attachment: Attachment, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Unsigned codes of every activation quantizer, call by call, and the first output."""
    codes: dict[str, list[Tensor]] = {}
    observers = {}
    for site, quantizer in attachment.items():
        if site.role == "weight":
            continue

        def keep(x: Tensor, name: str = site.name, quantizer: Any = quantizer) -> None:
            made = quantizer.encode(x.detach()).int() + offset_of(quantizer)
            codes.setdefault(name, []).append(made.to(torch.uint8).cpu())

        observers[site.name] = [keep]
    with attachment.observing(observers):  # type: ignore[arg-type]
        output = first_output(model(*args, **kwargs))
    return codes, output.detach().float().cpu()


def _count(
    program: IntegerProgram, inputs: dict[int, Tensor], codes: dict[str, list[Tensor]], found: Comparison
) -> None:
    """Run the operations on the simulation's codes, and by themselves."""
    forced, free = dict(inputs), dict(inputs)
    pending = {name: list(made) for name, made in codes.items()}
    for op in program.ops:
        made = step(op, forced)
        free[op.writes] = step(op, free)
        if pending.get(op.name):
            expected = pending[op.name].pop(0)
            count = found.sites.setdefault(op.name, SiteCount())
            for prefix, other in (("", made), ("free_", free[op.writes])):
                gap = (other.int() - expected.int()).abs()
                setattr(count, f"{prefix}differing", getattr(count, f"{prefix}differing") + int((gap > 0).sum()))
                setattr(count, f"{prefix}most", max(getattr(count, f"{prefix}most"), int(gap.max())))
            count.codes += expected.numel()
            made = expected
        forced[op.writes] = made
