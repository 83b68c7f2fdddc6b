"""What each golden case of AWQ must reproduce; the blocks run through the engine with the recipe itself."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fewbits import quantize as quantize_model
from fewbits.formats import PerChannel, PerGroup, quantize
from fewbits.kernels.pack4 import pack4, unpack4
from fewbits.papers import build_recipe
from fewbits.papers.awq import grid
from fewbits.ranges import MinMax
from fewbits.ranges.output_clip import output_clip
from fewbits.steps.output_clip import ClipOutputs


def pseudo_quantize(data: dict) -> None:
    names = [name.removesuffix("_dq") for name in data if name.endswith("_dq")]
    assert names
    for name in names:
        bits, group = name.removeprefix("b").split("_")
        fmt = grid(int(bits), released=True)
        spread = PerChannel(0) if group == "gnone" else PerGroup(data["group"])
        params = MinMax().fit(data["w"], fmt, spread)
        for key, value in (("scale", params["scale"]), ("zero", params["zero_point"])):
            torch.testing.assert_close(value, data[f"{name}_{key}"], rtol=1e-6, atol=1e-6)
        made = quantize(data["w"], fmt, spread, params)
        torch.testing.assert_close(made, data[f"{name}_dq"], rtol=1e-6, atol=1e-6)


def auto_clip(data: dict) -> None:
    bits, group, steps, max_shrink, tokens = data["params"].tolist()
    weight, x, fmt, size = data["w"], data["x"], grid(int(bits), released=True), int(group)
    x = x[:: max(1, len(x) // int(tokens))]
    ours = output_clip(weight, x, fmt, MinMax(), group_size=size, steps=int(steps), max_shrink=max_shrink)
    theirs = data["best_max_val"].squeeze(-1)
    same = (ours - theirs).abs() <= 1e-5
    assert same.float().mean() >= 0.9

    def errors(limits: Tensor) -> Tensor:
        bound = PerGroup(size).expand(limits, weight.shape)
        clamped = weight.clamp(-bound, bound)
        difference = quantize(clamped, fmt, PerGroup(size), MinMax().fit(clamped, fmt, PerGroup(size))) - weight
        parts = zip(difference.split(size, 1), x.split(size, 1), strict=True)
        return torch.stack([(d @ part.T).square().mean(1) for d, part in parts], 1)

    ratio = errors(ours)[~same] / errors(theirs)[~same]
    assert bool(((ratio - 1).abs() <= 0.02).all())


def pack_int4(data: dict) -> None:
    packed = pack4(data["intweight"])
    assert packed.dtype == data["packed"].dtype and torch.equal(packed, data["packed"])
    assert torch.equal(unpack4(packed, *data["intweight"].shape).to(torch.int32), data["intweight"])


class _Layer(nn.Module):
    """A decoder layer with what its model would hand it beside the hidden states."""

    def __init__(self, layer: nn.Module, **extra: Any) -> None:
        super().__init__()
        self.layer = layer
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min).triu(1).expand(len(x), 1, -1, -1)
        out = self.layer(x, attention_mask=mask, **self.extra)
        return out[0] if isinstance(out, tuple) else out


def _opt(data: dict) -> nn.Module:
    from transformers import OPTConfig
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    ffn, width = data["p.fc1.weight"].shape
    config = OPTConfig(hidden_size=width, ffn_dim=ffn, num_attention_heads=int(data["params"][2]), dropout=0.0)
    config._attn_implementation = "eager"
    return _Layer(OPTDecoderLayer(config, layer_idx=0))


def _llama(data: dict) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    ffn, width = data["p.mlp.up_proj.weight"].shape
    heads, shared = (int(value) for value in data["params"][2:4])
    config = LlamaConfig(
        hidden_size=width, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=shared,
        head_dim=len(data["p.self_attn.q_proj.weight"]) // heads,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return _Layer(LlamaDecoderLayer(config, layer_idx=0), position_embeddings=(data["cos"], data["sin"]))


def _outputs(model: nn.Module, data: dict) -> tuple[Tensor, Tensor]:
    """(of the whole batch, of the part the case keeps)."""
    with torch.no_grad():
        out = model(data["x"])
    kept = data["out_fp"].shape
    return out, out[: kept[0], : kept[1]]


def block(build: Any, data: dict) -> None:
    pytest.importorskip("transformers")
    model = build(data).eval()
    own = {key.removeprefix("p."): value for key, value in data.items() if key.startswith("p.")}
    model.layer.load_state_dict(own)
    before, kept = _outputs(model, data)
    torch.testing.assert_close(kept, data["out_fp"], rtol=1e-4, atol=1e-5)
    bits, group = (int(value) for value in data["params"][:2])

    limits: dict[str, Tensor] = {}
    clip = ClipOutputs._clip

    def recording(step: ClipOutputs, unit: Any, site: Any, statistic: Any) -> None:
        clip(step, unit, site, statistic)
        name = site.name.removeprefix("layer.").removesuffix(".weight")
        limits[name] = PerGroup(group).reduce(unit.weight(site).abs(), lambda held: held.amax(1))

    recipe = build_recipe("awq", f"W{bits}A16g{group}", {"variant": "released"})
    with mock.patch.object(ClipOutputs, "_clip", recording):
        quantize_model(model, recipe, list(data["x"].split(2)), units=["layer"])

    weights = dict(model.layer.named_parameters())
    searched = sorted(key for key in data if key.startswith("scale") and key.removeprefix("scale").isdigit())
    for key in searched:
        if "norm" in data[f"{key}_prev"]:
            norm = f"{data[f'{key}_prev']}.weight"
            torch.testing.assert_close(own[norm] / weights[norm].data, data[key], rtol=1e-4, atol=1e-6)
    biases = {f"{data[f'{key}_prev']}.bias": data[key] for key in searched if "norm" not in data[f"{key}_prev"]}
    for name, s in biases.items():
        if name in own:
            torch.testing.assert_close(own[name] / s, weights[name].data, rtol=1e-4, atol=1e-6)

    assert sorted(limits) == sorted(key.removeprefix("clip.") for key in data if key.startswith("clip."))
    for name, found in limits.items():
        expected = data[f"clip.{name}"].squeeze(-1)
        share = float(((found - expected).abs() <= 1e-4 * expected).float().mean())
        assert share >= 0.9, f"{name}: {share:.3f} of the groups are clipped where they should be"

    after, kept = _outputs(model, data)
    error = float((after - before).square().mean())
    assert abs(error / data["mse_q_vs_fp"] - 1) <= 0.1
    assert float((kept - data["out_q"]).abs().mean()) <= 0.1 * float((data["out_q"] - data["out_fp"]).abs().mean())


HANDLERS = {
    "awq": {
        "pseudo_quantize": pseudo_quantize,
        "auto_clip": auto_clip,
        "pack_int4": pack_int4,
        "opt_block": lambda data: block(_opt, data),
        "llama_block": lambda data: block(_llama, data),
    }
}
