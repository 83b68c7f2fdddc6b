"""Golden cases that need a whole model and the engine."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn


def repq_whole_vit(data: dict) -> None:
    timm = pytest.importorskip("timm")
    from fewbits import quantize

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=data["img_size"], patch_size=data["patch_size"], embed_dim=data["embed_dim"], depth=data["depth"],
        num_heads=data["num_heads"], num_classes=data["num_classes"], mlp_ratio=4, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    model.load_state_dict({key.removeprefix("sd/"): value for key, value in data.items() if key.startswith("sd/")})
    with torch.no_grad():
        torch.testing.assert_close(model(data["test"]), data["logits_fp"], rtol=1e-5, atol=1e-5)
    bits = f"W{data['w_bits']}A{data['a_bits']}"
    result = quantize(model, "repq-vit", [data["calib"]], bits=bits, options={"variant": "released"})
    attachment = result.attachment

    for site in attachment.sites.values():  # the transformed float model: take the quantized weights out again
        if site.name in attachment.frozen:
            attachment.thaw(site.name)
    state = dict(model.named_parameters())
    for key, value in data.items():
        if key.startswith("reparam/") and "qkv.weight" not in key and "fc1.weight" not in key:
            torch.testing.assert_close(state[key.removeprefix("reparam/")].data, value, rtol=1e-4, atol=1e-5)

    def params(site: str) -> dict:
        quantizer = attachment.quantizer(site)
        assert quantizer is not None, f"{site} carries no quantizer"
        return quantizer.params

    places = {
        "matmul1/A": "matmul.lhs",
        "matmul1/B": "matmul.rhs",
        "matmul2/A": "matmul_1.lhs",
        "matmul2/B": "matmul_1.rhs",
    }
    checked = 0
    for key, value in data.items():
        if not key.startswith("q/"):
            continue
        module, _, leaf = key.removeprefix("q/").rpartition("/")
        operand, _, what = leaf.rpartition("_")
        if ".matmul" in module:
            prefix, _, name = module.rpartition(".")
            site = f"{prefix}.{places[f'{name}/{operand}']}"
        else:
            site = f"{module}.{'input' if operand == 'in' else 'weight'}"
        ours = params(site)["scale" if what == "delta" else "zero_point"]
        expected = torch.as_tensor(value, dtype=torch.float32)
        torch.testing.assert_close(
            ours.flatten(), expected.flatten(), rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
        checked += 1
    assert checked > 10
    # weights: the committed values are the nearest levels of the transformed weights on the checked grids
    for key, value in data.items():
        if key.startswith("reparam/") and ("qkv.weight" in key or "fc1.weight" in key):
            name = key.removeprefix("reparam/")
            scale = params(name)["scale"]
            off = (state[name].data - value).abs() / scale
            inside = off <= 0.5 + 1e-3
            clipped = ~inside
            assert clipped.float().mean() < 0.02, (
                f"{name}: {int(clipped.sum())} weights are further than half a step away"
            )
    for site_name in list(attachment.frozen):
        raise AssertionError(f"{site_name} should have been thawed")
    for site in attachment.sites.values():
        if site.role == "weight" and site.name in attachment.codes:
            attachment.freeze(site.name)
    with torch.no_grad():
        logits = model(data["test"])
    close = (logits - data["logits_q"]).abs() <= 1e-3
    assert close.float().mean() >= 0.95, f"{int((~close).sum())} of {close.numel()} logits differ by more than 1e-3"


HANDLERS = {"repq-vit": {"whole_vit": repq_whole_vit}}
