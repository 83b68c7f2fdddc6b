"""The sweep: what a unit is fed, regimes, determinism, budgets, failures."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.engine import Budget
from fewbits.engine.run import Run
from fewbits.engine.statistics import AbsMax, Bounds, Hessian, Values
from fewbits.errors import FewbitsError
from fewbits.formats import PerTensor
from fewbits.graph import record
from fewbits.papers import build_recipe
from fewbits.recipe import Recipe, Step
from fewbits.steps.gptq import ColumnSolver

MODELS = {"encoder": (encoder, tokens), "skipnet": (skipnet, images)}


def _run(model, recipe: Recipe, batches, **options) -> Run:
    unset = dict.fromkeys(("example", "work_dir", "progress", "budget", "units", "source"))
    defaults = {**unset, "seed": 0, "device": torch.device("cpu"), "resume": False}
    return Run(model, recipe, batches, **{**defaults, **options})


class Spy(Step):
    """Keeps what each unit was fed, in both streams, and what the float unit returned."""

    stage = 10
    streams = frozenset({"float", "quantized"})

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, list]] = {}

    def apply(self, unit) -> None:
        held = {stream: [args for _, args, _ in unit.batches(stream)] for stream in ("float", "quantized")}
        self.seen[unit.name] = {
            key: [tuple(t.clone() for t in args if isinstance(t, torch.Tensor)) for args in value]
            for key, value in held.items()
        }

    def to_dict(self) -> dict:
        return {"step": "Spy"}


def _entries(model, batches, names: list[str]) -> dict[str, list[tuple]]:
    """What each module is really called with in plain forwards."""
    seen: dict[str, list[tuple]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(
                tuple(t.clone() for t in args if isinstance(t, torch.Tensor))
            )
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_units_are_fed_what_a_whole_forward_feeds_them(name: str) -> None:
    make, data = MODELS[name]
    model, batches = make(), data(8)
    original = copy.deepcopy(model)
    spy = Spy()
    base = build_recipe("rtn", "W3A16")
    import dataclasses

    result = quantize(model, dataclasses.replace(base, steps=(spy, *base.steps)), batches)
    names = [unit.name for unit in result.units]
    assert len(names) >= 4
    on_float, on_quantized = _entries(original, batches, names), _entries(model, batches, names)
    for unit in names:
        for stream, expected in (("float", on_float), ("quantized", on_quantized)):
            got = spy.seen[unit][stream]
            assert len(got) == len(expected[unit])
            # A unit called several times per forward is captured call by call, batch by batch, as a forward does.
            for ours, real in zip(got, expected[unit], strict=True):
                for a, b in zip(ours, real, strict=True):
                    torch.testing.assert_close(
                        a, b, rtol=1e-5, atol=1e-5, msg=lambda m, u=unit, s=stream: f"{u}, {s} stream: {m}"
                    )
    last = names[-1]
    assert not torch.allclose(spy.seen[last]["float"][0][0], spy.seen[last]["quantized"][0][0], atol=1e-4)


def test_outputs_are_dropped_when_nothing_reads_them_any_more() -> None:
    model, batches = encoder(depth=5), tokens(8)
    sizes = []

    class Watch(Spy):
        def apply(self, unit) -> None:
            sizes.append(sum(1 for key in list(unit.run.store.keys()) if key[0] == "quantized"))

    import dataclasses

    base = build_recipe("rtn", "W4A16")
    quantize(model, dataclasses.replace(base, steps=(Watch(), *base.steps)), batches)
    assert max(sizes) <= 2 * len(batches), "a chain needs one unit's outputs at a time"


def test_parallel_and_sequential_regimes_differ_and_say_what_they_mean() -> None:
    def weights(regime: str):
        model = encoder()
        quantize(model, build_recipe("gptq", "W2A16", {"regime": regime}), tokens(16))
        return {name: value.clone() for name, value in model.named_parameters()}

    parallel, sequential, true_sequential = (weights(r) for r in ("parallel", "sequential", "true_sequential"))
    # The first unit's first weights see float inputs in every regime.
    assert torch.equal(parallel["blocks.0.q.weight"], sequential["blocks.0.q.weight"])
    assert torch.equal(sequential["blocks.0.q.weight"], true_sequential["blocks.0.q.weight"])
    assert not torch.equal(parallel["blocks.2.q.weight"], sequential["blocks.2.q.weight"])
    # Inside a unit only true_sequential feeds o what the quantized q, k, v give.
    assert torch.equal(parallel["blocks.0.o.weight"], sequential["blocks.0.o.weight"])
    assert not torch.equal(sequential["blocks.0.o.weight"], true_sequential["blocks.0.o.weight"])


def test_a_statistic_at_a_shared_input_is_gathered_once() -> None:
    updates = []

    class Counting(Hessian):
        def update(self, x, samples) -> None:
            updates.append(samples)
            super().update(x, samples)

    class Ask(Step):
        streams = frozenset({"prefix"})
        stage = 10

        def apply(self, unit) -> None:
            wanted = [s for s in unit.weights() if s.name.rsplit(".", 2)[-2] in "qkvo"]
            stats = {s.name: Counting(s, unit.graph.calls[s.call], unit.device) for s in wanted}
            unit.gather({unit.input_of(s).name: [stats[s.name]] for s in wanted})
            if wanted:
                q, k = (next(v for n, v in stats.items() if n.endswith(f".{x}.weight")) for x in "qk")
                assert torch.equal(q.value(), k.value()) and float(q.value().diagonal().sum()) > 0

    import dataclasses

    base = build_recipe("rtn", "W4A16")
    quantize(encoder(depth=2), dataclasses.replace(base, steps=(Ask(), *base.steps)), tokens(8))
    assert len(updates) == 2 * 2 * 2, "per block and batch: one for q, k, v together and one for o"


def test_statistics_do_not_depend_on_how_samples_are_batched() -> None:
    x = torch.randn(12, 5, 4)
    graph = record(torch.nn.Linear(4, 3), x)
    site = next(s for s in graph.sites.values() if s.role == "weight")
    for make in (
        lambda: AbsMax(),
        lambda: Bounds(PerTensor()),
        lambda: Values(12),
        lambda: Hessian(site, graph.calls[site.call], torch.device("cpu")),
    ):
        one, many = make(), make()
        one.update(x, 12)
        for part in x.split([5, 4, 3]):
            many.update(part, len(part))
        for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (one.value(), many.value())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(FewbitsError, match="no calibration data"):
        AbsMax().value()


def test_same_seed_same_bits_and_other_seed_other_bits() -> None:
    def learned(seed: int):
        model = skipnet()
        result = quantize(
            model,
            build_recipe("brecq", "W2A4", {"iters_w": 30, "iters_a": 20, "batch": 4}),
            images(16, batch=8),
            seed=seed,
        )
        scales = {site.name: quantizer.params["scale"].clone() for site, quantizer in result.attachment.items()}
        return {**scales, **{f"codes of {name}": codes for name, codes in result.attachment.codes.items()}}

    first, again, other = learned(0), learned(0), learned(1)
    assert set(first) == set(again) and all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quantize(skipnet(), build_recipe("brecq", "W4A16", {"iters_w": 3}), images(4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("recipe", ["gptq", "brecq"])
def test_activations_on_disk_change_nothing(recipe: str, tmp_path: Path) -> None:
    options = {"iters_w": 5} if recipe == "brecq" else {}
    results = []
    for budget in (None, Budget(device=0, host=0, folder=tmp_path)):
        model = encoder()
        run = _run(model, build_recipe(recipe, "W3A16", options), tokens(12), budget=budget)
        result = run.execute()
        if budget is not None:
            assert run.store.spilled_bytes > 0 and run.store.peak_host_bytes == 0
            assert result.forecast.spilled > 0
        run.close()
        results.append({name: value.clone() for name, value in model.named_parameters()})
    assert all(torch.equal(a, results[1][name]) for name, a in results[0].items())
    assert not list(tmp_path.iterdir()), "spilled files are removed"


def test_a_recipe_without_data_needs_no_batches_and_one_with_data_says_so() -> None:
    quantize(encoder(), build_recipe("rtn", "W4A16"), example=tokens(1)[0])
    with pytest.raises(FewbitsError, match="calibration"):
        quantize(encoder(), build_recipe("gptq", "W4A16"), example=tokens(1)[0])
    with pytest.raises(FewbitsError, match="example"):
        quantize(encoder(), build_recipe("rtn", "W4A16"))


def test_a_failure_detaches_and_names_the_site() -> None:
    model = encoder()
    model.blocks[1].o.weight.data[0, 0] = float("nan")
    with pytest.raises(FewbitsError, match=r"blocks\.1\.o\.weight"):
        quantize(model, build_recipe("rtn", "W4A16"), tokens(4))
    assert not model._forward_hooks and "_fewbits" not in model.__dict__
    with torch.no_grad():
        model(tokens(4)[0])


def test_a_scheme_site_no_step_quantized_is_an_error() -> None:
    import dataclasses

    recipe = build_recipe("rtn", "W4A8")
    without = dataclasses.replace(recipe, steps=tuple(s for s in recipe.steps if s.part != "activations"))
    with pytest.raises(FewbitsError, match="no step of rtn did"):
        quantize(encoder(), without, tokens(4))


def test_excluded_sites_and_edge_bits_are_obeyed() -> None:
    model = encoder()
    before = copy.deepcopy(model)
    result = quantize(model, build_recipe("rtn", "W3A8", {"exclude": "blocks.1.*", "first_last_bits": "8"}), tokens(8))
    assert torch.equal(model.blocks[1].q.weight, before.blocks[1].q.weight)
    assert not torch.equal(model.blocks[0].q.weight, before.blocks[0].q.weight)
    assert not [s for s, _ in result.attachment.items() if s.name.startswith("blocks.1.")]


def test_a_tied_head_keeps_the_embedding_in_floating_point() -> None:
    model = encoder()
    model.head.weight = model.embed.weight
    before = model.embed.weight.clone()
    result = quantize(model, build_recipe("rtn", "W3A16", {"quantize_head": "true"}), tokens(4))
    assert torch.equal(model.embed.weight, before)
    assert result.attachment.quantizer("head.weight") is not None and "head.weight" not in result.attachment.frozen
    with torch.no_grad():
        x = torch.randn(2, 16)
        assert not torch.allclose(model.head(x), torch.nn.functional.linear(x, before, model.head.bias), atol=1e-4)


def test_units_can_be_chosen() -> None:
    result = quantize(encoder(), build_recipe("gptq", "W4A16"), tokens(4), units=["blocks.*.q", "blocks.*.up"])
    names = [unit.name for unit in result.units]
    assert "blocks.0.q" in names and "blocks.2.up" in names and "blocks.0" not in names


def test_batches_in_every_form_mean_the_same() -> None:
    outputs = []
    for form in (lambda t: t, lambda t: (t,), lambda t: {"tokens": t}, lambda t: ((t,), {})):
        model = encoder()
        quantize(model, build_recipe("gptq", "W3A16"), [form(t) for t in tokens(8)])
        outputs.append(model.blocks[2].down.weight.clone())
    assert all(torch.equal(outputs[0], other) for other in outputs)


def test_activation_sites_between_units_are_calibrated_too() -> None:
    """A stem's activation lies in no unit: it must be quantized, on what the quantized prefix really gives it."""
    model = skipnet()
    data = images(8, batch=8)
    result = quantize(model, "brecq", data, bits="W4A4", options={"iters_w": 1, "iters_a": 1})
    glue = [site for site, _ in result.attachment.items() if not any(u.contains(site.module) for u in result.units)]
    assert "relu.output" in [site.name for site in glue], [site.name for site in glue]
    assert not [note for note in result.notes if "stays floating point" in note]
    with torch.no_grad():
        stem = torch.relu(model.stem(data[0]))
    quantizer = result.attachment.quantizer("relu.output")
    assert quantizer.spec.format.bits == 8
    top = float(quantizer.decode(torch.tensor(quantizer.spec.format.code_max)))
    assert top == pytest.approx(float(stem.max()), rel=0.25)


def test_glue_survives_resume(tmp_path: Path) -> None:
    def held(resume: bool) -> dict:
        model = skipnet()
        recipe = build_recipe("brecq", "W4A4", {"iters_w": 2, "iters_a": 2})
        result = quantize(model, recipe, images(8), work_dir=tmp_path, resume=resume)
        return {site.name: q.params["scale"].clone() for site, q in result.attachment.items()}

    first = held(False)
    for path in sorted(tmp_path.glob("sweep*.safetensors"))[-3:]:
        path.unlink()
    again, third = held(True), held(True)
    for later in (again, third):
        assert set(first) == set(later) and all(torch.equal(first[name], later[name]) for name in first)


def test_rows_of_a_convolution_are_taken_all_over_the_image_however_they_are_batched() -> None:
    from fewbits.engine.statistics import Rows

    # every position carries its own column number, so what is kept tells where it was taken
    x = torch.arange(8.0).expand(16, 2, 8, 8)
    graph = record(torch.nn.Conv2d(2, 3, 1), x[:1])
    site = next(s for s in graph.sites.values() if s.role == "weight")

    def kept(batch: int) -> torch.Tensor:
        rows = Rows(site, graph.calls[site.call], 16, limit=64)
        for part in x.split(batch):
            rows.update(part, len(part))
        return rows.value()

    whole = kept(16)
    assert whole.shape == (1, 64, 2) and torch.equal(whole, kept(4))
    assert torch.bincount(whole[0, :, 0].long(), minlength=8).min() >= 4, "16 = 2 x 8 steps would see one column only"


@pytest.mark.parametrize(
    ("bits", "options"),
    [("W3A16", {}), ("W4A16g8", {}), ("W3A16g8", {"act_order": True}), ("W4A16g8", {"static_groups": True})],
)
def test_weights_on_one_input_are_solved_as_one_with_the_same_codes(
    bits: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values share a Hessian: one factorisation, one sweep, and what each would get alone."""
    gptq_rounding = importlib.import_module("fewbits.rounding.gptq")  # the package names its function the same
    factorised: list[int] = []
    factor = gptq_rounding.inverse_factor

    def counting(h: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        factorised.append(h.shape[-1])
        return factor(h, damping)

    monkeypatch.setattr(gptq_rounding, "inverse_factor", counting)
    recipe = build_recipe("gptq", bits, options)
    stacked = quantize(encoder(), recipe, tokens(16)).attachment
    together = len(factorised)
    monkeypatch.setattr(ColumnSolver, "stacks", False)
    alone = quantize(encoder(), recipe, tokens(16)).attachment
    assert len(factorised) - together > together
    assert stacked.codes.keys() == alone.codes.keys() and stacked.group_index.keys() == alone.group_index.keys()
    for name, codes in alone.codes.items():
        assert float((stacked.codes[name] != codes).float().mean()) < 0.01, name  # products of other sizes round apart
        assert stacked.decoded(name).shape == alone.decoded(name).shape


def test_the_last_unit_is_not_run_for_outputs_nobody_reads() -> None:
    model, calls = encoder(), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    quantize(model, build_recipe("gptq", "W3A16"), tokens(12))
    assert len(calls) == 1, "the recorded forward alone: the head stays floating point"


def test_forecast_leaves_out_what_is_not_kept() -> None:
    model = encoder(vocabulary=5000)  # logits far larger than anything else
    run = _run(model, build_recipe("gptq", "W3A16"), tokens(64, vocabulary=5000))
    logits = 64 * 6 * 5000 * 4
    assert run.forecast.activations < logits / 10 and run.forecast.unit < logits
    run.close()


def test_layers_on_one_input_are_counted_with_one_hessian() -> None:
    run = _run(encoder(), build_recipe("gptq", "W3A16"), tokens(4))
    step = next(step for step in run.recipe.steps if isinstance(step, ColumnSolver))
    found = step.statistics_bytes(run.graph, run.units[0])
    assert found == 4 * (3 * 16**2 + 32**2), "queries, keys and values share one; the others have one each"
    run.close()


def test_scales_are_judged_on_no_more_tokens_than_asked() -> None:
    def judged(count: int) -> tuple[int, dict[str, torch.Tensor]]:
        model, calls = encoder(), []
        model.blocks[0].up.register_forward_hook(lambda *_: calls.append(1))
        recipe = build_recipe("awq", "W3A16g8", {"ratios": 2, "clip": False, "search_tokens": count})
        quantize(model, recipe, tokens(32))
        return len(calls), {name: value.clone() for name, value in model.named_parameters()}

    (all_calls, whole), (same_calls, same), (fewer, _) = judged(10**6), judged(32 * 6), judged(32 * 6 // 4)
    assert all_calls == same_calls > fewer
    assert all(torch.equal(value, same[name]) for name, value in whole.items())


def test_stored_trees_come_in_the_order_asked_and_may_be_dropped_on_the_way() -> None:
    from fewbits.engine.store import ActivationStore

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for budget in (Budget(), Budget(device=0), Budget(device=0, host=0)):
        store = ActivationStore(budget, device)
        for number in range(5):
            store.put(("x", number), {"a": torch.full((3,), float(number), device=device), "b": None})
        order = [("x", number) for number in (3, 1, 4)]
        found = []
        for key, tree in zip(order, store.walk(order), strict=True):
            assert tree["a"].device.type == device.type and tree["b"] is None
            found.append(tree["a"][0].item())
            store.put(("y", key[1]), tree)
            store.drop(key)
        assert found == [3, 1, 4] and [store.get(("y", n))["a"][0].item() for n in (3, 1, 4)] == found
        store.close()
