"""Position tags: first and last layers, heads, placements."""

from __future__ import annotations

import pytest

import zoo_tiny
from engine_models import encoder, skipnet
from fewbits.graph import Graph, record

LANGUAGE = ["hf-llama", "hf-opt", "hf-bloom", "hf-falcon", "hf-gpt2", "hf-gpt-neo"]


def _tagged(graph: Graph, tag: str, role: str) -> list[str]:
    return [site.name for site in graph.sites.values() if tag in site.tags and site.role == role]


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_has_one_head_and_no_first_layer(name: str) -> None:
    graph = zoo_tiny.recorded(name)
    assert _tagged(graph, "lm_head", "weight") == ["lm_head.weight"]
    assert _tagged(graph, "last_layer", "weight") == ["lm_head.weight"]
    assert not _tagged(graph, "first_layer", "weight"), "what follows an embedding is not a first layer"


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("timm-vit", "patch_embed.proj", "head"),
        ("timm-resnet", "conv1", "fc"),
        ("timm-swin", "patch_embed.proj", "head.fc"),
    ],
)
def test_an_image_model_has_a_first_and_a_last_layer(name: str, first: str, last: str) -> None:
    graph = zoo_tiny.recorded(name)
    assert _tagged(graph, "first_layer", "weight") == [f"{first}.weight"]
    assert _tagged(graph, "last_layer", "weight") == [f"{last}.weight"]
    assert not _tagged(graph, "lm_head", "weight")


def test_outputs_of_a_residual_block_are_after_its_activations() -> None:
    import torch

    graph = record(skipnet(), torch.randn(1, 3, 8, 8))
    outputs = [name for name in _tagged(graph, "layer_output", "output") if name.startswith("down.0.")]
    assert outputs == ["down.0.relu.output", "down.0.relu_1.output"], (
        "after the first activation, and after the add's; not on the branch"
    )
    bare = _tagged(graph, "bare_input", "input")
    assert "head.input" in bare and "down.0.conv2.input" not in bare and "down.0.conv1.input" not in bare


def test_every_layer_input_and_product_operand_is_tagged() -> None:
    import torch

    graph = record(encoder(), torch.zeros(1, 6, dtype=torch.long))
    inputs = _tagged(graph, "layer_input", "input")
    assert len(inputs) == 3 * 6 + 1
    operands = _tagged(graph, "matmul_operand", "lhs") + _tagged(graph, "matmul_operand", "rhs")
    assert len(operands) == 3 * 4
    # Behind a norm nothing quantized arrives: such inputs need their own quantizers in the outputs placement.
    assert "blocks.0.q.input" in _tagged(graph, "bare_input", "input")
    assert "blocks.0.down.input" not in _tagged(graph, "bare_input", "input")
