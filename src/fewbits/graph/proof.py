"""Whether a relation holds, found by trying: in float64, at the outputs of its consumers, with a control.
 A right relation changes nothing; a wrong one changes something; a relation the data never exercised changes nothing
either. Only the first is proved, so producers are also scaled alone: what does not move then was not exercised. The
numbers say nothing about parameters that did not run; those are known from the record (`Relation.uncovered`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbits.errors import FewbitsError
from fewbits.graph.relations import End, Relation
from fewbits.graph.trace import Tracer, clean
from fewbits.graph.types import CallKey, Graph
from fewbits.graph.weights import scale

EXACT = 1e-9
#: Some models cast to float32 inside (norms, rotary embeddings): float32 rounding is all that can be asked there.
CASTING = 1e-6
#: How far above the threshold the control must move an output.
MOVED = 1e3


@dataclass(frozen=True)
class Verdict:
    """`error`: largest relative change at the consumers under the whole change; `control`: smallest change over the
    consumers when only the producers are scaled; `threshold`: what `error` was held against; `reason`: why, where not
    proved."""

    relation: str
    verdict: str  # "proved" | "refuted" | "not exercised"
    error: float
    control: float
    threshold: float
    reason: str = ""

    def __bool__(self) -> bool:
        return self.verdict == "proved"


def prove(
    model: nn.Module, graph: Graph, relation: Relation, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Verdict:
    """Try one relation on one input. The model is left as it was.

    Only the smallest submodule that contains all ends is copied to float64 and run, on the inputs it had. Raises
    `FewbitsError` for a relation that is blocked (replace the op first).
    """
    return prove_all(model, graph, [relation], args, kwargs)[0]


def prove_all(
    model: nn.Module,
    graph: Graph,
    relations: Iterable[Relation],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[Verdict]:
    """Try each relation, capturing the submodules' inputs in one forward of the model."""
    relations = list(relations)
    for relation in relations:
        if relation.blocked_by:
            raise FewbitsError(
                f"relation {relation.name} cannot be proved before {', '.join(sorted(relation.blocked_by))} is replaced"
            )
    homes = [_home(graph, relation) for relation in relations]
    inputs = _capture(model, set(homes), args, kwargs or {})
    verdicts: dict[int, Verdict] = {}
    for home in dict.fromkeys(homes):  # one float64 copy at a time
        mine = [i for i, place in enumerate(homes) if place == home]
        if home not in inputs:
            for i in mine:
                verdicts[i] = Verdict(
                    relations[i].name, "not exercised", math.nan, math.nan, EXACT, f"{home} did not run"
                )
            continue
        trial = _Trial(model, home, inputs[home])
        for i in mine:
            verdicts[i] = trial.judge(relations[i], seed)
    return [verdicts[i] for i in range(len(relations))]


class _Trial:
    """A float64 copy of one submodule and its recorded inputs."""

    def __init__(self, model: nn.Module, home: str, inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.home = home
        inner = copy.deepcopy(_submodule(model, home)).double()
        inner.eval()
        self.root = _Rooted(inner, home)
        self.inner = inner
        self.inputs = [_double(pair) for pair in inputs]
        self.casts = False
        self.before = self.run()

    def run(self) -> dict[CallKey, list[Tensor]]:
        """Outputs of every call of a known op, by run-time address; one entry per use."""
        watch = _Watch(self.home)
        watch.install(self.inner)
        seen: dict[CallKey, list[Tensor]] = watch.outputs
        try:
            with torch.no_grad():
                for args, kwargs in self.inputs:
                    args, kwargs = copy.deepcopy((args, kwargs))  # caches are written in place
                    self.inner(*args, **kwargs)
        finally:
            watch.remove()
        self.casts = self.casts or watch.casts
        return seen

    def judge(self, relation: Relation, seed: int) -> Verdict:
        generator = torch.Generator().manual_seed(seed)
        s = torch.exp(0.5 * torch.randn(relation.size, generator=generator, dtype=torch.float64))
        threshold = CASTING if self.casts else EXACT
        wanted = _watched(relation)

        def changed(only: str, producers: tuple[End, ...] | None = None) -> dict[CallKey, list[Tensor]]:
            saved = {name: self.root.parameter(name).detach().clone() for name in _params(relation)}
            try:
                part = relation if producers is None else _with(relation, producers)
                scale(self.root, part, s, only=only, force=True)
                return self.run()
            finally:
                with torch.no_grad():
                    for name, held in saved.items():
                        self.root.parameter(name).copy_(held)

        missing = [site for site, calls in wanted.items() if not any(call in self.before for call in calls)]
        if missing:
            return Verdict(relation.name, "not exercised", math.nan, math.nan, threshold, f"{missing[0]} did not run")
        whole = changed("both")
        errors = {call: _distance(self.before, whole, [call]) for call in self.before if call not in relation.moves}
        if not errors:
            return Verdict(
                relation.name,
                "not exercised",
                math.nan,
                math.nan,
                threshold,
                "every output near its ends moves with it",
            )
        error = max(errors.values())
        if not error <= threshold:
            path, op, _ = max(errors, key=errors.__getitem__)
            return Verdict(relation.name, "refuted", error, math.nan, threshold, f"the output of {path}.{op} moved")
        control = changed("producers")
        moved = {site: _distance(self.before, control, calls) for site, calls in wanted.items()}
        least = min(moved.values())
        if not least > MOVED * threshold:
            still = min(moved, key=moved.__getitem__)
            return Verdict(
                relation.name, "not exercised", error, least, threshold, f"{still} does not react to its producers here"
            )
        if len(relation.producers) > 1:
            for end in relation.producers:
                alone = changed("producers", (end,))
                if not max(_distance(self.before, alone, calls) for calls in wanted.values()) > MOVED * threshold:
                    return Verdict(
                        relation.name, "not exercised", error, least, threshold, f"nothing reacts to {end.param} here"
                    )
        if relation.uncovered:
            reason = f"the recorded forward used only a part of {', '.join(relation.uncovered)}"
            return Verdict(relation.name, "not exercised", error, least, threshold, reason)
        return Verdict(relation.name, "proved", error, least, threshold)


class _Watch(Tracer):
    """Keeps what every known op returns."""

    def __init__(self, home: str) -> None:
        super().__init__()
        self.home = home
        self.outputs: dict[CallKey, list[Tensor]] = {}
        self.casts = False

    def handle(
        self, op: str, key: CallKey | None, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = _grouped_mm(*args, **kwargs) if op == "grouped_mm" else func(*args, **kwargs)
        for leaf in pytree.tree_leaves(out):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                continue
            if leaf.dtype != torch.float64 and any(
                isinstance(x, Tensor) and x.dtype == torch.float64 for x in pytree.tree_leaves(args)
            ):
                self.casts = True
            if key is not None:
                path, name, ordinal = key
                full = ".".join(part for part in (self.home, path) if part)
                self.outputs.setdefault((full, name, ordinal), []).append(leaf.detach().double())
        return out


class _Rooted(nn.Module):
    """A submodule under the name it has in the whole model, so that parameter names stay."""

    def __init__(self, inner: nn.Module, home: str) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["home"] = inner, home

    def get_submodule(self, target: str) -> nn.Module:
        inner: nn.Module = self.__dict__["inner"]
        home: str = self.__dict__["home"]
        return inner.get_submodule(target[len(home) :].lstrip(".") if home else target)

    def parameter(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        held = getattr(self.get_submodule(path), leaf)
        assert isinstance(held, Tensor)
        return held


def _params(relation: Relation) -> set[str]:
    return {end.param for end in relation.ends} | {end.bias for end in relation.producers if end.bias is not None}


def _with(relation: Relation, producers: tuple[End, ...]) -> Relation:
    return replace(relation, producers=producers)


def _watched(relation: Relation) -> dict[str, list[CallKey]]:
    """What must react to the producers alone: every consumer, or for a pair the products where both sides meet."""
    if "query_key" in relation.tags:
        return {f"{path}.{op}": [(path, op, number)] for path, op, number in relation.meets}
    return {end.site: list(end.calls) for end in relation.consumers}


def _grouped_mm(x: Tensor, weight: Tensor, offs: Tensor | None = None, **options: Any) -> Tensor:
    """The grouped product written out: torch's own has no float64."""
    if offs is None or x.dim() != 2 or weight.dim() != 3:
        raise FewbitsError("only grouped products of rows with a stack of matrices can be tried in float64")
    starts = [0, *offs.tolist()]
    parts = [x[a:b] @ w for a, b, w in zip(starts, starts[1:], weight, strict=False)]
    out = torch.zeros(len(x), weight.shape[-1], dtype=x.dtype, device=x.device)
    done = torch.cat(parts)
    out[: len(done)] = done
    return out


def _home(graph: Graph, relation: Relation) -> str:
    """The smallest module with a forward of its own that holds every end's parameter and call."""
    places = [end.module for end in relation.ends] + [call[0] for end in relation.ends for call in end.calls]
    places += [call[0] for call in relation.meets]
    common = places[0].split(".") if places[0] else []
    for place in places[1:]:
        parts = place.split(".") if place else []
        shared = 0
        while shared < min(len(parts), len(common)) and parts[shared] == common[shared]:
            shared += 1
        common = common[:shared]
    while common and ".".join(common) not in graph.module_calls:
        common.pop()
    return ".".join(common)


def _capture(
    model: nn.Module, homes: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The inputs of some submodules in one forward; every call of each."""
    found: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    if homes == {""}:
        return {"": [(args, kwargs)]}
    handles = []
    modes = {module: module.training for module in model.modules()}
    try:
        for name, module in model.named_modules():
            path = clean(name)
            if path not in homes:
                continue

            def keep(_: nn.Module, a: Any, k: Any, path: str = path) -> None:
                found.setdefault(path, []).append(copy.deepcopy((a, k)))

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        with torch.no_grad():
            model.eval()(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return found


def _submodule(model: nn.Module, path: str) -> nn.Module:
    return next(module for name, module in model.named_modules() if clean(name) == path)


def _double(tree: Any, made: dict[int, Any] | None = None) -> Any:
    """Every floating tensor in float64, in containers and objects (caches) too; what was one tensor stays one."""
    made = {} if made is None else made
    if isinstance(tree, Tensor):
        if not tree.is_floating_point():
            return tree
        return made.setdefault(id(tree), tree.double())
    if isinstance(tree, dict):
        new = copy.copy(tree)
        for key, value in tree.items():
            new[key] = _double(value, made)
        return new
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_double(x, made) for x in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_double(x, made) for x in tree)
    if hasattr(tree, "__dict__") and not isinstance(tree, (type, nn.Module)) and not callable(tree):
        if id(tree) not in made:
            made[id(tree)] = held = copy.copy(tree)
            for key, value in vars(tree).items():
                held.__dict__[key] = _double(value, made)
        return made[id(tree)]
    return tree


def _distance(before: dict[CallKey, list[Tensor]], after: dict[CallKey, list[Tensor]], calls: list[CallKey]) -> float:
    """Largest change of the calls' outputs, relative to their largest value; infinite where shapes or counts differ."""
    worst = 0.0
    for call in calls:
        if call not in before:
            continue
        old, new = before[call], after.get(call, [])
        if len(old) != len(new):
            return math.inf
        for a, b in zip(old, new, strict=True):
            if a.shape != b.shape:
                return math.inf
            if a.numel():
                # masked scores hold -inf on both sides
                change = torch.where(a == b, torch.zeros_like(a), (a - b).abs()).max() / a[
                    a.isfinite()
                ].abs().max().clamp(min=1e-300)
                worst = max(worst, float(change)) if not math.isnan(float(change)) else math.inf
    return worst
