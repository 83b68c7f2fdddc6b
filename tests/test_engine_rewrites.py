"""What steps may do besides changing weights: other grids, parts, factors, replaced ops, data; all of it saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from engine_models import encoder, images, tokens
from fewbits.attach import Attachment
from fewbits.engine import quantize, snapshot
from fewbits.engine.context import ModelContext, UnitContext
from fewbits.engine.losses import task_loss
from fewbits.errors import FewbitsError
from fewbits.outliers import Columns, Sparse
from fewbits.papers import build_recipe
from fewbits.papers.common import at_bits
from fewbits.quantizer import Quantizer
from fewbits.recipe import Recipe, Step


def _tokens(count: int) -> Tensor:
    return torch.cat(tokens(count))


class _Clipped(nn.Module):
    """A convolution, an in-place ReLU6 and another convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x * 40)))


def _with(name: str, bits: str, *steps: Step) -> Recipe:
    recipe = build_recipe(name, bits)
    return dataclasses.replace(recipe, steps=(*steps, *recipe.steps))


def _reloaded(result: Any, model: nn.Module, path: Path) -> nn.Module:
    """A fresh model with everything the snapshot of another holds."""
    sites = [site for site, _ in result.attachment.items()]
    names = list(result.model.state_dict(keep_vars=True))
    snapshot.write(path, *snapshot.take(result.model, result.attachment, names, sites))
    attachment = Attachment(model, result.attachment.sites, result.attachment.known)
    snapshot.put(model, attachment, *snapshot.read(path))
    return model.eval()


@dataclass(frozen=True)
class _Unclip(Step):
    part: ClassVar[str] = "transform"
    scope: ClassVar[str] = "model"

    def apply(self, unit: ModelContext) -> None:  # type: ignore[override]
        for call in unit.graph.calls:
            if call.op in ("relu6", "hardtanh"):
                unit.replace_op(call, "relu")


def test_a_replaced_op_runs_in_the_model_its_float_self_and_its_copy(tmp_path: Path) -> None:
    x, model = torch.cat(images(4)), _Clipped().eval()
    wanted = model.second(model.first(x * 40).relu())
    assert not torch.allclose(model(x), wanted)
    result = quantize(model, _with("rtn", "W8A16", _Unclip()), [x])
    assert any(call.op == "relu" for call in result.graph.calls)
    with result.attachment.disabled():
        assert torch.allclose(model(x), wanted, rtol=0.05, atol=0.5)
    assert torch.equal(_reloaded(result, _Clipped(), tmp_path / "m.safetensors")(x), model(x))


@dataclass(frozen=True)
class _Factor(Step):
    part: ClassVar[str] = "transform"
    stage: ClassVar[int] = 10

    def apply(self, unit: UnitContext) -> None:
        for site in unit.weights():
            if ".down." in site.name:
                s = torch.linspace(0.5, 2, site.shape[1])
                unit.set_weight(site, unit.weight(site) * s)
                unit.multiply(unit.input_of(site), 1 / s)


def test_a_factor_undoes_a_scaled_weight_everywhere_and_in_the_float_stream_of_later_sweeps(tmp_path: Path) -> None:
    x = _tokens(4)
    float_out = encoder()(x)
    model = encoder()
    recipe = _with("brecq", "W8A8", _Factor())
    short = tuple(dataclasses.replace(s, iterations=2) if hasattr(s, "iterations") else s for s in recipe.steps)
    result = quantize(model, dataclasses.replace(recipe, steps=short), [x])
    assert len(result.attachment.factors) == 3
    assert float((model(x) - float_out).norm() / float_out.norm()) < 0.05
    assert torch.equal(_reloaded(result, encoder(), tmp_path / "m.safetensors")(x), model(x))
    with result.attachment.hiding(result.attachment.rewrites()):
        assert float((model(x) - float_out).norm() / float_out.norm()) > 0.1


@dataclass(frozen=True)
class _Parts(Step):
    part: ClassVar[str] = "rounding"
    streams: ClassVar[frozenset[str]] = frozenset()

    def apply(self, unit: UnitContext) -> None:
        for site in unit.weights():
            weight, spec = unit.weight(site), unit.spec(site)
            assert spec is not None
            quantizer = Quantizer(spec, site.name)
            quantizer.calibrate(weight)
            codes = quantizer.encode(weight)
            columns = Columns(torch.tensor([3, 1]), weight[:, [3, 1]])
            far = weight - columns.apply(quantizer.decode(codes))
            kept = far.abs() > far.abs().quantile(0.9)
            unit.quantize_weight(site, codes, quantizer.params, parts=[columns, Sparse.from_dense(far, kept)])


def test_a_weight_is_the_sum_of_its_parts_and_stays_so_when_saved(tmp_path: Path) -> None:
    x, before, model = _tokens(4), encoder(), encoder()
    recipe = dataclasses.replace(build_recipe("rtn", "W2A16"), steps=(_Parts(),))
    result = quantize(model, recipe, [x])
    old, new = before.blocks[0].up.weight, model.blocks[0].up.weight
    assert torch.equal(old[:, [1, 3]], new[:, [1, 3]]) and not torch.equal(old, new)
    error = (old - new).abs()
    assert int((error < 1e-6).sum()) >= 0.1 * error.numel(), "the sparse entries are exact"
    assert torch.equal(_reloaded(result, encoder(), tmp_path / "m.safetensors")(x), model(x))
    held, described = snapshot.read(tmp_path / "m.safetensors")
    del held["part/blocks.0.up.weight/1/values"]
    with pytest.raises(FewbitsError, match="incomplete"):
        fresh = encoder()
        snapshot.put(fresh, Attachment(fresh, result.attachment.sites, result.attachment.known), held, described)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FewbitsError, match="do not fit"):
        Columns(torch.tensor([4]), torch.zeros(2, 1)).check((2, 4), "here")
    with pytest.raises(FewbitsError, match="twice"):
        Columns(torch.tensor([1, 1]), torch.zeros(2, 2)).check((2, 4), "here")
    sparse = Sparse.from_dense(torch.ones(2, 3), torch.eye(2, 3) > 0)
    sparse.check((2, 3), "here")
    assert torch.equal(sparse.apply(torch.zeros(2, 3)), torch.eye(2, 3))
    with pytest.raises(FewbitsError, match="does not fit"):
        sparse.check((3, 3), "here")


@dataclass(frozen=True)
class _Eight(Step):
    part: ClassVar[str] = "allocation"
    scope: ClassVar[str] = "model"

    def apply(self, unit: ModelContext) -> None:  # type: ignore[override]
        first, second = unit.weights()[:2]
        spec = unit.spec(first)
        assert spec is not None
        unit.override(first, at_bits(spec, 8))
        unit.override(second, None)


def test_overridden_sites_take_the_other_grid_and_it_is_told() -> None:
    model = encoder()
    result = quantize(model, _with("rtn", "W2A16", _Eight()), [_tokens(2)])
    (first, eight), (second, none) = result.overrides.items()
    assert eight is not None and eight["format"]["bits"] == 8 and none is None
    assert result.attachment.quantizer(first).spec.format.bits == 8
    assert result.attachment.quantizer(second) is None


@dataclass(frozen=True)
class _Data(Step):
    part: ClassVar[str] = "datagen"
    scope: ClassVar[str] = "model"
    stage: ClassVar[int] = -10
    makes_data: ClassVar[bool] = True
    calls: ClassVar[list[int]] = []

    def apply(self, unit: ModelContext) -> None:  # type: ignore[override]
        def make() -> dict[str, Tensor]:
            self.calls.append(1)
            return {"tokens": _tokens(4)}

        unit.set_batches([unit.remembered("data", make)["tokens"]])


def test_made_data_feed_the_sweeps_and_are_made_once(tmp_path: Path) -> None:
    recipe = _with("rtn", "W8A8", _Data())
    assert not recipe.needs_data and build_recipe("rtn", "W8A8").needs_data
    outputs = []
    for resume in (False, True):
        model = encoder()
        quantize(model, recipe, [], example=_tokens(1), work_dir=tmp_path / "w", resume=resume)
        outputs.append(model(_tokens(2)))
    assert torch.equal(*outputs) and len(_Data.calls) == 1
    given = encoder()
    quantize(given, build_recipe("rtn", "W8A8"), [_tokens(4)])
    assert torch.equal(outputs[0], given(_tokens(2)))


def test_task_losses_are_what_they_say() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    by_hand = torch.stack([-logits[i, :-1].log_softmax(-1).gather(1, ids[i, 1:, None]).mean() for i in range(3)]).sum()
    assert torch.allclose(task_loss("next_token", logits, ids), by_hand)
    flat = logits[:, 0].requires_grad_()
    task_loss("pseudo", flat, None).backward()
    assert float(flat.grad.abs().max()) > 0
    draws = [task_loss("sampled", flat, None, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with pytest.raises(FewbitsError, match="language model"):
        task_loss("next_token", flat, torch.zeros(3, 3, 4, 4))
    with pytest.raises(FewbitsError, match="unknown task loss"):
        task_loss("kl", flat, None)  # type: ignore[arg-type]
