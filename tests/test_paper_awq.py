"""AWQ: what its parts promise, what its recipe does to models of several kinds, and how it joins with others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo_tiny
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.engine.context import UnitContext
from fewbits.engine.gradients import first_output
from fewbits.engine.statistics import AbsMean, Rows
from fewbits.engine.tree import map_tensors
from fewbits.errors import FewbitsError
from fewbits.formats import PerGroup, Uniform, affine
from fewbits.formats import quantize as on_grid
from fewbits.graph import record
from fewbits.graph.attention import score_products
from fewbits.graph.operands import canonical
from fewbits.graph.weights import operand, scale
from fewbits.hub import checkpoint
from fewbits.kernels.pack4 import pack4, unpack4
from fewbits.papers import build_recipe
from fewbits.papers.awq import grid
from fewbits.ranges import MinMax
from fewbits.ranges.output_clip import output_clip
from fewbits.recipe import Step
from fewbits.steps import scale_search
from fewbits.steps.output_clip import ClipOutputs
from fewbits.steps.scale_search import SearchScales, column_factors
from fewbits.transforms import magnitude_scales, search_scales
from test_checkpoint import _loaded

# -- the scale -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 50), min_size=2, max_size=12), st.integers(0, 19))
def test_scales_are_normalised_to_a_geometric_middle_of_one(magnitude: list[float], step: int) -> None:
    s = magnitude_scales(torch.tensor(magnitude), step / 20)
    assert float(s.max() * s.min()) == pytest.approx(1, rel=1e-4)
    assert torch.equal(s.argsort(stable=True), torch.tensor(magnitude).argsort(stable=True)) or step < 2


def test_equally_loud_channels_and_exponent_zero_give_no_scale() -> None:
    for ratio in (0.0, 0.3, 0.95):
        torch.testing.assert_close(magnitude_scales(torch.full((5,), 3.7), ratio), torch.ones(5))
    assert torch.equal(magnitude_scales(torch.tensor([1.0, 100.0]), 0.0), torch.ones(2))


def test_a_silent_channel_takes_no_part_unless_the_release_is_asked_for() -> None:
    loud = torch.tensor([0.0, 1.0, 4.0])
    kept, clamped = magnitude_scales(loud, 0.5), magnitude_scales(loud, 0.5, dead="clamp")
    torch.testing.assert_close(kept, torch.tensor([1.0, 0.5**0.5, 2**0.5]))
    torch.testing.assert_close(clamped, torch.tensor([1e-4, 1.0, 2.0]) / (2e-4) ** 0.5)
    assert torch.equal(magnitude_scales(torch.zeros(3), 0.5), torch.ones(3))


def test_the_search_takes_the_first_of_the_least_losses_and_never_one_that_is_not_finite() -> None:
    losses = iter([2.0, float("nan"), 1.0, 1.0, float("inf")])
    found = search_scales(torch.tensor([1.0, 2.0]), lambda s: next(losses), grid=5)
    assert found.ratio == 2 / 5 and torch.equal(found.scale, magnitude_scales(torch.tensor([1.0, 2.0]), 0.4))
    assert search_scales(torch.ones(2), lambda s: 0.0).ratio == 0, "no gain, no scale"
    with pytest.raises(FewbitsError, match="even without scaling"):
        search_scales(torch.ones(2), lambda s: float("nan"))
    with pytest.raises(FewbitsError, match="finite"):
        search_scales(torch.tensor([1.0, float("inf")]), lambda s: 0.0)


def test_mean_magnitudes_are_means_over_everything_seen() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4)
    linear, conv = AbsMean(-1), AbsMean(-3)
    for part in x.split([1, 2, 3]):
        linear.update(part, len(part))
        conv.update(part.unsqueeze(1).transpose(1, 3), len(part))
    torch.testing.assert_close(linear.value(), x.abs().mean((0, 1)))
    torch.testing.assert_close(conv.value(), x.abs().mean((0, 1)))


# -- the clip --------------------------------------------------------------------------------------------------------


def _clip_error(weight: Tensor, x: Tensor, limits: Tensor, fmt: Uniform, size: int) -> Tensor:
    """[rows, groups]: mean squared output error of the clamped and quantized weight, by hand."""
    bound = PerGroup(size).expand(limits, weight.shape)
    clamped = weight.clamp(-bound, bound)
    off = on_grid(clamped, fmt, PerGroup(size), MinMax().fit(clamped, fmt, PerGroup(size))) - weight
    parts = zip(off.split(size, 1), x.split(size, 1), strict=True)
    return torch.stack([(d @ part.T).square().mean(1) for d, part in parts], 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12), st.integers(2, 4), st.integers(0, 99))
def test_clips_are_the_best_of_the_candidates(columns: int, tokens: int, size: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, columns, generator=generator) ** 3
    x, fmt = torch.randn(tokens, columns, generator=generator), affine(bits)
    limits = output_clip(weight, x, fmt, MinMax(), group_size=size, rows_at_once=2)
    top = PerGroup(size).reduce(weight.abs(), lambda block: block.amax(1))
    assert limits.shape == top.shape and bool((limits >= 0.55 * top - 1e-6).all()) and bool((limits <= top).all())
    ours = _clip_error(weight, x, limits, fmt, size)
    tried = torch.stack([_clip_error(weight, x, top * (1 - i / 20), fmt, size) for i in range(10)])
    assert bool((ours <= tried.amin(0) * (1 + 1e-3) + 1e-9).all()), "none of the candidates is better"
    assert bool((ours <= tried[0] * (1 + 1e-5) + 1e-12).all()), "not clipping is one of them"


def test_many_tokens_and_layers_side_by_side_change_nothing() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(3, 6, 10), torch.randn(3, 400, 10)
    together = output_clip(weight, x, affine(3), MinMax(), group_size=4)
    alone = torch.stack([output_clip(w, r, affine(3), MinMax(), group_size=4) for w, r in zip(weight, x, strict=True)])
    assert together.shape == (3, 6, 3) and torch.equal(together, alone)
    few = output_clip(weight[0], x[0].repeat(3, 1), affine(3), MinMax(), group_size=4)
    torch.testing.assert_close(few, alone[0])


def test_clipping_follows_the_output_not_the_weight() -> None:
    """An outlier weight is clipped where nothing multiplies it, and kept where a loud channel does."""
    torch.manual_seed(0)
    weight = 0.1 * torch.randn(64, 16)
    weight[:, 3] = 1.0
    silent, loud = torch.randn(2, 100, 16)
    silent[:, 3] = 0
    loud[:, 3] *= 30
    limits = [float(output_clip(weight, x, affine(3), MinMax()).mean()) for x in (silent, loud)]
    assert limits[0] < 0.65 and limits[1] > 0.95


def test_a_clip_that_cannot_be_judged_is_refused() -> None:
    weight = torch.randn(4, 8)
    for x in (torch.zeros(0, 8), torch.zeros(3, 7), torch.full((3, 8), float("nan"))):
        with pytest.raises(FewbitsError, match="output clip"):
            output_clip(weight, x, affine(4), MinMax())
    assert torch.equal(output_clip(weight, torch.zeros(3, 8), affine(4), MinMax())[:, 0], weight.abs().amax(1))


def test_rows_are_taken_at_even_steps_over_batches() -> None:
    layer = nn.Linear(4, 3)
    graph = record(nn.Sequential(layer), torch.zeros(1, 4))
    site = graph.sites["0.weight"]
    x = torch.arange(24.0).view(6, 4, 1).expand(6, 4, 4)
    for limit, stride in ((512, 1), (10, 2), (7, 3), (1, 24)):
        rows = Rows(site, graph.calls[site.call], 6, limit)
        for part in x.split([2, 3, 1]):
            rows.update(part, len(part))
        assert torch.equal(rows.value()[0, :, 0], torch.arange(0.0, 24, stride))


# -- the grid and the packing ----------------------------------------------------------------------------------------


def test_the_release_loses_groups_of_one_sign_and_the_paper_does_not() -> None:
    weight = torch.cat([torch.full((1, 8), 0.3), torch.linspace(2.0, 2.5, 8)[None]])
    for released, error in ((True, 0.25), (False, 0.1)):
        fmt = grid(4, released=released)
        off = (on_grid(weight, fmt, PerGroup(8), MinMax().fit(weight, fmt, PerGroup(8))) - weight).abs().amax(1)
        assert bool((off > error).all()) if released else bool((off < error).all())
    assert grid(4, sym=True).code_min == -8


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 9))
def test_packed_codes_come_back(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed))
    words = pack4(codes)
    assert words.shape == (-(-rows // 4), -(-columns // 64) * 64) and words.dtype == torch.int16
    assert torch.equal(unpack4(words, rows, columns), codes.to(torch.uint8))


def test_wrong_codes_are_not_packed() -> None:
    for codes in (torch.full((2, 2), 16), torch.full((2, 2), -1), torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(FewbitsError, match="pack4"):
            pack4(codes)
    with pytest.raises(FewbitsError, match="unpack4"):
        unpack4(torch.zeros(1, 64, dtype=torch.int16), 5, 64)


# -- on models -------------------------------------------------------------------------------------------------------


def _example(name: str) -> tuple[nn.Module, tuple, dict, list]:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    generator = torch.Generator().manual_seed(3)

    def vary(t: Tensor) -> Tensor:
        return t + 0.3 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t.roll(1, -1)

    return model, args, kwargs, [(args, kwargs), map_tensors(vary, (args, kwargs))]


@dataclass(frozen=True)
class _Between(Step):
    """Calls a function on every unit at a stage, with a rounding step's streams."""

    call: Callable[[UnitContext], None] = lambda unit: None
    part: ClassVar[str] = "transform"
    stage: ClassVar[int] = 13
    streams: ClassVar[frozenset[str]] = frozenset({"float"})
    gradients: ClassVar[bool] = True  # such steps compare with the outputs of the last unit too

    def apply(self, unit: UnitContext) -> None:
        self.call(unit)

    def to_dict(self) -> dict[str, Any]:
        return {"step": "_Between"}


def _with(look: Callable[[UnitContext], None], bits: str = "W3A16", **options: Any) -> Any:
    recipe = build_recipe("awq", bits, options)
    return dataclasses.replace(recipe, steps=(*recipe.steps, _Between(look)))


@pytest.mark.parametrize(
    "name",
    ["hf-opt", "hf-llama", "hf-bloom", "hf-falcon", "hf-mixtral-eager", "hf-bert", "torchvision-vit", "timm-resnet"],
)  # fmt: skip
def test_scaling_keeps_what_every_unit_computes(name: str) -> None:
    model, args, kwargs, batches = _example(name)
    moved: list[str] = []

    def look(unit: UnitContext) -> None:
        targets = [unit.run.store.get(("float", unit.name, n, 0)) for n in range(len(batches))]
        with unit.attachment.disabled(), torch.no_grad():
            for (_, given, named), target in zip(unit.batches("float"), targets, strict=True):
                out, expected = first_output(unit.forward(given, named)).double(), first_output(target).double()
                assert float((out - expected).norm() / expected.norm()) < 1e-5, unit.name
        moved.extend(unit.name for site in unit.weights() if not torch.equal(unit.weight(site), before[site.name]))

    before: dict[str, Tensor] = {}
    recipe = _with(look, clip=False)

    def remember(step: SearchScales, unit: UnitContext) -> list:
        before.update({site.name: unit.weight(site) for site in unit.weights()})
        return groups(step, unit)

    groups = SearchScales._groups
    with mock.patch.object(SearchScales, "_groups", remember):
        quantize(model, recipe, batches, example=(args, kwargs))
    assert moved, "something was scaled"


def _groups(name: str) -> dict[str, tuple[str, list[str]]]:
    """First layer of a group in the first block -> (judging module, layers)."""
    model, args, kwargs, batches = _example(name)
    found: dict[str, tuple[str, list[str]]] = {}

    def look(unit: UnitContext) -> None:
        for group in SearchScales()._groups(unit):
            layers = [site.name.removeprefix(f"{unit.name}.").removesuffix(".weight") for _, site in group.layers]
            found.setdefault(layers[0], (group.module.removeprefix(f"{unit.name}."), layers))

    recipe = _with(look)
    steps = tuple(step for step in recipe.steps if not isinstance(step, (SearchScales, ClipOutputs)))
    quantize(model, dataclasses.replace(recipe, steps=steps), batches[:1], example=(args, kwargs))
    return found


def test_groups_and_their_judges_are_the_papers_without_a_table_of_architectures() -> None:
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert _groups("hf-opt") == {
        qkv[0]: ("self_attn", qkv),
        "self_attn.out_proj": ("self_attn.out_proj", ["self_attn.out_proj"]),
        "fc1": ("fc1", ["fc1"]),
        "fc2": ("fc2", ["fc2"]),
    }
    llama = _groups("hf-llama")  # two heads share a key and a value: values are not scaled
    assert llama == {
        qkv[0]: ("self_attn", qkv),
        "mlp.gate_proj": ("mlp", ["mlp.gate_proj", "mlp.up_proj"]),
        "mlp.down_proj": ("mlp.down_proj", ["mlp.down_proj"]),
    }
    vit = _groups("timm-vit")
    assert vit["attn.qkv"] == ("attn", ["attn.qkv"]), "a fused projection is judged past the products, too"
    assert set(vit) == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    falcon = _groups("hf-falcon")  # attention and MLP read one norm: the block judges
    assert len(falcon["self_attention.query_key_value"][1]) == 2
    experts = _groups("hf-mixtral-eager")
    (judge,) = {judge for judge, layers in experts.values() if len(layers) > 3}
    assert judge == "mlp"


def test_queries_and_keys_are_not_clipped_and_the_rest_is() -> None:
    for name, skipped, clipped in (
        ("hf-llama", ("q_proj", "k_proj"), ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("hf-qwen3", ("q_proj", "k_proj"), ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("timm-vit", ("qkv",), ("attn.proj", "fc1", "fc2", "head", "patch_embed.proj")),
        ("hf-bart", ("q_proj", "k_proj"), ("v_proj", "out_proj", "fc1", "fc2")),
    ):
        model, args, kwargs, batches = _example(name)
        seen: list[str] = []
        clip = ClipOutputs._clip

        def noting(step: Any, unit: Any, site: Any, rows: Any, seen: list[str] = seen, clip: Any = clip) -> None:
            seen.append(site.name.removesuffix(".weight"))
            clip(step, unit, site, rows)

        with mock.patch.object(ClipOutputs, "_clip", noting):
            quantize(model, build_recipe("awq", "W4A16", {"ratios": 1}), batches[:1], example=(args, kwargs))
        assert not [site for site in seen if site.endswith(skipped)]
        assert all(any(site.endswith(layer) for site in seen) for layer in clipped), name


def test_score_products_stop_at_layers_and_residuals() -> None:
    graph = record(encoder(), tokens(1)[0])
    made = {graph.calls[index].module for index in score_products(graph)}
    assert made == {f"blocks.{i}.{layer}" for i in range(3) for layer in "qk"}
    assert not score_products(record(skipnet(), images(1)[0]))


def _loud(channel: int = 3, factor: float = 100.0) -> nn.Module:
    """An encoder whose first norm makes one channel loud, with the columns that read it as much smaller."""
    model = encoder()
    with torch.no_grad():
        model.blocks[0].norm1.weight[channel] *= factor
        model.blocks[0].norm1.bias[channel] *= factor
        for layer in (model.blocks[0].q, model.blocks[0].k, model.blocks[0].v):
            layer.weight[:, channel] /= factor
    return model


def test_a_loud_channel_is_protected() -> None:
    data, model = tokens(16), _loud()
    original = copy.deepcopy(model)
    quantize(model, "awq", data, bits="W3A16", options={"clip": False})
    s = original.blocks[0].norm1.weight / model.blocks[0].norm1.weight
    assert int(s.argmax()) == 3 and float((s[3] / s.median()).detach()) > 3
    plain = _loud()
    quantize(plain, "awq", data, bits="W3A16", options={"clip": False, "ratios": 1})
    assert torch.equal(plain.blocks[0].norm1.weight, original.blocks[0].norm1.weight), "one exponent is no scaling"

    @torch.no_grad()
    def column_error(quantized: nn.Module, by: Tensor) -> float:
        return float((quantized.blocks[0].v.weight / by - original.blocks[0].v.weight)[:, 3].norm())

    assert column_error(model, s) < 0.5 * column_error(plain, torch.ones(16))


def test_the_search_never_does_worse_than_no_scale_on_what_it_saw_and_mostly_better() -> None:
    found = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        found.append(search_scales(*args, **kwargs))
        return found[-1]

    with mock.patch.object(scale_search, "search_scales", watched):
        quantize(_loud(), "awq", tokens(16), bits="W3A16")
    assert len(found) == 12
    chosen = [result.losses[round(result.ratio * 20)] for result in found]
    assert all(least == min(result.losses) for least, result in zip(chosen, found, strict=True))
    assert sum(least < 0.9 * result.losses[0] for least, result in zip(chosen, found, strict=True)) >= 6
    assert found[0].losses[0] > 2 * chosen[0], "where the loud channel is"


def test_groups_are_searched_on_the_float_unit_and_weights_come_back_in_between() -> None:
    """The second group's search must not see the first one's scale or quantized weights."""
    model, seen = _loud(), []

    def watched(magnitude: Tensor, loss: Callable[[Tensor], float], **kwargs: Any) -> Any:
        seen.append([p.clone() for p in model.blocks[0].parameters()])
        return search_scales(magnitude, loss, **kwargs)

    with mock.patch.object(scale_search, "search_scales", watched):
        quantize(model, "awq", tokens(8), bits="W3A16")
    float_block = list(_loud().blocks[0].parameters())
    for number in range(4):
        assert all(torch.equal(a, b) for a, b in zip(seen[number], float_block, strict=True))


def _loud_gelu() -> nn.Module:
    """A vision transformer with a loud channel behind every GELU."""
    model, *_ = zoo_tiny.MODELS["timm-vit"]()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[5] *= 40
            block.mlp.fc1.bias[5] *= 40
            block.mlp.fc2.weight[:, 5] /= 40
    return model


def test_behind_an_activation_that_passes_no_scale_stands_a_factor_that_is_saved(tmp_path: Path) -> None:
    batches = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    exact = _loud_gelu()(batches[0])
    errors = []
    for used in (True, False):
        model = _loud_gelu()
        options = {"behind_activations": used, "clip": False}
        result = quantize(model, "awq", batches, bits="W3A16g32", options=options)
        factors = {f"blocks.{i}.mlp.fc2.input" for i in range(2)} if used else set()
        assert set(result.attachment.factors) == factors
        errors.append(float((model(batches[0]) - exact).square().mean()))
        if used:
            arguments = {**zoo_tiny._VIT, "num_classes": 10}
            spec = {
                "kind": "timm",
                "architecture": "vit_tiny_patch16_224",
                "model_args": arguments,
                "pretrained_cfg": {},
            }
            checkpoint.save(tmp_path / "q", result, _loaded(model, spec, "image"))
            assert torch.equal(checkpoint.load(tmp_path / "q").model(batches[0]), model(batches[0]))
    assert errors[0] < errors[1]


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    fails = [True]

    def stumble(unit: UnitContext) -> None:
        if unit.name == "blocks.1" and fails:
            fails.pop()
            raise KeyboardInterrupt

    recipe = _with(stumble, "W3A8")
    with pytest.raises(KeyboardInterrupt):
        quantize(_loud(), recipe, tokens(8), work_dir=tmp_path / "a")
    resumed, whole = _loud(), _loud()
    quantize(resumed, recipe, tokens(8), work_dir=tmp_path / "a", resume=True)
    quantize(whole, recipe, tokens(8), work_dir=tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("name", ["hf-llama", "hf-gpt2", "hf-mixtral-grouped", "timm-regnetx"])
def test_column_factors_are_what_scaling_a_relation_does_to_its_weights(name: str) -> None:
    model, args, kwargs, _ = _example(name)
    graph = record(model, *args, **kwargs)
    checked = 0
    for relation in graph.relations:
        if relation.uncovered:
            continue
        s = torch.rand(relation.size, generator=torch.Generator().manual_seed(0)) + 0.5
        changed = copy.deepcopy(model)
        scale(changed, relation, 1 / s.double())
        for end in relation.consumers:
            if end.layout == "vector":
                continue
            old, new = (canonical(operand(m, end), end.layout, end.groups).flatten(1) for m in (model, changed))
            torch.testing.assert_close(old * column_factors(end, *old.shape, s), new, rtol=1e-5, atol=1e-7)
            checked += 1
    assert checked >= 4


# -- joined and compared ---------------------------------------------------------------------------------------------


def test_awq_then_gptq_solves_the_scaled_and_clipped_weights() -> None:
    recipe = build_recipe("awq+gptq", "W3A16g8")
    names = [type(step).__name__ for sweep in recipe.sweeps() for step in sweep]
    assert names == ["SearchScales", "ClipOutputs", "AttachDynamic", "ColumnSolver"]
    assert recipe.scheme.weights == build_recipe("gptq", "W3A16g8").scheme.weights
    data, solved = tokens(16), []
    joined, alone, plain = _loud(), _loud(), _loud()

    def look(unit: UnitContext) -> None:
        solved.append({site.name: unit.weight(site).abs().amax() for site in unit.weights()})

    probe = _Between(look)
    object.__setattr__(probe, "stage", 15)
    quantize(joined, dataclasses.replace(recipe, steps=(*recipe.steps, probe)), data)
    quantize(alone, "gptq", data, bits="W3A16g8")
    quantize(plain, "rtn", data, bits="W3A16g8")
    assert not torch.equal(joined.blocks[0].norm1.weight, alone.blocks[0].norm1.weight)
    with torch.no_grad():
        exact = torch.cat([_loud()(t) for t in data])
        errors = [float((torch.cat([m(t) for t in data]) - exact).square().mean()) for m in (joined, alone, plain)]
    assert errors[0] < errors[2], errors


@pytest.mark.parametrize("name", ["smoothquant+awq", "awq+adaround", "awq+repq-vit"])
def test_awq_joins_with_other_papers(name: str) -> None:
    options = {"ratios": 4, **({"iterations": 2} if "adaround" in name else {})}
    model = encoder(depth=2)
    result = quantize(model, name, tokens(8), bits="W4A8", options=options)
    assert torch.isfinite(model(tokens(4)[0])).all() and len(result.attachment.codes) >= 12


@pytest.mark.parametrize("options", [{"sym": True}, {"group_size": 0}, {"clip": False}, {"variant": "released"}])
def test_options_do_what_they_say(options: dict) -> None:
    model, bits = encoder(), "W4A16" if "group_size" in options else "W4A16g5"
    quantizer = quantize(model, "awq", tokens(4), bits=bits, options=options).attachment.quantizer("blocks.0.up.weight")
    assert quantizer.params["scale"].shape == (32, 1 if "group_size" in options else 4)
    assert ("zero_point" in quantizer.params) != bool(options.get("sym"))
    assert torch.isfinite(model(tokens(4)[0])).all()


def test_half_precision_models_are_searched_in_float32() -> None:
    model = encoder().to(torch.bfloat16)
    quantize(model, "awq", tokens(4), bits="W4A16")
    assert model.blocks[0].q.weight.dtype == torch.bfloat16 and torch.isfinite(model(tokens(4)[0])).all()


def test_awq_beats_nearest_rounding_on_the_demo_model() -> None:
    from fewbits import demo

    calibration, evaluation = (demo.data("text", split) for split in ("calibration", "evaluation"))
    losses = {}
    for recipe in ("rtn", "awq"):
        model = demo.load("text")[0]
        options = {"ratios": 10, "clip_tokens": 128} if recipe == "awq" else {}
        quantize(model, recipe, [calibration.inputs[:8]], bits="W3A16g64", options=options)
        with torch.no_grad():
            logits = model(evaluation.inputs[:24])
        losses[recipe] = float(nn.functional.cross_entropy(logits.flatten(0, 1), evaluation.labels[:24].flatten()))
    assert losses["awq"] < losses["rtn"], losses
