"""Relations: what is found on real architectures, that it holds, that nothing else is found, that proofs can fail."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import zoo_tiny
from fewbits.errors import FewbitsError
from fewbits.graph import Graph, record
from fewbits.graph.labels import FIXED, WILD, Labels, compact, full
from fewbits.graph.proof import prove, prove_all
from fewbits.graph.relations import Relation, find_relations, query_key_pairs, would_be_relations
from fewbits.graph.weights import channels, operand, scale, shift

CONV, NORM, VO, UP, LIN = "conv->conv", "norm->linear", "v->o", "up->down", "linear->linear"
HEAD, LAST = "conv->linear", "norm->conv"

#: model -> kinds of relations, number of would-be relations, channels in query-key pairs.
EXPECTED: dict[str, tuple[dict[str, int], int, int]] = {
    "timm-vit": ({NORM: 5, VO: 2}, 0, 64),
    "timm-deit-distilled": ({NORM: 5, VO: 2}, 0, 64),
    "timm-swin": ({NORM: 10, VO: 4}, 0, 96),
    "timm-mobilevit": ({CONV: 4, NORM: 18, VO: 9, LAST: 3}, 0, 736),
    "timm-efficientformer": ({CONV: 4, "conv->layer scale": 4, NORM: 3, VO: 1, "linear->layer scale": 2}, 0, 256),
    "timm-resnet": ({CONV: 9, HEAD: 1}, 0, 0),
    "timm-resnet-bottleneck": ({CONV: 14, HEAD: 1}, 0, 0),
    "timm-regnetx": ({CONV: 17}, 0, 0),
    "timm-regnety": ({CONV: 23}, 0, 0),
    "timm-mobilenetv2": ({CONV: 7}, 35, 0),
    "timm-densenet": ({CONV: 19, HEAD: 1}, 0, 0),
    "timm-vgg": ({CONV: 5, HEAD: 1}, 0, 0),
    "torchvision-vit": ({NORM: 5, VO: 2}, 0, 64),
    "torchvision-shufflenet": ({CONV: 26, HEAD: 1}, 0, 0),
    "torchvision-inception": ({CONV: 88, HEAD: 6}, 0, 0),
    "torchvision-mnasnet": ({CONV: 41, HEAD: 1}, 0, 0),
    "torchvision-retinanet": ({CONV: 12}, 12, 0),
    "torchvision-fasterrcnn": ({CONV: 5, LIN: 2}, 12, 0),
    "hf-llama": ({NORM: 5, VO: 2, UP: 2}, 0, 16),
    "hf-qwen3": ({NORM: 5, VO: 2, UP: 2}, 0, 8),
    "hf-gemma": ({NORM: 4, VO: 2, UP: 2}, 0, 16),
    "hf-opt": ({NORM: 4, VO: 2, LIN: 2}, 0, 64),
    "hf-bloom": ({NORM: 4, VO: 2}, 0, 64),
    "hf-falcon": ({NORM: 2, VO: 2}, 0, 8),
    "hf-gpt2": ({NORM: 4, VO: 2}, 0, 64),
    "hf-gpt-neo": ({NORM: 4, VO: 2}, 0, 64),
    "hf-bert": ({NORM: 1, VO: 2}, 0, 64),
    "hf-roberta": ({NORM: 1, VO: 2}, 0, 64),
    "hf-bart": ({VO: 6}, 0, 192),
    "hf-t5": ({NORM: 10, VO: 6, LIN: 4}, 0, 192),
    "hf-mixtral-eager": ({NORM: 5, VO: 2, UP: 6}, 0, 16),
    "hf-mixtral-grouped": ({NORM: 5, VO: 2, UP: 2}, 0, 16),
    "hf-detr": ({VO: 6, LIN: 6}, 0, 192),
    "diffusers-unet2d": ({NORM: 4, VO: 4}, 0, 128),
    "diffusers-unet2d-condition": ({LAST: 4, NORM: 12, VO: 8, UP: 4, CONV: 1}, 0, 160),
}

#: model -> (producers, consumers) that must be among the relations, by site.
NAMED: dict[str, list[tuple[str, str]]] = {
    "timm-vit": [
        ("blocks.0.norm1", "blocks.0.attn.qkv"),
        ("blocks.0.attn.qkv", "blocks.0.attn.proj"),
        ("blocks.0.norm2", "blocks.0.mlp.fc1"),
        ("norm", "head"),
    ],
    "timm-deit-distilled": [("norm", "head head_dist")],
    "timm-swin": [
        ("layers.0.blocks.1.norm1", "layers.0.blocks.1.attn.qkv"),
        ("layers.0.blocks.1.attn.qkv", "layers.0.blocks.1.attn.proj"),
        ("layers.1.downsample.norm", "layers.1.downsample.reduction"),
        ("norm", "head.fc"),
    ],
    "timm-resnet": [
        ("bn1", "layer1.0.conv1 layer1.0.downsample.0"),
        ("layer1.0.bn1", "layer1.0.conv2"),
        ("layer1.0.bn2 layer1.0.downsample.1 layer1.1.bn2", "layer1.1.conv1 layer2.0.conv1 layer2.0.downsample.0"),
        ("layer4.0.bn2 layer4.0.downsample.1", "fc"),
    ],
    "torchvision-vit": [
        ("encoder.layers.encoder_layer_0.ln_1", "encoder.layers.encoder_layer_0.self_attention.linear"),
        (
            "encoder.layers.encoder_layer_0.self_attention.linear",
            "encoder.layers.encoder_layer_0.self_attention.out_proj",
        ),
        ("encoder.ln", "heads.head"),
    ],
    "hf-llama": [
        (
            "model.layers.0.input_layernorm",
            "model.layers.0.self_attn.q_proj model.layers.0.self_attn.k_proj model.layers.0.self_attn.v_proj",
        ),
        ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"),
        ("model.layers.0.post_attention_layernorm", "model.layers.0.mlp.gate_proj model.layers.0.mlp.up_proj"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
        ("model.norm", "lm_head"),
    ],
    "hf-opt": [("model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2")],
    "hf-falcon": [
        (
            "transformer.h.0.input_layernorm",
            "transformer.h.0.self_attention.query_key_value transformer.h.0.mlp.dense_h_to_4h",
        ),
    ],
    "hf-gpt2": [
        ("transformer.h.0.ln_1", "transformer.h.0.attn.c_attn"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
    ],
    "hf-bart": [("model.decoder.layers.1.encoder_attn.v_proj", "model.decoder.layers.1.encoder_attn.out_proj")],
    "hf-mixtral-eager": [
        ("model.layers.0.mlp.experts.gate_up_proj.1", "model.layers.0.mlp.experts.down_proj.1"),
        (
            "model.layers.0.post_attention_layernorm",
            "model.layers.0.mlp.gate "
            + " ".join(f"model.layers.0.mlp.experts.gate_up_proj.{e}" for e in range(3)),
        ),
    ],
    "diffusers-unet2d-condition": [
        (
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        ),
    ],
}  # fmt: skip
#: Casts to float32 inside (norms, rotary embeddings, softmax).
CASTS = (
    "hf-llama",
    "hf-qwen3",
    "hf-gemma",
    "hf-bloom",
    "hf-gpt-neo",
    "hf-t5",
    "hf-mixtral-eager",
    "hf-mixtral-grouped",
)


@cache
def related(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Graph, list[Relation]]:
    graph = zoo_tiny.recorded(name)
    return *zoo_tiny.build(name), graph, find_relations(graph)


def outputs(model: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    with torch.no_grad():
        out = model(*pytree.tree_map(cast, copy.deepcopy(args)), **pytree.tree_map(cast, copy.deepcopy(kwargs)))
    while not isinstance(out, (Tensor, list, tuple)):
        out = (
            [v for k, v in out.items() if k != "past_key_values"] if isinstance(out, dict) else list(vars(out).values())
        )
    return [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    assert len(a) == len(b)
    if any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def random_scales(size: int, seed: int = 0) -> Tensor:
    return torch.exp(0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def sides(relation: Relation) -> tuple[str, str]:
    left, right = (
        [end.site for end in ends if end.axis != "vector"] for ends in (relation.producers, relation.consumers)
    )
    return " ".join(left), " ".join(right)


# -- real architectures ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", zoo_tiny.NAMES)
def test_finds_what_is_there(name: str) -> None:
    *_, graph, relations = related(name)
    kinds, would_be, pairs = EXPECTED[name]
    assert dict(Counter(r.kind for r in relations)) == kinds
    assert len({r.name for r in relations}) == len(relations)
    assert len(would_be_relations(graph)) == would_be
    assert sum(pair.size for pair in query_key_pairs(graph)) == pairs
    found = [sides(relation) for relation in relations]
    for expected in NAMED.get(name, []):
        assert expected in found
    for relation in relations:
        assert not relation.uncovered
        for end in relation.ends:
            numbers = end.channel_of[end.channel_of >= 0]
            assert sorted(set(numbers.tolist())) == list(range(relation.size))


@pytest.mark.parametrize("name", zoo_tiny.NAMES)
def test_scaling_everything_at_once_keeps_the_function(name: str) -> None:
    model, args, kwargs, graph, relations = related(name)
    grouped = name == "hf-mixtral-grouped"  # torch's grouped product has no float64
    dtype = torch.float32 if grouped else torch.float64
    threshold = 2e-5 if grouped else 1e-6 if name in CASTS else 1e-9
    model = copy.deepcopy(model).to(dtype)
    before = outputs(model, args, kwargs, dtype)
    for number, relation in enumerate((*relations, *query_key_pairs(graph))):
        s = random_scales(relation.size, number)
        if "scale" in relation.permits:
            s[::3] *= -1
        scale(model, relation, s)
    assert distance(before, outputs(model, args, kwargs, dtype)) <= threshold
    scale(model, relations[0], random_scales(relations[0].size), only="producers")
    assert distance(before, outputs(model, args, kwargs, dtype)) > (
        0 if name.startswith("torchvision-") else 1e3 * threshold
    )


@pytest.mark.parametrize("name", [n for n in zoo_tiny.NAMES if n != "torchvision-inception"])
def test_every_relation_is_proved(name: str) -> None:
    model, args, kwargs, graph, relations = related(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    verdicts = prove_all(model, graph, [*relations, *query_key_pairs(graph)][:24], args, kwargs)
    assert [v for v in verdicts if v.verdict != "proved"] == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_inception_relations_are_proved() -> None:
    model, args, kwargs, graph, relations = related("torchvision-inception")
    assert all(prove_all(model, graph, [*relations[2:5], relations[40], relations[-1]], args, kwargs))


def test_would_be_relations_hold_once_relu6_is_relu() -> None:
    model, args, kwargs, graph, _ = related("timm-mobilenetv2")
    waiting = would_be_relations(graph)
    assert all(r.blocked_by == {"hardtanh"} for r in waiting)
    with pytest.raises(FewbitsError, match="replaced"):
        scale(model, waiting[0], torch.ones(waiting[0].size))
    model = copy.deepcopy(model).double()
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, child_name, nn.ReLU())
    now = {r.name: r for r in find_relations(record(model.float(), *args, **kwargs))}
    assert {r.name for r in waiting} <= set(now)
    model.double()
    before = outputs(model, args, kwargs)
    for number, relation in enumerate(waiting):
        scale(model, relation, random_scales(relation.size, number), force=True)
    assert distance(before, outputs(model, args, kwargs)) < 1e-9


# -- uses other than scaling -----------------------------------------------------------------------------------------
SHIFTED = "timm-vit timm-swin timm-mobilevit hf-opt hf-gpt2 hf-llama hf-bert hf-bart diffusers-unet2d-condition"


@pytest.mark.parametrize("name", SHIFTED.split())
def test_permitted_shifts_keep_the_function(name: str) -> None:
    model, args, kwargs, _, relations = related(name)
    model = copy.deepcopy(model).double()
    before = outputs(model, args, kwargs)
    shifted = [r for r in relations if "shift" in r.permits]
    assert any(r.kind == "v->o" for r in shifted)
    for number, relation in enumerate(shifted):
        t = torch.randn(relation.size, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        shift(model, relation, t)
        scale(model, relation, random_scales(relation.size, number))  # also scales a bias the shift created
    assert distance(before, outputs(model, args, kwargs)) < (1e-6 if name in CASTS else 1e-9)


def test_permits_follow_what_channels_pass() -> None:
    by_kind = {r.kind: r.permits for r in related("hf-opt")[-1]}
    assert by_kind["linear->linear"] == {"positive_scale", "permute"}  # ReLU
    assert by_kind["norm->linear"] == {"scale", "positive_scale", "shift"}
    assert by_kind["v->o"] == {"scale", "positive_scale", "shift"}
    llama = {r.kind: r.permits for r in related("hf-llama")[-1]}
    assert llama["up->down"] == llama["norm->linear"] == {"scale", "positive_scale"}  # a gate; a norm without a bias
    plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    (relation,) = find_relations(record(plain, torch.randn(2, 4)))
    assert relation.permits == {"scale", "positive_scale", "shift", "permute", "rotate"}


def test_bad_vectors_are_refused() -> None:
    *_, relations = related("hf-opt")
    model = related("hf-opt")[0]
    relu = next(r for r in relations if r.kind == "linear->linear")
    for s in (torch.ones(3), torch.zeros(relu.size), -torch.ones(relu.size), torch.full((relu.size,), float("nan"))):
        with pytest.raises(FewbitsError, match="relation"):
            scale(model, relu, s)
    with pytest.raises(FewbitsError, match="permits"):
        shift(model, relu, torch.ones(relu.size))


# -- the proof can fail ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["timm-vit", "timm-resnet", "hf-llama", "hf-gpt2"])
def test_wrong_relations_are_refuted(name: str) -> None:
    model, args, kwargs, graph, relations = related(name)
    for relation in relations[:4]:
        first = relation.consumers[0]
        turned = replace(
            relation, consumers=(replace(first, channel_of=first.channel_of.roll(1)), *relation.consumers[1:])
        )
        assert prove(model, graph, turned, args, kwargs).verdict == "refuted"
    several = next((r for r in relations if len(r.consumers) > 1), None)
    if several is not None:
        assert (
            prove(model, graph, replace(several, consumers=several.consumers[:-1]), args, kwargs).verdict == "refuted"
        )
    joined = next((r for r in relations if len(r.producers) > 1), None)
    if joined is not None:
        assert prove(model, graph, replace(joined, producers=joined.producers[:-1]), args, kwargs).verdict == "refuted"


def test_a_relation_through_gelu_is_refuted() -> None:
    class Mlp(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(4, 6), act, nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x)))

    torch.manual_seed(0)
    x = torch.randn(2, 4)
    right = Mlp(nn.ReLU())
    (relation,) = find_relations(record(right, x))
    assert prove(right, record(right, x), relation, (x,)).verdict == "proved"
    wrong = Mlp(nn.GELU())
    graph = record(wrong, x)
    assert find_relations(graph) == []
    assert prove(wrong, graph, relation, (x,)).verdict == "refuted"


def test_a_dead_head_is_not_a_proof() -> None:
    model, args, kwargs = zoo_tiny.MODELS["torchvision-vit"]()
    with torch.no_grad():
        model.heads.head.weight.zero_()  # as the library initialises it
    graph = record(model, *args, **kwargs)
    verdicts = {v.relation: v.verdict for v in prove_all(model, graph, graph.relations, args, kwargs)}
    assert verdicts["encoder.ln->heads.head"] == "not exercised"
    assert list(verdicts.values()).count("not exercised") == 1


# -- experts ---------------------------------------------------------------------------------------------------------
def _mixtral(implementation: str, experts: int = 8) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, intermediate_size=24, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=experts, num_experts_per_tok=2,
        )
    )  # fmt: skip
    model.set_experts_implementation(implementation)
    return model.eval()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_no_token_reached_follow_the_others(implementation: str) -> None:
    model = _mixtral(implementation)
    graph = record(model, input_ids=torch.tensor([[5]]))  # two of eight experts run
    relation = next(r for r in find_relations(graph) if "post_attention_layernorm" in r.name)
    assert not relation.uncovered
    other = {"input_ids": torch.arange(3, 60)[None]}
    before = outputs(model, (), other, torch.float32)
    scale(model, relation, random_scales(relation.size))
    assert distance(before, outputs(model, (), other, torch.float32)) < 1e-5


def test_an_unseen_stack_is_not_exercised() -> None:
    class One(nn.Module):
        """A stack of matrices of which one is used."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.stack = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, x: Tensor, which: int) -> Tensor:
            return F.linear(self.norm(x), self.stack[which])

    torch.manual_seed(0)
    model, x = One(), torch.randn(2, 6)
    graph = record(model, x, 1)
    (relation,) = find_relations(graph)
    assert relation.uncovered == ("stack",)
    assert prove(model, graph, relation, (x, 1)).verdict == "not exercised"
    with pytest.raises(FewbitsError, match="record with more data"):
        scale(model, relation, torch.ones(6))


def test_a_module_beside_that_never_ran_is_reported() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.experts[which](self.norm(x))

    torch.manual_seed(0)
    model, x = Routed(), torch.randn(2, 6)
    graph = record(model, x, 1)
    (relation,) = find_relations(graph)
    assert relation.uncovered
    assert prove(model, graph, relation, (x, 1)).verdict == "not exercised"


# -- small models, one difficulty each -------------------------------------------------------------------------------
class Case(nn.Module):
    """A model written as one function over named modules."""

    def __init__(self, forward: Any, **modules: Any) -> None:
        super().__init__()
        self.body = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def _holds(model: nn.Module, x: Tensor, count: int) -> list[Relation]:
    graph = record(model, x)
    relations = find_relations(graph)
    assert len(relations) == count
    assert all(prove_all(model, graph, relations, (x,)))
    double = copy.deepcopy(model).double()
    before = outputs(double, (x,), {})
    for number, relation in enumerate(relations):
        scale(double, relation, random_scales(relation.size, number))
    assert distance(before, outputs(double, (x,), {})) < 1e-12
    return relations


def _linear(a: int, b: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(a, b, bias)


def test_convolutions_of_every_kind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),  # depthwise
        nn.PReLU(8),
        nn.Conv2d(8, 12, 1, groups=4),
        nn.LeakyReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(6, 8, 2),
        nn.PixelShuffle(2),
        nn.Conv2d(2, 4, 3, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 256, 5),
    )
    relations = _holds(model, torch.randn(1, 3, 8, 8), 6)
    tied = next(r for r in relations if r.producers[0].site == "7")
    assert tied.size == 2 and tied.producers[0].channel_of.tolist() == [0] * 4 + [1] * 4


def test_channels_last_parameters_are_edited_right() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    _holds(model, torch.randn(1, 3, 8, 8), 1)


def test_one_weight_in_two_places() -> None:
    torch.manual_seed(0)
    twice = Case(
        lambda m, x: m.b(F.relu(m.a(x))) + m.b(F.relu(m.c(x))), a=_linear(4, 6), b=_linear(6, 3), c=_linear(4, 6)
    )
    (relation,) = _holds(twice, torch.randn(2, 4), 1)
    assert {end.site for end in relation.producers} == {"a", "c"}
    transposed = Case(lambda m, x: F.linear(m.a(x), m.a.weight.t()), a=_linear(4, 6))
    assert find_relations(record(transposed, torch.randn(2, 4))) == []


def test_fused_weights_cut_by_chunk_and_copied_weights() -> None:
    torch.manual_seed(0)

    def cut(m: Any, x: Tensor) -> Tensor:
        a, b = m.ab(x).chunk(2, -1)
        return m.out(torch.sigmoid(a) * b)

    (relation,) = _holds(Case(cut, ab=_linear(4, 12), out=_linear(6, 3)), torch.randn(2, 4), 1)
    assert relation.kind == "up->down"
    assert relation.producers[0].channel_of.tolist() == [-1] * 6 + list(range(6))

    def halves(m: Any, x: Tensor) -> Tensor:
        first, second = m.w.weight.chunk(2)
        return m.out(F.relu(F.linear(x, first))) + m.out2(F.relu(F.linear(x, second)))

    _holds(Case(halves, w=_linear(4, 12, False), out=_linear(6, 3), out2=_linear(6, 3)), torch.randn(2, 4), 2)

    def copied(m: Any, x: Tensor) -> Tensor:
        weight = m.w.weight[torch.tensor([3, 1, 0, 2])]  # a copy, not a view
        return m.out(F.relu(F.linear(x, weight)))

    (relation,) = _holds(Case(copied, w=_linear(5, 4, False), out=_linear(4, 3)), torch.randn(2, 5), 1)
    assert relation.producers[0].index is not None


def test_norm_weights_that_enter_as_one_plus_w() -> None:
    torch.manual_seed(0)

    def body(m: Any, x: Tensor) -> Tensor:
        return m.out(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.w))

    model = Case(body, out=_linear(6, 3), w=nn.Parameter(0.1 * torch.randn(6)))
    (relation,) = _holds(model, torch.randn(2, 6), 1)
    assert relation.producers[0].offset == 1.0 and relation.kind == "norm->linear"


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.b(torch.sigmoid(m.a(x))),
        lambda m, x: m.b(m.a(x) * m.a(x)),
        lambda m, x: m.b(m.a(x) + 1.0),
        lambda m, x: m.b(m.a(x) + torch.ones(6)),
        lambda m, x: m.b(F.normalize(m.a(x), dim=-1)),
        lambda m, x: m.b(m.a(x).clamp(-1, 1)),
        lambda m, x: m.b(m.a(x).softmax(-1)),
        lambda m, x: m.b(m.a(x).masked_fill(torch.eye(2, 6, dtype=torch.bool), 1.0)),
        lambda m, x: m.b(torch.cat([m.a(x)[:, :3], x[:, :3]], -1)) + m.a(x).sum() ** 2,
        lambda m, x: (m.a(x), m.b(m.a(x)))[1] + m.a(x).abs().log().sum(),
        lambda m, x: (h := m.a(x), m.b(h), h)[1:],
        lambda m, x: m.b(h := m.a(x)) * h.mean().item(),
        lambda m, x: m.b(h := m.a(x)) * float(h.sum()),
        lambda m, x: (h := m.a(x), m.b(h) if bool(h.sum()) else x)[1],
        lambda m, x: m.b(h := m.a(x)) * h.mean(),
    ],
)
def test_no_relation_where_a_scale_would_show(body: Any) -> None:
    torch.manual_seed(0)
    assert find_relations(record(Case(body, a=_linear(4, 6), b=_linear(6, 3)), torch.randn(2, 4))) == []


@pytest.mark.parametrize("named", [False, True])
def test_parts_that_are_joined_keep_their_relations(named: bool) -> None:
    torch.manual_seed(0)

    def joined(m: Any, x: Tensor) -> Tensor:
        parts = [m.a(x), m.c(x)]
        return m.b(torch.cat(tensors=parts, dim=-1) if named else torch.cat(parts, -1))

    _holds(Case(joined, a=_linear(4, 6), c=_linear(4, 2), b=_linear(8, 3)), torch.randn(2, 5, 4), 2)


def test_values_changed_through_an_alias_have_no_relation() -> None:
    torch.manual_seed(0)

    def written(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h[:, 0].mul_(2.0).add_(1.0)
        return m.b(h)

    assert find_relations(record(Case(written, a=_linear(4, 6), b=_linear(6, 3)), torch.randn(2, 4))) == []

    def relu_in_place(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        F.relu_(h)
        return m.b(h)

    _holds(Case(relu_in_place, a=_linear(4, 6), b=_linear(6, 3)), torch.randn(2, 4), 1)


def test_zeros_fit_any_scale() -> None:
    torch.manual_seed(0)

    def padded(m: Any, x: Tensor) -> Tensor:
        h = F.pad(m.a(x), (0, 0, 1, 1))
        return m.b(h.roll(1, 0)) + m.b(torch.cat([torch.zeros(1, 6, dtype=x.dtype), h[:3]]))

    (relation,) = _holds(Case(padded, a=_linear(4, 6), b=_linear(6, 3)), torch.randn(2, 4), 1)
    assert "shift" not in relation.permits and "scale" in relation.permits


def test_a_missing_bias_is_made_for_a_shift() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    (relation,) = find_relations(record(model, x))
    before = model(x)
    shift(model, relation, torch.arange(6.0))
    assert isinstance(model[1].bias, nn.Parameter) and "1.bias" in model.state_dict()
    assert torch.allclose(model(x), before, atol=1e-12)


# -- reading weights by channel --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["timm-regnety", "hf-gpt2", "hf-mixtral-grouped", "hf-llama", "torchvision-shufflenet"]
)
def test_channels_are_the_elements_a_scale_touches(name: str) -> None:
    model, *_, relations = related(name)
    model = copy.deepcopy(model).double()
    for relation in relations:
        for end in relation.ends:
            if end.axis == "vector" or end.offset:
                continue
            before = channels(model, end)
            assert before.shape[0] == len(end.channel_of) and before.numel() == operand(model, end).numel()
            s = random_scales(relation.size)
            alone = replace(
                relation, producers=(end,) if end.axis != "in" else (), consumers=(end,) if end.axis == "in" else ()
            )
            scale(model, alone, s)
            factor = torch.where(
                end.channel_of >= 0, s[end.channel_of.clamp(min=0)], torch.ones(1, dtype=torch.float64)
            )
            expected = before * factor[:, None] if end.axis != "in" else before / factor[:, None]
            assert torch.allclose(channels(model, end), expected, rtol=1e-12, atol=0)


# -- the union-find --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_labels_join_like_a_plain_union(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = Labels()
    fresh = labels.fresh(60)
    sets = [{int(x)} for x in fresh]

    def of(x: int) -> set[int]:
        return next(s for s in sets if x in s)

    for _ in range(4):
        a, b = (torch.from_numpy(random.choice(fresh.numpy(), 12)) for _ in range(2))
        labels.unite(a, b, "test")
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            joined = of(x) | of(y)
            sets[:] = [s for s in sets if not (s & joined)] + [joined]
    roots = dict(zip(fresh.tolist(), labels.classes(fresh).tolist(), strict=True))
    assert all(roots[x] == min(of(x)) for x in fresh.tolist())


def test_fixed_blocks_and_wild_does_not() -> None:
    labels = Labels()
    a = labels.fresh(4)
    labels.unite(a, torch.tensor([FIXED, WILD, FIXED, int(a[1])]), "met a constant")
    blocked = labels.marked("block")["met a constant"]
    assert [bool(blocked[c]) for c in labels.classes(a)] == [True, False, True, False]


def test_compact_keeps_values_and_saves_memory() -> None:
    labels = torch.arange(8).view(1, 8, 1, 1).expand(2, 8, 16, 16)
    moved = compact(labels.roll(3, 2).contiguous())
    assert torch.equal(moved, labels) and moved.untyped_storage().nbytes() == 64
    assert full(FIXED, (1000, 1000)).untyped_storage().nbytes() == 8
