"""Language models in ONNX with a cache of keys and values: generation token by token, as transformers does it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine_models import tokens
from fewbits.engine import quantize
from fewbits.errors import FewbitsError
from fewbits.export.base import Subject
from fewbits.export.targets import load_target
from fewbits.export.workflow import export_reference
from fewbits.hub import checkpoint
from fewbits.hub.loaded import LoadedModel
from fewbits.papers import build_recipe
from fewbits.workflow import quantize_reference

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")
openvino = pytest.importorskip("openvino")

ZOO, DATA = (os.environ.get(name) for name in ("FEWBITS_ZOO", "FEWBITS_DATA"))
on_zoo = pytest.mark.skipif(not (ZOO and DATA), reason="FEWBITS_ZOO and FEWBITS_DATA are not set")
VOCABULARY = 64


def language_model(name: str) -> Any:
    """A small model whose next tokens differ: large weights and one layer, or two where they are of different kinds."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.2}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4}
    rope = sizes | heads | {"max_position_embeddings": 64}
    torch.manual_seed(4)
    configs = {
        "llama": lambda: transformers.LlamaConfig(**rope, intermediate_size=48, num_key_value_heads=2),
        "mistral": lambda: transformers.MistralConfig(
            **rope, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=6
        ),
        "opt": lambda: transformers.OPTConfig(
            **{**rope, "init_std": 0.2}, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0
        ),
        "bloom": lambda: transformers.BloomConfig(**sizes, n_layer=1, n_head=4, tie_word_embeddings=False),
        "falcon": lambda: transformers.FalconConfig(**rope, multi_query=True, alibi=False, bias=False),
        "gpt_neo": lambda: transformers.GPTNeoConfig(
            **sizes, max_position_embeddings=64, window_size=6, num_heads=4, num_layers=2, intermediate_size=48,
            attention_types=[[["global", "local"], 1]],
        ),
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(configs[name]()).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def subject_of(model: nn.Module, bits: str) -> Subject:
    batches = [{"input_ids": tokens(3, 3, 24, VOCABULARY)[0], "use_cache": False}]
    result = quantize(model, build_recipe("rtn", bits=bits, options={"target": "onnxruntime"}), batches)
    loaded = LoadedModel("test", "module", result.model, "text-generation", {}, {"kind": "module"})
    return Subject(loaded, result.attachment, batches=batches)


def exported(subject: Subject, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    target = load_target("onnx")
    facts = target.write(subject, folder, cache="true")  # as typed
    return facts, {report["runtime"]: report for report in target.check(subject, folder)}


class OnnxRuntime:
    """Greedy generation from a file, as a user of onnxruntime writes it."""

    def __init__(self, file: Path) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = self.session.get_inputs()
        self.names = [item.name for item in self.session.get_outputs()]

    def run(self, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.session.run(self.names, given)

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        return {
            item.name: np.zeros((rows, item.shape[1], 0, item.shape[3]), np.float32)
            for item in self.inputs
            if item.name.startswith("past_key_values.")
        }

    def generate(self, ids: Tensor, mask: Tensor, count: int) -> Tensor:
        taken = {item.name for item in self.inputs}
        held, seen, past = ids.numpy(), mask.numpy(), self.empty(len(ids))
        new = held
        for _ in range(count):
            places = np.maximum(seen.cumsum(-1) - 1, 0)[:, -new.shape[1] :]
            given = {"input_ids": new, "attention_mask": seen, "position_ids": places}
            out = self.run({name: value for name, value in given.items() if name in taken} | past)
            found = dict(zip(self.names, out, strict=True))
            new = found["logits"][:, -1:].argmax(-1)
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            held = np.concatenate([held, new], 1)
            seen = np.concatenate([seen, np.ones_like(new)], 1)
        return torch.from_numpy(held)


class OpenVino(OnnxRuntime):
    """The same loop in OpenVINO."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
        self.model = core.compile_model(core.read_model(str(file)), "CPU", settings)

    def run(self, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self.model(given)
        return [np.array(found[port]) for port in self.model.outputs]


def prompts() -> tuple[Tensor, Tensor]:
    """Two texts of different length, filled up on the left."""
    ids = tokens(2, 2, 9, VOCABULARY)[0]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return torch.where(mask.bool(), ids, 0), mask


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("llama", "W8A8"),
        *(
            pytest.param(name, bits, marks=pytest.mark.slow)
            for name, bits in [
                ("llama", "W4A16g16"), ("mistral", "W4A16g16"), ("opt", "W8A8"), ("opt", "W4A16g16"), ("bloom", "W8A8"),
                ("bloom", "W4A16g16"), ("falcon", "W8A8"), ("falcon", "W4A16g16"), ("gpt_neo", "W8A8"),
                ("gpt_neo", "W4A16g16"),
            ]
        ),
    ],
)  # fmt: skip
def test_generation_from_the_file_is_that_of_the_simulated_model(tmp_path: Path, name: str, bits: str) -> None:
    model = language_model(name)
    subject = subject_of(model, bits)
    facts, found = exported(subject, tmp_path)
    assert facts["cache"] is True and facts["outputs"][:3] == ["logits", "present.0.key", "present.0.value"]
    inputs = facts["inputs"]
    assert inputs[:2] == ["input_ids", "attention_mask"] and ("position_ids" in inputs) == (name != "bloom")
    assert "past_key_values.0.key" in inputs
    assert {"input_ids[batch]", "input_ids[sequence]", "past_key_values.0.key[past]"} <= set(facts["free_axes"])
    for report in found.values():  # prefill and single tokens against the model without a cache
        assert report["samples"] == 3 and report["agreement"] == 1.0
        assert report["relative"] < (0.03 if bits == "W8A8" else 1e-5)
    if bits == "W8A8":  # the products of attention and the softmax stay quantized
        quantized = {node.name for node in onnx.load(str(tmp_path / "model.onnx")).graph.node}
        wanted = {site.name for site, _ in subject.attachment.items()}
        assert wanted <= quantized and any(name.endswith("matmul_1.lhs") or "matmul.lhs" in name for name in wanted)
        assert found["onnxruntime"]["quantizers"]["equal"] > 0.999
    ids, mask = prompts()
    with torch.no_grad():
        expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert len(set(expected[:, 9:].flatten().tolist())) > 5
    for runtime in (OnnxRuntime, OpenVino):
        got = runtime(tmp_path / "model.onnx").generate(ids, mask, 16)
        assert got.tolist() == expected.tolist(), runtime.__name__
    subject.batches = [{"input_ids": ids, "attention_mask": mask, "use_cache": False}]
    with pytest.raises(FewbitsError, match="padded"):
        load_target("onnx").check(subject, tmp_path)


def test_a_model_whose_states_are_no_keys_and_values_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    mamba = transformers.MambaForCausalLM(config).eval()
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 32}
    config = transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, **sizes)
    encoder = transformers.BertForSequenceClassification(config).eval()
    for model in (mamba, encoder, nn.Linear(3, 3)):
        loaded = LoadedModel("test", "module", model, "text-generation", {}, {"kind": "module"})
        subject = subject_stub(loaded)
        with pytest.raises(FewbitsError, match=f"cache: .*{type(model).__name__}|cache: {type(model).__name__}"):
            load_target("onnx").write(subject, tmp_path, cache=True)
    assert not list(tmp_path.iterdir())


def subject_stub(loaded: LoadedModel) -> Subject:
    """A model without quantizers."""
    from fewbits.attach import Attachment

    return Subject(loaded, Attachment(loaded.model, {}, set()))


@on_zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "llama", "bloom", "falcon", "gpt_neo"])
def test_a_trained_language_model(tmp_path: Path, name: str) -> None:
    assert ZOO is not None and DATA is not None
    quantize_reference(Path(ZOO) / name, "rtn", "W4A16g32", out=tmp_path / name, options={"target": "onnxruntime"})
    text = Path(DATA) / "docs-text/test.jsonl"
    report = export_reference(
        tmp_path / name, "onnx", options={"cache": "true"}, data=str(text), samples=2, out=tmp_path / "onnx"
    )
    for run in report["comparison"]:
        assert run["agreement"] > 0.999 and run["relative"] < 1e-4
    loaded = checkpoint.load(tmp_path / name)
    with text.open() as lines:
        prompt = next(iter(json.loads(next(lines)).values()))
    ids = torch.tensor([loaded.tokenizer(str(prompt))["input_ids"][:24]])
    model: Any = loaded.model
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    got = OnnxRuntime(tmp_path / "onnx" / "model.onnx").generate(ids, torch.ones_like(ids), 16)
    assert got.tolist() == expected.tolist()
