"""Exports to checkpoint formats: reloaded in transformers, or decoded by the readers of other packages."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo_tiny
from fewbits import quantize
from fewbits.errors import FewbitsError
from fewbits.export.base import Subject
from fewbits.export.layers import Layer
from fewbits.export.targets import load_target
from fewbits.formats import Float8, PerChannel, PerTensor, PerToken
from fewbits.hub import checkpoint
from fewbits.hub.loaded import LoadedModel, plain
from fewbits.papers import build_recipe
from fewbits.papers.common import HEAD, input_rules, weight_rules
from fewbits.papers.targeted import plan
from fewbits.ranges import AbsMax
from fewbits.recipe import Bits, Calibration, QSpec, Recipe, Scheme
from fewbits.report import terminal
from fewbits.steps.calibrate import AttachDynamic, CalibrateActivations
from fewbits.steps.nearest import RoundNearest

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"intermediate_size": 96, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"intermediate_size": 96, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"intermediate_size": 96, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"intermediate_size": 96, "num_key_value_heads": 2}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bert": ("BertForSequenceClassification", "BertConfig", {"intermediate_size": 96}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"bos_token_id": 0, "eos_token_id": 0}),
}


def tiny(kind: str) -> LoadedModel:
    cls, config, more = MODELS[kind]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**SIZES, **more, architectures=[cls])
    model = zoo_tiny._liven(getattr(transformers, cls)(made))
    domain = "text-classification" if "Sequence" in cls else "text-generation"
    spec = {
        "kind": "transformers",
        "class": cls,
        "config": made.to_dict(),
        "attention": made._attn_implementation,
        "ref": "here",
        "domain": domain,
        "dtype": "float32",
        "preprocessing": None,
        "model_config": {},
    }
    return LoadedModel("here", "transformers", model, domain, {}, plain(spec))


def tokens(length: int = 12) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": torch.randint(3, 64, (3, length), generator=torch.Generator().manual_seed(n))} for n in range(2)
    ]


def subject(kind: str, recipe: str | Recipe, bits: str | None = None, **options: str) -> Subject:
    """A quantized model as export targets get it, without the way over a checkpoint."""
    loaded = tiny(kind)
    result = quantize(loaded.model, recipe, tokens(), bits=bits, options=options)
    return Subject(loaded, result.attachment, {}, tokens())


def exported(target: str, made: Subject, folder: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts, comparison) of an export that must be possible."""
    able = load_target(target)
    assert [str(obstacle) for obstacle in able.obstacles(made)] == []
    folder.mkdir(exist_ok=True)
    facts = able.write(made, folder, **options)
    json.dumps(facts)
    return facts, able.check(made, folder)


def by_module(folder: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for file in folder.glob("*.safetensors"):
        for name, value in load_file(file).items():
            module, _, last = name.rpartition(".")
            found.setdefault(module, {})[last] = value
    return found


def close_to_half(read: Tensor, layer: Layer) -> None:
    """Weights decoded in float16 are those of the simulation: scale and product are rounded once each."""
    expected = layer.values()
    assert read.shape == expected.shape
    assert bool(((read.float() - expected).abs() <= expected.abs() * 2**-10 * 1.01).all())


# -- compressed-tensors ----------------------------------------------------------------------------------------------
def float8(dynamic: bool, rows: bool = True, inputs: bool = True) -> Recipe:
    weights = weight_rules(
        Bits.parse("W8"), Float8(), AbsMax(), without=HEAD, granularity=PerChannel(0) if rows else PerTensor()
    )
    spec = QSpec(Float8(), PerToken(-1) if dynamic else PerTensor(), AbsMax(), dynamic=dynamic)
    acting = input_rules(spec, matmuls=False, without=HEAD) if inputs else ()
    steps = (AttachDynamic() if dynamic else CalibrateActivations(), RoundNearest())
    return Recipe("fp8", Bits.parse("W8A8"), Scheme(weights, acting), steps, Calibration(regime="parallel"))


#: case -> (subject, format, tensors of every layer with their type)
CT: dict[str, tuple[Callable[[], Subject], str, dict[str, torch.dtype]]] = {
    "int8, per token": (
        lambda: subject("llama", "smoothquant", "W8A8"),
        "int-quantized",
        {"weight": torch.int8, "weight_scale": torch.float32},
    ),
    "int8, static": (
        lambda: subject("opt", "smoothquant", "W8A8", activations="tensor_static"),
        "int-quantized",
        {"weight": torch.int8, "weight_scale": torch.float32, "input_scale": torch.float32},
    ),
    "int8, static, asymmetric": (
        lambda: subject("bert", "rtn", "W8A8", sites="*.weight:symmetric,*.matmul*:float"),
        "int-quantized",
        {
            "weight": torch.int8,
            "weight_scale": torch.float32,
            "input_scale": torch.float32,
            "input_zero_point": torch.int8,
        },
    ),
    "int4 groups": (
        lambda: subject("llama", "gptq", "W4A16g32", sym="true"),
        "pack-quantized",
        {"weight_packed": torch.int32, "weight_scale": torch.float32, "weight_shape": torch.int64},
    ),
    "int4 groups, asymmetric": (
        lambda: subject("opt", "gptq", "W4A16g32"),
        "pack-quantized",
        {
            "weight_packed": torch.int32,
            "weight_scale": torch.float32,
            "weight_shape": torch.int64,
            "weight_zero_point": torch.int32,
        },
    ),
    "int8 groups": (
        lambda: subject("llama", "smoothquant", "W8A16g16"),
        "pack-quantized",
        {"weight_packed": torch.int32, "weight_scale": torch.float32, "weight_shape": torch.int64},
    ),
    "int3 rows": (
        lambda: subject("bert", "rtn", "W3"),
        "pack-quantized",
        {
            "weight_packed": torch.int32,
            "weight_scale": torch.float32,
            "weight_shape": torch.int64,
            "weight_zero_point": torch.int32,
        },
    ),
    "int4 groups, int8 per token": (
        lambda: subject("llama", "gptq", "W4A8g32", sym="true"),
        "int-quantized",
        {"weight": torch.int8, "weight_scale": torch.float32},
    ),
    "float8, per token": (
        lambda: subject("llama", float8(dynamic=True)),
        "float-quantized",
        {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32},
    ),
    "float8, static": (
        lambda: subject("llama", float8(dynamic=False, rows=False)),
        "float-quantized",
        {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32, "input_scale": torch.float32},
    ),
    "float8, weights only": (
        lambda: subject("llama", float8(dynamic=False, inputs=False)),
        "naive-quantized",
        {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32},
    ),
}


@pytest.mark.parametrize("case", CT)
def test_compressed_tensors_in_transformers(case: str, tmp_path: Path) -> None:
    """transformers loads the folder and answers as the simulation does by its rules; weights are the same bits."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    make, form, kinds = CT[case]
    made = make()
    facts, (entry,) = exported("compressed-tensors", made, tmp_path)
    assert facts["format"] == form
    assert entry["weight_change"] == 0
    assert entry["difference_by_its_rule"] <= 1e-6 * entry["scale"]
    # what a token's step of 2 max / 255 instead of max / 127 changes
    assert entry["difference"] <= 0.03 * entry["scale"]
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(described)
    scheme = config.config_groups["group_0"]
    stored = by_module(tmp_path)
    for layer in made.layers:
        held = {name: value for name, value in stored[layer.module].items() if name != "bias"}
        assert {name: value.dtype for name, value in held.items()} == kinds
        # decoded again by the package itself, without transformers
        read = BaseCompressor.get_value_from_registry(form).decompress(held, scheme)["weight"]
        assert torch.equal(read, layer.values())
    head = made.loaded.model.get_output_embeddings() if hasattr(made.loaded.model, "lm_head") else None
    assert head is None or torch.equal(stored["lm_head"]["weight"] if "lm_head" in stored else head.weight, head.weight)


def test_everything_that_vllm_reads_is_there(tmp_path: Path) -> None:
    """The fields of `quantization_config` and the shapes that vLLM's reader of compressed-tensors takes."""
    pytest.importorskip("compressed_tensors")
    made = subject("opt", "smoothquant", "W8A8", activations="tensor_static")
    exported("compressed-tensors", made, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["OPTForCausalLM"] and config["dtype"] == "float32"
    described = config["quantization_config"]
    assert described["quant_method"] == "compressed-tensors"
    assert described["quantization_status"] == "compressed"
    assert described["format"] == "int-quantized"
    assert described["ignore"] == ["lm_head"]
    assert described["kv_cache_scheme"] is None and not described["sparsity_config"]
    assert not described["transform_config"] and {"version", "global_compression_ratio"} <= set(described)
    (group,) = described["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["format"] == "int-quantized"
    assert group["output_activations"] is None
    keys = ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size")
    assert [group["weights"][key] for key in keys] == [8, "int", "channel", True, False, None]
    assert [group["input_activations"][key] for key in keys] == [8, "int", "tensor", True, False, None]
    held = by_module(tmp_path)["model.decoder.layers.0.fc1"]
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    assert shapes == {"weight": (96, 64), "weight_scale": (96, 1), "input_scale": (1,), "bias": (96,)}


def test_packed_shapes_and_layers_that_differ(tmp_path: Path) -> None:
    """Two schemes are told apart by name; packed tensors have the shapes that vLLM allocates."""
    pytest.importorskip("compressed_tensors")
    made = subject("llama", "gptq", "W4A16g32", sym="true", sites="*.mlp.down_proj.weight:8")
    _, (entry,) = exported("compressed-tensors", made, tmp_path)
    assert entry["difference"] == 0
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert sorted(group["weights"]["num_bits"] for group in groups) == [4, 8]
    (eight,) = (group for group in groups if group["weights"]["num_bits"] == 8)
    assert eight["targets"] == ["model.layers.0.mlp.down_proj"]
    held = by_module(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in held["model.layers.0.mlp.up_proj"].items()}
    assert shapes == {"weight_packed": (96, 64 * 4 // 32), "weight_scale": (96, 2), "weight_shape": (2,)}
    assert tuple(held["model.layers.0.mlp.down_proj"]["weight_packed"].shape) == (64, 96 * 8 // 32)


def test_half_precision_scales_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    made = subject("llama", "gptq", "W4A16g32", sym="true")
    facts, (entry,) = exported("compressed-tensors", made, tmp_path, dtype="float16")
    assert 0 < facts["scale_change"] <= 2**-11
    assert 0 < entry["weight_change"] <= 2**-11 and entry["difference"] <= 0.01 * entry["scale"]
    assert by_module(tmp_path)["model.norm"]["weight"].dtype == torch.float16
    assert next(made.loaded.model.parameters()).dtype == torch.float32  # the subject stays what it was


# -- GPTQ and AWQ ----------------------------------------------------------------------------------------------------
@pytest.fixture
def auto_round() -> Iterator[dict[str, type[nn.Module]]]:
    """auto-round's layers for GPTQ checkpoints, by checkpoint format.

    Its modules are used as they are; only the package's own start is left out, which changes transformers.
    """
    spec = importlib.util.find_spec("auto_round")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("auto-round is not installed: pip install auto-round")
    root = Path(next(iter(spec.submodule_search_locations)))
    known = set(sys.modules)
    for name, where in (("auto_round", root), ("auto_round.utils", root / "utils")):
        package = types.ModuleType(name)
        package.__path__ = [str(where)]
        sys.modules[name] = package
    sys.modules["auto_round.utils"].get_packing_device = torch.device  # type: ignore[attr-defined]
    try:
        yield {
            "gptq": importlib.import_module("auto_round_extension.torch.qlinear_torch_zp").QuantLinear,
            "gptq_v2": importlib.import_module("auto_round_extension.torch.qlinear_torch").QuantLinear,
        }
    finally:
        for name in set(sys.modules) - known:
            if name.startswith("auto_round"):
                del sys.modules[name]


GPTQ: dict[str, tuple[Callable[[], Subject], str, dict[str, Any]]] = {
    "2 bits": (lambda: subject("opt", "gptq", "W2A16g32"), "gptq_v2", {"bits": 2, "group_size": 32}),
    "3 bits, rows": (lambda: subject("llama", "rtn", "W3"), "gptq", {"bits": 3, "group_size": -1, "sym": False}),
    "4 bits": (lambda: subject("llama", "gptq", "W4A16g32", sym="true"), "gptq", {"bits": 4, "sym": True}),
    "4 bits, by activation": (
        lambda: subject("llama", "gptq", "W4A16g32", act_order="true"),
        "gptq",
        {"bits": 4, "desc_act": True},
    ),
    "8 bits": (lambda: subject("opt", "smoothquant", "W8A16g32"), "gptq", {"bits": 8, "sym": True, "group_size": 32}),
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_is_read_by_auto_round(case: str, tmp_path: Path, auto_round: dict[str, type[nn.Module]]) -> None:
    """auto-round's layers, filled with the files' tensors, hold the simulation's weights."""
    make, form, expected = GPTQ[case]
    made = make()
    facts, (entry,) = exported("gptq", made, tmp_path, checkpoint_format=form)
    assert entry["difference"] <= 0.01 * entry["scale"]
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config.items() >= {**expected, "quant_method": "gptq", "checkpoint_format": form, "lm_head": False}.items()
    assert 0 < facts["scale_change"] <= 2**-11
    assert config["desc_act"] == ("by activation" in case)
    held = by_module(tmp_path)
    for layer in made.layers:
        size = config["group_size"]
        tensors = {name: value for name, value in held[layer.module].items() if name != "bias"}
        rows = []
        for first in range(0, len(layer.codes), 32):  # rows do not depend on each other
            some = slice(first, first + 32)
            words = slice(first * config["bits"] // 32, (first + 32) * config["bits"] // 32)
            reader: Any = auto_round[form](config["bits"], size, layer.codes.shape[1], 32, False, g_idx=True)
            reader.load_state_dict(
                {
                    "qweight": tensors["qweight"][:, some],
                    "qzeros": tensors["qzeros"][:, words],
                    "scales": tensors["scales"][:, some],
                    "g_idx": tensors["g_idx"],
                }
            )
            rows.append(reader(torch.eye(layer.codes.shape[1])).T)
        close_to_half(torch.cat(rows), layer)
    if config["desc_act"]:
        index = held["model.layers.0.self_attn.q_proj"]["g_idx"]
        assert index.diff().lt(0).any() and index.bincount().tolist() == [32, 32]


_AUTO_ROUND = """
import sys, torch, auto_round
from transformers import AutoModelForCausalLM, AutoRoundConfig
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=AutoRoundConfig(backend="torch"), device_map="cpu", dtype=torch.float32
)
assert "qlinear_torch_zp" in type(model.model.layers[0].self_attn.q_proj).__module__
tokens = torch.frombuffer(open(sys.argv[1] + "/tokens.bin", "rb").read(), dtype=torch.int64).reshape(3, 12)
with torch.no_grad():
    open(sys.argv[1] + "/out.bin", "wb").write(model(tokens).logits.float().contiguous().numpy().tobytes())
"""


@pytest.mark.slow
def test_gptq_runs_in_transformers_with_auto_round(tmp_path: Path) -> None:
    """In a process of its own, as auto-round changes transformers: the folder loads and answers on the CPU."""
    if importlib.util.find_spec("auto_round") is None:
        pytest.skip("auto-round is not installed: pip install auto-round")
    made = subject("llama", "gptq", "W4A16g32", sym="true")
    exported("gptq", made, tmp_path)
    batch = tokens()[0]["input_ids"]
    (tmp_path / "tokens.bin").write_bytes(batch.numpy().tobytes())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _AUTO_ROUND, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = torch.frombuffer(bytearray((tmp_path / "out.bin").read_bytes()), dtype=torch.float32).reshape(3, 12, 64)
    with torch.no_grad():
        expected = made.loaded.model(batch).logits
    assert torch.allclose(read, expected, atol=0.01 * float(expected.abs().max()))


def test_zero_points_at_code_zero_choose_the_second_form(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    made = subject("opt", "rtn", "W2A16g8")  # some groups of 8 have no negative value
    assert any(bool((layer.unsigned()[1] == 0).any()) for layer in made.layers)
    facts, _ = exported("gptq", made, tmp_path / "any")
    assert facts["checkpoint_format"] == "gptq_v2"
    with pytest.raises(FewbitsError, match=r"layers\.0.*zero point at code 0.*gptq_v2"):
        load_target("gptq").write(made, tmp_path, checkpoint_format="gptq")
    with pytest.raises(FewbitsError, match="gptq, gptq_v2"):
        load_target("gptq").write(made, tmp_path, checkpoint_format="marlin")
    with pytest.raises(FewbitsError, match="float16 or bfloat16"):
        load_target("gptq").write(made, tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"sym": "true"}, None),
        ({"sym": "true", "sites": "*.o_proj.weight:3"}, "3 bits"),
        (
            {"sym": "true", "sites": "*.q_proj.weight:8"},
            "model.layers.0.self_attn.qkv_proj, in which layers differ",
        ),
        ({"sym": "true", "act_order": "true"}, "groups in the order of activations (act_order)"),
        ({}, "zero points"),
    ],
)
def test_gptq_says_what_vllm_refuses(options: dict[str, str], refused: str | None, tmp_path: Path) -> None:
    """vLLM 0.32's words for these: "Unsupported quantization config: bits=4, sym=False", "desc_act=True is no longer
    supported".
    """
    pytest.importorskip("compressed_tensors")
    made = subject("llama", "gptq", "W4A16g32", **options)
    facts = load_target("gptq").write(made, tmp_path)
    assert facts["vllm_refuses"] == refused
    printed = io.StringIO()
    report = {"checkpoint": "c", "target": "gptq", "bytes": 1, "out": "o", "comparison": None, "written": facts}
    terminal.exported(report, Console(file=printed, width=200))
    assert (refused is None) == ("vLLM" not in printed.getvalue()) and (refused or "") in printed.getvalue()


def test_gptq_lists_layers_that_differ(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    sites = "*.q_proj.weight:8,*.v_proj.weight:float"
    made = subject("llama", "gptq", "W4A16g32", sym="true", sites=sites)
    facts, (entry,) = exported("gptq", made, tmp_path)
    assert entry["difference"] <= 0.01 * entry["scale"]
    assert facts["dynamic"] == {
        r"+:^model\.layers\.0\.self_attn\.q_proj$": {"bits": 8, "group_size": 32, "sym": True},
        r"-:^model\.layers\.0\.self_attn\.v_proj$": {},
        r"-:^lm_head$": {},
    }


@pytest.mark.parametrize(
    ("parts", "bits", "rule", "said"),
    [
        (
            ("q", "k", "v"),
            "8",
            r"+:^model\.layers\.0\.self_attn\.qkv_proj$",
            {"bits": 8, "group_size": 32, "sym": True},
        ),
        (("gate", "up"), "float", r"-:^model\.layers\.0\.mlp\.gate_up_proj$", {}),
    ],
)
def test_gptq_names_alike_what_vllm_runs_as_one(
    parts: tuple[str, ...], bits: str, rule: str, said: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    sites = ",".join(f"*.{part}_proj.weight:{bits}" for part in parts)
    facts = load_target("gptq").write(subject("llama", "gptq", "W4A16g32", sym="true", sites=sites), tmp_path)
    assert facts["dynamic"][rule] == said and facts["vllm_refuses"] is None


def test_what_vllm_runs_alone_is_no_part_of_something_else() -> None:
    """A query projection without the others, as where keys and values are compressed, is a layer of its own."""
    fused = importlib.import_module("fewbits.export.gptq")._fused
    four, eight = (4, 32, True), (8, 32, True)
    assert fused({"a.q_proj": eight, "a.o_proj": four, "q_proj": four}) == {}
    together = {f"a.{part}_proj": four for part in "qkv"}
    assert fused({**together, "a.q_proj": eight}) == {"a.qkv_proj": {four, eight}}


@pytest.mark.parametrize("sym", ["false", "true"])
def test_awq_is_read_by_compressed_tensors(sym: str, tmp_path: Path) -> None:
    """The folder, converted by compressed-tensors' converter for AutoAWQ, runs in transformers."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    made = subject("llama", "awq", "W4A16g32", sym=sym)
    facts, (entry,) = exported("awq", made, tmp_path / "awq")
    assert 0 < facts["scale_change"] <= 2**-11 and entry["difference"] <= 0.01 * entry["scale"]
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    converter = AutoAWQConverter.from_pretrained(str(tmp_path / "awq"))
    convert_checkpoint(str(tmp_path / "awq"), str(tmp_path / "ct"), converter, max_workers=1, device="cpu")
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ct", quantization_config=dense, dtype=torch.float32
    )
    for layer in made.layers:
        close_to_half(model.get_submodule(layer.module).weight.detach(), layer)
    with torch.no_grad():
        read, expected = model(**tokens()[0]).logits, made.loaded.model(**tokens()[0]).logits
    assert torch.allclose(read, expected, atol=0.01 * float(expected.abs().max()))


# -- GGUF ------------------------------------------------------------------------------------------------------------
GGUF: dict[str, tuple[Callable[[], Subject], str]] = {
    "Q8_0": (lambda: subject("llama", "smoothquant", "W8A16g32"), "llama"),
    "Q4_0": (lambda: subject("mistral", "gptq", "W4A16g32", sym="true"), "llama"),
    "Q4_1": (lambda: subject("qwen2", "gptq", "W4A16g32"), "qwen2"),
    "Q5_0": (lambda: subject("qwen3", "gptq", "W5", sym="true"), "qwen3"),
    "Q5_1": (lambda: subject("llama", "rtn", "W5"), "llama"),
}


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_runs_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed (the extra `llama`)")
    _, entries = exported("gguf", GGUF[kind][0](), tmp_path)
    assert entries[-1]["runtime"].startswith("llama.cpp")
    assert 0 < entries[-1]["difference"] <= 0.03 * entries[-1]["scale"]


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_is_read_by_gguf_and_transformers(kind: str, tmp_path: Path) -> None:
    """The gguf package decodes the blocks to the simulation's weights; transformers loads the file and answers."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    make, architecture = GGUF[kind]
    made = make()
    facts, entries = exported("gguf", made, tmp_path, dtype="float32")
    assert facts["blocks"] == {kind: len(made.layers)} and facts["scale_change"] <= 2**-11
    assert [entry["runtime"].split()[0] for entry in entries[:2]] == ["gguf", "transformers"]
    assert entries[1]["difference"] <= 0.01 * entries[1]["scale"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == architecture
    assert reader.get_field(f"{architecture}.block_count").contents() == 1
    # a layer whose rows keep their order in every architecture
    (layer,) = (layer for layer in made.layers if layer.module.endswith("down_proj"))
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type.name == kind
    read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    expected = layer.values()
    step = layer.scales()[0].max()
    slack = 2**-11 * (expected.abs() + 2 * step * layer.uniform.levels * int(kind.endswith("_1")))
    assert bool(((read - expected).abs() <= slack * 1.01).all())


# -- plain PyTorch ---------------------------------------------------------------------------------------------------
_ALONE = """
import sys
for name in ("fewbits", "transformers", "timm", "safetensors"):
    sys.modules[name] = None
import torch
folder = sys.argv[1]
program = torch.export.load(folder + "/model.pt2").module()
inputs = {name: torch.frombuffer(open(f"{folder}/{name}.bin", "rb").read(), dtype=kind).reshape(shape)
          for name, kind, shape in eval(sys.argv[2], {"torch": torch})}
args = () if "input_ids" in inputs else tuple(inputs.values())
with torch.no_grad():
    out = program(*args, **({} if args else inputs))
out = out["logits"] if isinstance(out, dict) else out
open(folder + "/out.bin", "wb").write(out.contiguous().numpy().tobytes())
"""


def test_torch_programs_need_nothing_but_torch(tmp_path: Path) -> None:
    """A fresh process that can import neither fewbits nor the model's library runs the program with other sizes."""
    made = subject("opt", "gptq", "W3A16g32", act_order="true")
    facts, (entry,) = exported("torch", made, tmp_path)
    assert facts["dynamic"] and entry["difference"] <= 1e-6 * entry["scale"] and entry["agreement"] == 1
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        assert not any(name.endswith(".pkl") for name in archive.namelist())
        assert [item.file_size for item in archive.infolist() if item.filename.endswith(".pt")] == [0]
        sizes = {item.filename.split("/", 1)[1]: item.file_size for item in archive.infolist()}
    state = torch.export.load(tmp_path / "model.pt2").state_dict
    packed = {name: value for name, value in state.items() if name.startswith("packed.")}
    assert len(packed) == len(made.layers)  # three planes of bits for each, and no float weight behind them
    assert sum(value.numel() for value in packed.values()) == sum(layer.codes.numel() for layer in made.layers) * 3 // 8
    assert not any(name.endswith("fc1.weight") for name in state) and sizes
    batch = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(7))
    (tmp_path / "input_ids.bin").write_bytes(batch.numpy().tobytes())
    described = '[("input_ids", torch.int64, (2, 9))]'
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", _ALONE, str(tmp_path), described],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = torch.frombuffer(bytearray((tmp_path / "out.bin").read_bytes()), dtype=torch.float32).reshape(2, 9, 64)
    with torch.no_grad():
        expected = made.loaded.model(input_ids=batch, use_cache=False).logits
    assert torch.allclose(read, expected, atol=1e-6)
    # the model goes on as before
    with torch.no_grad():
        assert torch.equal(made.loaded.model(input_ids=batch, use_cache=False).logits, expected)


def test_torch_holds_what_no_other_target_does(tmp_path: Path) -> None:
    """Twin grids behind softmax, in a program that takes another number of images."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 10}
    model = zoo_tiny._liven(timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes))
    images = [torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (3, 2)]
    result = quantize(model, "ptq4vit", images, bits="W6A6")
    made = Subject(LoadedModel("here", "timm", model, "image", {}, {}), result.attachment, {}, images)
    for other in ("compressed-tensors", "gptq", "awq", "gguf"):
        assert load_target(other).obstacles(made)
    facts, (entry,) = exported("torch", made, tmp_path)
    assert facts["dynamic"] and entry["samples"] == 5 and entry["difference"] <= 1e-6 * entry["scale"]


@pytest.mark.parametrize("target, bits", [("compressed-tensors", "W4A8g32"), ("gguf", "W8A16g20")])
def test_a_planned_recipe_fits(target: str, bits: str, tmp_path: Path) -> None:
    """What `quantize --target` makes of an asymmetric recipe, the target holds."""
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("gguf")
    recipe = build_recipe("gptq", bits)
    assert load_target(target).obstacles(subject("llama", recipe))
    exported(target, subject("llama", plan(recipe, target)), tmp_path)


# -- what cannot be, and what goes wrong -----------------------------------------------------------------------------
def _shown(target: str, made: Subject) -> str:
    return "; ".join(str(obstacle) for obstacle in load_target(target).obstacles(made))


def test_obstacles_name_sites() -> None:
    matmuls = subject("opt", "rtn", "W8A8", sites="*.weight:symmetric")
    assert "self_attn.matmul.lhs: compressed-tensors quantizes input, not the lhs" in _shown(
        "compressed-tensors", matmuls
    )
    one_sided = subject("bert", "rtn", "W8A8", sites="*.matmul*:float")
    assert "query.weight: compressed-tensors has no asymmetric grids" in _shown("compressed-tensors", one_sided)
    transposed = subject("gpt2", "rtn", "W8")
    for target in ("compressed-tensors", "gptq", "awq", "gguf"):
        assert "transformer.h.0.attn.c_attn.weight" in _shown(target, transposed)
    tied = subject("opt", "rtn", "W4", quantize_head="true")
    for target in ("compressed-tensors", "gptq", "awq"):
        assert "lm_head.weight: model.decoder.embed_tokens.weight is the same parameter" in _shown(target, tied)
    uneven = subject("llama", "rtn", "W4A16g40")
    assert "q_proj.weight: compressed-tensors needs groups that divide its 64 columns" in _shown(
        "compressed-tensors", uneven
    )
    assert "groups of 40" in _shown("gguf", uneven)
    by_order = subject("llama", "gptq", "W4A16g32", act_order="true")
    assert "side by side" in _shown("compressed-tensors", by_order) and "side by side" in _shown("awq", by_order)
    assert "awq has no 3 bits there" in _shown("awq", subject("llama", "rtn", "W3"))
    assert "one group size for all layers" in _shown(
        "awq", subject("llama", "rtn", "W4A16g32", sites="*.down_proj.weight:group48")
    )
    unknown = subject("opt", "gptq", "W4A16g32", sym="true")
    assert "gguf is written for llama, mistral, qwen2, qwen3 only, not for opt" in _shown("gguf", unknown)
    bare = subject("llama", "rtn", "W4A16g32")
    for site, _ in list(bare.attachment.items()):
        bare.attachment.set_quantizer(site.name, None)
    for target in ("compressed-tensors", "gptq", "awq", "gguf"):
        assert "none of its weights is quantized" in _shown(target, bare)
    beside = subject("llama", "gptq", "W4A16g32", sites="*.down_proj.weight:8")
    assert "down_proj.weight: weights with zero points are packed by one scheme" in _shown("compressed-tensors", beside)


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    loaded = tiny("llama")
    with torch.no_grad():
        loaded.model.get_submodule("model.layers.0.self_attn.q_proj").weight.mul_(1e-6)
    result = quantize(loaded.model, "gptq", tokens(), bits="W4A16g32", options={"sym": "true"})
    made = Subject(loaded, result.attachment, {}, tokens())
    for target in ("gptq", "awq"):
        with pytest.raises(FewbitsError, match=r"q_proj\.weight: scales from .* do not fit float16"):
            load_target(target).write(made, tmp_path)
    exported("compressed-tensors", made, tmp_path / "float32")


def _checkpoint(folder: Path, kind: str = "llama", **options: str) -> Path:
    loaded = tiny(kind)
    result = quantize(loaded.model, "gptq", tokens(), bits="W4A16g32", options=options)
    checkpoint.save(folder, result, loaded)
    return folder


def test_from_a_checkpoint_and_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from a folder to a folder; whatever fails leaves nothing behind."""
    pytest.importorskip("compressed_tensors")
    from fewbits.export import gptq
    from fewbits.export.workflow import export_reference

    source = _checkpoint(tmp_path / "w4", act_order="true")
    report = export_reference(source, "gptq", out=tmp_path / "out")
    assert report["comparison"][0]["agreement"] >= 0.99
    assert set(report["files"]) >= {"config.json", "model.safetensors", "generation_config.json"}
    assert report["bytes"] < (tmp_path / "w4" / "model.safetensors").stat().st_size * 1.2
    with pytest.raises(FewbitsError, match=r"awq cannot hold this model: .*down_proj\.weight.*can hold it: .*gptq"):
        export_reference(source, "awq", out=tmp_path / "awq")
    with pytest.raises(FewbitsError, match="checkpoint_format"):
        export_reference(source, "gptq", out=tmp_path / "no", options={"checkpoint_format": "x"})

    decode = gptq._decode
    monkeypatch.setattr(gptq, "_decode", lambda *args: None if (w := decode(*args)) is None else w * 1.5)
    with pytest.raises(FewbitsError, match="answers differently from the simulation"):
        export_reference(source, "gptq", out=tmp_path / "wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "w4"]


# -- trained models on real text -------------------------------------------------------------------------------------
_TEXT = ("docs-text/calibration.jsonl", "docs-text/test.jsonl")
#: name -> (model of the zoo, recipe, bits, options, (calibration, data to compare on))
ZOO: dict[str, tuple[str, str, str, dict[str, str], tuple[str, str]]] = {
    "llama-awq": ("llama", "awq", "W4A16g32", {"clip": "false", "ratios": "4"}, _TEXT),
    "opt-gptq": ("opt", "gptq", "W4A16g64", {"sym": "true"}, _TEXT),
    "opt-smooth": ("opt", "smoothquant", "W8A8", {}, _TEXT),
    "bert-static": (
        "bert_sst2",
        "rtn",
        "W8A8",
        {"sites": "*.weight:symmetric,*.matmul*:float"},
        ("sst2/train.tsv", "sst2/dev.tsv"),
    ),
}
_quantized: dict[str, Path] = {}


@pytest.mark.skipif(
    not (os.environ.get("FEWBITS_ZOO") and os.environ.get("FEWBITS_DATA")),
    reason="FEWBITS_ZOO or FEWBITS_DATA is not set",
)
@pytest.mark.parametrize(
    "case, target, agreement",
    [
        ("llama-awq", "awq", 0.98),
        ("llama-awq", "gguf", 0.98),
        ("opt-gptq", "gptq", 0.98),
        ("opt-gptq", "compressed-tensors", 1.0),
        ("opt-smooth", "compressed-tensors", 0.9),
        ("bert-static", "compressed-tensors", 1.0),
    ],
)
def test_trained_models_answer_alike(
    case: str, target: str, agreement: float, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Real models on real text: at least so many of the predicted tokens, or classes, are the simulation's."""
    pytest.importorskip("compressed_tensors")
    from fewbits.export.workflow import export_reference
    from fewbits.workflow import quantize_reference

    zoo, data = Path(os.environ["FEWBITS_ZOO"]), Path(os.environ["FEWBITS_DATA"])
    model, recipe, bits, options, (calibration, test) = ZOO[case]
    if case not in _quantized:
        out = tmp_path_factory.mktemp("zoo") / case
        calib = data / calibration
        quantize_reference(zoo / model, recipe, bits, out=out, calib=calib, samples=8, seqlen=64, options=options)
        _quantized[case] = out
    samples = 64 if model == "bert_sst2" else 2
    report = export_reference(_quantized[case], target, out=tmp_path / "out", data=str(data / test), samples=samples)
    entry = report["comparison"][-1]
    print(case, target, report["bytes"], report["written"], report["comparison"])
    assert entry["agreement"] >= agreement
    assert entry["samples"] == samples
    assert entry.get("difference_by_its_rule", 0) == 0
