"""The run-time mode: what an attached model keeps, where quantizers act, and what the ledger refuses."""

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

import zoo_tiny
from fewbits.attach import Attachment, attachment_of
from fewbits.errors import FewbitsError
from fewbits.formats import PerChannel, PerTensor, affine
from fewbits.graph import operands, record
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer
from fewbits.ranges import MinMax
from fewbits.recipe import QSpec

WEIGHT = QSpec(affine(4), PerChannel(0), MinMax())
ACTIVATION = QSpec(affine(6), PerTensor(), MinMax())


def everything(site: Site) -> bool:
    """Weights of layers, their inputs and the operands of attention products."""
    if site.role == "weight":
        return site.op != "embedding"
    return bool(site.tags & {"layer_input", "matmul_operand"}) and site.role in ("input", "lhs", "rhs")


def weights_only(site: Site) -> bool:
    return site.role == "weight" and site.op != "embedding" and not site.used_by


def attach(
    model: nn.Module, *args: Any, wanted: Callable[[Site], bool] = everything, freeze: bool = False, **kwargs: Any
) -> Attachment:
    """Quantizers at the wanted sites, fitted on one forward of these inputs."""
    graph = record(model, *args, **kwargs)
    attachment = Attachment(model, graph.sites, {call.key for call in graph.calls if call.key is not None})
    pending: set[str] = set()
    for site in graph.sites.values():
        if not wanted(site):
            continue
        if site.role == "weight":
            commit(attachment, site, freeze)
        else:
            attachment.set_quantizer(site.name, Quantizer(ACTIVATION, site.name))
            pending.add(site.name)
    attachment.calibrating = pending
    with torch.no_grad():
        model(*args, **kwargs)
    for name in attachment.calibrating:  # experts that got no token
        attachment.set_quantizer(name, None)
    attachment.calibrating = set()
    return attachment


def commit(attachment: Attachment, site: Site, freeze: bool) -> None:
    quantizer = Quantizer(WEIGHT, site.name)
    weight = operands.read(attachment.model, site)
    quantizer.calibrate(weight.flatten(1))
    attachment.set_quantizer(site.name, quantizer)
    if freeze:
        attachment.codes[site.name] = quantizer.encode(weight.flatten(1))
        operands.write(attachment.model, site, attachment.decoded(site.name).view(weight.shape))
        attachment.freeze(site.name)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def run(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return first(model(*args, **kwargs)).clone()


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Net(nn.Module):
    """Blocks, optionally recomputed in the backward pass, and a head."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 4)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant") if self.recompute else block(x)
        return self.head(x)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


class Rooted(Net):
    """A root with weighted ops of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), self.head.weight[:, :4]) @ self.blocks[0].up.weight[:4, :4].T


def net(**options: Any) -> Net:
    torch.manual_seed(1)
    return Net(**options).eval()


# -- what an attached model keeps -----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "torchvision-vit", "hf-llama", "hf-gpt2"])
def test_class_and_state_dict_stay(name: str) -> None:
    model, args, kwargs = zoo_tiny.MODELS[name]()
    kind, keys, before = type(model), list(model.state_dict()), run(model, *args, **kwargs)
    attachment = attach(model, *args, **kwargs)
    assert type(model) is kind and list(model.state_dict()) == keys
    after = run(model, *args, **kwargs)
    assert not torch.allclose(before, after, atol=1e-4)
    assert attachment_of(model) is attachment
    with torch.inference_mode():
        assert torch.equal(first(model(*args, **kwargs)), after)
    attachment.detach()
    assert torch.equal(run(model, *args, **kwargs), before) and attachment_of(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    attach(model, *args, **kwargs)  # and again


@pytest.mark.parametrize("name", ["hf-llama", "hf-opt"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_takes_the_tokens_of_full_forwards(name: str, cache: str) -> None:
    model, _, kwargs = zoo_tiny.MODELS[name]()
    ids = kwargs["input_ids"]
    model.config.use_cache = False
    attach(model, **kwargs)
    model.config.use_cache = True
    steps, manual = 6, ids
    for _ in range(steps):
        logits = run(model, input_ids=manual, use_cache=False)
        manual = torch.cat([manual, logits[:, -1:].argmax(-1)], 1)
    options = {
        "do_sample": False,
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    made = model.generate(ids, **options, **({"cache_implementation": "static"} if cache == "static" else {}))
    assert torch.equal(made, manual)
    with torch.no_grad():  # one prefill, then one token at a time
        prefill = model(input_ids=manual[:, :-1], use_cache=True)
        step = model(input_ids=manual[:, -1:], past_key_values=prefill.past_key_values, use_cache=True)
        full = model(input_ids=manual, use_cache=False)
    torch.testing.assert_close(step.logits[:, -1], full.logits[:, -1], rtol=1e-4, atol=1e-5)
    attachment_of(model).detach()  # type: ignore[union-attr]
    with torch.no_grad():  # the comparison above would fail in floating point
        assert not torch.allclose(model(input_ids=manual, use_cache=False).logits, full.logits, atol=1e-3)


def test_a_copy_has_its_own_quantizers() -> None:
    model = net()
    attachment = attach(model, X)
    before = run(model, X)
    twin = copy.deepcopy(model)
    theirs = attachment_of(twin)
    assert theirs is not None and theirs is not attachment and theirs.model is twin
    assert torch.equal(run(twin, X), before)
    theirs.quantizer("head.input").scale.mul_(3.0)  # type: ignore[union-attr,operator]
    with torch.no_grad():
        twin.head.weight.mul_(2.0)
    assert torch.equal(run(model, X), before) and not torch.allclose(run(twin, X), before, atol=1e-3)
    theirs.detach()
    assert not any(module._forward_hooks for module in twin.modules())
    assert torch.equal(run(model, X), before)
    attachment.detach()
    again = copy.deepcopy(twin)
    assert torch.equal(run(again, X), run(twin, X))


def test_a_copied_unit_runs_alone() -> None:
    model = net()
    attach(model, X)
    whole = run(model.blocks[1], X)
    unit = copy.deepcopy(model.blocks[1])
    del model
    assert torch.equal(run(unit, X), whole)


def test_a_unit_runs_alone_as_in_the_model() -> None:
    model = net()
    attach(model, X)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.blocks[1].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    run(model, X)
    hook.remove()
    assert torch.equal(run(model.blocks[1], seen[0][0]), seen[0][1])


def test_another_thread_quantizes_too() -> None:
    model = net()
    attach(model, X)
    want, got = run(model, X), []
    threads = [threading.Thread(target=lambda: got.append(run(model, X))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 3 and all(torch.equal(out, want) for out in got)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("net", "eager"),
        ("net", "aot_eager"),
        ("rooted", "eager"),
        ("timm-vit", "eager"),
        pytest.param("hf-llama", "eager", marks=pytest.mark.slow),
    ],
)
def test_compile_gives_the_same_values_in_one_graph(name: str, backend: str) -> None:
    if name in ("net", "rooted"):
        torch.manual_seed(1)
        model, args, kwargs = (Net() if name == "net" else Rooted()).eval(), (X,), {}
    else:
        model, args, kwargs = zoo_tiny.MODELS[name]()
    if name == "hf-llama":
        kwargs = {**kwargs, "use_cache": False}
    attachment = attach(model, *args, **kwargs)
    want = run(model, *args, **kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert torch.equal(run(compiled, *args, **kwargs), want)
    assert not attachment.stack
    assert torch.equal(run(model, *args, **kwargs), want)
    torch._dynamo.reset()


def test_a_compiled_function_around_the_model_quantizes() -> None:
    model = net()
    attach(model, X)
    want = run(model, X)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(X), want * 2)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["net", "timm-vit"])
def test_export_keeps_the_values(name: str) -> None:
    model, args, kwargs = (net(), (X,), {}) if name == "net" else zoo_tiny.MODELS[name]()
    attachment = attach(model, *args, **kwargs)
    want = run(model, *args, **kwargs)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False)
    assert torch.equal(run(program.module(), *args, **kwargs), want)
    rounds = sum("round" in str(node.target) for node in program.graph.nodes)
    assert rounds >= len([1 for site, _ in attachment.items() if site.role != "weight"])


def test_autocast_quantizes_before_the_cast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    attachment = attach(model, X)
    weight, given = (attachment.quantizer(f"0.{role}") for role in ("weight", "input"))
    assert weight is not None and given is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(X)
    want = F.linear(given(X).bfloat16(), weight(model[0].weight).bfloat16(), model[0].bias.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)


@pytest.mark.parametrize("mode", ["reentrant", "saved"])
def test_checkpointing_recomputes_quantized(mode: str) -> None:
    grads: list[list[Tensor]] = []
    for recompute in ("", mode):
        model = net(recompute=recompute)
        attachment = attach(model, X)
        learned = [parameter for _, quantizer in attachment.items() for parameter in quantizer.learn()]
        for parameter in learned:
            parameter.requires_grad_(True)
        x = X.clone().requires_grad_(True)
        model(x).square().sum().backward()
        assert len(learned) > 8 and all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learned)
        assert x.grad is not None
        grads.append([x.grad, *(p.grad for p in learned)])  # type: ignore[list-item]
        assert not attachment.stack
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_another_dtype() -> None:
    model = net()
    attachment = attach(model, X)
    model.to(torch.bfloat16)
    out = run(model, X.bfloat16())
    assert out.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for _, q in attachment.items() for value in q.params.values())
    with torch.no_grad():
        block = model.head
        given, weight = attachment.quantizer("head.input"), attachment.quantizer("head.weight")
        assert given is not None and weight is not None
        want = F.linear(given(X.bfloat16()), weight(block.weight), block.bias)
        assert torch.equal(block(X.bfloat16()), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quantizers_follow_the_model_to_another_device() -> None:
    model, args, kwargs = zoo_tiny.MODELS["timm-vit"]()
    attachment = attach(model, *args, **kwargs)
    want = run(model, *args, **kwargs)
    model.cuda()
    out = run(model, *(a.cuda() for a in args))
    torch.testing.assert_close(out.cpu(), want, rtol=1e-3, atol=1e-3)
    assert all(value.is_cuda for _, q in attachment.items() for value in q.params.values())
    torch._dynamo.reset()
    model.cpu()
    assert torch.equal(run(model, *args), want)


def test_ddp_prefixes_and_wrappers() -> None:
    class Wrapper(nn.Module):  # as DistributedDataParallel: the model is its only child, named "module"
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    class Functional(nn.Module):  # ops of the root itself
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(F.linear(x, self.weight))

    torch.manual_seed(0)
    plain = Functional().eval()
    wrapped = Wrapper(copy.deepcopy(plain)).eval()
    names = [site.name for site, _ in attach(plain, X).items()]
    attachment = attach(wrapped, X)
    assert [site.name for site, _ in attachment.items()] == names
    assert torch.equal(run(wrapped, X), run(plain, X))
    assert attachment_of(Wrapper(plain)) is attachment_of(plain)
    assert torch.equal(run(Wrapper(plain), X), run(plain, X))
    with pytest.raises(FewbitsError, match="already has quantizers"):
        attach(Wrapper(plain), X)


# -- the ledger -----------------------------------------------------------------------------------------
class Switch(nn.Module):
    """Ops that run or not by a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.product, self.extra, self.transposed, self.composite = True, False, False, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.product:
            x = x @ x.transpose(-2, -1) @ x
        if self.extra:
            x = self.second(x)
        if self.transposed:
            x = x @ self.second.weight.T
        if self.composite:
            x = self.attention(x, x, x, need_weights=False)[0]
        return x


def switch(**flags: bool) -> Switch:
    torch.manual_seed(0)
    model = Switch().eval()
    model.__dict__.update(flags)
    return model


def test_a_planned_site_that_does_not_run_raises() -> None:
    model = switch()
    attachment = attach(model, X)
    run(model, X)
    model.product = False
    with pytest.raises(FewbitsError, match=r"matmul.*did not run"):
        run(model, X)
    with attachment.disabled():
        run(model, X)
    try:  # the same while some other exception is being handled
        raise KeyError("unrelated")
    except KeyError:
        with pytest.raises(FewbitsError, match="did not run"):
            run(model, X)
    assert not attachment.stack
    model.product = True
    run(model, X)


@pytest.mark.parametrize("flag", ["extra", "transposed", "composite"])
@pytest.mark.parametrize("freeze", [False, True])
def test_an_unrecorded_weighted_op_raises(flag: str, freeze: bool) -> None:
    model = switch()
    attachment = attach(model, X, wanted=weights_only if freeze else everything, freeze=freeze)
    model.__dict__[flag] = True
    with pytest.raises(FewbitsError, match="was not recorded"):
        run(model, X)
    with attachment.disabled():
        run(model, X)


def test_the_forwards_own_error_comes_through() -> None:
    model = net()
    attachment = attach(model, X)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(5, 9))
    assert not attachment.stack
    run(model, X)


def test_an_interrupt_leaves_no_trace_in_the_next_forward() -> None:
    model = net()
    attachment = attach(model, X)
    want = run(model, X)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.blocks[1].down.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    hook.remove()
    assert torch.equal(run(model, X), want) and not attachment.stack
    assert torch.equal(F.linear(X, model.head.weight), X @ model.head.weight.T)  # no mode is left behind


def test_a_module_called_twice_has_one_quantizer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    torch.manual_seed(0)
    model = Twice().eval()
    attachment = attach(model, X)
    names = [site.name for site, _ in attachment.items()]
    assert sorted(names) == ["layer.input", "layer.weight"]
    given, weight = attachment.quantizer("layer.input"), attachment.quantizer("layer.weight")
    assert given is not None and weight is not None
    want = X
    with torch.no_grad():
        for _ in range(2):
            want = F.linear(given(want), weight(model.layer.weight), model.layer.bias)
    assert torch.equal(run(model, X), want)


def test_experts_without_tokens_do_not_raise() -> None:
    model, _, kwargs = zoo_tiny.MODELS["hf-mixtral-eager"]()
    ids = kwargs["input_ids"]
    graph = record(model, input_ids=ids[:, :1])  # one token: some experts are not seen
    attachment = Attachment(model, graph.sites, {call.key for call in graph.calls if call.key is not None})
    experts = [site for site in graph.sites.values() if "@" in site.key[1] and site.role == "weight"]
    assert len(experts) == 2 * 3 * 2 and any(site.uses == 0 for site in experts)
    for site in experts:
        commit(attachment, site, False)
    for number in range(4):  # each token takes other experts
        run(model, input_ids=ids[:, number : number + 1])
    live = run(model, input_ids=ids)
    for site in experts:
        commit(attachment, site, True)
    assert torch.equal(run(model, input_ids=ids), live)
    module = next(m for name, m in model.named_modules() if name == experts[0].module)
    original = type(module).forward

    def forward(
        self: Any, x: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:  # an expert that skips its second product
        F.linear(x, self.gate_up_proj[0])
        return x

    for site in experts:
        attachment.thaw(site.name)
    module.__dict__["forward"] = forward.__get__(module)
    with pytest.raises(FewbitsError, match="did not run"):
        run(model, input_ids=ids)
    del module.__dict__["forward"]
    assert type(module).forward is original


# -- where quantizers act -------------------------------------------------------------------------------
def _attention(q: Tensor, k: Tensor, v: Tensor, quantize: Callable[[str, Tensor], Tensor], scale_first: bool) -> Tensor:
    """softmax(q k^T / sqrt d) v with the four operands quantized."""
    factor = 1 / math.sqrt(q.shape[-1])
    if scale_first:
        scores = quantize("matmul.lhs", q * factor) @ quantize("matmul.rhs", k.transpose(-2, -1))
    else:
        scores = quantize("matmul.lhs", q) @ quantize("matmul.rhs", k.transpose(-2, -1)) * factor
    return quantize("matmul_1.lhs", scores.softmax(-1)) @ quantize("matmul_1.rhs", v)


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if self.kind == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = torch.softmax(q @ k.transpose(-2, -1) * (1 / math.sqrt(4)), -1) @ v
        return self.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attention_products_are_quantized(kind: str) -> None:
    torch.manual_seed(0)
    model = Attention(kind).eval()
    x = torch.randn(2, 5, 8)
    attachment = attach(model, x, wanted=lambda site: "matmul_operand" in site.tags and site.role in ("lhs", "rhs"))
    names = {site.name for site, _ in attachment.items()}
    assert names == {"matmul.lhs", "matmul.rhs", "matmul_1.lhs", "matmul_1.rhs"}
    with torch.no_grad(), attachment.disabled():
        q, k, v = model.split(x)
        out = _attention(q, k, v, lambda name, t: attachment.quantizer(name)(t), False)  # type: ignore[misc]
        want = model.out(out.transpose(1, 2).flatten(2))
        floating = model(x)
    torch.testing.assert_close(run(model, x), want, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(want, floating, atol=1e-4)


@pytest.mark.parametrize("cross", [False, True])
def test_multihead_attention_is_quantized_inside(cross: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    other = torch.randn(2, 6, 8) if cross else x
    attachment = attach(model, x, other, other)
    held = {site.name: quantizer for site, quantizer in attachment.items()}
    assert {"matmul.lhs", "matmul.rhs", "matmul_1.lhs", "matmul_1.rhs"} <= set(held)
    weights = [site for site, _ in attachment.items() if site.role == "weight"]
    assert len(weights) == (4 if cross else 2)

    def linear(t: Tensor, site: Site, bias: Tensor) -> Tensor:
        weight = held[site.name](operands.read(model, site))
        return F.linear(held[site.name.removesuffix("weight") + "input"](t), weight, bias)

    with torch.no_grad():
        b = model.in_proj_bias
        if cross:
            q, k, v = (linear(t, s, part) for t, s, part in zip((x, other, other), weights, b.chunk(3), strict=False))
        else:
            q, k, v = linear(x, weights[0], b).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        out = _attention(q, k, v, lambda name, t: held[name](t), True)
        want = linear(out.transpose(1, 2).flatten(2), weights[-1], model.out_proj.bias)
    torch.testing.assert_close(run(model, x, other, other), want, rtol=1e-5, atol=1e-6)
    with attachment.disabled():
        assert not torch.allclose(run(model, x, other, other), want, atol=1e-4)


@pytest.mark.parametrize("name", ["timm-vit", "hf-gpt2", "hf-falcon", "hf-mixtral-grouped", "timm-resnet"])
def test_live_and_frozen_weights_give_the_same_outputs(name: str) -> None:
    outputs = []
    for freeze in (False, True):
        model, args, kwargs = zoo_tiny.MODELS[name]()
        attachment = attach(model, *args, wanted=weights_only, freeze=freeze, **kwargs)
        assert bool(attachment._plans) is not freeze
        outputs.append(run(model, *args, **kwargs))
    assert torch.equal(*outputs)


class Oriented(nn.Module):
    """One weight in an orientation of its own: (parameter, dimension of the output channels, how it is used)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shape = {"io": (8, 6), "oi": (6, 8), "transposed": (6, 8), "conv_t": (8, 3, 2), "expert_io": (3, 8, 6)}[kind]
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "io":
            return torch.addmm(self.b, x, self.w)
        if self.kind == "oi":
            return F.linear(x, self.w)
        if self.kind == "transposed":
            return x @ self.w.T
        if self.kind == "conv_t":
            return F.conv_transpose1d(x.unsqueeze(-1), self.w, self.b, groups=2)
        return torch.bmm(x.expand(3, *x.shape), self.w)

    def outputs(self) -> Tensor:
        """[out channels, everything that makes one]."""
        with torch.no_grad():
            if self.kind == "io":
                return self.w.T
            if self.kind == "conv_t":  # (in, out/groups, k): output channel g*3+j reads the inputs of group g
                return torch.stack([self.w[4 * g : 4 * g + 4, j] for g in range(2) for j in range(3)]).flatten(1)
            if self.kind == "expert_io":
                return torch.stack([self.w[e, :, o] for e in range(3) for o in range(6)])
            return self.w


@pytest.mark.parametrize("kind", ["io", "oi", "transposed", "conv_t", "expert_io"])
@pytest.mark.parametrize("freeze", [False, True])
def test_channel_scales_are_per_output_channel(kind: str, freeze: bool) -> None:
    torch.manual_seed(0)
    model = Oriented(kind).eval()
    with torch.no_grad():  # every output channel in a range of its own
        rows = model.outputs()
        sizes = torch.logspace(-2, 2, len(rows))
        for row, size in zip(rows, sizes, strict=True):
            if kind != "conv_t":
                row.mul_(size)
        if kind == "conv_t":
            model.w.mul_(sizes.view(2, 1, 3, 1).expand(2, 4, 3, 2).reshape(8, 3, 2))
    before = model.outputs().clone()
    attachment = attach(model, X, wanted=weights_only, freeze=freeze)
    (site, quantizer), *none = list(attachment.items())
    assert not none
    want = affine(4).quantize(before, affine(4).from_range(before.amin(1, keepdim=True), before.amax(1, keepdim=True)))
    torch.testing.assert_close(
        quantizer(operands.canonical(operands.operand(model, site), site.layout, site.groups).flatten(1)), want
    )
    got = run(model, X)
    attachment.detach()
    with torch.no_grad():
        rows = want
        if kind == "io":
            model.w.copy_(rows.T)
        elif kind == "conv_t":
            model.w.copy_(rows.view(2, 3, 4, 2).transpose(1, 2).reshape(8, 3, 2))
        elif kind == "expert_io":
            model.w.copy_(rows.view(3, 6, 8).transpose(1, 2))
        else:
            model.w.copy_(rows)
    torch.testing.assert_close(got, run(model, X), rtol=1e-6, atol=1e-6)


def test_committed_codes_are_what_runs_where_a_parameter_is_shared() -> None:
    """A tied weight stays floating point in its parameter; the layer runs on its codes, not on nearest rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    attachment = attach(model, X, wanted=weights_only)
    quantizer = attachment.quantizer("0.weight")
    assert quantizer is not None
    kept = model[0].weight.clone()
    codes = (quantizer.encode(kept).int() + 1).clamp(max=15).to(torch.uint8)  # as a solver might choose
    attachment.codes["0.weight"] = codes
    attachment.thaw("0.weight")
    assert torch.equal(run(model, X), F.linear(X, quantizer.decode(codes), model[0].bias).detach())
    assert torch.equal(model[0].weight, kept)
    with attachment.disabled():
        assert torch.equal(run(model, X), F.linear(X, kept, model[0].bias).detach())
    attachment.set_quantizer("0.weight", quantizer)  # a quantizer put there anew has no codes yet
    assert not attachment.codes and torch.equal(run(model, X), F.linear(X, quantizer(kept), model[0].bias).detach())


def test_ops_in_place_change_the_tensor_they_were_called_with() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y.add_(x)
            F.relu(y, True)
            return self.last(y)

    torch.manual_seed(0)
    model = InPlace().eval()
    roles = {"add": ("lhs", "rhs"), "relu": ("output",)}
    attachment = attach(model, X, wanted=lambda site: site.role in roles.get(site.op, ()))
    held = {site.name: quantizer for site, quantizer in attachment.items()}
    assert len(held) == 3

    def expected(x: Tensor) -> Tensor:
        y = model.layer(x)
        return model.last(held["relu.output"](F.relu(held["add.lhs"](y) + held["add.rhs"](x))))

    with torch.no_grad(), attachment.disabled():
        want = expected(X)
    assert torch.equal(run(model, X), want)
    x, twin = X.clone().requires_grad_(True), X.clone().requires_grad_(True)  # gradients too
    model(x).square().sum().backward()
    with attachment.disabled():
        expected(twin).square().sum().backward()
    assert x.grad is not None and twin.grad is not None and bool(x.grad.any()) and torch.equal(x.grad, twin.grad)


def test_observers_nest_and_see_the_tensor_before_its_quantizer() -> None:
    model = net()
    attachment = attach(model, X)
    outer: list[Tensor] = []
    inner: list[Tensor] = []
    with attachment.observing({"head.input": [outer.append]}):
        with attachment.observing({"head.input": [inner.append]}), attachment.without_activations():
            run(model, X)
        run(model, X)
    run(model, X)
    assert len(outer) == 2 and len(inner) == 1 and torch.equal(outer[0], inner[0])
    with pytest.raises(FewbitsError, match="no site named"), attachment.observing({"nowhere": []}):
        pass


def test_many_quantizers_are_set_in_linear_time() -> None:
    """Setting one replans one call: a thousand must not cost a million."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(600))).eval()
    graph = record(model, torch.randn(1, 2))
    attachment = Attachment(model, graph.sites, set())
    asked = 0
    original = attachment.quantizer

    def counting(site: str) -> Quantizer | None:
        nonlocal asked
        asked += 1
        return original(site)

    attachment.quantizer = counting  # type: ignore[method-assign]
    for site in graph.sites.values():
        if site.role == "weight":
            attachment.set_quantizer(site.name, Quantizer(WEIGHT, site.name))
    assert len(attachment._plans) == 600 and asked <= 6 * 600
