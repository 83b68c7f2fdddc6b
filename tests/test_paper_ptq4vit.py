"""PTQ4ViT: twin grids, searches at a layer's output, gradients of the task loss, and the recipe on whole models."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import encoder, images, skipnet, tokens
from fewbits import quantize
from fewbits.engine.context import ModelContext
from fewbits.engine.gradients_sites import gradients_at, site_gradients
from fewbits.engine.losses import task_loss
from fewbits.engine.run import Run
from fewbits.errors import FewbitsError
from fewbits.formats import (
    GELU_BOUND,
    PerBlock,
    PerChannel,
    PerHead,
    PerTensor,
    TwinMagnitude,
    TwinSign,
    Uniform,
    encode,
    expand_params,
    granularity_from_dict,
    symmetric,
)
from fewbits.formats import quantize as on_grid
from fewbits.graph import record
from fewbits.graph.fused import fused_rows
from fewbits.papers import build_recipe
from fewbits.ranges import LayerCall, LayerSearch, MinMax, Operand, search_layer
from fewbits.ranges.output_metrics import METRICS

FAST = {"candidates": "12", "rounds": "2"}


def grid(bits: int) -> Uniform:
    return symmetric(bits, narrow=False, step="span")


def operand(slot, x, fmt, granularity=None, group_axis=None, *, alone=False, search=None) -> Operand:
    granularity, search = granularity or PerTensor(), search or LayerSearch(steps=16)
    start = search.fit(x, fmt, granularity)
    return Operand(slot, fmt, granularity, start, search.tried(fmt, start), group_axis, alone)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_case(seed: int = 0, out: int = 6) -> LayerCall:
    x, w, g = noise(4, 5, 8, seed=seed), noise(out, 8, seed=seed + 1), noise(4, 5, out, seed=seed + 2)
    return LayerCall(x, w, F.linear(x, w), g)


def layer_search(call: LayerCall, bits: int = 4, rows=None, metric: str = "hessian", **options):
    operands = [
        operand(1, call.second, grid(bits), rows or PerTensor(), 0 if rows else None),
        operand(0, call.first, grid(bits)),
    ]
    return search_layer(F.linear, [call], operands, metric=metric, **options)


# -- twin grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_twin_softmax_error_ends_and_order(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    p = torch.cat([torch.linspace(0, 1, 4001), 2.0 ** -torch.arange(24.0)]).sort().values
    for shift in range(20):
        fmt, params, split = TwinMagnitude(bits), {"shift": torch.tensor(float(shift))}, 2.0**-shift
        value = fmt.nearest(p, params)[0]
        step = torch.where(p < split, split / top, 1 / top)
        assert bool(((value - p).abs() <= step / 2 * (1 + 1e-5) + 1e-7).all())
        assert float(value[0]) == 0 and float(value[-1]) == 1
        if shift < bits:
            assert bool((value.diff() >= 0).all())
        else:  # the paper's formula: between the split and half a coarse step lies zero, above it order is kept
            zeros = (p >= split) & (p < 0.5 / top)
            assert bool((value[zeros] == 0).all()) and bool((value[~zeros].diff() >= 0).all())
        codes = fmt.encode(p, params)
        assert int(codes.max()) == 2**bits - 1 and len(codes.unique()) <= 2**bits
        assert bool(((codes >= 2 ** (bits - 1)) == (p >= split)).all()), "the top bit is the region"
        # the fine region counts small steps and the coarse one steps that are a shift apart
        payload = codes.long() & (2 ** (bits - 1) - 1)
        shifted = payload << torch.where(p >= split, shift, 0)
        torch.testing.assert_close(shifted.double() * (split / top), value.double(), rtol=1e-6, atol=1e-9)
    uniform = Uniform(bits - 1, zero_point="none", step="positive")
    whole = uniform.nearest(p, {"scale": torch.tensor(1 / top)})[0]
    same = TwinMagnitude(bits).nearest(p, {"shift": torch.tensor(0.0)})[0]
    off_tie = ((p * top) % 1 - 0.5).abs() > 1e-4
    torch.testing.assert_close(same[off_tie], whole[off_tie])


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("tie", ["negative", "positive", "none"])
def test_twin_gelu_keeps_signs_and_covers_the_negative_part(bits: int, tie: str) -> None:
    h = F.gelu(torch.linspace(-8, 8, 4001))
    fmt = TwinSign(bits, tie=tie)
    params = MinMax().fit(h, fmt, PerTensor())
    value, codes = fmt.nearest(h, params)[0], fmt.encode(h, params)
    half = 2 ** (bits - 1)
    negative, step = fmt.steps(params)
    assert bool((value * h >= 0).all()) and float(fmt.nearest(torch.zeros(1), params)[0]) == 0
    assert bool(((value - h).abs() <= negative / 2 * (1 + 1e-5))[h < 0].all())
    assert 1 - 1e-6 <= float(negative) * half / GELU_BOUND < (2 if tie == "positive" else 1 + 1e-6)
    assert int(codes.min()) >= -half and int(codes.max()) <= half - 1, "sign and region are one bit"
    plain = symmetric(bits, narrow=False).nearest(h.clamp_min(0), {"scale": step})[0]
    assert torch.equal(value[h >= 0], plain[h >= 0])
    if tie != "none":
        assert float(torch.frexp(step / negative)[0]) == 0.5, "a power of two"
        payload = codes.long() << torch.where(h < 0, 0, int(params["shift"])) if int(params["shift"]) >= 0 else None
        if payload is not None:
            torch.testing.assert_close(payload * negative, value, rtol=1e-6, atol=1e-7)
    if tie == "negative":
        assert float((value - h).abs()[h >= 0].max()) <= float(step) / 2 * (1 + 1e-5)


def test_twin_gelu_of_negative_values_only() -> None:
    h = -torch.rand(64) * GELU_BOUND
    for tie in ("negative", "none"):
        fmt = TwinSign(4, tie=tie)
        params = MinMax().fit(h, fmt, PerTensor())
        fmt.check_params(params)
        assert float((fmt.nearest(h, params)[0] - h).abs().max()) <= GELU_BOUND / 8 / 2 + 1e-7


def test_a_split_that_is_no_power_of_two_is_refused() -> None:
    for bad in (1.5, -1.0, 1000.0):
        with pytest.raises(FewbitsError, match="here"):
            TwinMagnitude(4).check_params({"shift": torch.tensor(bad)}, "here")
    with pytest.raises(FewbitsError, match="bits"):
        TwinMagnitude(1)
    with pytest.raises(FewbitsError, match="bits"):
        TwinSign(9)


def test_gradients_of_the_free_positive_step() -> None:
    fmt, h = TwinSign(4, tie="none"), noise(40).requires_grad_()
    scale = torch.tensor(0.1, requires_grad=True)
    fmt.quantize(h, {"scale": scale}).sum().backward()
    inside = (h.detach() < 0.75) & (h.detach() > -GELU_BOUND * 17 / 16)
    assert bool((h.grad[inside] == 1).all()) and bool((h.grad[h.detach() < -0.2] == 0).all())
    ratio = h.detach() / 0.1
    slope = torch.where(ratio >= 7.5, torch.tensor(7.0), torch.round(ratio) - ratio)[h.detach() >= 0]
    torch.testing.assert_close(scale.grad, slope.sum(), rtol=1e-4, atol=1e-4)


# -- blocks of a matrix ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "labels"),
    [
        (PerBlock(3), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
        (PerBlock((2, 1, 1)), [0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2]),
        (PerBlock((6, 4, 2), 2), [0] * 6 + [1] * 4 + [2] * 2),
    ],
)
def test_blocks_of_rows_and_columns(granularity: PerBlock, labels: list[int]) -> None:
    x = noise(12, 8)
    found = granularity.reduce(x, lambda block: block.abs().amax(1))
    expected = torch.stack(
        [
            torch.stack([part[torch.tensor(labels) == i].abs().max() for part in x.chunk(granularity.columns, 1)])
            for i in range(3)
        ]
    )
    assert torch.equal(found, expected)
    spread = granularity.expand(found, x.shape).expand(12, 8)
    assert all(spread[row, 7] == expected[label, -1] for row, label in enumerate(labels))
    wide = granularity.expand(torch.stack([found, found * 2]), x.shape)
    assert torch.equal((wide[1] / 2).expand(12, 8), spread)
    assert granularity_from_dict(granularity.to_dict()) == granularity
    for shape in ((13, 8), (12, 7) if granularity.columns > 1 else (10, 8), (12, 8, 1)):
        with pytest.raises(FewbitsError, match="block"):
            granularity.param_shape(shape)


# -- the search ------------------------------------------------------------------------------------------------------


def brute_force(call: LayerCall, bits: int, n_v: int, n_h: int, n_a: int, steps: int, rounds: int, alpha=0.01):
    """The alternating search written out with loops over blocks, candidates and elements."""
    q, (x, w, raw, g) = 2 ** (bits - 1), call
    factors = [alpha + i * (1.2 - alpha) / steps for i in range(steps)]
    rows, columns, chunks = w.shape[0] // n_v, w.shape[1] // n_h, x.shape[-1] // n_a

    def dq(t: Tensor, step: Tensor) -> Tensor:
        return torch.clamp(torch.round(t / step), -q, q - 1) * step

    def weight(d: Tensor) -> Tensor:
        return dq(w, d.repeat_interleave(rows, 0).repeat_interleave(columns, 1))

    def inputs(d: Tensor) -> Tensor:
        return dq(x, d.repeat_interleave(chunks))

    w_start = w.reshape(n_v, rows, n_h, columns).abs().amax((1, 3)) / (q - 0.5)
    a_start = x.reshape(-1, n_a, chunks).abs().amax((0, 2)) / (q - 0.5)
    dw, da = w_start.clone(), a_start.clone()
    for _ in range(rounds):
        for h in range(n_h):
            best = torch.full((n_v,), -torch.inf)
            kept = dw[:, h].clone()
            for factor in factors:
                tried = dw.clone()
                tried[:, h] = w_start[:, h] * factor
                error = -((g * (raw - inputs(da) @ weight(tried).T)) ** 2)
                score = error.reshape(*error.shape[:2], n_v, rows).mean((1, 3)).sum(0)
                better = score > best
                best, kept = torch.where(better, score, best), torch.where(better, tried[:, h], kept)
            dw[:, h] = kept
        for a in range(n_a):
            scores = []
            for factor in factors:
                tried = da.clone()
                tried[a] = a_start[a] * factor
                scores.append(float(-((g * (raw - inputs(tried) @ weight(dw).T)) ** 2).mean((1, 2)).sum()))
            da[a] = a_start[a] * factors[scores.index(max(scores))]
    return dw, da


@pytest.mark.parametrize(("n_v", "n_h", "n_a"), [(1, 1, 1), (3, 1, 1), (2, 2, 1), (1, 4, 2), (3, 2, 4)])
def test_search_equals_one_written_out_with_loops(n_v: int, n_h: int, n_a: int) -> None:
    call, search = linear_case(n_v), LayerSearch(steps=12)
    chunks = PerHead(-1, heads=n_a)
    operands = [
        operand(1, call.second, grid(4), PerBlock(n_v, n_h), 0, search=search),
        operand(0, call.first, grid(4), chunks, search=search),
    ]
    w, a = search_layer(F.linear, [call], operands, rounds=2).params
    dw, da = brute_force(call, 4, n_v, n_h, n_a, 12, 2)
    torch.testing.assert_close(w["scale"], dw, rtol=1e-6, atol=0)
    torch.testing.assert_close(a["scale"].flatten(), da, rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", list(METRICS))
def test_the_best_candidate_wins_and_beats_the_extremes(metric: str) -> None:
    call = linear_case(3)
    search = LayerSearch(alpha=0.2, beta=1.2, steps=50)  # 1.0 is candidate 40
    operands = [
        operand(1, call.second, grid(3), PerBlock(3), 0, search=search),
        operand(0, call.first, grid(3), search=search),
    ]
    found = search_layer(F.linear, [call], operands, metric=metric, rounds=2)
    for number, (op, params) in enumerate(zip(operands, found.params, strict=True)):
        scores = found.scores[-1][number][0]
        tried = op.tried["scale"].view(50, -1)
        assert torch.equal(tried.gather(0, scores.argmax(0)[None]).flatten(), params["scale"].flatten())
        assert bool((scores.amax(0) >= scores[40]).all())
    assert found.scores[0][0].shape == (1, 50, 3) and found.scores[0][1].shape == (1, 50, 1)


def test_the_scale_of_the_gradients_does_not_matter_and_unit_gradients_are_plain_squares() -> None:
    call = linear_case(4)
    base = layer_search(call)
    for factor in (1e-6, -3.0, 1e5):
        other = layer_search(call._replace(gradient=call.gradient * factor))
        assert all(torch.equal(a["scale"], b["scale"]) for a, b in zip(base.params, other.params, strict=True))
    signs = call._replace(gradient=call.gradient.sign())
    squares = layer_search(call, metric="l2")
    unit = layer_search(signs)
    assert all(torch.equal(a["scale"], b["scale"]) for a, b in zip(squares.params, unit.params, strict=True))
    assert torch.equal(squares.scores[0][0], unit.scores[0][0])


def test_features_without_gradient_do_not_count() -> None:
    call = linear_case(5, out=6)
    gradient = call.gradient.clone()
    gradient[..., 4:] = 0
    kept = LayerCall(call.first, call.second[:4], call.raw[..., :4], gradient[..., :4])

    def input_scale(case: LayerCall) -> Tensor:
        return search_layer(F.linear, [case], [operand(0, case.first, grid(3))]).params[0]["scale"]

    assert torch.equal(input_scale(call._replace(gradient=gradient)), input_scale(kept))
    assert not torch.equal(input_scale(call), input_scale(kept))


def test_q_k_and_v_rows_are_independent() -> None:
    call = linear_case(6, out=12)
    found = layer_search(call, rows=PerBlock(3), rounds=1).params[0]["scale"]
    louder = call.second.clone()
    louder[8:] *= 10
    moved = layer_search(
        call._replace(second=louder, raw=F.linear(call.first, louder)), rows=PerBlock(3), rounds=1
    ).params[0]["scale"]
    assert torch.equal(found[:2], moved[:2])
    torch.testing.assert_close(moved[2], 10 * found[2])


def test_heads_pick_their_own_intervals_and_a_shared_one_serves_all() -> None:
    a, b, g = noise(3, 2, 5, 4), noise(3, 2, 4, 6, seed=1), noise(3, 2, 5, 6, seed=2)
    a[:, 1] *= 7

    def per_head(call: LayerCall) -> list[dict[str, Tensor]]:
        sides = [operand(slot, call.operand(slot), grid(4), PerHead(1), 1) for slot in (0, 1)]
        return search_layer(torch.matmul, [call], sides, weighted=False).params

    call = LayerCall(a, b, a @ b, g)
    both = per_head(call)
    for head in range(2):
        alone = per_head(LayerCall(*(t[:, head : head + 1] for t in call)))
        for x, y in zip(both, alone, strict=True):
            torch.testing.assert_close(x["scale"][0, head], y["scale"][0, 0])
    shared = b[:, :1]  # one key head for all queries
    found = per_head(LayerCall(a, shared, a @ shared, g))
    assert found[0]["scale"].shape == (1, 2, 1, 1) and found[1]["scale"].shape == (1, 1, 1, 1)


def test_the_softmax_split_is_judged_with_the_values_in_floating_point() -> None:
    p, v, g = noise(3, 2, 6, 6).mul(3).softmax(-1), noise(3, 2, 6, 4, seed=1), noise(3, 2, 6, 4, seed=2)
    fmt, call = TwinMagnitude(4), LayerCall(p, v, p @ v, g)
    found = search_layer(
        torch.matmul, [call], [operand(0, p, fmt, alone=True), operand(1, v, grid(4), PerHead(1), 1)], weighted=False
    )
    errors = []
    for shift in range(20):
        made = fmt.nearest(p, {"shift": torch.tensor(float(shift))})[0]
        errors.append(float((g * (made @ v - p @ v)).square().mean((1, 2, 3)).sum()))
    assert float(found.params[0]["shift"]) == errors.index(min(errors))
    torch.testing.assert_close(-found.scores[0][0].flatten(), torch.tensor(errors), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 6, 5, 5), (4, 6, 9)])
def test_convolution_channels(shape: tuple[int, ...]) -> None:
    dims = len(shape) - 2
    weight, conv = noise(4, 3, *[3] * dims), (F.conv1d, F.conv2d)[dims - 1]

    def run(x: Tensor, w: Tensor) -> Tensor:
        return conv(x, w.view(weight.shape), groups=2)

    x = noise(*shape, seed=1)
    matrix = weight.flatten(1)
    raw = run(x, matrix)
    call = LayerCall(x, matrix, raw, noise(*raw.shape, seed=2))
    op = operand(1, matrix, grid(4), PerChannel(0), 0)
    found = search_layer(run, [call], [op], channel_axis=1)
    for channel in range(4):
        errors = []
        for scale in op.tried["scale"][:, channel, 0]:
            made = run(x, on_grid(matrix, grid(4), PerTensor(), {"scale": scale}))
            errors.append(float((call.gradient * (made - raw)).square()[:, channel].sum()))
        assert torch.equal(
            found.params[0]["scale"][channel, 0], op.tried["scale"][errors.index(min(errors)), channel, 0]
        )


def test_passes_batches_and_repeated_rounds_change_no_score() -> None:
    call = linear_case(7, out=12)
    whole = layer_search(call, rows=PerBlock(3), rounds=2)

    def part(start: int, stop: int) -> LayerCall:
        return LayerCall(call.first[start:stop], call.second, call.raw[start:stop], call.gradient[start:stop])

    operands = [operand(1, call.second, grid(4), PerBlock(3), 0), operand(0, call.first, grid(4))]
    splits = ([call], [part(n, n + 1) for n in range(4)], [part(0, 1), part(1, 4)])
    for calls, at_once in itertools.product(splits, (1, 3000)):
        found = search_layer(F.linear, calls, operands, rounds=2, at_once=at_once)
        assert all(torch.equal(a["scale"], b["scale"]) for a, b in zip(whole.params, found.params, strict=True))
        for row, other in zip(whole.scores, found.scores, strict=True):
            for a, b in zip(row, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_searched_is_said() -> None:
    call = linear_case()
    broken = call.first.clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(FewbitsError, match="NaN"):
        search_layer(F.linear, [call._replace(first=broken)], [operand(1, call.second, grid(4))])
    with pytest.raises(FewbitsError, match="no calibration data"):
        search_layer(F.linear, [], [operand(1, call.second, grid(4))])
    with pytest.raises(FewbitsError, match="gradient"):
        layer_search(call._replace(gradient=None))
    with pytest.raises(FewbitsError, match="unknown output metric"):
        layer_search(call, metric="best")
    for bad in ({"alpha": 2.0}, {"steps": 0}, {"splits": 0}):
        with pytest.raises(FewbitsError, match="layer search"):
            LayerSearch(**bad)


def test_zero_groups_and_a_zero_first_candidate() -> None:
    call = linear_case(8)
    weight = call.second.clone()
    weight[:2] = 0
    found = layer_search(call._replace(second=weight, raw=F.linear(call.first, weight)), rows=PerBlock(3))
    made = on_grid(weight, grid(4), PerBlock(3), found.params[0])
    assert bool((made[:2] == 0).all()) and bool((found.params[0]["scale"] > 0).all())
    search = LayerSearch(alpha=0.0, steps=10)
    tried = search.tried(grid(4), search.fit(weight, grid(4), PerTensor()))["scale"]
    assert len(tried) == 9 and bool((tried > 0).all())


# -- a small vision transformer --------------------------------------------------------------------------------------


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Images (batch, 3, 8, 8)."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.Sequential(*(VitBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


def vit(seed: int = 0) -> Vit:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Vit()
        with torch.no_grad():
            for block in model.blocks:
                block.qkv.weight *= 3  # attention that attends
                block.fc1.weight *= 3
            model.head.weight *= 4
        return model.eval()


def test_every_tensor_of_the_paper_is_quantized_on_its_grid() -> None:
    result = quantize(vit(), "ptq4vit", images(8), bits="W6A6", options=FAST)
    specs = {site.name: quantizer.spec for site, quantizer in result.attachment.items()}
    expected = {"patch.weight", "head.weight", "head.input"}
    for block in ("blocks.0", "blocks.1"):
        expected |= {
            f"{block}.{layer}.{role}" for layer in ("qkv", "proj", "fc1", "fc2") for role in ("weight", "input")
        }
        expected |= {f"{block}.{product}.{role}" for product in ("matmul", "matmul_1") for role in ("lhs", "rhs")}
    assert set(specs) == expected, "both attention products, no pixels, no norms"
    assert all(spec.format.bits == 6 for spec in specs.values())
    assert all(getattr(spec.format, "zero_point", "none") == "none" for spec in specs.values())
    kinds = {name: (spec.format.kind, spec.granularity) for name, spec in specs.items()}
    assert kinds["patch.weight"] == ("uniform", PerChannel(0))
    assert kinds["blocks.1.qkv.weight"] == ("uniform", PerBlock((16, 16, 16)))
    assert kinds["blocks.1.fc1.weight"] == kinds["blocks.1.fc1.input"] == ("uniform", PerTensor())
    assert kinds["blocks.1.fc2.input"] == ("twin_sign", PerTensor())
    assert kinds["blocks.1.matmul.lhs"] == kinds["blocks.1.matmul.rhs"] == ("uniform", PerHead(1))
    assert kinds["blocks.1.matmul_1.lhs"] == ("twin_magnitude", PerTensor())
    assert kinds["blocks.1.matmul_1.rhs"] == ("uniform", PerHead(1))
    assert result.attachment.quantizer("blocks.1.qkv.weight").params["scale"].shape == (3, 1)
    assert all(int(codes.min()) >= -32 and int(codes.max()) <= 31 for codes in result.attachment.codes.values())
    assert not result.notes


def captured(model: nn.Module, batches: list[Tensor], names: list[str]) -> dict[str, LayerCall]:
    """Operands, outputs and gradients of linears, taken from the float model with hooks of its own."""
    held: dict[str, list] = {name: [] for name in names}
    handles = []
    for name in names:

        def keep(module, args, output, name=name):
            output.retain_grad()
            held[name].append((args[0].detach(), output))

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    for batch in batches:
        logits = model(batch.clone().requires_grad_())
        F.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {
        name: LayerCall(
            torch.cat([x for x, _ in calls]),
            model.get_submodule(name).weight.detach(),
            torch.cat([out.detach() for _, out in calls]),
            torch.cat([out.grad for _, out in calls]),
        )
        for name, calls in held.items()
    }


def test_intervals_come_from_the_float_model_whatever_the_order() -> None:
    """Every layer's intervals equal those of a search of its own on what the float model shows."""
    model = vit()
    names = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("qkv", "proj", "fc1", "fc2")] + ["head"]
    seen = captured(copy.deepcopy(model), images(8), names)
    result = quantize(model, "ptq4vit", images(8), bits="W4A4", options=FAST)
    search = LayerSearch(steps=12)
    for name in names:
        layer, call = vit().get_submodule(name), seen[name]
        specs = [result.attachment.quantizer(f"{name}.{role}").spec for role in ("weight", "input")]
        assert all(spec.range == search for spec in specs)
        operands = [
            operand(1, call.second, specs[0].format, specs[0].granularity, 0 if "qkv" in name else None, search=search),
            operand(0, call.first, specs[1].format, search=search),
        ]
        found = search_layer(partial(F.linear, bias=layer.bias.detach()), [call], operands, rounds=2)
        for role, params in zip(("weight", "input"), found.params, strict=True):
            kept = result.attachment.quantizer(f"{name}.{role}").params
            for key, value in params.items():
                torch.testing.assert_close(kept[key], value, rtol=1e-5, atol=0, msg=f"{name}.{role}")
    codes = result.attachment.codes["blocks.1.qkv.weight"]
    spec = result.attachment.quantizer("blocks.1.qkv.weight")
    assert torch.equal(codes, encode(seen["blocks.1.qkv"].second, spec.spec.format, spec.spec.granularity, spec.params))


def test_batches_of_another_size_give_the_same_intervals() -> None:
    scales = []
    for batch in (2, 8):
        result = quantize(vit(), "ptq4vit", images(8, batch=batch), bits="W4A4", options=FAST)
        scales.append({site.name: dict(q.params) for site, q in result.attachment.items()})
    for name, params in scales[0].items():
        for key, value in params.items():
            torch.testing.assert_close(value, scales[1][name][key], rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_twin_grids_beat_uniform_ones_where_they_are_meant_to(bits: int) -> None:
    p, v, g = (noise(4, 2, 24, 24) * 2).softmax(-1), noise(4, 2, 24, 8, seed=1), noise(4, 2, 24, 8, seed=2)
    h, w, gh = F.gelu(noise(4, 16, 32)), noise(8, 32, seed=3), noise(4, 16, 8, seed=4)
    product, layer = LayerCall(p, v, p @ v, g), LayerCall(h, w, F.linear(h, w), gh)

    def best(run, call: LayerCall, op: Operand) -> float:
        return float(search_layer(run, [call], [op], weighted=run is not torch.matmul).scores[0][0].amax(1).mean())

    twin = best(torch.matmul, product, operand(0, p, TwinMagnitude(bits), alone=True))
    added = best(torch.matmul, product, operand(0, p, TwinMagnitude(bits, additive=True), alone=True))
    uniform = best(torch.matmul, product, operand(0, p, grid(bits), PerHead(1), 1))
    assert twin > 0.6 * uniform and twin > added, "less than 0.6 of the error"
    ties = [best(F.linear, layer, operand(0, h, TwinSign(bits, tie=tie))) for tie in ("negative", "positive", "none")]
    assert max(ties) > 0.6 * best(F.linear, layer, operand(0, h, grid(bits)))
    assert ties[0] >= 4 * ties[2], "a step that may only be a power of two is never more than twice too wide"


def test_the_recipe_beats_its_base_on_a_whole_model() -> None:
    data, losses = images(16, batch=8), {}
    for base in ("true", "false"):
        model, teacher = vit(), vit()
        quantize(model, "ptq4vit", data, bits="W6A6", options={"candidates": "24", "base": base})
        with torch.no_grad():
            losses[base] = sum(
                float(F.kl_div(model(x).log_softmax(-1), teacher(x).softmax(-1), reduction="sum")) for x in data
            )
    assert losses["false"] < losses["true"]


def test_base_is_the_base_ptq_of_the_paper() -> None:
    recipe = build_recipe("ptq4vit", "W8A8", {"base": "true"})
    kinds = {rule.spec.format.kind for rule in (*recipe.scheme.weights, *recipe.scheme.activations) if rule.spec}
    steps = {type(step).__name__: step for step in recipe.steps}
    assert kinds == {"uniform"} and "TaskGradients" not in steps
    assert steps["SearchLayers"].metric == "cosine" and steps["SearchLayers"].rounds == 1
    assert recipe.scheme.weights[0].spec.range == LayerSearch(0.5, 1.2, 100)
    result = quantize(vit(), "ptq4vit", images(8), bits="W8A8", options={"base": "true", "candidates": "8"})
    assert result.attachment.quantizer("patch.weight").spec.granularity == PerTensor()
    assert result.attachment.quantizer("blocks.0.qkv.weight").spec.granularity == PerBlock((16, 16, 16))
    released = build_recipe("ptq4vit", "W8A8", {"variant": "released"})
    formats = [rule.spec.format for rule in released.scheme.activations if rule.spec is not None]
    assert TwinMagnitude(8, additive=True) in formats and TwinSign(8, tie="none") in formats


def test_blocks_finer_than_layers() -> None:
    options = {**FAST, "row_blocks": "2", "column_blocks": "2", "input_chunks": "4"}
    result = quantize(vit(), "ptq4vit", images(8), bits="W4A4", options=options)
    held = result.attachment.quantizer
    assert held("blocks.0.qkv.weight").params["scale"].shape == (6, 2)
    assert held("blocks.0.fc1.weight").params["scale"].shape == (2, 2)
    assert held("blocks.0.fc1.input").params["scale"].shape == (1, 1, 4)
    with pytest.raises(FewbitsError, match=r"patch|blocks|head"):
        quantize(vit(), "ptq4vit", images(8), bits="W4A4", options={**FAST, "row_blocks": "3"})


# -- which rows of a fused projection go where -----------------------------------------------------------------------


class Fused(nn.Module):
    """Projections with the rows laid out in several ways."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.qkv = nn.Linear(8, {"halves": 24, "heads": 24, "shared": 16, "value": 8}[layout])

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.qkv(x)
        if self.layout == "halves":
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in y.chunk(3, -1))
            q = F.layer_norm(q * 0.5, (4,)) + torch.cat([-q[..., 2:], q[..., :2]], -1) * 0.1
        elif self.layout == "heads":
            q, k, v = (t.transpose(1, 2) for t in y.view(b, n, 2, 3, 4).unbind(3))
        elif self.layout == "shared":
            q, k, v = y.split([8, 4, 4], -1)
            q = q.unflatten(-1, (2, 4)).transpose(1, 2)
            k, v = (t.unsqueeze(1).expand(b, 2, n, 4) for t in (k, v))
        else:
            q = k = x.unflatten(-1, (2, 4)).transpose(1, 2)
            v = y.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("layout", "expected"), [("halves", (8, 8, 8)), ("heads", (4, 4, 4)), ("shared", (8, 4, 4)), ("value", None)]
)
def test_rows_of_fused_projections(layout: str, expected: tuple[int, ...] | None) -> None:
    graph = record(Fused(layout).eval(), noise(1, 3, 8))
    call = graph.calls[graph.sites["qkv.weight"].call]
    assert fused_rows(graph, call) == expected


# -- gradients of the task loss --------------------------------------------------------------------------------------


def context(model: nn.Module, batches: list, recipe: str = "ptq4vit") -> ModelContext:
    built = build_recipe(recipe, "W8A8", FAST if recipe == "ptq4vit" else {})
    run = Run(model, built, batches, None, 0, torch.device("cpu"), None, False, None, None, None, None)
    return ModelContext(run)


def test_site_gradients_are_autograds() -> None:
    """At linears, products and convolutions, also where the next op writes in place, and from token ids."""
    model = skipnet()
    ctx = context(model, images(6, batch=3))
    sites = [ctx.graph.sites[name] for name in ("stem.output", "down.1.conv2.output", "shared.output", "head.output")]
    loss = lambda number, logits, batch: task_loss("pseudo", logits, batch)  # noqa: E731
    with torch.no_grad():
        site_gradients(ctx, sites, loss)
    found = {site.name: gradients_at(ctx, site) for site in sites}
    ctx.attachment.detach()
    held: dict[str, list[Tensor]] = {"stem": [], "shared": []}
    for name, kept in held.items():
        # a clone, so that an op that writes in place does not reach the tensor that is watched
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, kept=kept: (out.retain_grad(), kept.append(out), out.clone())[2]
        )
    for batch in images(6, batch=3):
        logits = model(batch.clone().requires_grad_())
        task_loss("pseudo", logits, batch).backward()
    assert len(found["stem.output"]) == 2 and len(found["shared.output"]) == 4, "one a use"
    for name, kept in held.items():
        for ours, theirs in zip(found[f"{name}.output"], kept, strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-7)
    assert all(not parameter.requires_grad for parameter in ctx.model.parameters())
    ctx = context(encoder(), tokens(4))
    product = ctx.graph.sites["blocks.1.matmul_1.output"]
    with torch.no_grad():
        site_gradients(ctx, [product], lambda n, logits, batch: task_loss("next_token", logits, batch))
    (gradient,) = gradients_at(ctx, product)
    assert gradient.shape == (4, 2, 6, 8) and float(gradient.abs().amax()) > 0
    assert all(not parameter.requires_grad for parameter in ctx.model.parameters())


def test_losses_are_defined_or_refused() -> None:
    scales = {}
    for loss in ("sampled", "kl", "sampled"):
        result = quantize(vit(), "ptq4vit", images(8), bits="W4A4", options={**FAST, "rounds": "1", "loss": loss})
        assert not result.notes
        found = {site.name: q.params for site, q in result.attachment.items()}
        if loss in scales:
            assert all(torch.equal(v, scales[loss][n][k]) for n, p in found.items() for k, v in p.items())
        scales[loss] = found
    with pytest.raises(FewbitsError, match="token"):
        quantize(vit(), "ptq4vit", images(8), bits="W4A4", options={**FAST, "loss": "next_token"})

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.gelu(self.a(x)))

    with pytest.raises(FewbitsError, match="class scores"):
        quantize(Dense().eval(), "ptq4vit", images(4), bits="W4A4", options=FAST)
    quantize(Dense().eval(), "ptq4vit", images(4), bits="W4A4", options={**FAST, "metric": "l2"})

    class Constant(Vit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    with pytest.raises(FewbitsError, match="vanishes"):
        quantize(Constant().eval(), "ptq4vit", images(4), bits="W4A4", options=FAST)


def test_a_layer_that_the_loss_does_not_depend_on_is_searched_by_squared_error_and_named() -> None:
    class Idle(Vit):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * self.side(self.patch(x).flatten(2).mean(-1)).sum(1, keepdim=True)

    result = quantize(Idle().eval(), "ptq4vit", images(4), bits="W4A4", options=FAST)
    assert [note.split(":")[0] for note in result.notes] == ["side"] and "squared error" in result.notes[0]


def test_bad_activations_name_the_layer() -> None:
    model = vit()
    model.blocks[0].fc1.bias.data[0] = torch.inf
    with pytest.raises(FewbitsError, match=r"gradient|blocks\.0"):
        quantize(model, "ptq4vit", images(4), bits="W4A4", options={**FAST, "metric": "l2"})


# -- with other papers, and saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["gptq", "brecq", "adaround"])
def test_other_solvers_round_on_the_searched_grid(other: str) -> None:
    options = {
        **FAST,
        **{"brecq": {"iters_w": "3", "iters_a": "2", "edges_8bit": "no"}, "adaround": {"iterations": "3"}}.get(
            other, {}
        ),
    }
    plain = quantize(vit(), "ptq4vit", images(8), bits="W4A4", options=FAST)
    joined = quantize(vit(), f"ptq4vit+{other}", images(8), bits="W4A4", options=options)
    moved = 0
    for site, quantizer in plain.attachment.items():
        there = joined.attachment.quantizer(site.name)
        assert there is not None and there.spec == quantizer.spec
        if site.role == "weight" or other != "brecq":
            assert all(torch.equal(v, quantizer.params[k]) for k, v in there.params.items()), site.name
        if site.role == "weight":
            moved += int((plain.attachment.codes[site.name] != joined.attachment.codes[site.name]).sum())
    assert moved > 0 or other == "adaround"


def test_joins_that_make_sense_and_those_that_do_not() -> None:
    for pair in ("repq-vit+ptq4vit", "ptq4vit+repq-vit"):
        with pytest.raises(FewbitsError, match="activation quantizers"):
            build_recipe(pair, "W4A4")
    result = quantize(vit(), "smoothquant+ptq4vit", images(8), bits="W4A4", options=FAST)
    assert isinstance(result.attachment.quantizer("blocks.0.matmul_1.lhs").spec.format, TwinMagnitude)
    grouped = quantize(vit(), "ptq4vit", images(8), bits="W4A4g8", options=FAST)
    assert grouped.attachment.quantizer("blocks.0.fc1.weight").params["scale"].shape == (32, 2)


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = quantize(vit(), "ptq4vit", images(8), bits="W4A4", options=FAST, work_dir=tmp_path)
    sorted(tmp_path.glob("sweep0-*.safetensors"))[-1].unlink()
    sorted(tmp_path.glob("sweep0-*.safetensors"))[1].unlink()
    again = quantize(vit(), "ptq4vit", images(8), bits="W4A4", options=FAST, work_dir=tmp_path, resume=True)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(whole.model(images(4)[0]), again.model(images(4)[0]))


def test_expanded_candidates_match_one_by_one() -> None:
    """A leading candidate axis gives what each candidate gives alone, for every grid that is searched."""
    search = LayerSearch(steps=5)
    for fmt, x, granularity in (
        (grid(4), noise(3, 2, 4, 4), PerHead(1)),
        (TwinMagnitude(4), noise(3, 2, 4, 4).softmax(-1), PerTensor()),
        (TwinSign(4), F.gelu(noise(3, 5, 8)), PerTensor()),
        (TwinSign(4, tie="positive"), F.gelu(noise(3, 5, 8)), PerTensor()),
        (TwinSign(4, tie="none"), F.gelu(noise(3, 5, 8)), PerHead(-1, heads=2)),
    ):
        tried = search.tried(fmt, search.fit(x, fmt, granularity))
        many = fmt.nearest(x, expand_params(fmt, granularity, tried, x.shape))[0]
        for number, one in enumerate(many):
            params = {name: value[number] for name, value in tried.items()}
            assert torch.equal(one, on_grid(x, fmt, granularity, params))


def test_a_saved_model_loads_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from fewbits.hub import checkpoint
    from test_checkpoint import _SWIN, _images, _timm

    loaded = _timm("swin_tiny_patch4_window7_224", **_SWIN)
    result = quantize(loaded.model, "ptq4vit", _images(), bits="W4A4", options=FAST)
    checkpoint.save(tmp_path / "saved", result, loaded, {})
    again = checkpoint.load(tmp_path / "saved").model
    with torch.no_grad():
        assert torch.equal(again(_images()[0]), loaded.model(_images()[0]))
    with result.attachment.disabled(), torch.no_grad():
        assert not torch.equal(again(_images()[0]), loaded.model(_images()[0]))
