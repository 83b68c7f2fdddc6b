"""SqueezeLLM: sensitivities, codebooks by weighted k-means, the sparse part, packing, the recipe on whole models."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo_tiny
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.engine.context import ModelContext
from fewbits.engine.gradients_fisher import natural_loss, squared_weight_gradients
from fewbits.engine.losses import task_loss
from fewbits.engine.run import Run
from fewbits.engine.size import weight_sizes
from fewbits.errors import FewbitsError
from fewbits.formats import Codebook, PerChannel, PerGroup, affine
from fewbits.formats.codebook import half
from fewbits.kernels.words import pack_words, unpack_words
from fewbits.outliers import Sparse
from fewbits.outliers.dense_sparse import outlying_values, quartile_threshold, reach_for_share, sensitive_values
from fewbits.papers import build_recipe
from fewbits.ranges import KMeans, MinMax, inertia, kmeans, range_from_dict
from fewbits.rounding import nearest

ROWS = PerChannel(0)


def weighted(rows: int = 6, columns: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 0.1
    return values, torch.rand(rows, columns, generator=generator) ** 6 * 1e-9  # as small and uneven as gradients


def by_enumeration(values: Tensor, weights: Tensor, levels: int) -> float:
    """The least cost of one block over all ways to cut its sorted values into intervals."""
    x, order = values.double().sort()
    w = weights.double()[order]
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(x)), levels - 1):
        cost = 0.0
        for a, b in itertools.pairwise((0, *cuts, len(x))):
            mass = w[a:b].sum()
            mean = (w[a:b] * x[a:b]).sum() / mass
            cost += float((w[a:b] * (x[a:b] - mean).square()).sum())
        best = min(best, cost)
    return best


# -- clustering ------------------------------------------------------------------------------------------------------


def test_exact_clustering_is_the_best_of_all() -> None:
    values, weights = weighted(rows=3, columns=11)
    for levels in (1, 2, 3, 4):
        found = inertia(values, weights, kmeans(values, weights, levels, solver="exact"))
        best = torch.tensor([by_enumeration(v, w, levels) for v, w in zip(values, weights, strict=True)])
        torch.testing.assert_close(found.float(), best, rtol=1e-5, atol=0)


@settings(max_examples=15)
@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6), st.booleans(), st.integers(1, 30)
)
def test_exact_bounds_lloyd_on_every_row(
    rows: int, columns: int, levels: int, seed: int, some_without_weight: bool, distinct: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, distinct, (rows, columns), generator=generator).float() / 7
    weights = torch.rand(rows, columns, generator=generator)
    if some_without_weight:
        weights *= torch.rand(rows, columns, generator=generator) > 0.5
    counted = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
    exact = inertia(values, counted, kmeans(values, weights, levels, solver="exact"))
    lloyd = inertia(values, counted, kmeans(values, weights, levels, generator=generator))
    assert bool((exact <= lloyd * (1 + 1e-6) + 1e-9).all())
    few = torch.tensor([len(v[w > 0].unique()) <= levels for v, w in zip(values, counted, strict=True)])
    assert not few.any() or float(torch.maximum(exact, lloyd)[few].max()) < 1e-9, "few values are all met exactly"
    for solver in ("lloyd", "exact"):
        centers = kmeans(values, weights, levels, solver=solver)  # type: ignore[arg-type]
        assert bool(torch.isfinite(centers).all()) and bool((centers.diff(dim=1) >= 0).all())


def test_centers_are_weighted_means_of_their_members() -> None:
    values, weights = weighted()
    centers = kmeans(values, weights, 8, iterations=500)
    label = (values[:, :, None] - centers[:, None]).abs().argmin(2)
    for row, column in itertools.product(range(len(values)), range(8)):
        own = label[row] == column
        if bool((weights[row, own] > 0).any()):
            w = weights[row, own].double()
            mean = (w * values[row, own].double()).sum() / w.sum()
            assert float(centers[row, column]) == pytest.approx(float(mean), abs=1e-6)


def test_weights_decide() -> None:
    values, weights = weighted()
    even, also_even = (kmeans(values, w, 8) for w in (None, torch.full_like(values, 3e-7)))
    torch.testing.assert_close(even, also_even)
    heavy = torch.zeros_like(weights)
    chosen = torch.arange(0, 60, 8)
    heavy[:, chosen] = 1.0
    for solver in ("lloyd", "exact"):
        found = kmeans(values, heavy, 8, solver=solver)  # type: ignore[arg-type]
        torch.testing.assert_close(found, values[:, chosen].sort(dim=1).values)
    assert float(inertia(values, weights, kmeans(values, weights, 8)).sum()) < 0.7 * float(
        inertia(values, weights, even).sum()
    )


def test_codebooks_beat_a_uniform_grid_of_as_many_levels() -> None:
    values, weights = weighted(rows=20)
    grid = affine(3, clamp_zero_point=False)
    rounded, _ = nearest(values, grid, ROWS, MinMax().fit(values, grid, ROWS))
    uniform = (weights * (values - rounded).square()).sum(1).double()
    plain = inertia(values, weights, kmeans(values, weights, 8))
    also = inertia(values, weights, kmeans(values, weights, 8, uniform_start=True))
    assert float(plain.sum()) < 0.6 * float(uniform.sum())
    assert bool((also <= plain * (1 + 1e-9)).all()) and bool((also <= uniform).all())
    several = inertia(values, weights, kmeans(values, weights, 8, starts=5))
    assert float(several.sum()) < float(plain.sum())


def test_clustering_does_not_depend_on_how_many_rows_are_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = weighted(rows=9)
    whole = kmeans(values, weights, 8), kmeans(values, weights, 8, solver="exact")
    monkeypatch.setattr(sys.modules[kmeans.__module__], "_AT_ONCE", 1)
    torch.testing.assert_close(kmeans(values, weights, 8), whole[0], rtol=0, atol=0)
    torch.testing.assert_close(kmeans(values, weights, 8, solver="exact"), whole[1], rtol=0, atol=1e-9)


def test_clustering_refuses_what_it_cannot_weigh() -> None:
    values, weights = weighted()
    for bad in (weights[:, :3], -weights, weights * torch.nan):
        with pytest.raises(FewbitsError, match="k-means"):
            kmeans(values, bad, 8)
    with pytest.raises(FewbitsError, match="codebook"):
        KMeans().fit(values, affine(4), ROWS)
    with pytest.raises(FewbitsError, match="solver"):
        range_from_dict({"kind": "kmeans", "solver": "magic"})


def test_range_fits_rows_and_groups() -> None:
    values, weights = weighted(columns=50)
    for gran in (ROWS, PerGroup(16)):
        params = KMeans().fit_weighted(values, weights, Codebook(2), gran)
        assert params["table"].shape == (4, *gran.param_shape(values.shape))
    plain = KMeans().fit(values, Codebook(2), ROWS)
    torch.testing.assert_close(plain["table"][:, :, 0].T, kmeans(values, None, 4))
    assert Codebook(3, table_bits=16).count_bits(64, 1) == 64 * 3 + 8 * 16
    assert Codebook(3).count_bits(64, 1) == 64 * 3 + 8 * 32
    table = half(torch.tensor([-1e9, 1 / 3, 70000.0]))
    assert table.tolist() == [-65504.0, float(torch.tensor(1 / 3).half()), 65504.0]


# -- the sparse part -------------------------------------------------------------------------------------------------


def test_sensitive_values_are_strictly_above_the_threshold() -> None:
    values = torch.arange(200.0).view(10, 20)
    assert int(sensitive_values(values, 5.0).sum()) == 9, "k - 1"
    assert not sensitive_values(values, 0.5).any(), "k = 1 marks nothing"
    assert not sensitive_values(values, 0.4).any(), "k = 0 marks nothing"
    assert int(sensitive_values(torch.ones(10, 10), 50.0).sum()) == 0, "nothing is above a tie"
    assert int(sensitive_values(values, 100.0).sum()) == 199
    with pytest.raises(FewbitsError, match="percentage"):
        sensitive_values(values, 101)


def test_outliers_lie_beyond_the_quartiles() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 101), torch.tensor([-9.0, 9.0, 3.6])])
    threshold = quartile_threshold(weight, 2.0)
    first, third = torch.quantile(weight, 0.25), torch.quantile(weight, 0.75)
    assert float(threshold) == pytest.approx(
        float(max(abs(first - 2 * (third - first)), abs(third + 2 * (third - first)))), rel=1e-6
    )
    assert weight[outlying_values(weight, threshold)].tolist() == [-9.0, 9.0, float(torch.tensor(3.6))]
    assert outlying_values(torch.tensor([2.0]), 2.0).all(), "at the threshold counts"
    flat = torch.zeros(100)
    flat[:3] = 5.0
    for reach in (0.0, 1.5, float("inf")):
        assert not outlying_values(flat, quartile_threshold(flat, reach)).any(), "no spread, no outliers"


def test_reach_is_tuned_for_the_share_over_all_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(40, 50, generator=generator) ** 3 * scale for scale in (0.1, 1.0, 7.0)]
    weights.append(torch.zeros(10, 10))
    total = sum(weight.numel() for weight in weights)
    for share in (0.0005, 0.004, 0.05):
        reach = reach_for_share(weights, share, total)
        marked = sum(int(outlying_values(w, quartile_threshold(w, reach)).sum()) for w in weights)
        assert abs(marked - round(share * total)) <= 1, "but for rounding at the last one"
    assert reach_for_share(weights, 0.0, total) == float("inf")
    assert reach_for_share(weights, 1.0, total) == 0.0
    with pytest.raises(FewbitsError, match="share"):
        reach_for_share(weights, 1.5, total)


def test_removing_outliers_narrows_the_range_and_lowers_the_cost() -> None:
    values, weights = weighted(columns=200)
    values[:, ::50] *= 12
    moved = outlying_values(values, quartile_threshold(values, 2.0))
    assert 0 < int(moved.sum()) <= 24
    dense = values.masked_fill(moved, 0)
    assert float(dense.abs().max()) < float(values.abs().max()) / 2
    before = inertia(values, weights, kmeans(values, weights, 8))
    left = weights * ~moved
    after = inertia(dense, left, kmeans(dense, left, 8))
    assert float(after.sum()) < 0.8 * float(before.sum())


# -- packing ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 90), st.sampled_from([1, 2, 3, 4, 5, 8]), st.integers(0, 10**6))
def test_words_give_the_codes_back(out: int, columns: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (out, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (-(-columns // 32) * bits, out)
    assert torch.equal(unpack_words(words, bits, columns), codes)


def test_four_bits_put_eight_codes_in_a_word_lowest_first() -> None:
    codes = torch.arange(8)[None]
    assert pack_words(codes, 4)[:, 0].tolist() == [0x76543210, 0, 0, 0]
    with pytest.raises(FewbitsError, match="bits"):
        pack_words(codes, 9)


# -- sensitivities ---------------------------------------------------------------------------------------------------


def context(model: nn.Module, batches: list, recipe: str = "gptq") -> ModelContext:
    unset = dict.fromkeys(("example", "work_dir", "progress", "budget", "units", "source"))
    run = Run(model, build_recipe(recipe, "W4A16"), batches, **unset, seed=0, device=torch.device("cpu"), resume=False)
    return ModelContext(run)


def test_squares_are_taken_sample_by_sample() -> None:
    """Two samples with opposite gradients: their mean gradient is zero, their Fisher information is not."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.zeros(2, 3)
    data = torch.tensor([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]])
    ctx = context(model, [data])
    (found,) = squared_weight_gradients(ctx, ctx.weights(), "pseudo").values()
    # softmax is even and both samples take class 0: the gradient is (p - onehot) x^T, of opposite sign
    expected = 2 * 0.25 * torch.tensor([[1.0, 4.0, 0.0]]).expand(2, -1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", ["encoder", "skipnet"])
def test_sensitivities_are_squared_gradients_of_the_parameters(make: str) -> None:
    """Against autograd on the parameters, with convolutions and a layer that is used twice."""
    model, data = (encoder(depth=1), tokens(5, batch=3)) if make == "encoder" else (skipnet(), images(5, batch=3))
    kind = "next_token" if make == "encoder" else "pseudo"
    reference = copy.deepcopy(model)
    ctx = context(model, data)
    found = squared_weight_gradients(ctx, ctx.weights(), kind)
    sums = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for sample in torch.cat(data).split(1):
        reference.zero_grad()
        task_loss(kind, reference(sample), sample).backward()
        for name, parameter in reference.named_parameters():
            sums[name] += parameter.grad.square()
    assert len(found) >= 6
    for name, value in found.items():
        torch.testing.assert_close(value, sums[name].flatten(1), rtol=1e-3, atol=1e-12)
    assert not list(ctx.attachment.items()), "nothing stays attached"


def test_a_tied_head_counts_for_its_own_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = x + F.relu(layer(x))
            return self.head(x)

    model = Tied().eval()
    reference = copy.deepcopy(model)
    reference.head.weight = nn.Parameter(reference.embed.weight.detach().clone())
    data = tokens(3, batch=3, vocabulary=11)
    ctx = context(model, data)
    sites = [site for site in ctx.sites() if site.name in ("head.weight", "embed.weight")]
    found = squared_weight_gradients(ctx, sites, "next_token")
    sums = {"head.weight": torch.zeros(11, 8), "embed.weight": torch.zeros(11, 8)}
    for sample in data[0].split(1):
        reference.zero_grad()
        task_loss("next_token", reference(sample), sample).backward()
        sums["head.weight"] += reference.head.weight.grad.square()
        sums["embed.weight"] += reference.embed.weight.grad.square()
    for name, value in sums.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hf-llama", "next_token"),
        ("hf-bart", "next_token"),
        ("hf-bert", "pseudo"),
        ("timm-resnet", "pseudo"),
        ("diffusers-unet2d", "gaussian"),
    ],
)
def test_loss_suits_the_model(name: str, kind: str) -> None:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    if name.startswith("hf-"):
        kwargs = {**kwargs, "use_cache": False}
    assert natural_loss(context(model, [(args, kwargs)])) == kind


def test_a_bidirectional_language_model_is_not_asked_for_next_tokens() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(F.relu(self.mix(x + x.mean(1, keepdim=True))))

    assert natural_loss(context(Both().eval(), tokens(2, vocabulary=9))) == "pseudo"
    assert natural_loss(context(encoder(depth=1), tokens(2))) == "next_token"


def test_gradients_that_cannot_be_had_are_refused() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    ctx = context(Frozen().eval(), [torch.randn(2, 4)])
    with pytest.raises(FewbitsError, match="does not depend"):
        squared_weight_gradients(ctx, ctx.weights(), "pseudo")
    model = skipnet()
    model.head.weight.data.fill_(torch.nan)
    ctx = context(model, images(2))
    with pytest.raises(FewbitsError, match="NaN"):
        squared_weight_gradients(ctx, ctx.weights(), "pseudo")
    with pytest.raises(FewbitsError, match="calibration data"):
        quantize(skipnet(), "squeezellm", bits="W3A16", example=images(1)[0])


# -- the recipe ------------------------------------------------------------------------------------------------------


def test_moved_values_come_back_and_the_rest_is_on_the_table() -> None:
    original, model = encoder(width=32, depth=1), encoder(width=32, depth=1)
    options = {"sensitive_percent": 1.0, "outlier_percent": 1.0}
    result = quantize(model, "squeezellm", tokens(8), bits="W3A16", options=options)
    attachment = result.attachment
    marked = 0
    for name in attachment.codes:
        before = original.get_submodule(name.removesuffix(".weight")).weight.detach()
        after = model.get_submodule(name.removesuffix(".weight")).weight
        table = attachment.quantizer(name).params["table"][:, :, 0]
        emitted = table.gather(0, attachment.codes[name].long().T).T
        (part,) = attachment.parts[name]
        assert isinstance(part, Sparse)
        moved = part.apply(torch.zeros_like(before)) != 0
        torch.testing.assert_close(after[moved], before[moved], rtol=1e-6, atol=1e-8)
        assert torch.equal(after[~moved], emitted[~moved])
        distance = (before[:, :, None] - table.T[:, None]).abs()
        best = distance.gather(2, attachment.codes[name].long()[:, :, None])[:, :, 0]
        torch.testing.assert_close(best[~moved], distance.min(2).values[~moved], rtol=0, atol=1e-7)
        # what is under a moved value is the level nearest to zero
        assert torch.equal(emitted.abs()[moved], table.abs().min(0).values[:, None].expand_as(before)[moved])
        marked += len(part.values)
        assert len(part.values) >= int(before.numel() * 0.01) - 1
    total = sum(size.values for size in weight_sizes(attachment))
    assert marked <= 0.02 * total and marked >= 0.0099 * total


def test_bits_per_weight_count_tables_at_16_bits() -> None:
    model = encoder(width=32, depth=1)
    dense = {"sensitive_percent": 0, "outlier_percent": 0}
    result = quantize(model, "squeezellm", tokens(4), bits="W3A16", options=dense)
    assert not result.attachment.parts
    for size in weight_sizes(result.attachment):
        columns = result.attachment.codes[size.site].shape[1]
        assert size.bits_per_weight == pytest.approx(3 + 16 * 8 / columns)
    quantizer = result.attachment.quantizer("blocks.0.q.weight")
    assert not torch.equal(half(quantizer.params["table"]), quantizer.params["table"])
    rounded = quantize(encoder(width=32, depth=1), "squeezellm", tokens(4), bits="W3A16", options={"half_tables": True})
    table = rounded.attachment.quantizer("blocks.0.q.weight").params["table"]
    assert torch.equal(half(table), table)


def test_rows_of_few_values_are_exact() -> None:
    model = encoder(depth=1)
    for name in ("q", "up"):
        layer = model.blocks[0].get_submodule(name)
        layer.weight.data = (layer.weight.data * 8).round().clamp(-3, 3) / 4
    before = {name: model.blocks[0].get_submodule(name).weight.clone() for name in ("q", "up")}
    quantize(model, "squeezellm", tokens(8), bits="W3A16")
    for name, weight in before.items():
        torch.testing.assert_close(model.blocks[0].get_submodule(name).weight, weight, rtol=1e-6, atol=1e-7)


def test_sensitivity_follows_a_transform() -> None:
    """Smoothing scales weights after the gradients were taken; the result is that of quantizing the smoothed model."""
    options = {"sensitive_percent": 2.0, "outlier_percent": 0}

    def loud() -> nn.Module:
        model = encoder(width=32, depth=1)
        model.blocks[0].norm1.weight.data[3] *= 40
        return model

    joined, smoothed = loud(), loud()
    both = quantize(joined, "smoothquant+squeezellm", tokens(8), bits="W3A16", options=options)
    quantize(smoothed, "smoothquant", tokens(8), bits="W16A8").attachment.detach()
    assert not torch.equal(smoothed.blocks[0].q.weight, loud().blocks[0].q.weight)
    alone = quantize(smoothed, "squeezellm", tokens(8), bits="W3A16", options=options)
    for name in both.attachment.codes:
        moved, expected = (
            result.attachment.parts[name][0].apply(torch.zeros(result.attachment.codes[name].shape)) != 0
            for result in (both, alone)
        )
        assert float((moved & expected).sum()) >= 0.95 * float(expected.sum()), name
        agree = (both.attachment.codes[name] == alone.attachment.codes[name]).float().mean()
        assert float(agree) > 0.95, name


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        ("W4A8", {"solver": "exact"}),
        ("W3A16g8", {"uniform_start": True}),
        ("W2A16", {"reach": 1.8}),
        ("W3A16", {"loss": "sampled", "outlier_percent": 0}),
    ],
)
def test_options_run(bits: str, options: dict) -> None:
    model = encoder(width=20, depth=1)
    result = quantize(model, "squeezellm", tokens(6), bits=bits, options=options)
    for name, codes in result.attachment.codes.items():
        groups = -(-codes.shape[1] // 8) if "g8" in bits else 1
        assert result.attachment.quantizer(name).params["table"].shape == (2 ** int(bits[1]), len(codes), groups)
    with torch.no_grad():
        assert torch.isfinite(model(tokens(2)[0])).all()


def test_wrong_options_and_joins_are_refused() -> None:
    for options, match in (
        ({"outlier_percent": 101}, "percentages"),
        ({"reach": -1}, "reach"),
        ({"solver": "magic"}, "solver"),
        ({"iterations": 0}, "iterations"),
    ):
        with pytest.raises(FewbitsError, match=match):
            build_recipe("squeezellm", "W3A16", options)
    for other in ("gptq", "adaround"):
        with pytest.raises(FewbitsError, match="both bring their own rounding"):
            build_recipe(f"squeezellm+{other}", "W4A16")
    with pytest.raises(FewbitsError, match="weight grid"):
        build_recipe("squeezellm+repq-vit", "W4A8")


@pytest.mark.parametrize(
    "name", ["timm-vit", "timm-resnet", "timm-regnetx", "hf-opt", "hf-falcon", "hf-mixtral-eager", "diffusers-unet2d"]
)
def test_runs_on_models_of_any_kind(name: str) -> None:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    if name.startswith("hf-"):
        kwargs = {**kwargs, "use_cache": False}
    result = quantize(model, "squeezellm", [(args, kwargs)], bits="W3A16", example=(args, kwargs))
    assert len(result.attachment.codes) >= 8
    with torch.no_grad():
        output = model(*args, **kwargs)
    leaf = output if isinstance(output, Tensor) else output[0] if not hasattr(output, "logits") else output.logits
    assert torch.isfinite(leaf).all()


def test_resumes_to_the_same_bits_without_new_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build_recipe("squeezellm", "W3A16", {"sensitive_percent": 1.0})
    whole, resumed = encoder(), encoder()
    quantize(whole, recipe, tokens(8), work_dir=tmp_path)
    (tmp_path / "sweep0-unit0002.safetensors").unlink()
    from fewbits.steps import dense_sparse

    monkeypatch.setattr(dense_sparse, "squared_weight_gradients", None)
    again = quantize(resumed, recipe, tokens(8), work_dir=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert again.attachment.parts


def test_same_seed_same_bits_and_another_seed_others() -> None:
    made = []
    for seed in (0, 0, 1):
        model = encoder(width=32, depth=1)
        quantize(model, "squeezellm", tokens(8), bits="W3A16", options={"seed": seed})
        made.append(model.blocks[0].up.weight.clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_checkpoint_gives_the_same_outputs(tmp_path: Path) -> None:
    import fewbits
    from fewbits import demo
    from fewbits.hub import checkpoint

    loaded = fewbits.load_model("demo:digits")
    data = list(demo.data("digits", "calibration").inputs[:16].split(8))
    result = quantize(loaded.model, "squeezellm", data, bits="W3A16")
    with torch.no_grad():
        expected = loaded.model(data[0])
    checkpoint.save(tmp_path / "saved", result, loaded)
    again = fewbits.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.model(data[0]), expected)


def test_keeps_more_of_a_trained_model_than_a_uniform_grid_and_sparse_values_help() -> None:
    from fewbits import demo

    calibration, evaluation = (demo.data("text", split) for split in ("calibration", "evaluation"))

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            logits = model(evaluation.inputs[:8])
        return float(F.cross_entropy(logits.flatten(0, 1), evaluation.labels[:8].flatten()))

    losses = {"float": loss(demo.load("text")[0])}
    dense = {"sensitive_percent": 0, "outlier_percent": 0}
    for name, recipe, options in (("rtn", "rtn", {}), ("dense", "squeezellm", dense), ("both", "squeezellm", {})):
        model = demo.load("text")[0]
        quantize(model, recipe, list(calibration.inputs[:16].split(8)), bits="W3A16", options=options)
        losses[name] = loss(model)
    lost = {name: value - losses["float"] for name, value in losses.items()}
    assert lost["dense"] < 0.5 * lost["rtn"] and lost["both"] < lost["dense"], losses
