"""What `fewbits inspect` shows of a graph."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.graph import Graph, record
from fewbits.graph.describe import describe
from fewbits.report.tree import render
from zoo_tiny import build, recorded


def text(graph: Graph, model: nn.Module | None = None) -> str:
    console = Console(width=400, no_color=True, record=True, file=io.StringIO())
    console.print(render(describe(graph, model)))
    return console.export_text()


@pytest.mark.parametrize("name", ["timm-vit", "timm-resnet", "hf-mixtral-eager", "torchvision-fasterrcnn"])
def test_description_is_json_and_complete(name: str) -> None:
    graph = recorded(name)
    data = json.loads(json.dumps(describe(graph)))
    listed = [site["name"] for unit in data["units"] for site in unit["sites"]] + [
        site["name"] for site in data["outside_units"]
    ]
    assert sorted(listed) == sorted(graph.sites)
    assert [unit["name"] for unit in data["units"]] == [unit.name for unit in graph.units]
    assert data["opened"] == graph.opened and data["class"] == graph.model_class
    assert data["relations"] or name == "hf-mixtral-eager"


def test_tree_shows_sites_with_shapes_and_tags() -> None:
    shown = text(recorded("timm-vit"), build("timm-vit")[0])
    line = next(line for line in shown.splitlines() if "attn.matmul_1" in line)
    assert "lhs 1x4x17x17" in line and "post_softmax" in line and "attention_value" in line
    assert "4 units (2 blocks)" in shown and "parameters" in next(
        line for line in shown.splitlines() if "blocks.0" in line
    )
    assert "outside of units" in shown


def test_alike_blocks_are_shown_once() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.a(x).relu())

    graph = record(nn.Sequential(*[Block() for _ in range(12)], nn.Linear(4, 2)), torch.randn(2, 4))
    shown = text(graph)
    assert "... 11 more like it: 1 .. 11" in shown
    assert shown.count("Block, block") == 1 and len(shown.splitlines()) < 20


def test_reports_are_shown() -> None:
    assert "rpn: returns tensors whose sizes depend on the data" in text(recorded("torchvision-fasterrcnn"))
    assert "weight shared with" in text(recorded("hf-t5"))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.weight = nn.GRU(4, 4), nn.Parameter(torch.randn(4, 4))
            self.head = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0]) @ self.weight

    shown = text(record(Recurrent(), torch.randn(3, 1, 4)))
    assert "rnn.gru" in shown and "matmul (weight)" in shown


def test_missing_relations_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = recorded("timm-vit")
    kept = graph.__dict__.pop("relations", None)

    def fail(self: object) -> None:
        raise FewbitsError("no relations here")

    monkeypatch.setattr(type(graph), "relations", property(fail))
    assert "no relations here" in text(graph)
    assert describe(graph)["relations"] == []
    monkeypatch.undo()
    if kept is not None:
        graph.__dict__["relations"] = kept
