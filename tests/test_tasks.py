"""Metrics on outputs with a known answer, the registry, and the zoo's published figures."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.hub.data import IGNORED, Batch, load_data
from fewbits.hub.models import load_model
from fewbits.tasks import Task, evaluate, register_task, task_for, task_named, task_names
from fewbits.tasks import registry as registry_module
from golden import folder


class Given:
    """Batches with a domain, as `load_data` makes them."""

    ref, fingerprint = "given", "0" * 64

    def __init__(self, domain: str, *batches: tuple[Any, Tensor | None]) -> None:
        self.domain, self._batches = domain, [Batch(inputs, targets) for inputs, targets in batches]
        self.samples = sum(len(targets) for _, targets in batches if targets is not None)
        self.description = {"data": "given"}

    def __iter__(self) -> Any:
        return iter(self._batches)


def measure(domain: str, *batches: tuple[Any, Tensor | None], **options: Any) -> dict[str, Any]:
    return evaluate(nn.Identity(), Given(domain, *batches), **options)  # type: ignore[arg-type]


def test_top1_and_top5_by_hand() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    result = measure("image", (scores[:2], torch.tensor([0, 4])), (scores[2:], torch.tensor([5])))
    assert result["metrics"] == {"top1": pytest.approx(100 / 3), "top5": pytest.approx(200 / 3)}
    assert (result["metric"], result["value"], result["samples"]) == ("top1", pytest.approx(100 / 3), 3)
    json.dumps(result)


def test_few_classes_have_no_top5() -> None:
    assert set(measure("image", (torch.eye(3), torch.arange(3)))["metrics"]) == {"top1"}


def test_sequence_accuracy_reads_logits_of_any_output() -> None:
    class Output:
        logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])

    class Model(nn.Module):
        def __init__(self, made: Any) -> None:
            super().__init__()
            self.made = made

        def forward(self, x: Tensor) -> Any:
            return self.made

    data = Given("text-classification", (torch.zeros(2), torch.tensor([1, 1])))
    for made in (Output(), {"logits": Output.logits}, (Output.logits, None), Output.logits):
        assert evaluate(Model(made), data)["value"] == 50.0  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="without logits"):
        evaluate(Model("text"), data)  # type: ignore[arg-type]


def test_uniform_logits_have_the_perplexity_of_the_vocabulary() -> None:
    targets = torch.tensor([[1, 2, IGNORED], [IGNORED, 3, 0]])
    result = measure("text-generation", (torch.zeros(2, 3, 17), targets))
    assert result["value"] == pytest.approx(17, rel=1e-6) and result["tokens"] == 4
    certain = torch.full((1, 2, 5), -1e4)
    certain[0, 0, 3] = certain[0, 1, 1] = 1e4
    assert measure("text-generation", (certain, torch.tensor([[3, 1]])))["value"] == 1.0


def test_perplexity_is_over_tokens_not_batches() -> None:
    torch.manual_seed(0)
    scores, targets = torch.randn(5, 4, 9), torch.randint(9, (5, 4))
    whole = measure("text-generation", (scores, targets))["value"]
    parts = measure("text-generation", (scores[:1], targets[:1]), (scores[1:], targets[1:]))["value"]
    want = torch.nn.functional.cross_entropy(scores.double().flatten(0, 1), targets.flatten()).exp()
    assert whole == pytest.approx(parts, rel=1e-12) and whole == pytest.approx(float(want), rel=1e-6)


def test_noise_prediction() -> None:
    assert measure("diffusion", (torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)))["value"] == 9.0


@pytest.mark.parametrize("domain", ["image", "text-generation"])
def test_nan_is_an_error_not_a_figure(domain: str) -> None:
    shape, targets = ((2, 6), torch.tensor([0, 1])) if domain == "image" else ((1, 2, 6), torch.tensor([[0, 1]]))
    with pytest.raises(FewbitsError, match="NaN"):
        measure(domain, (torch.full(shape, math.nan), targets))


def test_wrong_data_for_the_task() -> None:
    for domain, output, targets, words in (
        ("image", torch.zeros(2, 3), None, "no labels"),
        ("image", torch.zeros(2, 3), torch.tensor([0, 3]), "labels from 0 to 3, the model 3 classes"),
        ("image", torch.zeros(2, 3, 4), torch.tensor([0, 1]), r"\[batch, classes\] is expected"),
        ("text-generation", torch.zeros(2, 3, 4), torch.zeros(2, 2).long(), "is expected"),
        ("diffusion", torch.zeros(2, 3), torch.zeros(2, 4), "no tensor of the targets' shape"),
        ("object-detection", torch.zeros(2, 3), torch.zeros(2), "no task measures"),
    ):
        with pytest.raises(FewbitsError, match=words):
            measure(domain, (output, targets))


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"image_classification", "language_modeling", "sequence_classification"} <= set(task_names())
    assert task_named("language-modeling") is task_named("language_modeling")
    with pytest.raises(FewbitsError, match="did you mean language_modeling"):
        task_named("language_modelling")
    monkeypatch.setattr(registry_module, "_TASKS", dict(registry_module._TASKS))

    class Mine(Task):
        name, domains, metric, higher_is_better = "mine", ("my-domain",), "sum", True

        def update(self, output: Any, targets: Tensor) -> None:
            self.total = float(targets.sum())

        def result(self) -> dict[str, float]:
            return {"sum": self.total}

    register_task(Mine)
    assert task_for(None, Given("my-domain")) is Mine
    assert measure("my-domain", (torch.zeros(1), torch.tensor([4.0])))["value"] == 4.0
    other = type("Other", (Mine,), {"name": "mine"})
    with pytest.raises(FewbitsError, match="already"):
        register_task(other)


def test_evaluating_restores_the_mode_and_reports_progress() -> None:
    model, seen = nn.Linear(3, 3), []
    model.train()
    data = Given("image", (torch.eye(3), torch.arange(3)), (torch.eye(3)[:1], torch.arange(1)))
    evaluate(model, data, progress=lambda done, total: seen.append((done, total)))  # type: ignore[arg-type]
    assert model.training and seen == [(3, 4), (4, 4)]


@pytest.mark.parametrize(("name", "low", "high"), [("digits", 90, 100), ("text", 2, 6)])
def test_demos_are_trained(name: str, low: float, high: float) -> None:
    loaded = load_model(f"demo:{name}")
    data = load_data(
        f"demo:{name}", loaded, purpose="evaluation", samples=None if name == "digits" else 16, batch_size=16
    )
    assert low < evaluate(loaded, data)["value"] < high


# -- the zoo's figures -------------------------------------------------------------------------------------------------
ZOO, DATA = folder("FEWBITS_ZOO"), folder("FEWBITS_DATA")
FILES = {
    "cifar10/test": "cifar10/test.parquet",
    "docs-text/test": "docs-text/test.jsonl",
    "wikitext-2/test": "wikitext-2/test.txt",
    "sst2/dev": "sst2/dev.tsv",
    "sst2/test": "sst2/test.tsv",
}
FIGURES = [
    (file.parent.name, figure["dataset"], figure["value"], figure["n"], figure["metric"])
    for file in (sorted(ZOO.glob("*/metrics.json")) if ZOO else [])
    for held in [json.loads(file.read_text())]
    for figure in (held, *held.get("also", []))
]
needs_zoo = pytest.mark.skipif(ZOO is None or DATA is None, reason="FEWBITS_ZOO or FEWBITS_DATA is not set")


def evaluated(name: str, dataset: str, samples: int | None) -> dict[str, Any]:
    assert ZOO is not None and DATA is not None
    config = ZOO / name / "config.json"
    library = json.loads(config.read_text()).get("library", "") if config.is_file() else ""
    loaded = load_model(ZOO / name, code_module=f"{ZOO / library}:load" if library.endswith(".py") else None)
    file = DATA / FILES[dataset.partition(" (")[0]]
    data = load_data(file, loaded, purpose="evaluation", samples=samples, batch_size=8 if "text" in dataset else 50)
    return evaluate(loaded, data)


def samples_of(count: int, metric: str) -> int:
    return count // 512 if metric.startswith("perplexity") else count


@needs_zoo
@pytest.mark.slow
@pytest.mark.parametrize(("name", "dataset", "value", "count", "metric"), FIGURES)
def test_zoo_figures(name: str, dataset: str, value: float, count: int, metric: str) -> None:
    """On the full sets. Pixels of resized images differ by rounding between resizing libraries: up to eight images in
    ten thousand.
    """
    got = evaluated(name, dataset, samples_of(count, metric))["value"]
    tolerance = {"top1_percent": 0.085, "epsilon_mse": 2e-4}.get(metric, 0.02)
    assert got == pytest.approx(value, abs=tolerance)


@needs_zoo
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "resnet20_cifar", "bert_sst2"])
def test_zoo_figures_on_a_part(name: str) -> None:
    """A thousand samples come within four standard errors of the full figure."""
    _, dataset, value, count, _ = next(figure for figure in FIGURES if figure[0] == name)
    samples = min(1000, count)
    error = 100 * math.sqrt(value / 100 * (1 - value / 100) / samples)
    assert evaluated(name, dataset, samples)["value"] == pytest.approx(value, abs=4 * error)
