"""A quantizer at a site: storage, learning, saving, compiling."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.formats import Codebook, Format, Granularity, PerChannel, PerTensor, PerToken, affine, quantize, symmetric
from fewbits.quantizer import Quantizer
from fewbits.ranges import AbsMax, MinMax, QuantileSearch, ShrinkSearch
from fewbits.recipe import QSpec
from formats_cases import DEVICES, FORMATS, GRANULARITIES, make

every_device = pytest.mark.parametrize("device", DEVICES)
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
COMPILED = ["affine-4", "symmetric-8", "power-of-two", "e4m3", "log-sqrt2", "codebook", "codebook-points", "ternary"]


AFFINE, ROWS = affine(4), PerChannel(0)


def quantizer(fmt: Format = AFFINE, gran: Granularity = ROWS, dynamic: bool = False) -> Quantizer:
    return Quantizer(QSpec(fmt, gran, MinMax(), dynamic), "layer.input")


@every_device
@every_format
@pytest.mark.parametrize("gran", GRANULARITIES.values(), ids=GRANULARITIES.keys())
def test_forward_is_the_format(fmt: Format, gran: Granularity, device: str) -> None:
    x = make("normal", (4, 8), 0).to(device)
    made = quantizer(fmt, gran)
    made.calibrate(x)
    expected = quantize(x, fmt, gran, MinMax().fit(x, fmt, gran))
    assert torch.equal(made(x), expected)
    assert torch.equal(made.decode(made.encode(x)), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert made(x.to(dtype)).dtype == dtype
        assert torch.equal(made(x.to(dtype)), made(x.to(dtype).float()).to(dtype))
    made.enabled = False
    assert made(x) is x


@every_device
def test_dynamic_fits_every_call_and_stores_nothing(device: str) -> None:
    made = Quantizer(QSpec(symmetric(8), PerToken(), AbsMax(), dynamic=True), "layer.input")
    for seed in range(3):
        x = make("normal", (2 + seed, 5, 8), seed).to(device)
        assert torch.equal(made(x), quantize(x, symmetric(8), PerToken(), AbsMax().fit(x, symmetric(8), PerToken())))
    assert not made.ready and made.state()[1] == {}
    # a bad token spoils only itself, an empty batch passes
    x[0, 0, 0] = torch.nan
    assert bool(torch.isfinite(made(x)[1:]).all())
    assert made(x[:0]).shape == (0, 5, 8)
    with pytest.raises(FewbitsError, match="dynamic"):
        made.learn()


def test_not_ready_is_an_error_that_names_the_site() -> None:
    for use in (
        lambda q: q(torch.ones(2, 2)),
        lambda q: q.encode(torch.ones(2, 2)),
        lambda q: q.params,
        lambda q: q.learn(),
    ):
        with pytest.raises(FewbitsError, match=r"layer\.input.*calibrate"):
            use(quantizer())


def test_parameters_keep_their_storage() -> None:
    made = quantizer()
    made.calibrate(make("normal", (4, 8), 0))
    before = {name: value.data_ptr() for name, value in made.params.items()}
    second = make("normal", (4, 8), 1)
    made.calibrate(second)
    assert {name: value.data_ptr() for name, value in made.params.items()} == before
    assert torch.equal(
        made(second), quantize(second, affine(4), PerChannel(0), MinMax().fit(second, affine(4), PerChannel(0)))
    )
    learned = made.learn(("scale", "zero_point"))
    assert [p.data_ptr() for p in learned] == list(before.values())
    assert set(made.parameters()) == set(learned)
    made.calibrate(make("normal", (4, 8), 2))
    made.freeze_learned()
    assert list(made.parameters()) == []
    assert {name: value.data_ptr() for name, value in made.params.items()} == before
    # the given tensors are copied, not kept
    given = {name: value.clone() for name, value in made.params.items()}
    made.set_params(given)
    given["scale"].zero_()
    assert bool((made.params["scale"] > 0).all())


def test_set_params_refuses_nonsense() -> None:
    made = quantizer()
    good = MinMax().fit(make("normal", (4, 8), 0), affine(4), PerChannel(0))
    made.set_params(good)
    for bad in (
        {"scale": good["scale"]},
        {**good, "more": good["scale"]},
        {**good, "scale": -good["scale"]},
        {**good, "zero_point": good["zero_point"] * torch.nan},
        {name: value[:2] for name, value in good.items()},
    ):
        with pytest.raises(FewbitsError, match=r"layer\.input"):
            made.set_params(bad)
        assert all(torch.equal(made.params[name], value) for name, value in good.items())
    with pytest.raises(FewbitsError, match=r"layer\.input.*does not fit"):
        made(torch.ones(5, 8))
    made.reset()
    made.set_params({name: value[:2] for name, value in good.items()})
    assert made(torch.ones(2, 8)).shape == (2, 8)


@every_device
def test_learning_a_step_reduces_the_error(device: str) -> None:
    x = make("normal", (1, 4000), 0).to(device)
    made = quantizer(symmetric(3), PerTensor())
    made.calibrate(x)
    first = float((made(x) - x).square().mean())
    steps = made.learn()
    optimiser = torch.optim.Adam(steps, lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        (made(x) - x).square().mean().backward()
        optimiser.step()
    made.freeze_learned()
    # three bits on a normal: min-max wastes its levels on the tail
    assert float((made(x) - x).square().mean()) < 0.6 * first
    made.learn()
    with torch.no_grad():
        made.scale.fill_(-1)  # type: ignore[operator]
    with pytest.raises(FewbitsError, match="positive"):
        made.freeze_learned()


def test_learn_refuses_what_has_no_gradient() -> None:
    made = quantizer(Codebook(2, (-1.0, 0.0, 1.0)), PerTensor())
    made.calibrate(torch.randn(4))
    with pytest.raises(FewbitsError, match="table"):
        made.learn(("table",))
    assert made.learn()[0] is made.scale


@every_format
def test_state_round_trip(fmt: Format) -> None:
    x = make("normal", (4, 8), 0)
    made = quantizer(fmt)
    made.calibrate(x)
    made.enabled = False
    description, tensors = made.state()
    again = Quantizer.from_state(
        json.loads(json.dumps(description)), {name: value.clone() for name, value in tensors.items()}
    )
    assert again.spec == made.spec and again.name == made.name and again.ready and not again.enabled
    again.enabled = made.enabled = True
    assert torch.equal(again(x), made(x))
    unfitted = Quantizer.from_state(*quantizer(fmt).state())
    assert not unfitted.ready


def test_foreign_states_are_refused() -> None:
    made = quantizer()
    made.calibrate(make("normal", (4, 8), 0))
    description, tensors = made.state()
    scale = tensors["scale"]
    for bad_description, bad_tensors in (
        ({}, tensors),
        ({**description, "spec": {}}, tensors),
        ({**description, "spec": None}, tensors),
        ({**description, "ready": "yes"}, tensors),
        ({**description, "ready": False}, tensors),
        (description, {}),
        (description, {**tensors, "scale": scale[:2]}),
        (description, {**tensors, "scale": scale.half()}),
        (description, {**tensors, "scale": scale * torch.inf}),
        (description, {**tensors, "scale": scale * 0}),
    ):
        with pytest.raises(FewbitsError):
            Quantizer.from_state(bad_description, bad_tensors)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("gran", ["tensor", "channel", "group", "token", "head"])
def test_compiles_as_one_graph(name: str, gran: str) -> None:
    x = make("normal", (6, 10), 0)
    for dynamic in (False, True):
        made = quantizer(FORMATS[name], GRANULARITIES[gran], dynamic)
        if not dynamic:
            made.calibrate(x)
        torch._dynamo.reset()
        compiled = torch.compile(made, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), made(x))
        exported = torch.export.export(made, (x,)).module()
        assert torch.equal(exported(x), made(x))


def test_compiles_with_searching_ranges_and_gradients() -> None:
    x = make("normal", (6, 10), 0)
    for found in (ShrinkSearch(5, 0.1), QuantileSearch(), AbsMax()):
        made = Quantizer(QSpec(affine(4), PerToken(), found, dynamic=True))
        torch._dynamo.reset()
        assert torch.equal(torch.compile(made, backend="eager", fullgraph=True)(x), made(x))
    made = quantizer()
    made.calibrate(x)
    (step,) = made.learn()
    grads = []
    for run in (made, torch.compile(made, backend="eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        made.zero_grad()
        run(leaf).square().sum().backward()
        assert leaf.grad is not None and step.grad is not None
        grads.append((leaf.grad.clone(), step.grad.clone()))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_deepcopy_is_independent() -> None:
    x = make("normal", (4, 8), 0)
    made = quantizer()
    made.calibrate(x)
    made.learn()
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))
    with torch.no_grad():
        twin.scale.mul_(2)  # type: ignore[operator]
    assert not torch.equal(twin(x), made(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_captured_in_a_cuda_graph(name: str, dynamic: bool) -> None:
    x = make("normal", (6, 10), 0).cuda()
    made = quantizer(FORMATS[name], PerToken() if dynamic else PerChannel(0), dynamic)
    if name == "codebook-points" and dynamic:
        pytest.skip("a fixed table is created on the host when it is fitted, so a dynamic one cannot be captured")
    if not dynamic:
        made.calibrate(x)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            made(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(x)
        x.copy_(make("normal", (6, 10), 1))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, made(x))
