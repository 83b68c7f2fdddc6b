"""Units: the expected blocks of real models, found without class names; disjoint, ordered, runnable alone; needs
by data flow.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.graph import record
from fewbits.graph.units import find_units, unit_needs
from zoo_tiny import NAMES, build, recorded

#: model -> (blocks, modules, ops), and some of the units by name.
EXPECTED: dict[str, tuple[tuple[int, int, int], dict[str, str]]] = {
    "timm-vit": ((2, 0, 2), {"patch_embed.proj": "op", "blocks.0": "block", "blocks.1": "block", "head": "op"}),
    "timm-deit-distilled": ((2, 0, 3), {"blocks.1": "block", "head": "op", "head_dist": "op"}),
    "timm-swin": (
        (4, 2, 1),
        {"patch_embed": "module", "layers.0.blocks.1": "block", "layers.1.downsample": "module", "head.fc": "op"},
    ),
    "timm-mobilevit": (
        (16, 11, 4),
        {
            "stem": "module",
            "stages.0.0": "block",
            "stages.2.1.conv_1x1": "op",
            "stages.2.1.transformer.0": "block",
            "final_conv": "module",
        },
    ),
    "timm-efficientformer": ((4, 0, 4), {"stem.conv1": "op", "stages.0": "block", "head": "op"}),
    "timm-resnet": ((5, 0, 2), {"conv1": "op", "layer1.0": "block", "layer4.0": "block", "fc": "op"}),
    "timm-resnet-bottleneck": ((5, 0, 2), {"conv1": "op", "layer1.1": "block", "fc": "op"}),
    "timm-regnetx": ((6, 1, 1), {"stem": "module", "s3.b2": "block", "head.fc": "op"}),
    "timm-regnety": ((6, 1, 1), {"stem": "module", "s3.b2": "block", "head.fc": "op"}),
    "timm-mobilenetv2": (
        (16, 1, 3),
        {"conv_stem": "op", "blocks.0.0": "module", "blocks.6.0": "block", "conv_head": "op"},
    ),
    "timm-densenet": (
        (8, 3, 2),
        {
            "features.conv0": "op",
            "features.denseblock1.denselayer1": "block",
            "features.transition1": "module",
            "classifier": "op",
        },
    ),
    "timm-vgg": ((0, 1, 5), {"features.0": "op", "pre_logits": "module", "head.fc": "op"}),
    "torchvision-vit": ((2, 0, 2), {"conv_proj": "op", "encoder.layers.encoder_layer_0": "block", "heads.head": "op"}),
    "torchvision-shufflenet": ((5, 2, 1), {"conv1": "module", "stage2.0": "block", "conv5": "module", "fc": "op"}),
    "torchvision-inception": (
        (9, 7, 1),
        {"Conv2d_1a_3x3": "module", "Mixed_5b": "block", "Mixed_6a": "module", "Mixed_6e": "block", "fc": "op"},
    ),
    "torchvision-mnasnet": (
        (16, 0, 5),
        {"layers.0": "op", "layers.8.0": "block", "layers.14": "op", "classifier.1": "op"},
    ),
    "torchvision-retinanet": (
        (6, 2, 4),
        {
            "backbone.body.0": "module",
            "backbone.body.6": "block",
            "backbone.fpn.inner_blocks.0.0": "op",
            "head": "module",
        },
    ),
    "torchvision-fasterrcnn": (
        (6, 4, 4),
        {
            "backbone.body.1": "block",
            "rpn.head": "module",
            "roi_heads.box_head": "module",
            "roi_heads.box_predictor": "module",
        },
    ),
    "hf-bert": ((2, 1, 1), {"bert.encoder.layer.0": "block", "bert.pooler": "module", "classifier": "op"}),
    "hf-roberta": ((2, 1, 0), {"roberta.encoder.layer.1": "block", "classifier": "module"}),
    "hf-bart": ((4, 0, 1), {"model.encoder.layers.0": "block", "model.decoder.layers.1": "block", "lm_head": "op"}),
    "hf-t5": ((4, 0, 1), {"encoder.block.0": "block", "decoder.block.1": "block", "lm_head": "op"}),
    "hf-detr": (
        (8, 2, 2),
        {
            "model.backbone.model.embedder": "module",
            "model.backbone.model.encoder.stages.0.layers.0": "block",
            "model.input_projection": "op",
            "model.encoder.layers.0": "block",
            "model.decoder.layers.1": "block",
            "class_labels_classifier": "op",
            "bbox_predictor": "module",
        },
    ),
    "diffusers-unet2d": (
        (12, 1, 4),
        {
            "time_embedding": "module",
            "conv_in": "op",
            "mid_block.attentions.0": "block",
            "up_blocks.0.resnets.1": "block",
        },
    ),
    "diffusers-unet2d-condition": (
        (12, 1, 12),
        {
            "time_embedding": "module",
            "down_blocks.0.attentions.0.transformer_blocks.0": "block",
            "down_blocks.0.attentions.0.proj_in": "op",
            "mid_block.resnets.1": "block",
            "conv_out": "op",
        },
    ),
    **{
        f"hf-{name}": ((2, 0, 1), {f"{path}.0": "block", f"{path}.1": "block", "lm_head": "op"})
        for name, path in {
            "llama": "model.layers",
            "qwen3": "model.layers",
            "gemma": "model.layers",
            "opt": "model.decoder.layers",
            "bloom": "transformer.h",
            "falcon": "transformer.h",
            "gpt2": "transformer.h",
            "gpt-neo": "transformer.h",
            "mixtral-eager": "model.layers",
            "mixtral-grouped": "model.layers",
        }.items()
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_units_of_real_models(name: str) -> None:
    graph = recorded(name)
    counts, named = EXPECTED[name]
    kinds = Counter(unit.kind for unit in graph.units)
    assert (kinds["block"], kinds["module"], kinds["op"]) == counts, [(u.name, u.kind) for u in graph.units]
    found = {unit.name: unit.kind for unit in graph.units}
    assert named.items() <= found.items()
    assert graph.unowned == []


@pytest.mark.parametrize("name", NAMES)
def test_units_are_disjoint_ordered_and_hold_every_weight(name: str) -> None:
    graph = recorded(name)
    owned = [index for unit in graph.units for index in unit.calls]
    assert len(owned) == len(set(owned))
    starts = [unit.calls[0] for unit in graph.units]
    assert starts == sorted(starts)
    for site in graph.sites.values():
        if site.role == "weight" and site.op != "embedding":
            assert sum(unit.contains(site.module) for unit in graph.units) == 1, site.name
    for unit in graph.units:
        assert unit.uses == graph.module_calls[unit.name]
        model = build(name)[0]
        model.get_submodule(unit.name)


@pytest.mark.parametrize("name", NAMES)
def test_units_run_again_from_their_own_inputs(name: str) -> None:
    """The point of a unit: its arguments, kept, give its outputs again."""
    model, args, kwargs = build(name)
    graph = recorded(name)
    kept: dict[str, tuple[Any, Any, Any]] = {}
    handles = []
    for unit in graph.units:

        def keep(module: nn.Module, a: Any, k: Any, out: Any, unit_name: str = unit.name) -> None:
            kept[unit_name] = (_copy(a), _copy(k), _copy(out))

        handles.append(model.get_submodule(unit.name).register_forward_hook(keep, with_kwargs=True))
    if name.startswith("hf-") and hasattr(model.config, "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    with torch.no_grad():
        model(*args, **kwargs)
        for handle in handles:
            handle.remove()
        assert set(kept) == {unit.name for unit in graph.units}
        for unit_name, (a, k, out) in kept.items():
            again = model.get_submodule(unit_name)(*a, **k)
            for x, y in zip(_tensors(again), _tensors(out), strict=True):
                torch.testing.assert_close(x, y, msg=unit_name)


def _copy(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


# -- needs -----------------------------------------------------------------------------------------------------------
def test_needs_follow_skips_and_shared_tensors() -> None:
    needs = unit_needs(recorded("timm-densenet"))
    assert needs["features.denseblock2.denselayer2"] == {"features.transition1", "features.denseblock2.denselayer1"}
    needs = unit_needs(recorded("timm-mobilevit"))
    assert needs["stages.2.1.conv_fusion"] == {"stages.2.0", "stages.2.1.conv_proj"}
    needs = unit_needs(recorded("hf-bart"))
    assert needs["model.encoder.layers.0"] == set()
    assert needs["model.decoder.layers.1"] == {"model.decoder.layers.0", "model.encoder.layers.1"}
    needs = unit_needs(recorded("diffusers-unet2d"))
    assert needs["up_blocks.1.resnets.1"] == {"conv_in", "time_embedding", "up_blocks.1.resnets.0"}
    assert needs["up_blocks.1.resnets.0"] == {
        "down_blocks.0.resnets.0",
        "time_embedding",
        "up_blocks.0.upsamplers.0.conv",
    }


@pytest.mark.parametrize("name", NAMES)
def test_needs_point_backwards(name: str) -> None:
    graph = recorded(name)
    needs = unit_needs(graph)
    order = {unit.name: i for i, unit in enumerate(graph.units)}
    assert set(needs) == set(order) and needs[graph.units[0].name] == set()
    for unit, needed in needs.items():
        assert all(order[other] < order[unit] for other in needed)


@pytest.mark.parametrize(
    "name",
    ["timm-swin", "timm-mobilevit", "timm-densenet", "timm-resnet", "hf-bart", "hf-t5", "hf-detr", "diffusers-unet2d"],
)
def test_needs_are_exactly_what_changes_the_inputs(name: str) -> None:
    """With every unit's output held fixed, moving one output moves the inputs of exactly the units that need it."""
    model, args, kwargs = build(name)
    if name in ("hf-bart", "hf-t5"):
        kwargs = {**kwargs, "use_cache": False}
    graph = recorded(name)
    needs = unit_needs(graph)
    clean: dict[str, tuple[list[Tensor], Any]] = {}
    inputs: dict[str, list[Tensor]] = {}
    moved = ""

    def hold(unit: str, module: nn.Module, a: Any, k: Any, out: Any) -> Any:
        inputs[unit] = _tensors(_copy((a, k)))
        if unit not in clean:
            clean[unit] = (inputs[unit], _copy(out))
            return out
        fixed = _copy(clean[unit][1])
        if unit != moved:
            return fixed
        noise = torch.Generator().manual_seed(7)
        return torch.utils._pytree.tree_map(
            lambda x: (
                x + torch.randn(x.shape, generator=noise) if isinstance(x, Tensor) and x.is_floating_point() else x
            ),
            fixed,
        )

    handles = [
        model.get_submodule(unit.name).register_forward_hook(partial(hold, unit.name), with_kwargs=True)
        for unit in graph.units
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
            for unit in graph.units:
                moved = unit.name
                model(*args, **kwargs)
                changed = {
                    other
                    for other, tensors in inputs.items()
                    if any(not torch.equal(x, y) for x, y in zip(tensors, clean[other][0], strict=True))
                }
                assert changed == {other for other, needed in needs.items() if unit.name in needed}, unit.name
    finally:
        for handle in handles:
            handle.remove()


# -- the rule on purpose-made models ---------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


def units(model: nn.Module, *args: Any, **options: Any) -> dict[str, str]:
    return {unit.name: unit.kind for unit in find_units(record(model, *args), **options)}


def test_parallel_branches_stay_together_and_serial_ones_do_not() -> None:
    class Many(nn.Module):
        def __init__(self, serial: bool) -> None:
            super().__init__()
            self.serial, self.experts = serial, nn.ModuleList([Block(), Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            if self.serial:
                for expert in self.experts:
                    x = expert(x)
                return x
            return sum(expert(x) for expert in self.experts)  # type: ignore[return-value]

    class Net(nn.Module):
        def __init__(self, serial: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Many(serial), Many(serial)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    x = torch.randn(2, 8)
    assert list(units(Net(False), x)) == ["layers.0", "layers.1"]
    assert list(units(Net(True), x)) == [f"layers.{i}.experts.{j}" for i in range(2) for j in range(3)]


def test_wrappers_around_a_model_are_opened() -> None:
    class Wrapper(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(8, 8), Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.stem(x)))

    x = torch.randn(2, 8)
    assert units(Net(), x) == {"stem": "op", "one": "block", "two": "block"}
    assert units(Wrapper(Wrapper(Net())), x) == {"net.net.stem": "op", "net.net.one": "block", "net.net.two": "block"}


def test_single_layers_and_plain_sequentials() -> None:
    x = torch.randn(2, 8)
    assert units(nn.Linear(8, 4), x) == {"": "op"}
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Linear(8, 2))
    assert units(net, x) == {"0": "op", "2": "module", "3": "op"}


def test_weights_used_by_an_opened_module_itself_are_reported() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x) @ self.weight

    graph = record(Net(), torch.randn(2, 8))
    assert [unit.name for unit in graph.units] == ["blocks.0", "blocks.1"]
    assert graph.unowned == ["matmul (weight)"]


class _Box:
    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize("way", ["object in", "object out", "attribute", "data sized", "bypassed"])
def test_modules_that_cannot_run_alone_are_opened(way: str) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Linear(8, 8), nn.Linear(8, 8)
            self.note: Any = None

        def work(self, x: Tensor) -> Tensor:
            return self.q(self.p(x).relu())

        def forward(self, x: Any) -> Any:
            if way == "object in":
                return self.work(x.x)
            if way == "attribute":
                return self.work(self.note)
            y = self.work(x)
            if way == "object out":
                return _Box(y)
            return y[y[:, 0] > -1e9] if way == "data sized" else y

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.inner, self.two = Block(), Inner(), Block()

        def forward(self, x: Tensor) -> Tensor:
            y: Any = self.one(x)
            if way == "attribute":
                self.inner.note = y
            if way == "bypassed":
                y = self.inner.work(y)
            else:
                y = self.inner(_Box(y) if way == "object in" else x if way == "attribute" else y)
            return self.two(y.x if way == "object out" else y)

    graph = record(Net(), torch.randn(2, 8))
    assert [unit.name for unit in graph.units] == ["one", "inner.p", "inner.q", "two"]
    reason = {
        "object in": r"reads tensors out of an argument .*_Box",
        "object out": r"returns tensors in something else .*_Box",
        "attribute": "reads a tensor it was not given",
        "data sized": "sizes depend on the data",
    }
    if way in reason:
        assert re.search(reason[way], graph.opened["inner"])


def test_embeddings_are_units_only_on_request() -> None:
    graph = recorded("hf-gpt2")
    assert "transformer.wte" not in {unit.name for unit in graph.units}
    asked = {unit.name: unit.kind for unit in find_units(graph, embeddings=True)}
    assert asked["transformer.wte"] == asked["transformer.wpe"] == "op" and asked["transformer.h.0"] == "block"
    find_units(graph)


# -- patterns --------------------------------------------------------------------------------------------------------
def test_patterns_choose_units() -> None:
    graph = recorded("timm-vit")
    finer = [unit.name for unit in find_units(graph, "blocks.*.*")]
    assert finer == ["patch_embed.proj", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "head"]
    mixed = [unit.name for unit in find_units(graph, ["blocks.0.attn", "blocks.0.mlp.fc[12]"])]
    assert mixed == ["patch_embed.proj", "blocks.0.attn", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1", "head"]
    assert [u.name for u in find_units(graph, "blocks")] == ["patch_embed.proj", "blocks", "head"]
    layers = [u.name for u in find_units(recorded("timm-vgg"), "features")]
    assert layers == ["features", "pre_logits", "head.fc"]


def test_patterns_that_make_no_sense_are_refused() -> None:
    graph = recorded("timm-vit")
    with pytest.raises(FewbitsError, match=r"'layers\.\*' matches no module.*blocks"):
        find_units(graph, "layers.*")
    with pytest.raises(FewbitsError, match="roi_heads returns tensors whose sizes depend on the data"):
        find_units(recorded("torchvision-fasterrcnn"), "roi_heads")
