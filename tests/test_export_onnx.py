"""ONNX exports: reloaded in onnxruntime and OpenVINO, and compared with the simulation."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import zoo_tiny
from engine_models import encoder, images, skipnet, tokens
from fewbits.attach import Attachment
from fewbits.engine import quantize
from fewbits.errors import FewbitsError
from fewbits.export.base import Subject
from fewbits.export.onnx.codes import Codes
from fewbits.export.targets import load_target
from fewbits.export.workflow import export_reference
from fewbits.formats import PerChannel, PerTensor, affine, symmetric
from fewbits.graph import record
from fewbits.hub.loaded import LoadedModel
from fewbits.outliers.parts import Columns
from fewbits.papers import build_recipe
from fewbits.quantizer import Quantizer
from fewbits.ranges import MinMax
from fewbits.recipe import QSpec
from fewbits.report import terminal
from fewbits.workflow import quantize_reference

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
openvino = pytest.importorskip("openvino")

ZOO, DATA = (os.environ.get(name) for name in ("FEWBITS_ZOO", "FEWBITS_DATA"))
on_zoo = pytest.mark.skipif(not (ZOO and DATA), reason="FEWBITS_ZOO and FEWBITS_DATA are not set")


def subject_of(
    model: nn.Module, batches: list[Any], recipe: str, bits: str, domain: str = "image", **options: Any
) -> Subject:
    """A quantized model with the batches to compare on."""
    result = quantize(model, build_recipe(recipe, bits=bits, options=options), batches)
    loaded = LoadedModel("test", "module", result.model, domain, {}, {"kind": "module"})
    return Subject(loaded, result.attachment, batches=batches)


def hand_made(model: nn.Module, x: Tensor, specs: dict[str, QSpec]) -> Subject:
    """A model with quantizers at the named sites, fitted to one forward."""
    graph = record(model, x)
    attachment = Attachment(model, graph.sites, {call.key for call in graph.calls if call.key is not None})
    for name, spec in specs.items():
        attachment.set_quantizer(name, Quantizer(spec, name))
        if attachment.sites[name].role == "weight":
            from fewbits.graph.operands import read

            attachment.quantizer(name).calibrate(read(model, attachment.sites[name]).flatten(1))
        else:
            attachment.calibrating.add(name)
    with torch.no_grad():
        model(x)
    return Subject(LoadedModel("test", "module", model, "other", {}, {"kind": "module"}), attachment, batches=[x])


def exported(subject: Subject, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(facts, comparison by runtime) of a model written and checked."""
    target = load_target("onnx")
    assert target.obstacles(subject) == []
    facts = target.write(subject, folder, **options)
    return facts, {report["runtime"]: report for report in target.check(subject, folder)}


def ops(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node]


def stretched(args: tuple[Any, ...], count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, *args[0].shape[1:], generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """A block as residual networks have them: two convolutions, and one on the way around."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.around = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x))) + self.around(x))
        return self.head(y.mean((2, 3)))


# -- whole models ----------------------------------------------------------------------------------------------------
def test_a_vision_transformer_with_its_attention_products(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4
    )
    x = torch.zeros(1, 3, 32, 32)
    subject = subject_of(zoo_tiny._liven(model), [stretched((x,), 6), stretched((x,), 5, 4)], "rtn", "W8A8")
    facts, found = exported(subject, tmp_path)
    assert facts["opset"] == 20 and facts["inputs"] == ["input"] and facts["outputs"] == ["logits"]
    assert facts["free_axes"] == ["input[batch]"]
    softmaxes = [site for site, _ in subject.attachment.items() if "post_softmax" in site.tags]
    nodes = {node.name: node for node in onnx.load(str(tmp_path / "model.onnx")).graph.node}
    assert len(softmaxes) == 1 and all(site.name in nodes for site in softmaxes)
    assert set(found) == {"onnxruntime", "openvino"}
    for report in found.values():
        assert report["samples"] == 11 and report["agreement"] == 1.0
        assert report["difference"] < 0.05 * report["scale"]
        assert report["distance"] < 1.1 * report["simulated_distance"]


@pytest.mark.slow
def test_batch_norms_go_into_the_scales_of_a_convolution(tmp_path: Path) -> None:
    model, args, _ = zoo_tiny.MODELS["timm-resnet"]()
    subject = subject_of(model, [stretched(args, 4)], "rtn", "W8A8", target="onnxruntime")
    facts, found = exported(subject, tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    folded = facts["sites"]["batch norms folded into scales"]
    assert folded > 0 and folded + ops(tmp_path).count("BatchNormalization") == 15
    codes = [item for item in graph.initializer if item.name.endswith(".weight.codes")]
    assert len(codes) == facts["sites"]["weights in int8"] == len(subject.layers)
    assert all(item.data_type == onnx.TensorProto.INT8 for item in codes)
    assert all(report["distance"] < 1.1 * report["simulated_distance"] for report in found.values())


@pytest.mark.parametrize(("recipe", "in_floating_point"), [("jacob-integer-only", 0), ("rtn", 2)])
def test_convolutions_before_a_sum_run_in_integers_where_something_makes_bytes_of_them(
    tmp_path: Path, recipe: str, in_floating_point: int
) -> None:
    """onnxruntime multiplies integers only where the result is quantized too; else it decodes the weight every time."""
    subject = subject_of(Residual().eval(), images(8), recipe, "W8A8", target="onnxruntime")
    exported(subject, tmp_path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert kinds.count("QLinearConv") == 3 - in_floating_point
    assert sum(kind in ("Conv", "FusedConv") for kind in kinds) == in_floating_point


def test_an_encoder_with_a_mask(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 32}
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(3, 64, (6, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[:3, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    subject = subject_of(model, [batch], "rtn", "W8A8", "text-classification")
    facts, found = exported(subject, tmp_path)
    assert facts["inputs"] == ["input_ids", "attention_mask"] and facts["outputs"] == ["logits"]
    assert {"input_ids[batch]", "attention_mask[sequence]"} <= set(facts["free_axes"])
    assert all(report["agreement"] == 1.0 for report in found.values())
    assert all(report["distance"] < 1.2 * report["simulated_distance"] + 1e-3 for report in found.values())


def test_a_language_model_in_groups_of_4_bits(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    batches = [{"input_ids": tokens(3, 3, 9, 64)[0], "use_cache": False}]
    batches.append({"input_ids": tokens(2, 2, 5, 64)[0], "use_cache": False})
    subject = subject_of(model, batches, "rtn", "W4A16g16", "text-generation")
    facts, found = exported(subject, tmp_path)
    packed = [node for node in onnx.load(str(tmp_path / "model.onnx")).graph.node if node.op_type == "MatMulNBits"]
    assert len(packed) == 7 and facts["sites"] == {"weights of 4 bits in MatMulNBits": 7}
    assert facts["outputs"] == ["logits"] and facts["cache"] is False
    for report in found.values():
        assert report["answers"] == 37 and report["agreement"] == 1.0 and report["relative"] < 1e-5


@pytest.mark.parametrize("bits", ["W2A16g16", "W3A16", pytest.param("W8A16", marks=pytest.mark.slow)])
def test_transposed_layers_and_other_widths(tmp_path: Path, bits: str) -> None:
    """GPT-2's layers hold [in, out]; 3 bits are held in 4, and a scale a row in blocks that repeat it."""
    model = nn.Sequential(Transposed(48, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    x = torch.randn(4, 3, 48, generator=torch.Generator().manual_seed(0))
    subject = subject_of(model, [x], "rtn", bits, "other")
    facts, found = exported(subject, tmp_path, opset="20", accuracy_level="0", cache="false")  # as typed
    width = {"W2A16g16": 2, "W3A16": 4, "W8A16": 8}[bits]
    assert facts["sites"] == {f"weights of {width} bits in MatMulNBits": 2}
    assert all(report["relative"] < 1e-5 for report in found.values())


@pytest.mark.slow
def test_a_denoiser(tmp_path: Path) -> None:
    model, args, _ = zoo_tiny.MODELS["diffusers-unet2d"]()
    batch = {"sample": stretched(args, 2), "timestep": torch.tensor([7, 300])}
    subject = subject_of(model, [batch], "rtn", "W8A8", "diffusion")
    facts, found = exported(subject, tmp_path)
    assert facts["inputs"] == ["sample", "timestep"] and facts["outputs"] == ["sample_out"]
    assert all(report["agreement"] is None for report in found.values())
    assert all(report["distance"] < 1.25 * report["simulated_distance"] for report in found.values())


class Transposed(nn.Module):
    """A layer that stores its weight as [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(1)) / 7)
        self.bias = nn.Parameter(torch.linspace(-1, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


# -- grids and parts -------------------------------------------------------------------------------------------------
X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 3, groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up_grouped(self.up(F.relu(self.grouped(x)))).mean((2, 3)))


@pytest.mark.parametrize("weights", [affine(8), pytest.param(symmetric(8), marks=pytest.mark.slow)])
def test_convolutions_of_every_layout_on_narrow_activation_grids(tmp_path: Path, weights: Any) -> None:
    torch.manual_seed(0)
    model = Convolutions().eval()
    graph = record(model, X)
    inputs = {"grouped": symmetric(8), "up": affine(4), "up_grouped": symmetric(5, narrow=False), "head": affine(8)}
    specs = {
        site.name: QSpec(weights, PerChannel(0) if site.module != "head" else PerTensor(), MinMax())
        if site.role == "weight"
        else QSpec(inputs[site.module], PerTensor(), MinMax())
        for site in graph.sites.values()
        if site.role == "weight" or (site.role == "input" and site.module in inputs)
    }
    subject = hand_made(model, X, specs)
    subject.batches = [3 * X, X]  # past the calibrated ranges: ends must clip where the simulation's do
    facts, found = exported(subject, tmp_path)
    assert facts["opset"] == 20 and facts["sites"] == {"activations": 4, "weights in int8": 4}
    assert ops(tmp_path).count("Clip") == 3  # -127, 4 bits, 5 bits
    codes = found["onnxruntime"]["quantizers"]
    assert codes["sites"] == dict.fromkeys((name for name in specs if name.endswith(".input")), 1.0)
    assert codes["worst"] is None and codes["different"] == codes["apart"] == 0
    assert codes["values"] == 2 * 5 * (3 * 64 + 6 * 36 + 4 * 144 + 4)  # what each of them reads, in two batches
    # a code may differ where a value lies between two, by the last bit of a float
    assert all(report["relative"] < 5e-3 for report in found.values())


def test_groups_of_a_convolution_take_opset_21(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(2), nn.Linear(36, 4)).eval()
    subject = subject_of(model, [X], "rtn", "W4A16g16", "other")
    facts, found = exported(subject, tmp_path)
    assert facts["opset"] == 21 and facts["sites"]["weights in int8"] == 1
    assert all(report["relative"] < 1e-5 for report in found.values())


def test_columns_kept_and_groups_out_of_order(tmp_path: Path) -> None:
    data = tokens(6, 3)
    subject = subject_of(encoder(width=32), data, "gptq", "W4A16g16", "text-generation", act_order=True)
    assert subject.attachment.group_index
    name = next(layer.site.name for layer in subject.layers if layer.site.name.endswith("blocks.1.up.weight"))
    layer = next(layer for layer in subject.layers if layer.site.name == name)
    subject.attachment.thaw(name)
    kept = Columns(torch.tensor([5, 2]), torch.randn(64, 2, generator=torch.Generator().manual_seed(4)))
    subject.attachment.codes[name] = layer.codes
    subject.attachment.parts[name] = layer.parts = (kept,)
    _, found = exported(subject, tmp_path)
    assert "Gather" in ops(tmp_path)
    assert all(report["relative"] < 1e-5 and report["agreement"] == 1.0 for report in found.values())


def test_a_layer_that_is_called_twice(tmp_path: Path) -> None:
    subject = subject_of(skipnet(), images(6, 3), "rtn", "W8A8", "image")
    _, found = exported(subject, tmp_path)
    names = [node.name for node in onnx.load(str(tmp_path / "model.onnx")).graph.node]
    assert len(set(names)) == len(names) and {"shared.input", "shared.input@1", "shared.weight@1"} <= set(names)
    assert all(report["distance"] < 1.1 * report["simulated_distance"] for report in found.values())


def test_factors_and_replaced_ops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU6(), nn.Linear(16, 3)).eval()
    x = 9 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    spec = QSpec(affine(8), PerTensor(), MinMax())
    subject = hand_made(model, x, {"0.linear.input": spec} if "0.linear.input" in record(model, x).sites else {})
    attachment = subject.attachment
    site = next(site for site in attachment.sites.values() if site.role == "input" and site.module == "2")
    attachment.set_factor(site.name, torch.linspace(0.2, 3, 16))
    relu = next(call.key for call in record_calls(model, x) if call.op in ("relu6", "hardtanh"))
    attachment.set_replacement(relu, "relu")
    attachment.set_quantizer(site.name, Quantizer(spec, site.name))
    attachment.calibrating.add(site.name)
    with torch.no_grad():
        model(x)
    _, found = exported(subject, tmp_path)
    assert "Clip" not in ops(tmp_path) and all(report["relative"] < 5e-3 for report in found.values())


def record_calls(model: nn.Module, x: Tensor) -> list[Any]:
    """The calls of a model whose quantizers stay out of it."""
    import copy

    plain = copy.deepcopy(model)
    held = plain.__dict__.get("_fewbits")
    if held is not None:
        held.detach()
    return record(plain, x).calls


# -- what is refused, and what is found out --------------------------------------------------------------------------
def test_grids_that_onnx_has_not_are_refused_by_site(tmp_path: Path) -> None:
    data = tokens(4)
    subject = subject_of(encoder(), data, "rtn", "W8A8", "text-generation", sites="blocks.0.matmul_1.lhs:log2")
    found = load_target("onnx").obstacles(subject)
    assert [item.site for item in found] == ["blocks.0.matmul_1.lhs"] and "log2" in found[0].reason
    subject = subject_of(encoder(), data, "smoothquant", "W8A8", "text-generation")
    assert load_target("onnx").obstacles(subject)  # fitted on every call


def test_options_are_checked(tmp_path: Path) -> None:
    subject = Subject(None, None)  # type: ignore[arg-type]
    for options, word in (
        ({"opset": 7}, "opset 7"),
        ({"accuracy_level": 2}, "accuracy_level 2"),
        ({"cache": "maybe"}, "cache 'maybe'"),
        ({"wrong": 1}, "no option 'wrong'"),
    ):
        with pytest.raises(FewbitsError, match=word):
            load_target("onnx").write(subject, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_the_checkpoint_is_found_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(70, 32, generator=torch.Generator().manual_seed(0))
    subject = subject_of(model, [x], "rtn", "W8A8", "image")
    exported(subject, tmp_path)
    file = str(tmp_path / "model.onnx")

    def spoiled(name: str, change: int) -> None:
        made = onnx.load(file)
        item = next(item for item in made.graph.initializer if item.name == name)
        array = onnx.numpy_helper.to_array(item).copy()
        array.flat[0] += array.dtype.type(change)
        item.CopyFrom(onnx.numpy_helper.from_array(array, name))
        onnx.save(made, file)
        with pytest.raises(FewbitsError, match=name.rpartition(".")[0]):
            load_target("onnx").check(subject, tmp_path)
        load_target("onnx").write(subject, tmp_path)

    weight, given = (
        next(site.name for site, _ in subject.attachment.items() if site.role == role) for role in ("weight", "input")
    )
    spoiled(f"{weight}.codes", 1)
    spoiled(f"{given}.zero", 1)
    made = onnx.load(file)  # right integers, another computation
    bias = next(item for item in made.graph.initializer if item.name.endswith("bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 3, bias.name))
    onnx.save(made, file)
    with pytest.raises(FewbitsError, match="onnxruntime"):
        load_target("onnx").check(subject, tmp_path)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(
    ("planted", "change"),
    [("scale", 1.002), ("zero", 1), ("low", 0.8), ("high", 0.8)],
)
def test_a_wrong_quantizer_is_found_by_its_codes_and_named(
    tmp_path: Path, planted: str, change: float, rows: int
) -> None:
    """One number of one QuantizeLinear (or of its Clip) is changed; the sites before and after it stay right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 40), nn.Linear(40, 3)).eval()
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))
    inputs = [site.name for site in record(model, x).sites.values() if site.role == "input"]
    grids = [affine(8), affine(4) if planted in ("low", "high") else symmetric(8, narrow=False), affine(8)]
    subject = hand_made(
        model, x, {name: QSpec(grid, PerTensor(), MinMax()) for name, grid in zip(inputs, grids, strict=True)}
    )
    load_target("onnx").write(subject, tmp_path)
    file = tmp_path / "model.onnx"
    quantizers = {site.name: quantizer for site, quantizer in subject.attachment.items()}

    def compared() -> Codes:
        codes = Codes(file, quantizers)
        with subject.attachment.observing(codes.observers()), torch.no_grad():
            model(x)
        return codes

    right = compared()
    right.judge()
    assert right.report()["equal"] == 1.0
    made = onnx.load(str(file))
    item = next(item for item in made.graph.initializer if item.name == f"{inputs[1]}.{planted}")
    array = onnx.numpy_helper.to_array(item)
    wrong = array + array.dtype.type(change) if planted == "zero" else array * np.float32(change)
    item.CopyFrom(onnx.numpy_helper.from_array(np.asarray(wrong), item.name))
    onnx.save(made, str(file))
    found = compared()
    with pytest.raises(FewbitsError, match=f"at {re.escape(inputs[1])}: "):
        found.judge()
    report = found.report()
    assert report["worst"] == inputs[1] and report["sites"][inputs[0]] == report["sites"][inputs[2]] == 1.0
    if planted in ("low", "high"):  # what a look at scales and zeros alone does not see
        with pytest.raises(FewbitsError, match=f"other codes .* at {re.escape(inputs[1])}: "):
            load_target("onnx").check(subject, tmp_path)


def test_codes_may_differ_at_ties_and_seldom(tmp_path: Path) -> None:
    """The file rounds ties to even; a grid that rounds them away from zero makes another code of half of them."""
    model = nn.Linear(2000, 2)
    x = torch.arange(2000.0).remainder(100)[None]
    name = next(site.name for site in record(model, x).sites.values() if site.role == "input")
    away = dataclasses.replace(affine(8), rounding="half_away")
    subject = hand_made(model, x, {name: QSpec(away, PerTensor(), MinMax())})
    quantizer = subject.attachment.quantizer(name)
    assert quantizer is not None
    quantizer.set_params({"scale": torch.ones(()), "zero_point": torch.zeros(())})
    load_target("onnx").write(subject, tmp_path)

    def compared(values: Tensor) -> Codes:
        codes = Codes(tmp_path / "model.onnx", {name: quantizer})
        with subject.attachment.observing(codes.observers()), torch.no_grad():
            model(values)
        return codes

    x[0, 4] = 4.5
    once = compared(x)
    once.judge()
    report = once.report()
    assert (report["values"], report["different"], report["apart"], report["worst"]) == (2000, 1, 1, name)
    assert report["sites"] == {name: report["equal"]} == {name: 1 - 1 / 2000}
    console = Console(width=200, record=True, file=io.StringIO())
    run = {"runtime": "onnxruntime", "difference": 0.0, "scale": 1.0, "samples": 1, "quantizers": report}
    terminal.exported({"checkpoint": "c", "target": "onnx", "bytes": 1, "out": "o", "comparison": [run]}, console)
    assert f"codes at 1 activation quantizers: 99.950 % at the worst, {name}, equal" in console.export_text()
    x[0, 100:110] = 4.5
    message = f"at {re.escape(name)}: 11 of 2000 differ, by 1 at most, 0 of them.*quantize with --target onnxruntime"
    with pytest.raises(FewbitsError, match=message):
        compared(x).judge()


# -- trained models --------------------------------------------------------------------------------------------------
@on_zoo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits", "calibration", "test", "samples"),
    [
        ("vit_tiny", "W8A8", "cifar10/calibration.parquet", "cifar10/test.parquet", 768),
        ("resnet10t_w32", "W8A8", "cifar10/calibration.parquet", "cifar10/test.parquet", 128),
        ("mobilenetv2_050", "W8A8", "cifar10/calibration.parquet", "cifar10/test.parquet", 128),
        ("bert_sst2", "W8A8", "sst2/train.tsv", "sst2/test.tsv", 96),
        ("opt", "W4A16g32", None, "docs-text/test.jsonl", 4),
        ("ddpm_cifar10", "W8A8", "cifar10/calibration.parquet", "cifar10/test.parquet", 8),
    ],
)
def test_a_trained_model(
    tmp_path: Path, name: str, bits: str, calibration: str | None, test: str, samples: int
) -> None:
    assert ZOO is not None and DATA is not None
    quantize_reference(
        Path(ZOO) / name,
        "rtn",
        bits,
        out=tmp_path / name,
        calib=None if calibration is None else Path(DATA) / calibration,
        samples=None if calibration is None else 32,
        options={"target": "onnxruntime"},
    )
    report = export_reference(tmp_path / name, "onnx", data=str(Path(DATA) / test), samples=samples)
    runs = {run["runtime"]: run for run in report["comparison"]}
    assert set(runs) == {"onnxruntime", "openvino"}
    for run in runs.values():
        assert run["samples"] == samples
        assert run["agreement"] is None or (run["answers"] >= 64 and run["agreement"] >= 0.99)
    assert (tmp_path / f"{name}-onnx" / "model.onnx").is_file()
