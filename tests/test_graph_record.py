"""Recording: composites opened exactly, in-place writes and aliases followed, weights resolved at call time,
nothing hidden.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewbits.errors import FewbitsError
from fewbits.graph import Ref, record
from fewbits.graph.decompose import attention, can_open, einsum
from fewbits.graph.trace import Tracer
from zoo_tiny import build, recorded

torch.manual_seed(0)


class Fn(nn.Module):
    """A function of (module, x) with two linears at hand."""

    def __init__(self, run: Callable[[Fn, Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.run, self.a, self.b = run, nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def reads(graph: Any, site: str) -> Any:
    """The value that a site's call reads, and the call that made it."""
    value = graph.values[graph.sites[site].value]
    return value, None if value.call is None else graph.calls[value.call]


# -- composites ------------------------------------------------------------------------------------------------------
def _qkv(kv_heads: int = 4, keys: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    shape = lambda heads, tokens: torch.randn(2, heads, tokens, 8, generator=g).to(dtype)  # noqa: E731
    return shape(4, 5), shape(kv_heads, keys), shape(kv_heads, keys)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": "bool"},
        {"attn_mask": "float"},
        {"attn_mask": "dead row"},
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True, "scale": 0.1},
    ],
    ids=str,
)
def test_attention_equals_torch(options: dict[str, Any]) -> None:
    q, k, v = _qkv(2 if "enable_gqa" in options else 4)
    options = dict(options)
    if "attn_mask" in options:
        mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[:, 0] = True
        if options["attn_mask"] == "dead row":
            mask[2] = False
        options["attn_mask"] = mask if options["attn_mask"] != "float" else torch.randn(2, 1, 5, 6)
    torch.testing.assert_close(attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options))


def test_attention_gradients_equal_torch() -> None:
    ours, theirs = ([x.clone().requires_grad_() for x in _qkv()] for _ in range(2))
    attention(*ours, is_causal=True).square().sum().backward()
    F.scaled_dot_product_attention(*theirs, is_causal=True).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "sizes", "no bias"])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "both", "per head"])
def test_multi_head_attention_equals_torch(batch_first: bool, kind: str, masks: str) -> None:
    sizes = {"kdim": 6, "vdim": 10} if kind == "sizes" else {}
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=kind != "no bias", **sizes).eval()
    with torch.no_grad():
        for param in module.parameters():
            param.normal_(generator=torch.Generator().manual_seed(5)).mul_(0.3)
    shape = (lambda t, w: (2, t, w)) if batch_first else (lambda t, w: (t, 2, w))
    query = torch.randn(shape(5, 16))
    key = query if kind in ("self", "no bias") else torch.randn(shape(7, sizes.get("kdim", 16)))
    value = key if kind != "sizes" else torch.randn(shape(7, 10))
    keys = key.shape[1 if batch_first else 0]
    options: dict[str, Any] = {}
    if masks in ("causal", "both"):
        options["attn_mask"] = torch.ones(5, keys, dtype=torch.bool).triu(1)
    if masks == "per head":
        options["attn_mask"] = torch.randn(8, 5, keys)
    if masks in ("padding", "both"):
        options["key_padding_mask"] = torch.zeros(2, keys, dtype=torch.bool)
        options["key_padding_mask"][1, -2:] = True
    for need_weights, average in ((True, True), (True, False), (False, True)):
        arguments = {**options, "need_weights": need_weights, "average_attn_weights": average}
        module.train()  # torch's slow path; there is no dropout
        expected = module(query, key, value, **arguments)
        module.eval()
        holder = Opening(module)
        got = holder(query, key, value, **arguments)
        assert holder.opened == 1
        torch.testing.assert_close(got[0], expected[0], atol=1e-6, rtol=1e-6)
        assert (got[1] is None) == (expected[1] is None)
        if expected[1] is not None:
            torch.testing.assert_close(got[1], expected[1], atol=1e-6, rtol=1e-6)


class Opening(Tracer):
    """Runs a model with composites opened, and counts softmaxes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.opened = model, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.install(self.model)
        try:
            with torch.no_grad():
                return self.model(*args, **kwargs)
        finally:
            self.remove()

    def handle(self, op: str, key: Any, func: Any, args: Any, kwargs: Any) -> Any:
        self.opened += op == "softmax"
        return func(*args, **kwargs)


def test_unbatched_multi_head_attention() -> None:
    module = nn.MultiheadAttention(8, 2).eval()
    x = torch.randn(5, 8)
    module.train()
    expected = module(x, x, x)
    got = Opening(module.eval())(x, x, x)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_torchvision_vit_is_unchanged_by_opening() -> None:
    model, args, _ = build("torchvision-vit")
    model.train()
    with torch.no_grad():
        expected = model(*args)
    model.eval()
    holder = Opening(model)
    torch.testing.assert_close(holder(*args), expected, atol=1e-6, rtol=1e-6)
    assert holder.opened == 2


def test_attention_options_that_cannot_be_opened_are_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, add_bias_kv=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x)[0]

    graph = record(Odd(), torch.randn(3, 1, 8))
    assert graph.opaque == ["attn.multi_head_attention_forward"]


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhid,bhjd->bhij", ((2, 3, 4, 5), (2, 3, 6, 5))),
        ("bhij,bjhd->bihd", ((2, 3, 4, 6), (2, 6, 3, 5))),
        ("...d,de->...e", ((2, 3, 4), (4, 5))),
        ("bij,jk", ((2, 3, 4), (4, 5))),
        ("b...i,b...j i->b...j".replace(" ", ""), ((2, 3, 4), (2, 3, 5, 4))),
        ("ij,kj->ki", ((3, 4), (5, 4))),
        ("bnd,hde->bhne", ((2, 3, 4), (5, 4, 6))),
        ("abc,cd->d", ((2, 3, 4), (4, 5))),
        ("bchw,bchwk->bk", ((2, 3, 4, 5), (2, 3, 4, 5, 6))),
    ],
)
def test_einsum_equals_torch(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    assert can_open("einsum", (equation, a, b), {})
    torch.testing.assert_close(einsum(equation, a, b), torch.einsum(equation, a, b))


def test_einsum_that_is_no_matrix_product_stays_closed() -> None:
    a = torch.randn(3)
    assert not can_open("einsum", ("i,j->ij", a, a), {})
    assert not can_open("einsum", ("ii->i", torch.randn(3, 3)), {})
    assert not can_open("einsum", ("ij,jk,kl->il", *[torch.randn(3, 3)] * 3), {})


def test_attention_written_with_einsum_has_sites() -> None:
    def run(m: Fn, x: Tensor) -> Tensor:
        q, k = m.a(x), m.b(x)
        p = torch.einsum("bid,bjd->bij", q, k).div(math.sqrt(8)).softmax(-1)
        return torch.einsum("bij,bjd->bid", p, x)

    graph = record(Fn(run), torch.randn(2, 5, 8))
    assert "query_key" in graph.sites["matmul.lhs"].tags
    assert "attention_value" in graph.sites["matmul_1.rhs"].tags


# -- what is hidden is said ------------------------------------------------------------------------------------------
def test_recurrent_layers_are_opaque() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    graph = record(Recurrent(), torch.randn(2, 5, 8))
    assert graph.opaque == ["rnn.lstm"]
    assert [s.name for s in graph.sites.values() if s.role == "weight"] == ["head.weight"]


def test_unknown_ops_that_read_weights_are_opaque() -> None:
    def run(m: Fn, x: Tensor) -> Tensor:
        return torch.ops.aten.addmm(m.a.bias, x, m.a.weight.t()) + torch.tensordot(x, m.b.weight, dims=([1], [1]))

    graph = record(Fn(run), torch.randn(3, 8))
    assert graph.opaque == ["tensordot"]
    assert graph.sites["a.weight"].param == "a.weight"


def test_flex_attention_is_opaque() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def run(m: Fn, x: Tensor) -> Tensor:
        q, k = (y.view(1, 4, 2, 4).transpose(1, 2) for y in (m.a(x), m.b(x)))
        return flex.flex_attention(q, k, k)

    assert record(Fn(run), torch.randn(1, 4, 8)).opaque == ["flex_attention"]


def test_scripted_submodule_is_one_clear_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(FewbitsError, match="1 is scripted"):
        record(model, torch.randn(2, 4))
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_failing_forward_is_one_clear_error_and_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4)).train()
    with pytest.raises(FewbitsError, match="Sequential cannot run forward"):
        record(model, torch.randn(2, 4))
    assert model.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.overrides._get_current_function_mode_stack() == []


# -- data flow -------------------------------------------------------------------------------------------------------
def test_in_place_ops_make_new_values() -> None:
    def run(m: Fn, x: Tensor) -> Tensor:
        h = m.a(x)
        h += 1.0
        h.relu_()
        h[:, 0] = 0.0
        return m.b(h)

    graph = record(Fn(run), torch.randn(2, 8))
    chain = []
    _, call = reads(graph, "b.input")
    while call is not None and call.op != "linear":
        chain.append((call.op, call.inplace))
        call = graph.calls[graph.values[next(call.refs()).value].call]
    assert chain == [("setitem", True), ("relu", True), ("add", True)]


@pytest.mark.parametrize("through", ["view", "base"])
def test_writes_through_an_alias_are_followed(through: str) -> None:
    def run(m: Fn, x: Tensor) -> Tensor:
        h = m.a(x)
        v = h[:, :4]
        if through == "view":
            v.mul_(2.0)
            return m.b(h)
        h.mul_(2.0)
        return m.b(torch.cat([v, v], 1))

    graph = record(Fn(run), torch.randn(2, 8))
    if through == "view":
        value, call = reads(graph, "b.input")
    else:
        cat = next(call for call in graph.calls if call.op == "cat")
        value = graph.values[next(cat.refs()).value]
        call = graph.calls[value.call]
    assert value.aliased and call.op == "mul"


def test_every_recorded_operand_comes_before_its_call() -> None:
    for name in ("timm-swin", "hf-bart", "torchvision-fasterrcnn"):
        graph = recorded(name)
        for call in graph.calls:
            for ref in call.refs():
                made = graph.values[ref.value].call
                assert made is None or made < call.index


def test_module_calls_hold_their_inputs_and_outputs() -> None:
    graph = recorded("hf-llama")
    layers = [note for note in graph.module_io if note.path in ("model.layers.0", "model.layers.1")]
    first, second = layers
    assert first.outputs[0] in second.inputs and first.stop <= second.start
    assert any("DynamicCache" in place for place in first.objects_in) and first.objects_out == ()
    for note in graph.module_io:
        inner = [
            call
            for call in graph.calls[note.start : note.stop]
            if f"{call.module}.".startswith(f"{note.path}.") or not note.path
        ]
        assert len(inner) == note.stop - note.start
    root = graph.module_io[0]
    assert root.path == "" and (root.start, root.stop) == (0, len(graph.calls))
    assert set(root.inputs) == set(graph.inputs)


# -- weights ---------------------------------------------------------------------------------------------------------
def test_computed_weights_have_sites_without_a_parameter() -> None:
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(plain, nn.Linear(8, 4))
    graph = record(model, torch.randn(2, 8))
    sites = [s for s in graph.sites.values() if s.role == "weight"]
    assert [(s.op, s.param, "computed" in s.tags) for s in sites] == [
        ("linear", None, True),
        ("linear", "1.weight", False),
    ]


def test_weights_through_views_and_casts() -> None:
    def run(m: Fn, x: Tensor) -> Tensor:
        y = x @ m.a.weight.T
        z = F.linear(y, m.b.weight.to(torch.float64).float())
        return F.linear(z, m.b.weight[:4]) + torch.addmm(m.a.bias[:4], z, m.a.weight.t()[:, 4:])

    graph = record(Fn(run), torch.randn(3, 8))
    found = [(s.param, s.layout, s.sliced) for s in graph.sites.values() if s.role == "weight"]
    assert found == [
        ("a.weight", "io", False),
        ("b.weight", "oi", False),
        ("b.weight", "oi", True),
        ("a.weight", "io", True),
    ]
    assert graph.sites["a.weight"].view == ((8, 8), (1, 8), 0)


def test_cpu_offload_resolves_every_weight() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, _, kwargs = build("hf-llama")
    expected = {name: site.param for name, site in recorded("hf-llama").sites.items() if site.role == "weight"}
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    graph = record(offloaded, **kwargs)
    assert {name: site.param for name, site in graph.sites.items() if site.role == "weight"} == expected


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_modules_are_recorded(reentrant: bool) -> None:
    def run(m: Fn, x: Tensor) -> Tensor:
        return m.b(checkpoint(m.a, x, use_reentrant=reentrant))

    graph = record(Fn(run), torch.randn(2, 8, requires_grad=True))
    assert [name for name, site in graph.sites.items() if site.role == "weight"] == ["a.weight", "b.weight"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_same_calls(reentrant: bool) -> None:
    class Watch(Tracer):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def handle(self, op: str, key: Any, func: Any, args: Any, kwargs: Any) -> Any:
            if op == "linear":
                self.seen.append(key)
            return func(*args, **kwargs)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    model, watch = Model(), Watch()
    watch.install(model)
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    watch.remove()
    assert watch.seen == [("block.0", "linear", 0), ("block.1", "linear", 0)] * 2


class Doubling(Tracer):
    """Changes the result of every weighted call, so that a call it does not see shows."""

    def handle(self, op: str, key: Any, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        return out * 1.1 if op == "linear" and key is not None else out


def test_compiled_models_run_the_same_calls_without_a_graph_break() -> None:
    model, args, _ = build("timm-vit")
    model = copy.deepcopy(model)
    tracer = Doubling()
    tracer.install(model)
    try:
        with torch.no_grad():
            expected = model(*args)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(*args), expected)
    finally:
        tracer.remove()
        torch._dynamo.reset()
    with torch.no_grad():
        assert not torch.allclose(model(*args), expected)


def test_compiled_models_can_be_recorded() -> None:
    model, args, _ = build("timm-resnet")
    assert list(record(torch.compile(model), *args).sites) == list(recorded("timm-resnet").sites)


def test_copied_models_and_threads_have_their_own_stacks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tracer = Doubling()
    tracer.install(model)
    x = torch.randn(2, 4)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert twin[0]._forward_pre_hooks and next(iter(twin[0]._forward_pre_hooks.values())).tracer is not tracer
    seen: list[Tensor] = []
    workers = [threading.Thread(target=lambda m=m: seen.append(m(x))) for m in (model, twin, model)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(seen) == 3 and all(torch.equal(y, expected) for y in seen)
    tracer.remove()
    assert not torch.equal(model(x), expected) and torch.equal(twin(x), expected)


def test_wrapper_prefixes_are_stripped() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    model, args, _ = build("timm-vit")
    assert list(record(Wrapper(model), *args).sites) == list(recorded("timm-vit").sites)


def test_inputs_nested_in_objects_and_containers_are_inputs() -> None:
    graph = recorded("torchvision-fasterrcnn")
    assert [graph.values[v].shape for v in graph.inputs] == [(3, 64, 64)]
    assert len(graph.outputs) == 3 and all(isinstance(v, int) for v in graph.outputs)
    assert all(isinstance(ref, Ref) for call in graph.calls for ref in call.refs())


def test_recording_leaves_the_model_as_it_was() -> None:
    model, args, _ = build("timm-resnet")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record(model, *args)
    assert model.training
    model.eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
