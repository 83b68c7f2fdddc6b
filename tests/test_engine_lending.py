"""Large weights outside the units are on the device only while they are read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbits.engine.lending import Lending, read_by_their_module_alone
from fewbits.graph.record import record


class Small(nn.Module):
    def __init__(self, *, looked_at: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.looked_at = looked_at

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.body(self.words(ids))
        if self.looked_at:
            x = x + self.words.weight.mean()
        made: torch.Tensor = self.head(x)
        return made


NAMES = ["words.weight", "head.weight"]


def test_a_parameter_that_only_its_module_reads_may_be_lent() -> None:
    ids = torch.arange(4)[None]
    assert read_by_their_module_alone(record(Small(), ids), NAMES) == ["head.weight", "words.weight"]
    assert read_by_their_module_alone(record(Small(looked_at=True), ids), NAMES) == ["head.weight"]


def test_a_lent_parameter_is_the_model_s_during_the_forward_alone() -> None:
    model, seen = Small(), list[str]()
    model.head.weight = model.words.weight  # tied
    value = model.words.weight.detach().clone()
    lending = Lending(model, torch.device("meta"))
    lending.take(NAMES, value)
    assert model.head.weight is model.words.weight and lending.bytes == value.nbytes
    model.words.register_forward_hook(lambda module, args, out: seen.append(out.device.type), prepend=True)
    model.words(torch.zeros(1, dtype=torch.int64, device="meta"))
    with pytest.raises(RuntimeError):
        model.head(torch.zeros(3, device="meta"))  # 3 columns where 8 belong
    assert seen == ["meta"]
    assert model.head.weight is model.words.weight and torch.equal(model.words.weight, value)
    lent = lending._lent[model.words.weight]
    model.words(torch.zeros(1, dtype=torch.int64, device="meta"))
    assert lending._lent[model.words.weight] is lent  # one journey for both
    lending.ask_back()
    assert not lending._lent
    lending.end()
    assert model.words(torch.zeros(1, dtype=torch.int64)).device.type == "cpu"
