"""Sites of real library models: complete against counts taken below the recorder, tagged by data flow, and stable
in name.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fewbits.graph import Graph, record
from fewbits.graph.trace import Tracer
from zoo_tiny import NAMES, build, recorded

#: Attention products of each model: (attentions, key or value cache writes).
ATTENTIONS = {
    "timm-vit": (2, 0),
    "timm-deit-distilled": (2, 0),
    "timm-swin": (4, 0),
    "timm-mobilevit": (9, 0),
    "timm-efficientformer": (1, 0),
    "torchvision-vit": (2, 0),
    "hf-llama": (2, 4),
    "hf-qwen3": (2, 4),
    "hf-gemma": (2, 4),
    "hf-opt": (2, 4),
    "hf-bloom": (2, 4),
    "hf-falcon": (2, 4),
    "hf-gpt2": (2, 4),
    "hf-gpt-neo": (2, 4),
    "hf-bert": (2, 0),
    "hf-roberta": (2, 0),
    "hf-bart": (6, 8),
    "hf-t5": (6, 8),
    "hf-mixtral-eager": (2, 4),
    "hf-mixtral-grouped": (2, 4),
    "hf-detr": (6, 0),
    "diffusers-unet2d": (4, 0),
    "diffusers-unet2d-condition": (8, 0),
}
#: Residual adds and skip concatenations, counted by hand in the models' code.
RESIDUALS = {
    "timm-vit": 2 * 2,
    "timm-deit-distilled": 2 * 2,
    "timm-swin": 4 * 2,
    "timm-mobilevit": 3 + 9 * 2,
    "timm-efficientformer": 5 * 2,
    "timm-resnet": 5,
    "timm-resnet-bottleneck": 5,
    "timm-regnetx": 6,
    "timm-regnety": 6,
    "timm-mobilenetv2": 10,
    "timm-densenet": 0,
    "timm-vgg": 0,
    "torchvision-vit": 2 * 2,
    "torchvision-shufflenet": 0,
    "torchvision-inception": 0,
    "torchvision-mnasnet": 10,
    "torchvision-retinanet": 4 + 1,
    "torchvision-fasterrcnn": 4 + 1,
    "hf-bart": 2 * 2 + 2 * 3,
    "hf-t5": 2 * 2 + 2 * 3,
    "hf-detr": 4 + 2 * 2 + 2 * 3,
    "diffusers-unet2d": 8 + 4,
    "diffusers-unet2d-condition": 8 + 4 * 3 + 4,
    **{
        f"hf-{name}": 2 * 2
        for name in "llama qwen3 gemma opt bloom falcon gpt2 gpt-neo bert roberta mixtral-eager mixtral-grouped".split()
    },
}
SKIPS = {
    "timm-mobilevit": 3,
    "timm-densenet": 8,
    "torchvision-shufflenet": 5,
    "torchvision-inception": 11 + 4,
    "diffusers-unet2d": 4,
    "diffusers-unet2d-condition": 4,
}
#: Normalisations of the decoders that write RMSNorm out, per model.
WRITTEN_OUT_NORMS = {
    "hf-llama": 5,
    "hf-qwen3": 9,
    "hf-gemma": 5,
    "hf-mixtral-eager": 5,
    "hf-mixtral-grouped": 5,
    "hf-t5": 12,
}


class _Aten(TorchDispatchMode):
    """Counts the kernels that really run, below every Python-level function."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def kernels(name: str) -> Counter[str]:
    model, args, kwargs = build(name)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Aten() as mode:
        # The encoder fast path would fuse whole layers; it is off in training mode only, so switch it off globally.
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
    return mode.counts


def uses(graph: Graph, *ops: str) -> int:
    return sum(site.uses for site in graph.sites.values() if site.role == "output" and site.op in ops)


def tagged(graph: Graph, tag: str, *roles: str) -> list[str]:
    return [site.name for site in graph.sites.values() if tag in site.tags and (not roles or site.role in roles)]


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_has_its_site(name: str) -> None:
    graph, ran = recorded(name), kernels(name)
    assert uses(graph, "conv1d", "conv2d", "conv3d", "conv_transpose2d") == ran["convolution"]
    products = sum(ran[op] for op in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"))
    assert uses(graph, "linear", "addmm", "matmul", "baddbmm", "grouped_mm") == products
    assert uses(graph, "softmax") == ran["_softmax"] + ran["_safe_softmax"]
    assert uses(graph, "layer_norm") == ran["native_layer_norm"]
    assert uses(graph, "group_norm") == ran["native_group_norm"]
    assert (
        uses(graph, "batch_norm")
        == ran["native_batch_norm"] + ran["_native_batch_norm_legit_no_training"] + ran["cudnn_batch_norm"]
    )
    assert uses(graph, "embedding") == ran["embedding"]
    for op, kernel in (("gelu", "gelu"), ("silu", "silu"), ("hardtanh", "hardtanh"), ("tanh", "tanh")):
        assert uses(graph, op) == ran[kernel] + ran[kernel + "_"], op
    assert uses(graph, "relu") == ran["relu"] + ran["relu_"]
    assert graph.opaque == []


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_and_conv_module_has_a_weight_site(name: str) -> None:
    model, args, kwargs = build(name)
    ran: Counter[str] = Counter()
    handles = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2 and not isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda m, i, o, path=path: ran.update([path])))
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    graph = recorded(name)
    found = {site.name.removesuffix(".weight"): site for site in graph.sites.values() if site.role == "weight"}
    assert set(ran) - set(found) == set()
    for path, count in ran.items():
        assert found[path].uses == count
        assert found[path].param == f"{path}.weight"
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() >= 2}
    assert {site.param for site in found.values()} <= names


@pytest.mark.parametrize("name", NAMES)
def test_attention_residual_and_skip_tags(name: str) -> None:
    graph = recorded(name)
    attentions, writes = ATTENTIONS.get(name, (0, 0))
    assert len(tagged(graph, "query_key")) == 2 * attentions
    assert len(tagged(graph, "attention_value")) == attentions
    assert len(tagged(graph, "post_softmax", "lhs", "rhs")) == attentions
    assert len(tagged(graph, "kv_cache")) == writes
    assert len(tagged(graph, "residual")) == RESIDUALS[name], tagged(graph, "residual")
    assert len(tagged(graph, "skip_concat")) == SKIPS.get(name, 0), tagged(graph, "skip_concat")
    for query in tagged(graph, "query_key", "lhs"):  # each attention has all of its tags in one module
        module = graph.sites[query].module
        here = [site for site in graph.sites.values() if f"{site.module}.".startswith(f"{module}.")]
        assert sum("attention_value" in site.tags for site in here) == 1
        assert sum("post_softmax" in site.tags and site.role == "output" for site in here) == 1


@pytest.mark.parametrize("name", sorted(WRITTEN_OUT_NORMS))
def test_norms_written_out_are_norm_sites(name: str) -> None:
    graph = recorded(name)
    norms = [
        site
        for site in graph.sites.values()
        if site.op == "mul" and site.role == "output" and "post_layernorm" in site.tags
    ]
    assert len(norms) == WRITTEN_OUT_NORMS[name]
    model = build(name)[0]
    modules = {
        path for path, module in model.named_modules() if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    }
    assert {site.name.removesuffix(".output") for site in norms} == modules
    assert not any(".mul.lhs" in name and name.split(".mul")[0] in modules for name in graph.sites)


def test_qkv_inputs_are_post_layernorm_through_windows_and_padding() -> None:
    graph = recorded("timm-swin")
    inputs = [site for name, site in graph.sites.items() if name.endswith("attn.qkv.input")]
    assert len(inputs) == 4 and all("post_layernorm" in site.tags for site in inputs)


@pytest.mark.parametrize(
    ("name", "site", "tag"),
    [
        ("timm-vit", "blocks.0.mlp.fc2.input", "post_gelu"),
        ("hf-bloom", "transformer.h.0.mlp.dense_4h_to_h.input", "post_gelu"),
        ("hf-gpt2", "transformer.h.1.mlp.c_proj.input", "post_gelu"),
        ("hf-llama", "model.layers.0.mlp.mul.lhs", "post_silu"),
        ("hf-opt", "model.decoder.layers.0.fc2.input", "post_relu"),
        ("hf-gemma", "model.layers.1.self_attn.q_proj.input", "post_layernorm"),
        ("diffusers-unet2d", "down_blocks.0.resnets.0.conv1.input", "post_silu"),
        ("timm-mobilenetv2", "blocks.1.0.conv_dw.input", "post_hardtanh"),
    ],
)
def test_role_tags(name: str, site: str, tag: str) -> None:
    assert tag in recorded(name).sites[site].tags


def test_written_out_activations() -> None:
    class Act(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.a, self.b = kind, nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            if self.kind == "silu":
                y = h * torch.sigmoid(h)
            elif self.kind == "quick":
                y = h * torch.sigmoid(1.702 * h)
            elif self.kind == "erf":
                y = h * 0.5 * (1.0 + torch.erf(h / 2**0.5))
            elif self.kind == "gate":
                y = h * torch.sigmoid(self.a(h))
            else:
                y = h * torch.tanh(self.a(h))
            return self.b(y)

    expected = {"silu": {"post_silu"}, "quick": {"post_gelu"}, "erf": {"post_gelu"}, "gate": set(), "tanh gate": set()}
    for kind, tags in expected.items():
        found = record(Act(kind), torch.randn(2, 4)).sites["b.input"].tags
        assert found & {"post_silu", "post_gelu"} == tags, kind


# -- stable names ----------------------------------------------------------------------------------------------------
def _identity(graph: Graph) -> list[Any]:
    # whether a result is a map of positions or a single one is up to the resolution
    return [
        (site.name, site.key, site.op, site.role, sorted(site.tags - {"feature_map"}), site.param)
        for site in graph.sites.values()
    ]


def _another_batch(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    if name in ("torchvision-retinanet", "torchvision-fasterrcnn"):
        image = args[0][0]
        return ([image, image[:, :48, :]],), kwargs
    return tree_map(
        lambda x: torch.cat([x, x.flip(0)]) if isinstance(x, torch.Tensor) and x.dim() > 1 else x, (args, kwargs)
    )


@pytest.mark.parametrize("name", NAMES)
def test_names_are_stable_over_runs_copies_and_batches(name: str) -> None:
    model, args, kwargs = build(name)
    first = _identity(recorded(name))
    assert _identity(record(copy.deepcopy(model), *args, **kwargs)) == first
    args, kwargs = _another_batch(name, args, kwargs)
    assert _identity(record(model, *args, **kwargs)) == first


@pytest.mark.parametrize(
    "name", ["timm-resnet", "timm-mobilevit", "timm-densenet", "torchvision-inception", "diffusers-unet2d"]
)
def test_names_are_stable_over_resolutions(name: str) -> None:
    model, args, kwargs = build(name)
    larger = [
        torch.nn.functional.interpolate(x, scale_factor=2) if torch.is_tensor(x) and x.dim() == 4 else x for x in args
    ]
    assert _identity(record(model, *larger, **kwargs)) == _identity(recorded(name))


class _Keys(Tracer):
    """The keyed calls of every forward of the root module."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[list[Any]] = []

    def started(self) -> None:
        self.forwards.append([])

    def handle(self, op: str, key: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if key is not None:
            self.forwards[-1].append(key)
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["hf-llama", "hf-gpt2", "hf-bloom", "hf-mixtral-grouped", "hf-t5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_runs_the_recorded_sites_in_prefill_and_decode(name: str, cache: str) -> None:
    if cache == "static" and name in ("hf-bloom", "hf-t5"):
        pytest.skip("the library has no static cache for this model")
    model, _, kwargs = build(name)
    graph = recorded(name)
    core = {
        s.key
        for s in graph.sites.values()
        if s.op in ("linear", "addmm", "matmul", "baddbmm", "softmax", "grouped_mm", "silu", "tanh")
    }
    decoder = {key for key in core if not key[0].startswith("encoder")}
    tracer = _Keys()
    tracer.install(model)
    try:
        extra = {"cache_implementation": "static"} if cache == "static" else {}
        model.generate(
            kwargs["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, **extra
        )
    finally:
        tracer.remove()
    steps = [set(keys) & core for keys in tracer.forwards]
    steps = [step for step in steps if any(key[0] == "lm_head" for key in step)]  # the encoder runs by itself first
    assert len(steps) == 3
    for step in steps:
        missing = {
            key for key in decoder - step if "EncDecAttention.k" not in key[0] and "EncDecAttention.v" not in key[0]
        }
        assert missing == set()


# -- special cases ---------------------------------------------------------------------------------------------------
def test_modules_called_several_times_share_a_site() -> None:
    graph = recorded("torchvision-retinanet")
    heads = [site for name, site in graph.sites.items() if name.startswith("head.") and site.role == "weight"]
    assert len(heads) == 10 and {site.uses for site in heads} == {3}
    assert {site.uses for name, site in graph.sites.items() if name.startswith("backbone.body")} == {1}


def test_expert_slices_are_keyed_by_slice_not_by_order() -> None:
    model, _, kwargs = build("hf-mixtral-eager")
    graph = recorded("hf-mixtral-eager")
    path = "model.layers.0.mlp.experts"
    for expert in range(3):
        site = graph.sites[f"{path}.gate_up_proj.{expert}.weight"]
        assert site.key == (path, f"linear@gate_up_proj.{expert}", 0)
        stack = model.get_parameter(f"{path}.gate_up_proj")
        assert site.view is not None
        size, stride, offset = site.view
        assert torch.equal(stack.detach().as_strided(size, stride, offset), stack[expert])
        assert site.used_by == ()
    # one token goes to two of three experts; the third gets its sites all the same, marked as never reached
    few = record(model, input_ids=kwargs["input_ids"][:, :1])
    assert set(few.sites) == set(graph.sites)
    unused = {site.key[1] for site in few.sites.values() if site.uses == 0 and site.module == path}
    assert len({name.rpartition(".")[2] for name in unused if "gate_up" in name}) == 1
    for name, site in few.sites.items():
        assert (site.key, site.view, site.layout) == (
            graph.sites[name].key,
            graph.sites[name].view,
            graph.sites[name].layout,
        )


def test_grouped_expert_products() -> None:
    graph = recorded("hf-mixtral-grouped")
    site = graph.sites["model.layers.0.mlp.experts.grouped_mm.weight"]
    assert site.param == "model.layers.0.mlp.experts.gate_up_proj" and site.layout == "expert_io" and not site.sliced
    assert "model.layers.1.mlp.experts.grouped_mm_1.input" in graph.sites


def test_tied_parameters_know_their_readers() -> None:
    graph = recorded("hf-t5")
    assert graph.sites["lm_head.weight"].used_by == ("decoder.embed_tokens", "encoder.embed_tokens")
    assert graph.sites["encoder.block.0.layer.0.SelfAttention.q.weight"].used_by == ()
    assert recorded("hf-gpt2").sites["lm_head.weight"].param == "lm_head.weight"


def test_packed_attention_weights_are_separate_slices() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.attn(x, y, y)[0]

    graph = record(Cross(), torch.randn(1, 3, 8), torch.randn(1, 5, 8))
    packed = [site for site in graph.sites.values() if site.param == "attn.in_proj_weight"]
    assert [site.name for site in packed] == ["attn.linear.weight", "attn.linear_1.weight", "attn.linear_2.weight"]
    assert all(site.sliced and site.used_by == () for site in packed)
    assert graph.sites["attn.out_proj.weight"].param == "attn.out_proj.weight"


def test_index_arithmetic_does_not_shift_names() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
            index = torch.arange(4)
            for _ in range(steps):
                index = index + torch.ones_like(index)
            return self.a(self.a(x) + x)

    model, x = Add(), torch.randn(2, 4)
    assert list(record(model, x, 0).sites) == list(record(model, x, 3).sites)
    assert "add.output" in record(model, x, 0).sites
