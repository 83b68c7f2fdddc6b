"""What a step sees of one unit: its sites, weights, quantizers, cached inputs and targets, and how to run it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.attach import REPLACEMENTS
from fewbits.engine.gradients import output_gradients
from fewbits.engine.module_calls import ModuleCalls, module_calls
from fewbits.engine.statistics import Statistic
from fewbits.engine.tree import Batch, Samples, Tree, map_tensors, to
from fewbits.errors import FewbitsError
from fewbits.formats import Params
from fewbits.graph import operands
from fewbits.graph.results import tag_results
from fewbits.graph.types import Call, Graph, Site, Unit
from fewbits.outliers.parts import Part
from fewbits.quantizer import Quantizer
from fewbits.recipe import QSpec, Recipe

if TYPE_CHECKING:
    from fewbits.attach import Attachment
    from fewbits.engine.run import Run


class ModelContext:
    """A model with quantizers attached, its graph and a recipe: what model-scope steps work on."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model: nn.Module = run.model
        self.graph: Graph = run.graph
        self.attachment: Attachment = run.attachment
        self.recipe: Recipe = run.recipe
        self.device: torch.device = run.device
        self._codes_home = torch.device("cpu")

    def spec(self, site: Site) -> QSpec | None:
        """The grid the recipe's scheme, or a step that allocates bits, puts at a site; None for floating point."""
        return self.run.spec(site)

    def override(self, site: Site, spec: QSpec | None) -> None:
        """Put another grid at a site than the scheme says, from here on (bits allocated layer by layer)."""
        self.run.overrides[site.name] = spec

    def set_batches(self, batches: Sequence[Batch]) -> None:
        """Calibration data that a step made, where none was given."""
        self.run.set_batches(batches)

    def remembered(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` returns, computed once a run: later steps that ask by the same name get the same tensors.

        It is kept in the run's work folder too, where there is one, so that a resumed run reads it back.
        """
        known = self.run.known
        if name not in known:
            commits = self.run.commits
            found = None if commits is None else commits.recall(name)
            if found is None:
                found = {key: value.detach().cpu().contiguous() for key, value in compute().items()}
                if commits is not None:
                    commits.remember(name, found)
            known[name] = found
        return known[name]

    def replace_op(self, call: Call, op: str) -> None:
        """Run another elementwise op ("relu") in place of a recorded one, in this run and in the saved model.

        The recorded call becomes one of the new op, so that whoever reads the graph afterwards sees it.
        """
        if call.key is None:
            raise FewbitsError(f"{call.module}: {call.op} has no name of its own to be replaced at")
        self.attachment.set_replacement(call.key, op)
        first = call.bound["input"]
        call.op, call.func, call.args, call.kwargs = op, REPLACEMENTS[op], (first,), {}
        call.bound, call.inplace = {"input": first}, False
        tag_results(self.graph, self.graph.sites)
        self.graph.forget("relations", "_propagation")

    def multiply(self, site: Site, factor: Tensor, axis: int = -1) -> None:
        """Multiply the tensor at an activation site by `factor` [channels] along `axis` at run time.

        A factor that is already there is multiplied too. For a channel scale that no norm or weight can take.
        """
        before = self.attachment.factors.get(site.name)
        if before is not None:
            if before[1] != axis:
                raise FewbitsError(f"{site.name}: already multiplied along axis {before[1]}, not {axis}")
            factor = before[0].to(factor.device) * factor
        self.attachment.set_factor(site.name, factor.to(self.device), axis)

    def sites(self) -> list[Site]:
        return list(self.graph.sites.values())

    def weights(self) -> list[Site]:
        """Weight sites the scheme quantizes, in call order."""
        return [site for site in self.sites() if site.role == "weight" and self.spec(site) is not None]

    def activations(self) -> list[Site]:
        """Activation sites the scheme quantizes, in call order."""
        return [site for site in self.sites() if site.role != "weight" and self.spec(site) is not None]

    def input_of(self, weight: Site) -> Site:
        """The activation site that a weight site's call multiplies."""
        found = self.graph.sites.get(weight.name.removesuffix("weight") + "input")
        if found is None:
            raise FewbitsError(f"{weight.name} has no input site")
        return found

    def weight(self, site: Site) -> Tensor:
        """The site's weight as a float32 matrix (out, columns), a copy."""
        return operands.read(self.model, site).float().flatten(1)

    def float_weight(self, site: Site) -> Tensor:
        """A committed weight as it was before, float32 (out, columns): for steps that ask for `float_weights`."""
        held = self.run.float_weights
        if held is None or site.name not in held:
            raise FewbitsError(f"{site.name}: its float weight was not kept in this sweep")
        return held[site.name].to(self.device).float().flatten(1)

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Replace the site's weight by a floating-point matrix (out, columns)."""
        shape = operands.canonical(operands.operand(self.model, site), site.layout, site.groups).shape
        operands.write(self.model, site, weight.view(shape))

    def quantize_weight(
        self,
        site: Site,
        codes: Tensor,
        params: Params,
        group_index: Tensor | None = None,
        parts: Sequence[Part] = (),
        spec: QSpec | None = None,
    ) -> None:
        """Commit a weight: its integer codes (out, columns) on the scheme's grid, or that of `spec`, with these
        parameters.

        The parameter holds the decoded values from here on. A parameter that is also read elsewhere (a tied head) is
        left alone and quantized in the forward instead. `group_index` gives each column's group where groups are not
        contiguous. `parts` are laid, in order, over what the codes decode to.
        """
        spec = spec or self.spec(site)
        if spec is None:
            raise FewbitsError(f"{site.name}: the scheme keeps this weight in floating point")
        if self.run.float_weights is not None and site.name not in self.run.float_weights:
            self.run.float_weights[site.name] = operands.read(self.model, site)
        quantizer = Quantizer(spec, site.name).to(self.device)
        quantizer.set_params({name: value.detach() for name, value in params.items()})
        attachment = self.attachment
        attachment.set_quantizer(site.name, quantizer)
        attachment.codes[site.name] = codes.detach().to(self._codes_home)
        if group_index is not None:
            attachment.group_index[site.name] = group_index.detach().to("cpu")
        for part in parts:
            part.check(codes.shape, site.name)
        if parts:
            attachment.parts[site.name] = tuple(parts)
        if site.used_by:
            if group_index is not None:
                raise FewbitsError(
                    f"{site.name} is tied to {site.used_by[0]} and cannot use permuted groups; "
                    "turn act-order off for it"
                )
            attachment.thaw(site.name)
            return
        self.set_weight(site, attachment.decoded(site.name).to(self.device))
        attachment.freeze(site.name)

    def quantizer(self, site: Site | str) -> Quantizer | None:
        return self.attachment.quantizer(site if isinstance(site, str) else site.name)

    def set_quantizer(self, site: Site, quantizer: Quantizer | None) -> None:
        if quantizer is not None:
            quantizer.to(self.device)
        self.attachment.set_quantizer(site.name, quantizer)

    def generator(self, purpose: str = "") -> torch.Generator:
        """A random generator on the CPU that depends only on the run's seed and the purpose."""
        return _seeded(f"{self.run.seed}/model/{purpose}")

    def note(self, message: str) -> None:
        """Something the user should read in the report."""
        self.run.note(message)


class GlueContext(ModelContext):
    """The activation sites that lie between two units: a stem's activation, a join of branches."""

    def __init__(self, run: Run, index: int, stream: str, sites: list[Site]) -> None:
        super().__init__(run)
        self.index = index
        self.stream = stream
        self._sites = sites

    def activations(self) -> list[Site]:
        """Those without a quantizer: a step may have put one behind the last layer of the unit before."""
        return [site for site in self._sites if self.quantizer(site) is None]

    def gather(self, requests: dict[str, Iterable[Statistic]], stream: str | None = None) -> None:
        """Fill the statistics at the named sites, the glue itself in floating point, behind the regime's prefix or
        that of another stream of the sweep."""
        size = [0]
        observers: dict[str, list[Any]] = {
            name: [lambda x, s=statistic: s.update(x, size[0]) for statistic in statistics]
            for name, statistics in requests.items()
        }
        with self.attachment.disabled(), self.attachment.observing(observers):
            self.run.observe_glue(self.index, stream or self.stream, lambda count: size.__setitem__(0, count))


class UnitContext(ModelContext):
    """One unit of a sweep.

    `prefix` is the stream the regime feeds statistics from: "quantized", or "float" in the parallel regime. Inputs are
    cached for the streams that the sweep's steps asked for.
    """

    def __init__(self, run: Run, unit: Unit, sweep: int) -> None:
        super().__init__(run)
        self.unit = unit
        self.sweep = sweep
        self.module: nn.Module = run.model.get_submodule(unit.name)
        self._codes_home = run.device  # where they are packed; the sweep moves them when the unit is done
        self.prefix = "float" if run.recipe.calibration.regime == "parallel" else "quantized"
        self.writes_in_place = any(self.graph.calls[index].inplace for index in unit.calls)

    @property
    def name(self) -> str:
        return self.unit.name

    def sites(self) -> list[Site]:
        return self.graph.sites_of(self.unit)

    def sites_behind(self) -> list[Site]:
        """Activation sites the scheme quantizes that lie in no unit and run before the next unit starts."""
        return self.run.glue_sites(self.run.replay.order[self.unit.name] + 1)

    def generator(self, purpose: str = "") -> torch.Generator:
        """A random generator that depends only on the run's seed, the sweep, the unit and the purpose."""
        return _seeded(f"{self.run.seed}/{self.sweep}/{self.unit.name}/{purpose}")

    # -- data --------------------------------------------------------------------------------------------------------
    def batches(
        self, stream: str | None = None, every: int = 1
    ) -> Iterator[tuple[int, tuple[Any, ...], dict[str, Any]]]:
        """(samples, args, kwargs) of the cached calls of the unit, in order, on the first batch and every so many-th
        after it."""
        numbers = range(0, len(self.run.sizes), every)
        calls = [(number, use) for number in numbers for use in range(self.run.uses(self.unit, number))]
        trees = self.run.store.walk([("input", stream or self.prefix, number, use) for number, use in calls])
        for (number, _), (args, kwargs) in zip(calls, trees, strict=True):
            if self.writes_in_place:
                args, kwargs = map_tensors(torch.clone, (args, kwargs))
            yield self.run.sizes[number], args, kwargs

    def inputs(self, stream: str | None = None, device: torch.device | None = None) -> Samples:
        """All cached inputs of a stream, joined by sample on a device (default: where they come from)."""
        trees = [_at(device, (args, kwargs)) for _, args, kwargs in self.batches(stream)]
        return Samples.join(trees, self._sizes(), f"unit {self.name}")

    def targets(self, device: torch.device | None = None) -> Samples:
        """The float unit's outputs on float inputs, joined by sample on a device.

        Raises `FewbitsError` where they were not kept: of the last unit they are, for a recipe with a step of
        `gradients`.
        """
        if ("float", self.unit.name, 0, 0) not in self.run.store:
            raise FewbitsError(f"unit {self.name}: float outputs are kept for recipes with a step that has `gradients`")
        trees = [
            _at(device, self.run.store.get(("float", self.unit.name, number, use)))
            for number in range(len(self.run.sizes))
            for use in range(self.run.uses(self.unit, number))
        ]
        return Samples.join(trees, self._sizes(), f"outputs of unit {self.name}")

    def _sizes(self) -> list[int]:
        return [size for number, size in enumerate(self.run.sizes) for _ in range(self.run.uses(self.unit, number))]

    # -- running -----------------------------------------------------------------------------------------------------
    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
        """The unit with whatever quantizers are enabled now."""
        return self.module(*args, **kwargs)

    def output_gradients(self) -> Tensor:
        """Task-loss gradients at the unit's output (`engine.gradients`)."""
        return output_gradients(self)

    def gather(
        self, requests: dict[str, Iterable[Statistic]], stream: str | None = None, quantized: bool | None = None
    ) -> None:
        """Run the unit over the cached inputs and fill the statistics at the named sites.

        `stream` defaults to the regime's prefix. `quantized` False runs the float unit (default: False on the float
        stream). Sites that read the same tensor share one accumulator per statistic key.
        """
        if not requests:
            return
        stream = stream or self.prefix
        quantized = stream == "quantized" if quantized is None else quantized
        current = [0]
        shared: dict[tuple[Any, ...], Statistic] = {}
        twins: list[tuple[Statistic, Statistic]] = []
        observers: dict[str, list[Any]] = {}
        for name, statistics in requests.items():
            site = self.graph.sites[name]
            for statistic in statistics:
                key = (site.value if site.uses == 1 else name, statistic.key)
                first = shared.setdefault(key, statistic)
                if first is not statistic:
                    twins.append((statistic, first))
                    continue
                observers.setdefault(name, []).append(lambda x, s=statistic: s.update(x, current[0]))
        with ExitStack() as stack:
            if not quantized:
                stack.enter_context(self.attachment.disabled())
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.attachment.observing(observers))
            for size, args, kwargs in self.batches(stream):
                current[0] = size
                self.forward(args, kwargs)
        self.run.hessian_arithmetic.update(*(statistic.hessian_arithmetic for statistic in shared.values()))
        for statistic, first in twins:
            statistic.__dict__.update(first.__dict__)

    def module_calls(self, path: str, stream: str | None = None, every: int = 1) -> AbstractContextManager[ModuleCalls]:
        """What a module inside the unit is called with and returns in floating point (`engine.module_calls`)."""
        return module_calls(self, path, stream or self.prefix, every)

    @contextmanager
    def original_weights(self) -> Iterator[None]:
        """The unit's floating-point parameters, transforms done, in place while the context lasts.

        For a step that reads the float stream in a sweep of its own; in the first sweep they are there until a step
        replaces them.
        """
        with self.run._float_weights(self.unit, self.sweep):
            yield

    @contextmanager
    def float_activations(self) -> Iterator[None]:
        """Activation quantizers off while the context lasts; weights keep theirs."""
        with self.attachment.without_activations():
            yield


def _at(device: torch.device | None, tree: Tree) -> Tree:
    return tree if device is None else to(tree, device)


def _seeded(text: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)
