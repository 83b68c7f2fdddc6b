"""The sweep: unit by unit, statistics from cached streams, one atomic commit per unit, resumable at any point."""

from __future__ import annotations

import dataclasses
import difflib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewbits.attach import Attachment
from fewbits.engine import snapshot
from fewbits.engine.commits import Commits, fingerprint, model_fingerprint
from fewbits.engine.context import GlueContext, ModelContext, UnitContext
from fewbits.engine.gradients import first_output
from fewbits.engine.memory import Forecast, forecast
from fewbits.engine.progress import Progress
from fewbits.engine.replay import Replay
from fewbits.engine.source import InMemory, Source, Streamed, names_in, names_outside
from fewbits.engine.store import ActivationStore, Budget
from fewbits.engine.streams import Streams
from fewbits.engine.tree import Batch, as_call, batch_size, map_tensors, to
from fewbits.errors import FewbitsError
from fewbits.graph import record
from fewbits.graph.moments import Moments, NormStatistics
from fewbits.graph.record import without_cache
from fewbits.graph.types import Graph, Site, Unit
from fewbits.graph.units import find_units
from fewbits.recipe import QSpec, Recipe, Step


@dataclass
class QuantizeResult:
    """The quantized model (the one given, changed in place), what is attached to it, and what happened.

    `notes` are things a user should read (a tied head left alone, a failed factorisation); `seconds` and `peak_bytes`
    (host memory, or device memory on CUDA) are measured, `forecast` was predicted before the start. `overrides` are the
    grids that steps put at sites in place of the scheme's, as plain data (None: floating point). `hessian_arithmetic`
    names the ways in which Hessians were added up (`rounding.hessian.HessianAccumulator`), sorted; "unrecorded" where
    units were committed by a version that did not record them.
    """

    model: nn.Module
    attachment: Attachment
    graph: Graph
    recipe: Recipe
    seed: int
    seconds: float
    peak_bytes: int
    forecast: Forecast
    calibration_fingerprint: str
    notes: list[str] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    work: Path | None = None
    streamed: bool = False
    overrides: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    float_weights: dict[str, Tensor] | None = None
    hessian_arithmetic: list[str] = field(default_factory=list)


def quantize(
    model: nn.Module,
    recipe: Recipe,
    calibration: Sequence[Batch] = (),
    *,
    example: Batch | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    work_dir: Path | str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    budget: Budget | None = None,
    units: str | Sequence[str] | None = None,
    source: Streamed | None = None,
    keep_float: bool = False,
    input_range: tuple[float | Tensor, float | Tensor] | None = None,
) -> QuantizeResult:
    """Quantize `model` in place by `recipe`.

    calibration: batches (a tensor, a tuple of arguments, a dict of keyword arguments, or (args, kwargs)) with samples
        along the first axis.
    example: a batch to record the model with; the first sample of the calibration data by default.
    work_dir: where finished units are committed; with `resume` a run that was interrupted there goes on and ends with
        the same bits.
    units: globs of module names to process at once instead of the units found.
    budget: how many bytes of activations may be cached on the device and in host memory.
    source: stream weights from safetensors files; the model's parameters are then on the meta device.
    input_range: smallest and largest element of image inputs, as numbers or per channel [C], where that is known (from
        the preprocessing: `fewbits.hub.preprocess.input_range`), for recipes that work without data.
    keep_float: keep every weight as it was when it was quantized, transforms done, in the result's `float_weights`.

    Raises `FewbitsError` for bad input. No file is left half-written; the model itself may be quantized in part then.
    """
    run = Run(
        model,
        recipe,
        list(calibration),
        example,
        seed,
        torch.device(device),
        work_dir,
        resume,
        progress,
        budget,
        units,
        source,
    )
    if keep_float:
        run.float_weights = {}
    if input_range is not None:
        low, high = (torch.as_tensor(end, dtype=torch.float64).cpu() for end in input_range)
        run.input_range = (low, high)
    try:
        return run.execute()
    except BaseException:
        run.attachment.detach()
        raise
    finally:
        run.close()


class Run:
    """State of one quantization."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        batches: list[Batch],
        example: Batch | None,
        seed: int,
        device: torch.device,
        work_dir: Path | str | None,
        resume: bool,
        progress: Progress | None,
        budget: Budget | None,
        units: str | Sequence[str] | None,
        source: Streamed | None,
    ) -> None:
        self.started = time.monotonic()
        self.model = model
        self.recipe = recipe
        self.seed = seed
        self.device = device
        self.progress = progress or Progress()
        self.notes: list[str] = []
        self.overrides: dict[str, QSpec | None] = {}
        # What is known without data: mean and standard deviation per channel of values that norms make, kept up by
        # steps that rescale channels; ends of the inputs; and what follows for other values, all by value id.
        self.norms: dict[int, NormStatistics] = {}
        self.input_range: tuple[Tensor, Tensor] | None = None
        self.moments: dict[int, Moments] = {}
        self.mean_outputs: dict[int, Tensor] = {}  # by call
        self.float_weights: dict[str, Tensor] | None = None  # by site, (out, in, *kernel), where they are wanted
        self.known: dict[str, dict[str, Tensor]] = {}  # what steps asked to be remembered
        self.hessian_arithmetic: set[str] = set()
        self.batches = batches
        self.sizes = [batch_size(batch) for batch in batches]
        if example is None and not batches:
            raise FewbitsError("give calibration batches, or an example batch to record the model with")
        self.example = example if example is not None else _first_sample(batches[0])
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.streamed = source is not None
        if not self.streamed:
            model.to(device)
        elif recipe.model_steps():
            raise FewbitsError(
                f"{recipe.name}: a step that needs the whole model at once cannot run on streamed weights"
            )
        with without_cache(model):
            self.graph = self._record()
        self._glue_at: dict[int, list[Site]] | None = None
        self.units = find_units(self.graph, units) if units is not None else self.graph.units
        budget = budget or Budget()
        self.store = ActivationStore(budget, device, self.streamed)
        self.source: Source
        if source is not None:
            source.open(model, self.graph, self.units, device)
            self.source = source
        else:
            self.source = InMemory(model, self.store)
        known = {call.key for call in self.graph.calls if call.key is not None}
        self.attachment = Attachment(model, self.graph.sites, known)
        self.replay = Replay(model, self.attachment, self.graph, self.units, self.store)
        self.streams = Streams(self.replay, self.attachment, device)
        unread = self.units[-1] if self.units and not self._read(len(self.units) - 1) else None
        self.forecast = forecast(
            self.graph, self.units, recipe, {n: p.numel() * p.element_size() for n, p in model.named_parameters()},
            sum(self.sizes), batch_size(self.example), max(self.sizes, default=1), self.streamed,
            0 if source is None else source.lending.bytes, device,
            (self.store.device_limit, self.store.host_limit), unread,
        )  # fmt: skip
        # What a GPU holds is copied to be written, so that it can be written while the next unit is at work.
        behind = device.type == "cuda"
        self.commits = Commits(Path(work_dir), self.identity(), resume, behind) if work_dir is not None else None
        self._float_rewrites: set[Any] = set()
        self.float_logits: list[Tensor] | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def _record(self) -> Graph:
        """The graph of one forward; of a model whose weights are not there yet, by shapes alone."""
        if not self.streamed:
            args, kwargs = as_call(to(self.example, self.device))
            return record(self.model, *args, **kwargs)
        # Fake rather than meta tensors: libraries know a trace by them, and ask a trace for no values.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        args, kwargs = as_call(map_tensors(lambda t: mode.from_tensor(t.to("meta")), self.example))
        with mode:
            return record(self.model, *args, **kwargs)

    def spec(self, site: Site) -> QSpec | None:
        """The grid at a site: what a step put there, or what the scheme says."""
        if site.name in self.overrides:
            return self.recipe.scheme.changed(site, self.overrides[site.name])
        return self.recipe.scheme.spec(site)

    def set_batches(self, batches: Sequence[Batch]) -> None:
        """Calibration data made by a step of the recipe."""
        self.batches = list(batches)
        self.sizes = [batch_size(batch) for batch in self.batches]

    # -- the whole run -----------------------------------------------------------------------------------------------
    def execute(self) -> QuantizeResult:
        sweeps = self.recipe.sweeps()
        self._check_scheme()
        model_steps = self.recipe.model_steps()
        self.progress.start(len(model_steps) + len(sweeps) * len(self.units), str(self.forecast))
        try:
            with (
                torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
                without_cache(self.model),
            ):
                torch.manual_seed(self.seed)
                with torch.no_grad():
                    for step in model_steps:
                        step.apply(ModelContext(self))  # type: ignore[arg-type]
                        self.progress.advance()
                    self._float_rewrites = self.attachment.rewrites()
                    if any(step.logits for step in self.recipe.steps):
                        self.float_logits = [self._logits(batch) for batch in self.batches]
                for number, steps in enumerate(sweeps):
                    self.sweep(number, steps, later=sweeps[number + 1 :])
                if self.commits is not None:
                    self.commits.flush()
        finally:
            self.progress.stop()
        self._check_complete()
        return QuantizeResult(
            self.model,
            self.attachment,
            self.graph,
            self.recipe,
            self.seed,
            time.monotonic() - self.started,
            self.peak_bytes(),
            self.forecast,
            fingerprint(self.batches),
            self.notes,
            self.units,
            self.commits.folder if self.commits else None,
            self.streamed,
            {name: None if spec is None else spec.to_dict() for name, spec in self.overrides.items()},
            self.float_weights,
            sorted(self.hessian_arithmetic),
        )

    def sweep(self, number: int, steps: list[Step], later: list[list[Step]]) -> None:
        """One pass over the units."""
        prefix = "float" if self.recipe.calibration.regime == "parallel" else "quantized"
        wanted = {prefix if stream == "prefix" else stream for step in steps for stream in step.streams}
        streams = sorted(wanted)
        if streams and not self.batches:
            raise FewbitsError(f"{self.recipe.name} needs calibration data")
        float_later = any(
            "float" in step.streams or ("prefix" in step.streams and prefix == "float")
            for sweep in later
            for step in sweep
        )
        done = [self.commits is not None and self.commits.has(number, index) for index in range(len(self.units))]
        if all(done) and not self.glue_sites(len(self.units)):
            streams = []  # nothing left to compute in this sweep
        activations = all(step.activations is not False for step in steps)
        for index, unit in enumerate(self.units):
            self.progress.working(unit.name)
            self.source.bring_in(unit)
            if self.streamed and number > 0 and self.commits is not None:
                self._restore(number - 1, index)
            self.attachment.set_activations(activations)
            if streams or not done[index]:
                self._glue(index, steps, prefix)
            for stream in streams:
                self.streams.capture(stream, unit, self.batches)
            self.source.captured()
            self.attachment.set_activations(True)
            if number == 0 and float_later:
                self.source.remember(unit)
            if index + 1 < len(self.units):
                self.source.expect(self.units[index + 1])
            # Steps that learn compare with the unit's float outputs.
            read = self._read(index)
            if "float" in streams and (read or (not done[index] and any(step.gradients for step in steps))):
                with self._float_weights(unit, number), self.attachment.disabled():
                    self._outputs("float", unit)
            if done[index]:
                self._restore(number, index)
            else:
                with self._holding_float_weights(any(step.float_weights for step in steps)):
                    for step in steps:
                        step.apply(UnitContext(self, unit, number))
                if self.commits is not None:
                    self.commits.write(number, index, *self._snapshot(index))
            if "quantized" in streams and read:
                self.attachment.set_activations(activations)
                self._outputs("quantized", unit)
                self.attachment.set_activations(True)
            for stream in streams:
                self.streams.advance(stream, unit)
            if self.streamed:
                self.attachment.forget_codes(site.name for site in self.graph.sites_of(unit))
            # Of streamed weights not even the grids are to fill the device, unit after unit.
            names = [site.name for site in self.graph.sites_of(unit)]
            self.attachment.move(names, torch.device("cpu"), quantizers=self.streamed)
            self.source.let_go(unit)
            self.progress.advance()
        self._glue(len(self.units), steps, prefix)
        self.source.captured()
        for stream in streams:
            self.streams.end(stream)

    # -- streams -----------------------------------------------------------------------------------------------------
    def uses(self, unit: Unit, batch: int) -> int:
        """How often the unit is called in the forward of a batch."""
        return self.streams.uses(unit, batch)

    def glue_sites(self, index: int) -> list[Site]:
        """Activation sites of the scheme in no unit that run between the starts of unit `index - 1` and `index`."""
        if self._glue_at is None:
            self._glue_at = {}
            starts = [min(unit.calls) for unit in self.units]
            for site in self.graph.sites.values():
                if site.role != "weight" and not any(unit.contains(site.module) for unit in self.units):
                    self._glue_at.setdefault(sum(start < site.call for start in starts), []).append(site)
        return [site for site in self._glue_at.get(index, ()) if self.spec(site) is not None]

    def _read(self, index: int) -> bool:
        """Whether anything after the unit reads its outputs: the last one is followed by glue alone."""
        return index + 1 < len(self.units) or bool(self.glue_sites(len(self.units)))

    def _glue(self, index: int, steps: list[Step], stream: str) -> None:
        """Let the steps see to the activation sites in front of unit `index`."""
        sites = self.glue_sites(index)
        if sites:
            context = GlueContext(self, index, stream, sites)
            for step in steps:
                step.apply_glue(context)

    def observe_glue(self, index: int, stream: str, starting: Callable[[int], None]) -> None:
        """Run the glue in front of unit `index` on every batch, in floating point; `starting` gets the batch's size."""
        target = self.units[index] if index < len(self.units) else None
        for number, batch in enumerate(self.batches):
            starting(self.sizes[number])
            self.replay.capture(stream, target, to(batch, self.device), number)

    def _outputs(self, stream: str, unit: Unit) -> None:
        """Run the unit on its cached inputs and keep what it returns."""
        context = UnitContext(self, unit, 0)
        context.prefix = stream
        position = [(n, u) for n in range(len(self.batches)) for u in range(self.uses(unit, n))]
        for (number, use), (_, args, kwargs) in zip(position, context.batches(stream), strict=True):
            with torch.no_grad():
                output = context.forward(args, kwargs)
            self.replay.keep(stream, unit, number, use, map_tensors(torch.Tensor.detach, output))

    def _logits(self, batch: Batch) -> Tensor:
        args, kwargs = as_call(to(batch, self.device))
        return first_output(self.model(*args, **kwargs)).detach().cpu()

    @contextmanager
    def _float_weights(self, unit: Unit, sweep: int) -> Iterator[None]:
        """The unit's original float parameters in place while the context lasts."""
        if sweep == 0:
            yield
            return
        original = self.source.recall(unit)
        swapped: list[tuple[Tensor, Tensor]] = []
        for name in names_in(self.model, unit):
            held = self._parameter(name)
            swapped.append((held, held.data))
            # A bias that a transform created was absent before: zero.
            held.data = original[name].to(held.device) if name in original else torch.zeros_like(held.data)
        try:
            with self.attachment.hiding(self.attachment.rewrites() - self._float_rewrites):
                yield
        finally:
            for held, data in swapped:
                held.data = data

    @contextmanager
    def _holding_float_weights(self, wanted: bool) -> Iterator[None]:
        """Weights as they are when they are committed, for the steps of one unit that ask for them."""
        if not wanted or self.float_weights is not None:
            yield
            return
        self.float_weights = {}
        try:
            yield
        finally:
            self.float_weights = None

    def _parameter(self, name: str) -> Tensor:
        from fewbits.graph.operands import parameter

        return parameter(self.model, name)

    # -- commits -----------------------------------------------------------------------------------------------------
    def _snapshot(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        unit = self.units[index]
        # A step may have seen to the activation behind the unit too.
        sites = [*self.glue_sites(index), *self.graph.sites_of(unit), *self.glue_sites(index + 1)]
        held, described = snapshot.take(self.model, self.attachment, names_in(self.model, unit), sites)
        # of this unit and those before
        described["hessian_arithmetic"] = sorted(self.hessian_arithmetic)
        described["notes"] = list(self.notes)
        return held, described

    def _restore(self, sweep: int, index: int) -> None:
        assert self.commits is not None
        held, described = self.commits.read(sweep, index)
        snapshot.put(self.model, self.attachment, held, described, device=self.device)
        self.hessian_arithmetic.update(described.get("hessian_arithmetic", ["unrecorded"]))
        for message in described.get("notes", ()):
            self.note(message)

    def outside(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Snapshot of what lies in no unit."""
        return outside(self.model, self.attachment, self.graph, self.units)

    def identity(self) -> dict[str, Any]:
        """What must agree for a resumed run to continue another."""
        return {
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "calibration": fingerprint(self.batches),
            "model": model_fingerprint(self.model),
            "units": [unit.name for unit in self.units],
        }

    # -- checks ------------------------------------------------------------------------------------------------------
    def _check_scheme(self) -> None:
        context = ModelContext(self)
        for step in self.recipe.steps:
            step.prepare(self.graph, self.units)
        self._check_target()
        covered = [*context.weights(), *context.activations()]
        if not covered:
            raise FewbitsError(f"{self.recipe.name}: the scheme covers no site of this model; see `fewbits inspect`")
        self._check_changes()
        if self.recipe.bits.activation is not None and not context.activations():
            self.note(f"{self.recipe.name}: no activation of this model is one it quantizes; all stay floating point")
        for site in context.weights():
            if site.param is None or site.view is None:
                raise FewbitsError(
                    f"{site.name} is computed in the forward, not stored; exclude it to keep it in floating point"
                )
        lost = [site.name for site in context.weights() if not any(unit.contains(site.module) for unit in self.units)]
        for name in lost:
            self.note(f"{name} lies in no unit and stays floating point; name its module with `units` to quantize it")
        for place in self.graph.opaque:
            self.note(f"{place} hides its products behind one call and stays floating point inside")

    def _check_changes(self) -> None:
        """Every change that the user asked for must concern a site that the recipe would quantize."""
        scheme = dataclasses.replace(self.recipe.scheme, changes=())
        quantized = [site for site in self.graph.sites.values() if scheme.spec(site) is not None]
        for change in self.recipe.scheme.changes:
            if not any(change.covers(site) for site in quantized):
                near = difflib.get_close_matches(change.sites, [site.name for site in quantized], n=2)
                raise FewbitsError(
                    f"sites={change}: {self.recipe.name} quantizes no site of that name"
                    f"{'; did you mean ' + ' or '.join(near) + '?' if near else ''}; `fewbits inspect` lists them"
                )

    def _check_target(self) -> None:
        """The target, where the scheme names one, must have a grid for every site."""
        scheme = self.recipe.scheme
        if not scheme.target:
            return
        from fewbits.targets import load_profile, refusals

        free = dataclasses.replace(scheme, target="")
        specs = [(site, spec) for site in self.graph.sites.values() if (spec := free.spec(site)) is not None]
        found = refusals(load_profile(scheme.target), specs, self.graph)
        if found:
            raise FewbitsError(f"{self.recipe.name} {self.recipe.bits}: {found}")

    def _check_complete(self) -> None:
        """Every activation site of the scheme, and every weight site in a unit, must carry a quantizer now."""
        context = ModelContext(self)
        for site in (*context.weights(), *context.activations()):
            inside = any(unit.contains(site.module) for unit in self.units)
            if (inside or site.role != "weight") and self.attachment.quantizer(site.name) is None:
                raise FewbitsError(f"{site.name}: the scheme quantizes this site but no step of {self.recipe.name} did")

    def note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def close(self) -> None:
        if self.commits is not None:
            self.commits.close()
        self.source.close()
        self.store.close()


def outside(
    model: nn.Module, attachment: Attachment, graph: Graph, units: list[Unit]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Snapshot of the parameters and quantizers that lie in no unit."""
    sites = [site for site in graph.sites.values() if not any(unit.contains(site.module) for unit in units)]
    return snapshot.take(model, attachment, names_outside(model, units), sites)


def _first_sample(batch: Batch) -> Batch:
    size = batch_size(batch)
    return map_tensors(lambda t: t[:1] if t.dim() and t.shape[0] == size else t, batch)
