"""Targets as data: every profile reads, a recipe is fitted to one or refused by site before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbits
from fewbits import FewbitsError
from fewbits.formats import Log2, PerChannel, PerGroup, PerTensor, affine, gptq_grid, raw_affine, symmetric
from fewbits.graph.types import Site
from fewbits.papers import build_recipe
from fewbits.ranges import MinMax
from fewbits.recipe import QSpec, Scheme
from fewbits.targets import Profile, load_profile, profile_names


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def _batches() -> list[torch.Tensor]:
    return [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


def _site(role: str) -> Site:
    return Site(f"a.{role}", ("a", "linear", 0), "linear", role, role, 0, 0, (4, 8))


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_reads_and_holds_something(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name and profile.about and profile.weights
    for grid in (*profile.weights, *profile.activations):
        assert grid.bits and grid.granularity


def test_where_zero_lies_decides() -> None:
    profile = Profile.from_dict(
        {
            "name": "strict",
            "about": "symmetric per-channel weights, one affine grid per activation",
            "weights": [{"bits": [8], "zero": ["none"], "granularity": ["channel"]}],
            "activations": [{"bits": [8], "zero": ["integer"], "granularity": ["tensor"]}],
        }
    )
    weight, entry = _site("weight"), _site("input")
    assert profile.reason(weight, QSpec(symmetric(8), PerChannel(0), MinMax())) is None
    assert "asymmetric" in (profile.reason(weight, QSpec(affine(8), PerChannel(0), MinMax())) or "")
    assert "4 bits" in (profile.reason(weight, QSpec(symmetric(4), PerChannel(0), MinMax())) or "")
    assert "group" in (profile.reason(weight, QSpec(symmetric(8), PerGroup(8, -1), MinMax())) or "")
    assert profile.reason(entry, QSpec(gptq_grid(8), PerTensor(), MinMax())) is None  # zero inside: its code exists
    assert "outside" in (profile.reason(entry, QSpec(raw_affine(8), PerTensor(), MinMax())) or "")
    assert "log2" in (profile.reason(entry, QSpec(Log2(8), PerTensor(), MinMax())) or "")
    fitted = profile.fit(QSpec(affine(8), PerGroup(8, -1), MinMax()), weight)
    assert fitted.format == symmetric(8) and fitted.granularity == PerChannel(0)
    with pytest.raises(FewbitsError, match=r"a\.input: strict has no log2 grids"):
        profile.fit(QSpec(Log2(8), PerTensor(), MinMax()), entry)


def test_a_fitted_recipe_runs_on_grids_the_target_has() -> None:
    recipe = build_recipe("gptq", "W8A8", {"target": "onnxruntime"})
    assert recipe.needs_data and Scheme.from_dict(json.loads(json.dumps(recipe.scheme.to_dict()))) == recipe.scheme
    result = fewbits.quantize(_model(), recipe, _batches())
    profile = load_profile("onnxruntime")
    held = list(result.attachment.items())
    assert len(held) == 6
    for site, quantizer in held:
        assert profile.reason(site, quantizer.spec) is None
        assert not quantizer.spec.dynamic
    free = fewbits.quantize(_model(), build_recipe("gptq", "W8A8"), _batches())
    assert any(quantizer.spec.dynamic for _, quantizer in free.attachment.items())


def test_activations_made_static_by_the_user_are_calibrated() -> None:
    recipe = build_recipe("gptq", "W8A8", {"sites": "*.input:static+tensor"})
    result = fewbits.quantize(_model(), recipe, _batches())
    entries = [quantizer for site, quantizer in result.attachment.items() if site.role == "input"]
    assert entries and all(quantizer.ready and quantizer.params["scale"].shape == () for quantizer in entries)


def test_what_a_target_lacks_is_refused_by_site_before_any_work(tmp_path: Path) -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FewbitsError, match=r"0\.weight: onnxruntime has no codebook grids.*Keep these sites.*target"):
        fewbits.quantize(model, build_recipe("squeezellm", "W4A16", {"target": "onnxruntime"}), _batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(FewbitsError, match="there is no target 'onnxruntim'; did you mean onnxruntime"):
        build_recipe("rtn", "W8A8", {"target": "onnxruntim"})


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "npu.yaml"
    file.write_text(
        "name: npu\nabout: symmetric everywhere\n"
        "weights: [{bits: [8], zero: [none], granularity: [tensor]}]\n"
        "activations: [{bits: [8], zero: [none], granularity: [tensor]}]\n"
    )
    result = fewbits.quantize(_model(), build_recipe("rtn", "W8A8", {"target": str(file)}), _batches())
    for _, quantizer in result.attachment.items():
        assert quantizer.spec.format.zero_point == "none" and quantizer.spec.granularity.kind == "tensor"
    file.write_text("name: npu\nabout: x\nweight: []\n")
    other = tmp_path / "other.yaml"
    other.write_text(file.read_text())
    with pytest.raises(FewbitsError, match="unknown key 'weight'"):
        load_profile(str(other))


def test_scales_become_powers_of_two_and_sums_must_fit(tmp_path: Path) -> None:
    file = tmp_path / "shifts.yaml"
    file.write_text(
        "name: shifts\nabout: rescales by shifts\naccumulator: 24\n"
        "weights: [{format: power_of_two, bits: [8], zero: [none], granularity: [tensor]}]\n"
        "activations: [{format: power_of_two, bits: [8], zero: [none], granularity: [tensor]}]\n"
    )
    recipe = build_recipe("rtn", "W8A8", {"target": str(file), "exclude": "3.*"})
    result = fewbits.quantize(_model(), recipe, _batches())
    for site, quantizer in result.attachment.items():
        exponent = torch.log2(quantizer.spec.format.scale_of(quantizer.params))
        assert torch.equal(exponent, exponent.round()), site.name
        assert quantizer.params["scale"].shape == ()
    # 288 products of 127 * 255 pass 2^23
    with pytest.raises(FewbitsError, match=r"3\.weight: 288 products of up to 32385 may overflow the 24-bit sums"):
        fewbits.quantize(_model(), build_recipe("rtn", "W8A8", {"target": str(file)}), _batches())


def test_a_target_with_a_placement_of_its_own_brings_its_recipe() -> None:
    recipe = build_recipe("gptq", "W8A8", {"target": "integer"})
    assert recipe.name == "gptq+jacob-integer-only"
    result = fewbits.quantize(_model(), recipe, _batches())
    assert {site.role for site, _ in result.attachment.items()} == {"input", "output", "weight"}


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.inner(x), -1) + x


def test_calls_that_a_target_does_not_run_are_refused_before_any_work() -> None:
    batches = [torch.randn(2, 4, 16)]
    model = _Attention()
    before = model.inner.weight.clone()
    with pytest.raises(FewbitsError, match="integer runs no softmax") as refused:
        fewbits.quantize(model, build_recipe("jacob-integer-only", "W8A8", {"target": "integer"}), batches)
    assert "Take a target that can: " in str(refused.value) and "onnxruntime" in str(refused.value)
    assert torch.equal(model.inner.weight, before)
    # the ReLU behind a convolution is done in one go with it
    fewbits.quantize(_model(), build_recipe("jacob-integer-only", "W8A8", {"target": "integer"}), _batches())


def test_what_the_integer_target_runs_is_what_its_executor_translates() -> None:
    from fewbits.export.integer.build import BY_NAME
    from fewbits.export.integer.operations import LAYOUT
    from fewbits.graph.ops import ACTIVATIONS, IDENTITY
    from fewbits.graph.types import CASTS

    profile = load_profile("integer")
    pools = {f"{kind}avg_pool{axes}d" for kind in ("", "adaptive_") for axes in (1, 2, 3)}
    assert set(profile.requantizes) | set(profile.passes) == {
        *BY_NAME, *ACTIVATIONS, *IDENTITY, *CASTS, *LAYOUT, *pools, *profile.ops, "mean", "pad", "getitem", "matmul",
    }  # fmt: skip
    assert not set(profile.requantizes) & set(profile.passes)
