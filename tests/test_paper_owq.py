"""OWQ: which columns are kept, what happens to them in the solver, what they cost, and tuning them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo_tiny
from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.engine.tree import map_tensors
from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, affine, gptq_grid
from fewbits.outliers import (
    Columns,
    column_sensitivity,
    columns_in_budget,
    settle_weak_columns,
    weak_column_parameters,
    weakest_columns,
)
from fewbits.papers import build_recipe
from fewbits.papers.owq import owq_grid
from fewbits.ranges import AbsMax, JointSearch, MinMax
from fewbits.rounding import HessianAccumulator, decode_columns, gptq, nearest

ROWS = PerChannel(0)
FAST = {"tuning": "minmax"}  # where the search of ranges is not what a test is about


def problem(out: int = 12, columns: int = 40, seed: int = 0, outliers: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, some channels of which are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator) * 0.1
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    x = torch.randn(8, 24, columns, generator=generator) @ mixing
    x[..., list(outliers)] *= 20
    accumulator = HessianAccumulator(columns)
    accumulator.add(x)
    return weight, accumulator.value


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    difference = (weight - quantized).double()
    return float(((difference @ hessian.double()) * difference).sum())


def rank(weight: Tensor, hessian: Tensor, bits: int = 3) -> Tensor:
    fmt = owq_grid(bits)
    rounded, _ = nearest(weight, fmt, ROWS, JointSearch(num=40).fit(weight, fmt, ROWS))
    return column_sensitivity(weight, rounded, hessian)


# -- the solver ------------------------------------------------------------------------------------------------------


def test_kept_columns_take_up_exactly_the_error_of_the_others() -> None:
    """The published update leaves them at the least-squares optimum given what the rest was rounded to."""
    weight, hessian = problem(outliers=(3, 17))
    kept = torch.tensor([17, 3, 30])
    solution = gptq(weight, hessian, gptq_grid(3), MinMax(), kept=kept)
    free = torch.ones(weight.shape[1], dtype=torch.bool)
    free[kept] = False
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(weight.shape[1]).double()
    error = (solution.weight - weight).double()[:, free]
    best = -error @ damped[free][:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    torch.testing.assert_close(solution.weight[:, kept].double(), weight[:, kept] + best, rtol=1e-4, atol=1e-5)
    assert float((solution.weight - weight)[:, kept].abs().min(0).values.max()) > 1e-4, "not the original columns"

    decoded = decode_columns(gptq_grid(3), solution.codes, solution.params, None)
    assert torch.equal(decoded[:, free], solution.weight[:, free])
    assert not decoded[:, kept].any(), "codes under kept columns stand for zero"
    restored = solution.weight.clone()
    restored[:, kept] = weight[:, kept]
    assert objective(weight, solution.weight, hessian) < 0.9 * objective(weight, restored, hessian)


def test_without_kept_columns_it_is_gptq_and_with_all_of_them_nothing_happens() -> None:
    weight, hessian = problem()
    plain = gptq(weight, hessian, gptq_grid(3), MinMax())
    none = gptq(weight, hessian, gptq_grid(3), MinMax(), kept=torch.empty(0, dtype=torch.int64))
    assert torch.equal(plain.weight, none.weight) and torch.equal(plain.codes, none.codes)
    for group in (None, 16):
        everything = gptq(weight, hessian, gptq_grid(3), MinMax(), group_size=group, kept=torch.arange(40).flip(0))
        assert torch.equal(everything.weight, weight) and float(everything.loss) == 0
        assert torch.isfinite(everything.params["scale"]).all()


def test_objective_falls_as_more_columns_are_kept() -> None:
    weight, hessian = problem(outliers=(5, 21))
    order = weakest_columns(rank(weight, hessian), 40)
    assert set(order[:2].tolist()) == {5, 21}, "the planted outlier channels come first"
    errors = []
    for count in (0, 2, 4, 8, 16, 40):
        solution = gptq(weight, hessian, gptq_grid(3), JointSearch(num=40), kept=order[:count])
        errors.append(objective(weight, solution.weight, hessian))
    assert all(b <= a * 1.02 for a, b in itertools.pairwise(errors)), errors
    assert errors[1] < 0.7 * errors[0] and errors[-1] == 0


def test_ranges_are_those_of_the_other_columns() -> None:
    weight, hessian = problem()
    kept = torch.tensor([7, 33])
    loud = weight.clone()
    loud[:, kept] *= 1000
    for options in ({}, {"group_size": 16}, {"group_size": 16, "static_groups": True}):
        # a Hessian without coupling: nothing but the range could carry the outliers into other columns
        white = torch.diag(hessian.diagonal())
        a = gptq(weight, white, gptq_grid(3), JointSearch(num=10), kept=kept, **options)
        b = gptq(loud, white, gptq_grid(3), JointSearch(num=10), kept=kept, **options)
        assert all(torch.equal(a.params[name], b.params[name]) for name in a.params)
        free = torch.ones(40, dtype=torch.bool)
        free[kept] = False
        assert torch.equal(a.weight[:, free], b.weight[:, free])


def test_solution_does_not_depend_on_blocks_nor_on_the_order_of_kept_columns() -> None:
    weight, hessian = problem(columns=50, outliers=(2,))
    kept = torch.tensor([2, 10, 49])
    options = {"group_size": 16, "act_order": True, "order_by": rank(weight, hessian), "stale_groups": False}
    reference = gptq(weight, hessian, gptq_grid(3), MinMax(), kept=kept, dtype=torch.float64, **options)
    other = gptq(
        weight, hessian, gptq_grid(3), MinMax(), kept=kept.flip(0), block_size=7, dtype=torch.float64, **options
    )
    torch.testing.assert_close(other.weight, reference.weight, rtol=0, atol=1e-9)
    assert reference.params["scale"].shape == (12, 3), "47 columns in groups of 16, the last one shorter"
    assert reference.group_index is not None and int(reference.group_index.max()) == 2
    counts = torch.bincount(reference.group_index[torch.tensor([c for c in range(50) if c not in kept.tolist()])])
    assert counts.tolist() == [16, 16, 15]


def test_groups_of_a_convolution_keep_the_same_columns() -> None:
    problems = [problem(seed=seed) for seed in range(3)]
    weights, hessians = (torch.stack(parts) for parts in zip(*problems, strict=True))
    kept = torch.tensor([4, 12])
    together = gptq(weights, hessians, gptq_grid(3), MinMax(), kept=kept)
    for number, (weight, hessian) in enumerate(problems):
        alone = gptq(weight, hessian, gptq_grid(3), MinMax(), kept=kept)
        torch.testing.assert_close(together.weight[number], alone.weight, rtol=0, atol=1e-6)
    summed = column_sensitivity(weights, None, hessians)
    torch.testing.assert_close(summed, sum(h.diagonal() for h in hessians))


def test_dead_channels_and_constant_rows() -> None:
    weight, hessian = problem()
    weight[3] = 0
    weight[4] = 0.25
    for dead in (6, 9):
        hessian[dead] = 0
        hessian[:, dead] = 0
    sensitivity = rank(weight, hessian)
    assert float(sensitivity[6]) == float(sensitivity[9]) == 0
    kept = torch.tensor([9, 20])
    for search in (MinMax(), JointSearch(num=20)):
        solution = gptq(weight, hessian, gptq_grid(3), search, kept=kept)
        assert torch.isfinite(solution.weight).all() and not solution.weight[:, 6].any()
        assert torch.equal(solution.weight[:, 9], weight[:, 9]), "a dead column that is kept stays as it is"


@pytest.mark.parametrize("kept", [[0, 0], [40], [-1], [[1]]])
def test_kept_columns_must_exist_once(kept: list) -> None:
    weight, hessian = problem()
    with pytest.raises(FewbitsError, match="kept columns"):
        gptq(weight, hessian, gptq_grid(3), MinMax(), kept=torch.tensor(kept))


# -- which columns, and how many -------------------------------------------------------------------------------------


def test_selection_uses_the_product_of_input_power_and_rounding_error() -> None:
    weight, hessian = problem()
    on_grid = torch.zeros(12, 40)
    on_grid[:, 8] = 1.0  # every grid holds zero and the largest value
    rest = torch.where(torch.arange(40) == 8, on_grid, weight.clamp(-0.3, 0.3).abs())
    hessian[8, 8] = 1e6
    rounded, _ = nearest(rest, affine(3), ROWS, MinMax().fit(rest, affine(3), ROWS))
    assert float((rounded - rest)[:, 8].abs().max()) < 1e-6
    assert 8 not in weakest_columns(column_sensitivity(rest, rounded, hessian), 10)
    assert int(weakest_columns(column_sensitivity(rest, None, hessian), 1)) == 8, "by H_jj alone it comes first"


@pytest.mark.parametrize(
    ("shapes", "ratios"),
    [
        ([(64, 64)] * 4 + [(256, 64), (64, 256)], [1, 1, 1, 1, 0.25, 0.25]),  # OPT
        ([(96, 96)] * 4 + [(256, 96)] * 2 + [(96, 256)], [1, 1, 1, 1, 0.375, 0.375, 0.375]),  # LLaMA
        ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], [1, 1, 1, 1, 0.375, 0.375, 0.375]),  # 7B
        ([(64, 64), (64, 64), (256, 64), (64, 256)], [1, 1, 0.25, 0.25]),  # Falcon, multi-query width aside
    ],
)
def test_an_equal_share_for_every_weight_is_the_released_rule(shapes: list, ratios: list) -> None:
    bits, target, width = 3, 3.01 if shapes[0][0] > 1000 else 4.3, shapes[0][1]
    size = sum(out * columns for out, columns in shapes) / width**2  # 12 but for the MLP's exact width
    rate = size / (16 - bits) * (target - bits) / len(shapes)
    counts = [round(columns * rate * ratio) for (_, columns), ratio in zip(shapes, ratios, strict=True)]
    assert columns_in_budget(shapes, bits, target) == [count + count % 2 for count in counts]


def test_counts_meet_the_target_and_are_even() -> None:
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    weights = sum(out * columns for out, columns in shapes)
    for bits, target in ((3, 3.01), (3, 3.1), (4, 4.01), (2, 3.0)):
        counts = columns_in_budget(shapes, bits, target)
        assert all(count % 2 == 0 for count in counts)
        average = bits + sum((16 - bits) * k * out for (out, _), k in zip(shapes, counts, strict=True)) / weights
        slack = sum((16 - bits) * 1.5 * out for out, _ in shapes) / weights
        assert abs(average - target) <= slack and average >= target - slack / 3
    exact = columns_in_budget(shapes, 3, 3.1, even=False)
    average = 3 + sum(13 * k * out for (out, _), k in zip(shapes, exact, strict=True)) / weights
    assert average == pytest.approx(3.1, abs=2e-3)
    only = columns_in_budget(shapes, 3, 3.1, selected=[True] + [False] * 6)
    assert only[1:] == [0] * 6 and only[0] > 6 * columns_in_budget(shapes, 3, 3.1)[0]
    assert columns_in_budget([(8, 4)], 3, 15.9) == [4]
    with pytest.raises(FewbitsError, match="average"):
        columns_in_budget(shapes, 3, 2.9)


# -- the recipe ------------------------------------------------------------------------------------------------------


def kept_columns(result) -> dict[str, list[int]]:
    return {name: parts[0].index.tolist() for name, parts in result.attachment.parts.items()}


def test_recipe_without_columns_is_gptq_bit_by_bit() -> None:
    ours, theirs = encoder(depth=1), encoder(depth=1)
    a = quantize(ours, "owq", tokens(8), bits="W3A16", options={"weak_columns": 0})
    b = quantize(theirs, "gptq", tokens(8), bits="W3A16")
    assert not a.attachment.parts
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(torch.equal(a.attachment.codes[name], codes) for name, codes in b.attachment.codes.items())
    # a budget too small for one column is still plain GPTQ, and said; as released, on the searched grid
    plain = encoder(depth=1)
    quantize(plain, "owq", tokens(8), bits="W3A16")
    assert all(torch.equal(x, y) for x, y in zip(plain.parameters(), theirs.parameters(), strict=True))
    small = quantize(encoder(depth=1), "owq", tokens(8), bits="W3A16", options={"variant": "released"})
    assert not small.attachment.parts and any("no full-precision column" in note for note in small.notes)
    assert not torch.equal(
        small.attachment.quantizer("blocks.0.q.weight").params["scale"],
        b.attachment.quantizer("blocks.0.q.weight").params["scale"],
    )


def test_recipe_that_keeps_every_column_leaves_the_outputs() -> None:
    model, data = encoder(), tokens(8)
    with torch.no_grad():
        before = [model(x) for x in data]
    quantize(model, "owq", data, bits="W3A16", options={"weak_columns": 1000, **FAST})
    with torch.no_grad():
        for x, expected in zip(data, before, strict=True):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def loud_encoder() -> nn.Module:
    model = encoder(width=32, depth=2)
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.data[[5, 20]] *= 30
    return model


def test_recipe_finds_loud_channels_and_gains_from_keeping_them() -> None:
    data, original = tokens(32, batch=8), loud_encoder()
    errors = {}
    for name, options in (("gptq", {}), ("owq", {"target_bits": 3.8, **FAST}), ("owq", {"weak_columns": 8, **FAST})):
        model = loud_encoder()
        result = quantize(model, name, data, bits="W3A16", options=options)
        with torch.no_grad():
            error = sum(float((model(x) - original(x)).square().sum()) for x in data)
        errors[(name, *options.values())] = error
        if options:
            kept = kept_columns(result)
            assert all({5, 20} <= set(kept[f"blocks.{i}.{name}.weight"]) for i in range(2) for name in "qkv"), kept
    gptq_error, budget, fixed = errors.values()
    assert budget < 0.8 * gptq_error and fixed < budget


def test_parts_hold_real_values_and_the_rest_lies_on_the_grid() -> None:
    original, model = loud_encoder(), loud_encoder()
    result = quantize(model, "owq", tokens(16), bits="W3A16", options={"weak_columns": 4, **FAST})
    for name, (part,) in result.attachment.parts.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        free = torch.ones(weight.shape[1], dtype=torch.bool)
        free[part.index] = False
        quantizer = result.attachment.quantizer(name)
        grid = quantizer.decode(result.attachment.codes[name])
        torch.testing.assert_close(weight[:, free], grid[:, free], rtol=0, atol=1e-6)
        assert not grid[:, part.index].any()
        assert torch.equal(weight[:, part.index], part.values)
        assert not torch.equal(part.values, original.get_submodule(name.removesuffix(".weight")).weight[:, part.index])


def test_layers_that_are_not_selected_keep_nothing() -> None:
    result = quantize(
        encoder(width=32, depth=1),
        "owq",
        tokens(8),
        bits="W3A16",
        options={"target_bits": 3.5, "layers": "*.q.*,*.k.*", **FAST},
    )
    assert {name.split(".")[2] for name in kept_columns(result)} == {"q", "k"}


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        ("W3A16g8", {"weak_columns": 6, "act_order": True}),
        ("W2A16g8", {"weak_columns": 2}),
        ("W4A16", {"weak_columns": 2, "sym": True}),
        ("W3A8", {"weak_columns": 2, "regime": "true_sequential", "frob_norm": False}),
        ("W3A16", {"weak_columns": 2, "tuning": "minmax"}),
    ],
)
def test_options_run_and_change_what_they_name(bits: str, options: dict) -> None:
    model = encoder(width=20, depth=1)
    result = quantize(model, "owq", tokens(8), bits=bits, options=options)
    assert all(len(index) == options["weak_columns"] for index in kept_columns(result).values())
    quantizer = result.attachment.quantizer("blocks.0.q.weight")
    if "g8" in bits:
        free = 20 - options["weak_columns"]
        assert quantizer.params["scale"].shape == (20, -(-free // 8))
        assert result.attachment.group_index["blocks.0.q.weight"].shape == (20,)
    assert quantizer.spec.format.signed == bool(options.get("sym"))
    with torch.no_grad():
        assert torch.isfinite(model(tokens(2)[0])).all()


def test_first_and_last_layers_at_other_bits_keep_no_columns() -> None:
    result = quantize(
        skipnet(), "owq", images(4), bits="W3A16", options={"weak_columns": 2, "first_last_bits": 8, **FAST}
    )
    kept = kept_columns(result)
    assert "stem.weight" not in kept and "head.weight" not in kept and "down.0.conv1.weight" in kept


def test_wrong_options_are_refused() -> None:
    for options, match in (
        ({"target_bits": 2.5}, "target_bits"),
        ({"target_bits": 16}, "target_bits"),
        ({"weak_columns": -1}, "weak_columns"),
        ({"tuning": "much"}, "tuning"),
    ):
        with pytest.raises(FewbitsError, match=match):
            build_recipe("owq", "W3A16", options)


def test_joins_with_transforms_and_refuses_another_solver() -> None:
    joined = build_recipe("smoothquant+owq", "W4A8", {"weak_columns": 2, **FAST})
    names = [type(step).__name__ for sweep in joined.sweeps() for step in sweep]
    assert names == ["Smooth", "CalibrateActivations", "WeakColumnSolver"]
    result = quantize(encoder(depth=1), joined, tokens(8))
    assert result.attachment.parts
    for other in ("gptq", "adaround", "squeezellm"):
        with pytest.raises(FewbitsError, match="both bring their own rounding"):
            build_recipe(f"owq+{other}", "W4A16")


@pytest.mark.parametrize("name", ["timm-vit", "timm-regnetx", "hf-opt", "hf-falcon", "hf-gpt2", "hf-mixtral-eager"])
def test_runs_on_models_of_any_kind(name: str) -> None:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    if name.startswith("hf-"):
        kwargs = {**kwargs, "use_cache": False}
    batch = map_tensors(lambda t: t.roll(1, -1) if not t.is_floating_point() else t + 0.1, (args, kwargs))
    result = quantize(
        model, "owq", [(args, kwargs), batch], bits="W3A16", options={"weak_columns": 2, **FAST}, example=(args, kwargs)
    )
    parts = result.attachment.parts
    assert parts and all(isinstance(part, Columns) for (part,) in parts.values())
    if name == "timm-regnetx":
        grouped = [site for site in result.graph.sites.values() if site.role == "weight" and site.groups > 1]
        assert grouped and all(site.name in parts for site in grouped)
    with torch.no_grad():
        output = model(*args, **kwargs)
    assert torch.isfinite(output if isinstance(output, Tensor) else output.logits).all()


def test_fused_projections_make_one_selection() -> None:
    model, args, kwargs = zoo_tiny.MODELS["hf-falcon"]()
    kwargs = {**kwargs, "use_cache": False}
    result = quantize(
        model, "owq", [(args, kwargs)], bits="W3A16", options={"target_bits": 5.0, **FAST}, example=(args, kwargs)
    )
    kept = kept_columns(result)["transformer.h.0.self_attention.query_key_value.weight"]
    assert len(kept) >= 2 and max(kept) < 32


# -- tuning the columns ----------------------------------------------------------------------------------------------


def test_only_the_kept_columns_are_tuned() -> None:
    data, target = tokens(8, batch=8)[0], torch.randint(0, 23, (8, 6), generator=torch.Generator().manual_seed(4))
    model = loud_encoder()
    result = quantize(model, "owq", [data], bits="W3A16", options={"weak_columns": 4, **FAST})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        quantized = model(data)
    columns = weak_column_parameters(model)
    assert set(columns) == set(result.attachment.parts)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(data), quantized, rtol=0, atol=1e-5)

    site = "blocks.0.q.weight"
    seen: dict[str, Tensor] = {}
    layer = model.blocks[0].q

    def keep(module, args, output) -> None:
        output.retain_grad()
        seen.update(x=args[0].detach(), y=output)

    handle = layer.register_forward_hook(keep)
    loss = F.cross_entropy(model(data).flatten(0, 1), target.flatten())
    loss.backward()
    handle.remove()
    index = result.attachment.parts[site][0].index
    expected = seen["y"].grad.flatten(0, 1).T @ seen["x"].flatten(0, 1)[:, index]
    torch.testing.assert_close(columns[site].grad, expected, rtol=1e-4, atol=1e-7)

    first = float(loss.detach())
    optimizer = torch.optim.Adam(columns.values(), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data).flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.9 * first
    assert weak_column_parameters(model)[site] is columns[site]
    with torch.no_grad():
        tuned = model(data)
    settle_weak_columns(model)
    with torch.no_grad():
        torch.testing.assert_close(model(data), tuned, rtol=0, atol=1e-5)
    for name, value in model.state_dict().items():
        parts = result.attachment.parts.get(name)
        changed = (value != before[name]).any(0) if value.dim() > 1 else (value != before[name])
        if parts is None:
            assert not bool(changed.any()), name
        else:
            assert set(changed.nonzero().flatten().tolist()) == set(parts[0].index.tolist()), name


def test_tuning_needs_kept_columns() -> None:
    with pytest.raises(FewbitsError, match="not quantized"):
        weak_column_parameters(encoder())
    model = encoder()
    quantize(model, "gptq", tokens(4), bits="W3A16")
    with pytest.raises(FewbitsError, match="keeps no"):
        weak_column_parameters(model)


# -- saving, and what it is good for ---------------------------------------------------------------------------------


def test_resumes_to_the_same_bits(tmp_path: Path) -> None:
    recipe = build_recipe("owq", "W3A16", {"weak_columns": 4, **FAST})
    whole, resumed = loud_encoder(), loud_encoder()
    quantize(whole, recipe, tokens(8), work_dir=tmp_path)
    (tmp_path / "sweep0-unit0001.safetensors").unlink()
    again = quantize(resumed, recipe, tokens(8), work_dir=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert len(again.attachment.parts) == 12


def test_checkpoint_gives_the_same_outputs_before_and_after_tuning(tmp_path: Path) -> None:
    import fewbits
    from fewbits import demo
    from fewbits.hub import checkpoint

    loaded = fewbits.load_model("demo:digits")
    data = list(demo.data("digits", "calibration").inputs[:32].split(16))
    result = quantize(loaded.model, "owq", data, bits="W3A16", options={"weak_columns": 4, "act_order": True, **FAST})
    outputs = []
    for step in range(2):
        with torch.no_grad():
            outputs.append(loaded.model(data[0]))
        checkpoint.save(tmp_path / str(step), result, loaded)
        again = fewbits.load(tmp_path / str(step))
        with torch.no_grad():
            assert torch.equal(again.model(data[0]), outputs[step])
        assert len(weak_column_parameters(again.model)) == len(result.attachment.parts)
        for values in weak_column_parameters(loaded.model).values():
            values.data += 0.02
        settle_weak_columns(loaded.model)
    assert not torch.equal(*outputs)


def test_keeps_more_of_a_trained_model_than_gptq() -> None:
    """A language model whose inputs have outlier channels, its function unchanged: what the paper is about."""
    from fewbits import demo
    from fewbits.graph import record
    from fewbits.graph.weights import scale
    from fewbits.steps.norm_folds import norm_relations

    calibration, evaluation = (demo.data("text", split) for split in ("calibration", "evaluation"))

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            logits = model(evaluation.inputs[:8])
        return float(F.cross_entropy(logits.flatten(0, 1), evaluation.labels[:8].flatten()))

    losses = {}
    for name, bits, options in (
        ("float", "", {}),
        ("gptq", "W3A16", {}),
        ("owq", "W3A16", {"target_bits": 3.3, **FAST}),
    ):
        model = demo.load("text")[0]
        graph = record(model, calibration.inputs[:1])
        for unit in graph.units:
            for relation in norm_relations(graph, unit):
                factor = torch.ones(relation.size, dtype=torch.float64)
                factor[[11, 70]] = 40.0
                scale(model, relation, factor)
        if name != "float":
            quantize(model, name, list(calibration.inputs[:8].split(8)), bits=bits, options=options)
        losses[name] = loss(model)
    assert losses["owq"] - losses["float"] < 0.8 * (losses["gptq"] - losses["float"]), losses


def test_symmetric_grid_spans_one_step_less_above() -> None:
    fmt = owq_grid(4, sym=True)
    weight = torch.randn(6, 30)
    params = JointSearch(num=100).fit(weight, fmt, ROWS)
    assert "zero_point" not in params and fmt.code_min == -8 and fmt.code_max == 7
    widest = AbsMax().fit(weight, fmt, ROWS)
    torch.testing.assert_close(widest["scale"], weight.abs().amax(1, keepdim=True) / 8)
    ratio = params["scale"] / widest["scale"] * 100
    torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-3)
