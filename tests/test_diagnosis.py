"""The diagnosis: its measures, its switchboard, and that it finds what was planted."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbits
from engine_models import encoder, images, skipnet, tokens
from fewbits import FewbitsError
from fewbits.diagnosis.advice import pattern
from fewbits.diagnosis.bench import FLOAT, QUANTIZED, Bench, Subject, Trial
from fewbits.diagnosis.candidates import candidates
from fewbits.diagnosis.histogram import histogram
from fewbits.diagnosis.measures import Gain, Noise, OutputError, excerpt, expected, gain
from fewbits.diagnosis.study import command, study
from fewbits.diagnosis.switchboard import Switchboard
from fewbits.diagnosis.workflow import diagnose_reference
from fewbits.engine import QuantizeResult
from fewbits.formats import PerChannel, PerTensor, affine
from fewbits.graph.types import Site
from fewbits.hub.data import Batch
from fewbits.hub.output import dumps
from fewbits.quantizer import Quantizer
from fewbits.ranges import MinMax
from fewbits.recipe import QSpec
from fewbits.tasks.image_classification import ImageClassification


# -- measures ----------------------------------------------------------------------------------------------------------
def test_noise_in_decibels() -> None:
    noise = Noise()
    assert noise.decibels() is None
    noise.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]))
    assert noise.decibels() == math.inf
    noise.update(torch.tensor([10.0]), torch.tensor([9.0]))  # over both tensors: signal 125, noise 1
    assert noise.decibels() == pytest.approx(10 * math.log10(125))
    silent = Noise()
    silent.update(torch.zeros(2), torch.ones(2))
    assert silent.decibels() == -math.inf


def test_excerpts_of_like_tensors_can_be_paired() -> None:
    x = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(excerpt(x + 1, 1000), excerpt(x, 1000) + 1)
    assert excerpt(x, 1000).shape == (1000,) and torch.equal(excerpt(x[:2], 1000), x[:2].flatten())
    columns = torch.arange(500).expand(300, 500)
    assert len(excerpt(columns, 2000).unique()) > 450  # no stride that meets few channels only


def test_output_errors() -> None:
    exact, other = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    error = OutputError("kl")
    error.update(OutputError.reference("kl", exact), other)
    p, q = exact.softmax(-1), other.softmax(-1)
    want = (p * (p / q).log()).sum(-1).mean(-1)
    torch.testing.assert_close(error.samples().float(), want, rtol=1e-4, atol=1e-6)
    square = OutputError("mse")
    square.update(exact, other)
    whole = float(square.samples().mean())
    assert whole == pytest.approx(float((exact - other).square().sum() / exact.square().sum()), rel=1e-5)
    bad = OutputError("kl")
    bad.update(OutputError.reference("kl", exact), torch.full_like(other, math.nan))
    assert bool(bad.samples().isinf().all())
    with pytest.raises(FewbitsError, match="cannot be compared"):
        bad.update(exact, other[:, :2])


def test_expected_gain_trusts_the_steadier_of_the_two() -> None:
    noisy, steady = Gain(0.7, 0.5), Gain(0.3, 0.01)
    alone = Gain(0.05, 0.001)
    assert expected(noisy, alone, 1.0, 1.0).mean == pytest.approx(0.05, abs=0.03)  # a lucky flip does not decide
    assert expected(steady, alone, 1.0, 1.0).mean == pytest.approx(0.3, abs=0.05)
    assert (
        expected(noisy, alone, 4.0, 1.0).mean > 3 * expected(noisy, alone, 1.0, 1.0).mean
    )  # on the scale of the whole
    assert expected(Gain(math.inf, 0.0), alone, 1.0, math.inf).mean == math.inf
    paired = gain(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.5, 2.5]))
    assert paired == Gain(0.5, 0.0) and gain(torch.tensor([math.inf]), torch.tensor([math.inf])).mean == 0


def test_histograms_share_one_axis() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 20.0, 30.0]])
    rows = Quantizer(QSpec(affine(2), PerChannel(0), MinMax()))
    rows.calibrate(x)
    found = histogram(x, rows(x), rows)
    assert found["unit"] == "step" and found["levels"] == pytest.approx([0, 1, 2, 3], abs=0.02)
    assert sum(found["counts"]) == 8 and found["clipped"] == 0
    whole = Quantizer(QSpec(affine(2), PerTensor(), MinMax()))
    whole.calibrate(x[:1])
    clipped = histogram(x, whole(x), whole)
    assert clipped["unit"] == "value" and max(clipped["levels"]) == pytest.approx(3, abs=0.2)
    assert clipped["clipped"] == pytest.approx(3 / 8)


def test_patterns_of_names() -> None:
    assert pattern("blocks.10.attn.matmul_1.lhs") == "blocks.*.attn.matmul_1.lhs"
    assert pattern("layer1.0.conv2.weight") == "layer1.*.conv2.weight"


def test_candidates_fit_their_site() -> None:
    def at(role: str, tags: tuple[str, ...] = (), op: str = "linear", **spec: Any) -> list[str]:
        site = Site("x." + role, ("x", op, 0), op, role, role, 0, 0, (8, 256), frozenset(tags))
        return [c.text for c in candidates(site, QSpec(**{"format": affine(4), "granularity": PerTensor(),
                                                          "range": MinMax(), **spec}))]  # fmt: skip

    assert at("weight") == ["mse", "channel", "group64", "8", "float"]
    assert at("weight", granularity=PerChannel(0), format=affine(8)) == ["mse", "group64", "float"]
    assert at("input") == ["mse", "percentile99.9", "token", "8", "float"]
    assert "token" not in at("input", op="conv2d")
    assert at("lhs", ("post_softmax",))[:2] == ["logsqrt2", "log2"]
    assert at("input", dynamic=True) == ["8", "float"]


# -- running -----------------------------------------------------------------------------------------------------------
def subject_of(
    model: nn.Module, data: list[Tensor], recipe: str = "rtn", bits: str = "W4A4", **options: Any
) -> Subject:
    with torch.no_grad():
        outputs = [model(batch).detach() for batch in data]
    result: QuantizeResult = fewbits.quantize(model, recipe, data, bits=bits, options=options, keep_float=True)
    assert result.float_weights is not None
    floats = dict(result.float_weights)
    for site, _ in result.attachment.items():
        if site.role == "weight" and site.name not in floats:
            floats[site.name] = model.get_parameter(site.param or "").detach().clone()
    batches = [Batch(batch, None) for batch in data]
    report = {"model": "m", "recipe": recipe, "bits": bits, "options": options, "seed": 0}
    return Subject(
        result.model, result.attachment, result.graph, floats, batches, outputs, "kl", None, report,
        {"data": "made", "samples": sum(len(b) for b in data)}, torch.device("cpu"),
    )  # fmt: skip


class Tied(nn.Module):
    """The head shares the embedding's parameter: its weight is quantized in the forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        self.inner = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.inner:
            x = x + block(x)
        return self.head(x)


def tied() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tied().eval()


@pytest.mark.parametrize(
    ("make", "data", "options"),
    [(encoder, tokens(8), {}), (skipnet, images(8), {}), (tied, tokens(8), {"quantize_head": True})],
)
def test_the_switchboard_reaches_both_ends_and_back(
    make: Callable[[], nn.Module], data: list[Tensor], options: dict[str, Any]
) -> None:
    subject = subject_of(make(), data, **options)
    with torch.no_grad():
        quantized = [subject.model(batch) for batch in data]
    board = Switchboard(subject.model, subject.attachment, subject.floats, subject.device)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    with torch.no_grad():
        board.use(())
        for batch, want in zip(data, subject.outputs, strict=True):
            assert torch.equal(subject.model(batch), want)  # all off: the float model, bit for bit
        some = set(list(board.sites)[::2])
        other = dict.fromkeys(list(board.sites)[:3])
        board.use(some, other)
        board.use(board.sites)
        for batch, want in zip(data, quantized, strict=True):
            assert torch.equal(subject.model(batch), want)
    after = subject.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("recipe", "bits"), [("rtn", "W4A4"), ("squeezellm", "W3A16"), ("owq", "W4A16")])
@pytest.mark.parametrize("held", [True, False])
def test_everything_that_is_compared_lies_on_one_device(recipe: str, bits: str, held: bool) -> None:
    """Codes, grids and float weights come from different places; here none of them starts on the device."""
    subject = subject_of(encoder(), tokens(8), recipe=recipe, bits=bits)
    assert subject.attachment.codes
    if not held:  # as where codes are safe on disk: the grid rounds the float weight again
        subject.attachment.codes.clear()
    device = torch.device("meta")
    board = Switchboard(subject.model, subject.attachment, subject.floats, device)
    for site in board.sites.values():
        assert all(value.device == device for value in board.quantizers[site.name].params.values())
        if site.role == "weight":
            exact, quantized = board.weight(site), board.quantized_weight(site)
            assert exact.device == quantized.device == device and exact.shape == quantized.shape


@pytest.mark.parametrize(("make", "data"), [(encoder, tokens(8)), (skipnet, images(8))])
def test_runs_that_take_over_earlier_units_are_exact(make: Callable[[], nn.Module], data: list[Tensor]) -> None:
    """Every trial starts from cached outputs; each must equal a run of the whole network."""
    subject = subject_of(make(), data)
    bench = Bench(subject, lambda: None)
    names = frozenset(bench.sites)
    trials = [Trial(FLOAT, {name}, differs={name}) for name in names]
    trials += [Trial(QUANTIZED, names - {name}, differs={name}) for name in names]
    skipped = sum(bool(bench._finished(trial)) for trial in trials)
    bench.run(trials)
    assert skipped > len(trials) / 4
    for trial in trials:
        bench.board.use(trial.quantized)
        error = OutputError("kl")
        with torch.no_grad():
            for batch, exact in zip(data, subject.outputs, strict=True):
                error.update(OutputError.reference("kl", exact), subject.model(batch))
        assert torch.equal(trial.errors, error.samples()), trial.differs
    bench.close()


def culprit(kind: str) -> tuple[nn.Module, list[Tensor]]:
    """An encoder with one site that 4 bits ruin."""
    model = encoder(depth=3)
    with torch.no_grad():
        if kind == "weight":  # one large column that its input cancels: every other weight of the row falls on zero
            model.blocks[1].up.weight[:, 3] = 40.0
            model.blocks[1].norm2.weight[3] = 0.0
            model.blocks[1].norm2.bias[3] = 0.0
        else:  # one large channel of the input, which the weight does not read
            model.blocks[1].norm2.bias[3] = 60.0
            model.blocks[1].up.weight[:, 3] = 0.0
    return model, tokens(32, batch=8)


@pytest.mark.parametrize("kind", ["weight", "input"])
def test_it_finds_the_culprit_and_the_advice_helps(kind: str) -> None:
    """What was planted ranks first; following the first suggestion really does what the trial said."""
    model, data = culprit(kind)
    subject = subject_of(model, data)
    found = study(subject, top=3)
    worst = f"blocks.1.up.{kind}"
    assert found["ranking"][0] == worst
    site = next(s for s in found["sites"] if s["site"] == worst)
    assert site["rank"] == 1 and site["gain"] > 0.3 * found["output"]["quantized"]
    others = [s for s in found["sites"] if s["role"] == site["role"] and s["site"] != worst]
    assert site["layer_db"] < min(s["layer_db"] for s in others)
    assert site["alone"] > max(s["alone"] for s in found["sites"] if s["site"] != worst)
    first = found["suggestions"][0]
    assert worst in first["sites"] and first["option"].startswith(f"sites={worst}:")
    assert first["error"] < 0.7 * found["output"]["quantized"]
    assert [s["gain"] - s["gain_spread"] for s in found["suggestions"]] == sorted(
        (s["gain"] - s["gain_spread"] for s in found["suggestions"]), reverse=True
    )
    # the recipe, told so, arrives where the trial was
    again, _ = culprit(kind)
    fewbits.quantize(again, "rtn", data, bits="W4A4", options={"sites": first["option"].removeprefix("sites=")})
    error = OutputError("kl")
    with torch.no_grad():
        for batch, exact in zip(data, subject.outputs, strict=True):
            error.update(OutputError.reference("kl", exact), again(batch))
    assert float(error.samples().mean()) == pytest.approx(first["error"], rel=0.05)


def test_a_diagnosis_is_plain_repeatable_data() -> None:
    first, second = (study(subject_of(*culprit("weight")), top=2) for _ in range(2))
    for found in (first, second):
        found.pop("seconds")
    assert dumps(first) == dumps(second)
    assert first["output"]["float"] == 0 and first["metric"] is None and first["notes"] == []
    assert {s["site"] for s in first["sites"]} == set(first["ranking"])
    assert first["together"] == [] or first["together"][0]["count"] == 2


@pytest.mark.parametrize("recipe", ["smoothquant", "repq-vit", "gptq"])
def test_transformed_models_are_measured_against_their_own_float_weights(recipe: str) -> None:
    """With every site off, a transformed model is the original again, up to rounding of float arithmetic."""
    subject = subject_of(encoder(), tokens(16), recipe, "W4A8")
    bench = Bench(subject, lambda: None)
    nothing, everything = Trial(FLOAT, ()), Trial(QUANTIZED, frozenset(bench.sites))
    bench.run([nothing, everything])
    bench.close()
    assert nothing.error < 1e-6 < everything.error


def test_batch_norm_folding_too() -> None:
    subject = subject_of(skipnet(), images(16), "adaround", "W4A16", iterations=4)
    bench = Bench(subject, lambda: None)
    nothing = Trial(FLOAT, ())
    bench.run([nothing])
    bench.close()
    assert nothing.error < 1e-6


def test_outputs_that_are_not_finite_are_said() -> None:
    model = encoder()
    subject = subject_of(model, tokens(8))
    quantizer = subject.attachment.quantizer("blocks.0.up.input")
    assert quantizer is not None
    quantizer.params["scale"].fill_(math.nan)
    found = study(subject, top=1)
    assert found["output"]["quantized"] == math.inf and "not finite" in found["notes"][0]
    assert found["ranking"][0] == "blocks.0.up.input" and found["suggestions"][0]["sites"] == ["blocks.0.up.input"]
    assert '"quantized": null' in dumps(found, indent=1)


# -- references --------------------------------------------------------------------------------------------------------
def test_the_command_repeats_the_run_with_the_change() -> None:
    report = {
        "model": "zoo/my model", "recipe": "gptq", "bits": "W3A16", "seed": 3, "dtype": "bfloat16", "out": "out/one/",
        "options": {"act_order": "true", "sites": "a.*:8"}, "calibration": {"data": "c.parquet"},
        "evaluation": {"after": {"data": "t.parquet"}}, "settings": {"samples": 64, "seqlen": None, "batch_size": 4},
    }  # fmt: skip
    words = shlex.split(command(report, "b.0.weight:float"))
    assert words[:3] == ["fewbits", "quantize", "zoo/my model"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given["--recipe"] == "gptq" and given["--samples"] == "64" and given["--seed"] == "3"
    assert given["--calib"] == "c.parquet" and given["--eval"] == "t.parquet" and given["--dtype"] == "bfloat16"
    assert given["--out"] == "out/one-2" and "--seqlen" not in given
    assert "act_order=true" in words and "sites=a.*:8,b.0.weight:float" in words


@pytest.mark.parametrize(("recipe", "bits"), [("rtn", "W3A4"), ("smoothquant", "W4A8"), ("repq-vit", "W4A4")])
def test_a_checkpoint_and_its_recipe_in_memory_agree(tmp_path: Path, recipe: str, bits: str) -> None:
    """Two ways to the same diagnosis: beside the float original, and quantized on the spot."""
    fewbits.quantize_reference(
        "demo:digits", recipe, bits, out=tmp_path / "made", calib="demo:digits", samples=32, device="cpu"
    )
    stored = diagnose_reference(tmp_path / "made", samples=8, top=1)
    direct = diagnose_reference(
        "demo:digits", recipe=recipe, bits=bits, calib="demo:digits", options={"samples": 32}, samples=8, top=1
    )
    assert stored["output"]["float"] < 1e-6 and stored["output"]["quantized"] > 1e-4
    for key in ("output", "metric", "ranking", "sites"):
        assert dumps(stored[key]) == dumps(direct[key])
    assert stored["metric"]["name"] == ImageClassification.metric and stored["metric"]["samples"] == 8


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="say how to quantize it"):
        diagnose_reference("demo:digits")
    with pytest.raises(FewbitsError, match="samples 0"):
        diagnose_reference("demo:digits", recipe="rtn", bits="W4A16", samples=0)
    with pytest.raises(FewbitsError, match="--calib"):
        diagnose_reference("demo:digits", recipe="rtn", bits="W4A4")
    with pytest.raises(FewbitsError, match="what to diagnose it on"):
        diagnose_reference("demo:digits", recipe="rtn", bits="W4A16")
    with pytest.raises(FewbitsError, match="unknown recipe"):
        diagnose_reference("demo:digits", recipe="rtm", bits="W4A16")
    fewbits.quantize_reference("demo:digits", "rtn", "W4A16", out=tmp_path / "made")
    with pytest.raises(FewbitsError, match="quantized already"):
        diagnose_reference(tmp_path / "made", recipe="rtn", bits="W4A16")
    with pytest.raises(FewbitsError, match="--data"):
        diagnose_reference(tmp_path / "made")
    with pytest.raises(FewbitsError, match=r"does not exist in|belongs to"):
        diagnose_reference(tmp_path / "made", original="demo:text", data="demo:text", samples=2)


def test_probabilities_are_compared_along_the_last_axis() -> None:
    exact = torch.randn(2, 9)
    error = OutputError("kl")
    error.update(OutputError.reference("kl", exact), exact + 3)  # a shift of the logits changes no probability
    assert float(error.samples().max()) < 1e-6


# -- does it help? -----------------------------------------------------------------------------------------------------
def follow(folder: Path, model: str, bits: str, data: tuple[str, str], samples: int, measured: int) -> list[float]:
    """The metric in floating point, quantized, and with the first suggestion followed; on data not diagnosed on."""
    settings: dict[str, Any] = {"calib": data[0], "eval_data": data[1], "eval_samples": measured}
    plain = fewbits.quantize_reference(model, "rtn", bits, out=folder / "plain", **settings)
    found = diagnose_reference(folder / "plain", samples=samples, top=2)
    changes = found["suggestions"][0]["option"].removeprefix("sites=")
    better = fewbits.quantize_reference(
        model, "rtn", bits, out=folder / "better", options={"sites": changes}, **settings
    )
    return [plain["metric_before"], plain["metric_after"], better["metric_after"]]


def test_following_the_first_suggestion_helps_on_other_text(tmp_path: Path) -> None:
    data = ("demo:text:calibration", "demo:text:evaluation")
    exact, quantized, followed = follow(tmp_path, "demo:text", "W3A16", data, samples=3, measured=32)
    assert exact < followed < quantized - 0.1 * (quantized - exact)  # perplexity


@pytest.mark.slow
def test_following_the_first_suggestion_helps_on_other_images(tmp_path: Path) -> None:
    zoo, data = os.environ.get("FEWBITS_ZOO"), os.environ.get("FEWBITS_DATA")
    if not zoo or not data:
        pytest.skip("FEWBITS_ZOO or FEWBITS_DATA is unset: no trained model to follow the advice on")
    files = (f"{data}/cifar10/calibration.parquet", f"{data}/cifar10/test.parquet")
    exact, quantized, followed = follow(tmp_path, f"{zoo}/mobilenetv2_050", "W4A8", files, samples=16, measured=300)
    assert quantized + 0.3 * (exact - quantized) < followed  # per cent of images
