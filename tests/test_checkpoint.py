"""Quantized checkpoints: bit-equal outputs in a fresh process, honest size, one clear error for anything damaged."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo_tiny
from fewbits import quantize
from fewbits.attach import attachment_of
from fewbits.engine import snapshot
from fewbits.errors import FewbitsError
from fewbits.formats import storage_bits
from fewbits.hub import checkpoint
from fewbits.hub.loaded import LoadedModel, plain
from fewbits.recipe import QSpec, Scheme

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
_RESNET = {"layers": [1, 1, 1, 1], "channels": (8, 12, 16, 24), "stem_width": 8, "num_classes": 10}
_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def _timm(architecture: str, **args: Any) -> LoadedModel:
    import timm

    torch.manual_seed(0)
    model = zoo_tiny._liven(timm.create_model(architecture, pretrained=False, **args))
    spec = {"kind": "timm", "architecture": architecture, "model_args": args, "pretrained_cfg": {}}
    return _loaded(model, spec, "image")


def _llama(**changes: Any) -> LoadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**_LLAMA, **changes}, architectures=["LlamaForCausalLM"])
    model = zoo_tiny._liven(LlamaForCausalLM(config))
    spec = {
        "kind": "transformers",
        "class": "LlamaForCausalLM",
        "config": config.to_dict(),
        "attention": config._attn_implementation,
    }
    return _loaded(model, plain(spec), "text-generation")


def _loaded(model: nn.Module, spec: dict[str, Any], domain: str) -> LoadedModel:
    spec = plain(
        {**spec, "ref": "here", "domain": domain, "dtype": "float32", "preprocessing": None, "model_config": {}}
    )
    return LoadedModel("here", spec["kind"], model, domain, {}, spec)


def _images() -> list[Tensor]:
    return [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))]


def _tokens() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(n))} for n in range(3)]


FEW = {"iters_w": "4", "iters_a": "3", "batch": "4"}
CASES: dict[str, tuple[Callable[[], LoadedModel], Callable[[], list[Any]], str, str, dict[str, Any]]] = {
    "vit-rtn": (lambda: _timm("vit_tiny_patch16_224", **_VIT), _images, "rtn", "W4A8", {}),
    "vit-repq": (lambda: _timm("vit_tiny_patch16_224", **_VIT), _images, "repq-vit", "W4A4", {}),
    "swin-created-bias": (lambda: _timm("swin_tiny_patch4_window7_224", **_SWIN), _images, "repq-vit", "W4A4", {}),
    "resnet-brecq": (lambda: _timm("resnet18", **_RESNET), _images, "brecq", "W3A4", FEW),
    "llama-gptq-order": (_llama, _tokens, "gptq", "W4A16g32", {"act_order": "true"}),
    "llama-smooth": (_llama, _tokens, "smoothquant", "W8A8", {}),
    "llama-tied-head": (lambda: _llama(tie_word_embeddings=True), _tokens, "rtn", "W3A8", {"quantize_head": "true"}),
}
_made: dict[str, tuple[Any, LoadedModel, Path]] = {}


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, LoadedModel, Path]]:
    """(result, model, checkpoint folder) of a case, made once; do not change them."""

    def make(case: str) -> tuple[Any, LoadedModel, Path]:
        if case not in _made:
            build, data, recipe, bits, options = CASES[case]
            loaded = build()
            result = quantize(loaded.model, recipe, data(), bits=bits, options=options)
            folder = tmp_path_factory.mktemp("checkpoints") / case
            checkpoint.save(folder, result, loaded, {"top1": 0.5})
            _made[case] = result, loaded, folder
        return _made[case]

    return make


@torch.no_grad()
def outputs(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    got = [model(**batch) if isinstance(batch, dict) else model(batch) for batch in batches]
    return {str(number): (out if isinstance(out, Tensor) else out[0]).contiguous() for number, out in enumerate(got)}


FRESH = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from fewbits.hub import checkpoint
for folder, given, out in json.loads(sys.argv[1]):
    model = checkpoint.load(folder).model
    batches = load_file(given)
    with torch.no_grad():
        names = {k: k.split("/") for k in batches}
        got = {names[k][0]: model(**{names[k][1]: v}) if names[k][1] else model(v) for k, v in batches.items()}
    save_file({k: (v if isinstance(v, torch.Tensor) else v[0]).contiguous() for k, v in got.items()}, out)
"""


def test_a_fresh_process_gives_the_same_bits(made: Any, tmp_path: Path) -> None:
    jobs, want = [], {}
    for case, (_, data, *_rest) in CASES.items():
        result, _loaded_model, folder = made(case)
        batches = data()
        want[case] = outputs(result.model, batches)
        given = {
            f"{n}/{'input_ids' if isinstance(b, dict) else ''}": b["input_ids"] if isinstance(b, dict) else b
            for n, b in enumerate(batches)
        }
        save_file(given, tmp_path / f"{case}.in")
        jobs.append([str(folder), str(tmp_path / f"{case}.in"), str(tmp_path / f"{case}.out")])
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, json.dumps(jobs)], check=True, env=env)
    for case, _given, out in zip(CASES, [j[1] for j in jobs], [j[2] for j in jobs], strict=True):
        got = load_file(out)
        assert got.keys() == want[case].keys()
        for key, value in got.items():
            assert torch.equal(value, want[case][key]), case


@pytest.mark.parametrize("case", list(CASES))
def test_loading_restores_quantizers_codes_and_names(case: str, made: Any) -> None:
    result, original, folder = made(case)
    loaded = checkpoint.load(folder)
    assert type(loaded.model) is type(original.model)
    ours, theirs = result.attachment, attachment_of(loaded.model)
    assert theirs is not None
    assert [site.name for site, _ in theirs.items()] == [site.name for site, _ in ours.items()]
    assert theirs.frozen == ours.frozen and theirs.codes.keys() == ours.codes.keys()
    for name, codes in ours.codes.items():
        assert torch.equal(codes.long(), theirs.codes[name].long())
    assert all(torch.equal(index, theirs.group_index[name]) for name, index in ours.group_index.items())
    for site, quantizer in ours.items():
        other = theirs.quantizer(site.name)
        assert other is not None and other.spec == quantizer.spec
        if quantizer.ready:
            assert all(torch.equal(value, other.params[name]) for name, value in quantizer.params.items())
    state, again = original.model.state_dict(), loaded.model.state_dict()
    assert list(again) == list(state) and all(torch.equal(value, again[name]) for name, value in state.items())
    if case == "swin-created-bias":
        float_keys = set(CASES[case][0]().model.state_dict())
        created = set(state) - float_keys
        assert created and float_keys <= set(state) and all(name.endswith(".bias") for name in created)
    if case == "llama-gptq-order":
        assert ours.group_index and any(not torch.equal(i, i.sort().values) for i in ours.group_index.values())
    if case == "llama-tied-head":
        assert (
            loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
            and "lm_head.weight" not in theirs.frozen
        )
    # loaded, copied and saved once more
    folder2 = folder.with_name(folder.name + "-again")
    twin = copy.deepcopy(loaded.model)
    result2 = copy.copy(result)
    result2.model, result2.attachment = twin, attachment_of(twin)
    checkpoint.save(folder2, result2, loaded)
    for name in json.loads((folder / "fewbits.json").read_text())["files"]:
        assert (folder / name).read_bytes() == (folder2 / name).read_bytes()


@pytest.mark.parametrize("case", list(CASES))
def test_size_on_disk_is_what_the_bits_say(case: str, made: Any) -> None:
    result, loaded, folder = made(case)
    expected, headers, coded = 0.0, 0, set()
    for site, quantizer in result.attachment.items():
        if site.role == "weight":
            codes = result.attachment.codes[site.name]
            spec = quantizer.spec
            expected += codes.numel() * spec.format.code_bits / 8
            expected += sum(4 * value.numel() for value in quantizer.params.values())
            assert storage_bits(
                spec.format, spec.granularity, codes.shape
            ) / 8 <= codes.numel() * spec.format.code_bits / 8 + sum(
                4 * value.numel() for value in quantizer.params.values()
            )
            expected += 4 * codes.shape[1] if site.name in result.attachment.group_index else 0
            if site.name in result.attachment.frozen:
                coded.add(site.param)
        elif quantizer.ready:
            expected += sum(4 * value.numel() for value in quantizer.params.values())
    expected += sum(v.numel() * v.element_size() for n, v in loaded.model.named_parameters() if n not in coded)
    names = loaded.model.state_dict()
    expected += sum(v.numel() * v.element_size() for n, v in loaded.model.named_buffers() if n in names)
    actual = 0
    for path in folder.glob("*.safetensors"):
        actual += path.stat().st_size
        with open(path, "rb") as handle:
            headers += 8 + int.from_bytes(handle.read(8), "little")
    assert abs(actual - headers - expected) <= 0.01 * expected + 8 * len(result.attachment.codes)
    assert coded, "nothing is stored as codes"


def test_json_is_readable_and_round_trips(made: Any) -> None:
    for case in CASES:
        result, _, folder = made(case)
        data = json.loads((folder / "fewbits.json").read_text())
        assert Scheme.from_dict(data["recipe"]["scheme"]) == result.recipe.scheme
        assert data["recipe"]["bits"] == str(result.recipe.bits) and data["seed"] == 0
        assert data["metadata"] == {"top1": 0.5} and data["calibration_fingerprint"] == result.calibration_fingerprint
        assert "\n" in (folder / "fewbits.json").read_text()
        assert checkpoint.description(folder) == data
        tensors, part = snapshot.read(folder / "model.safetensors")
        for name, description in part["quantizers"].items():
            assert QSpec.from_dict(description["spec"]) == result.attachment.quantizer(name).spec
        assert tensors


def test_a_folder_says_how_hessians_were_added_up(made: Any, tmp_path: Path) -> None:
    for case, (_, _, recipe, *_rest) in CASES.items():
        data = checkpoint.description(made(case)[2])
        assert data["hessian_arithmetic"] == (["float32"] if recipe == "gptq" else []), case
    old = shutil.copytree(made("llama-gptq-order")[2], tmp_path / "old")  # as written before folders said it
    resign(old, lambda d: d.pop("hessian_arithmetic"))
    tokens = _tokens()
    with_it, without = (outputs(checkpoint.load(one).model, tokens) for one in (made("llama-gptq-order")[2], old))
    assert all(torch.equal(value, without[key]) for key, value in with_it.items())


# -- damage ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def copied(made: Any, tmp_path: Path) -> Path:
    return shutil.copytree(made("vit-rtn")[2], tmp_path / "q")


def refused(folder: Path, *words: str) -> str:
    """Loading raises exactly one FewbitsError, which names the words."""
    with pytest.raises(FewbitsError) as caught:
        checkpoint.load(folder)
    for word in words:
        assert word in str(caught.value), caught.value
    return str(caught.value)


FILES = ("model.safetensors", "fewbits.json")


@pytest.mark.parametrize("name", FILES)
def test_truncation_anywhere(copied: Path, name: str) -> None:
    raw = (copied / name).read_bytes()
    for tenth in range(10):
        (copied / name).write_bytes(raw[: len(raw) * tenth // 10])
        refused(copied, name)
    (copied / name).write_bytes(raw[:-1])
    refused(copied, name)
    (copied / name).write_bytes(raw + b" ")
    refused(copied, name)
    (copied / name).unlink()
    refused(copied, name)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere(copied: Path, name: str) -> None:
    raw = (copied / name).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little") if name.endswith("safetensors") else 0
    places = {
        *range(min(len(raw), 40)),
        *range(0, len(raw), max(1, len(raw) // 60)),
        *range(0, header, max(1, header // 20)),
        len(raw) - 1,
    }
    for number, place in enumerate(sorted(places)):
        bad = bytearray(raw)
        bad[place] ^= (0x01, 0x20, 0xFF)[number % 3]
        (copied / name).write_bytes(bad)
        refused(copied, name)


def test_every_digit_and_letter_of_the_json_counts(copied: Path) -> None:
    path = copied / "fewbits.json"
    text = path.read_text()
    for old, new in (
        ('"seed": 0', '"seed": 1'),
        ('"dtype": "float32"', '"dtype": "float16"'),
        ("0.5", "0.6"),
        ("\n", "\n "),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(FewbitsError, match="checksum differs"):
            checkpoint.description(copied)


def resign(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change fewbits.json as an attacker (or a buggy writer) would: with right checksums."""
    path = folder / "fewbits.json"
    data = json.loads(path.read_text())
    data["files"] = {
        name: checkpoint._sha256(folder / name) if (folder / name).is_file() else "" for name in data["files"]
    }
    change(data)
    data["checksum"] = "0" * 64
    text = json.dumps(data)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(fewbits_checkpoint=99), ("version",)),
        (lambda d: d.pop("sites"), ("lacks sites",)),
        (lambda d: d.update(sites={}), ("lacks sites",)),
        (lambda d: d.update(files=["model.safetensors"]), ("lacks files",)),
        (lambda d: d.update(files={}), ("holds no values",)),
        (lambda d: d.update(files={"../q/model.safetensors": "x"}), ("leads out",)),
        (lambda d: d.update(files={"/etc/passwd": "x"}), ("leads out",)),
        (lambda d: d.update(files={"..": "x"}), ("leads out",)),
        (lambda d: d.update(files={"": "x"}), ("leads out",)),
        (lambda d: d.update(companions={"a/../../x": "x"}), ("leads out",)),
        (lambda d: d.update(companions={"tokenizer/x": "x"}), ("tokenizer/x", "missing")),
        (lambda d: d["sites"].append(3), ("damaged list of sites",)),
        (lambda d: d["sites"][0].pop("key"), ("damaged list of sites",)),
        (lambda d: d["weighted_calls"].append([1]), ("damaged list of sites",)),
        (lambda d: d["sites"].append({**d["sites"][0], "name": "nowhere.input"}), ("nowhere.input",)),
        (lambda d: d["sites"].pop(0), ("has no site",)),
        (lambda d: d.update(model={}), ("cannot be built",)),
        (lambda d: d["model"].update(architecture="no_such_net"), ("cannot be built",)),
        (lambda d: d["model"].update(kind="nothing"), ("cannot be built",)),
        (lambda d: d["model"]["model_args"].update(embed_dim=64), ("model.safetensors", "shape")),
        (lambda d: d["model"]["model_args"].update(depth=1), ("model.safetensors", "does not have")),
        (lambda d: d["model"]["model_args"].update(depth=3), ("holds no values for blocks.2",)),
        (lambda d: d["model"].update(dtype="float16"), ("model.safetensors", "float16")),
    ],
)
def test_a_foreign_description(copied: Path, change: Callable[[dict[str, Any]], None], words: tuple[str, ...]) -> None:
    resign(copied, lambda data: None)
    checkpoint.load(copied)
    resign(copied, change)
    refused(copied, str(copied), *words)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"fewbits_checkpoint": 1}', "[" * 100_000, "\x00\xff", '{"a": 1}']
)
def test_foreign_json(copied: Path, text: str) -> None:
    (copied / "fewbits.json").write_bytes(text.encode("latin-1"))
    refused(copied, "fewbits.json")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    tensors, described = snapshot.read(path)
    change(tensors, described)
    snapshot.write(path, tensors, described)
    resign(folder, lambda data: None)


QKV = "blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, d: t.pop("tensor/pos_embed"), ("holds no values for pos_embed",)),
        (lambda t, d: t.pop(f"codes/{QKV}"), (f"codes/{QKV}",)),
        (lambda t, d: t.pop(f"quantizer/{QKV}/scale"), (QKV, "scale")),
        (lambda t, d: t.update({f"quantizer/{QKV}/scale": torch.ones(3, 1)}), (QKV,)),
        (
            lambda t, d: t.update(
                {f"quantizer/{QKV}/scale": torch.full_like(t[f"quantizer/{QKV}/scale"], float("nan"))}
            ),
            (QKV,),
        ),
        (lambda t, d: t.update({f"quantizer/{QKV.replace('weight', 'input')}/scale": torch.ones(7)}), ("qkv.input",)),
        (lambda t, d: t.update({f"quantizer/{QKV}/scale": t[f"quantizer/{QKV}/scale"].double()}), (QKV, "float64")),
        (lambda t, d: t.update({f"codes/{QKV}": t[f"codes/{QKV}"][:-1].clone()}), ("packed codes",)),
        (lambda t, d: t.update({"tensor/pos_embed": torch.zeros(1, 2, 3)}), ("pos_embed", "shape")),
        (lambda t, d: t.update({"tensor/pos_embed": t["tensor/pos_embed"].half()}), ("pos_embed", "float16")),
        (lambda t, d: t.update({"tensor/blocks.0.foreign": torch.zeros(3)}), ("blocks.0.foreign",)),
        (lambda t, d: t.update({"tensor/blocks.0.forward": torch.zeros(3)}), ("blocks.0.forward",)),
        (lambda t, d: t.update({"tensor/nowhere.weight": torch.zeros(3)}), ("nowhere.weight",)),
        (lambda t, d: t.update({f"group_index/{QKV}": torch.full((32,), 9, dtype=torch.int32)}), (QKV, "group index")),
        (lambda t, d: d.update(version=0), ("another version",)),
        (lambda t, d: d.pop("coded"), ("lacks coded",)),
        (lambda t, d: d.update(codes=[]), ("lacks codes",)),
        (lambda t, d: d["quantizers"].pop(QKV), (QKV,)),
        (lambda t, d: d["quantizers"][QKV].pop("spec"), ("spec",)),
        (lambda t, d: d["quantizers"][QKV]["spec"]["format"].update(kind="nothing"), ("nothing",)),
        (lambda t, d: d["codes"][QKV].update(shape=[32, 96]), (QKV, "shape")),
        (lambda t, d: d["codes"][QKV].update(shape="x"), (QKV,)),
        (lambda t, d: d["codes"][QKV].update(frozen=False), (QKV, "whole")),
        (lambda t, d: d["coded"][QKV].update(shape=[1]), (QKV, "shape")),
        (lambda t, d: d["alias"].update({"pos_embed": "nothing"}), ("pos_embed", "nothing")),
    ],
)
def test_foreign_contents(
    copied: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None], words: tuple[str, ...]
) -> None:
    rewrite(copied, change)
    refused(copied, str(copied), *words)


def test_a_foreign_safetensors_file(copied: Path) -> None:
    save_file({"x": torch.zeros(3)}, copied / "model.safetensors")
    refused(copied, "model.safetensors")
    resign(copied, lambda data: None)
    refused(copied, "model.safetensors", "not one that fewbits wrote")
    save_file({"x": torch.zeros(3)}, copied / "model.safetensors", metadata={"fewbits": "{"})
    resign(copied, lambda data: None)
    refused(copied, "model.safetensors", "damaged")


def test_nothing_is_pickled(made: Any) -> None:
    _, _, folder = made("vit-rtn")
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    source = Path(checkpoint.__file__).read_text() + Path(snapshot.__file__).read_text()
    assert "torch.load" not in source and "pickle" not in source


# -- saving ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["take", "write", "companions", "json", "replace"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_save_leaves_nothing(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, exists: bool
) -> None:
    result, loaded, _ = made("vit-rtn")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt if where == "write" else OSError("no space left on device")

    places = {
        "take": (snapshot, "take"), "write": (snapshot, "write"), "companions": (checkpoint, "save_companions"),
        "json": (checkpoint, "dumps"), "replace": (checkpoint.os, "replace"),
    }  # fmt: skip
    folder = tmp_path / "deep" / "er" / "q"
    if exists:
        folder.parent.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(*places[where], fails)
        with pytest.raises((OSError, KeyboardInterrupt)):
            checkpoint.save(folder, result, loaded)
    assert [path for path in tmp_path.rglob("*") if path not in (folder.parent, folder.parent.parent)] == []
    assert folder.parent.exists() is exists
    checkpoint.save(folder, result, loaded)
    checkpoint.load(folder)
    with pytest.raises(FewbitsError, match="not empty"):
        checkpoint.save(folder, result, loaded)


def test_the_tokenizer_is_checked_too(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    loaded = _llama()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    loaded.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    result = quantize(loaded.model, "rtn", _tokens()[:1], bits="W8A16")
    checkpoint.save(tmp_path / "q", result, loaded)
    assert checkpoint.load(tmp_path / "q").tokenizer is not None
    path = tmp_path / "q" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"b"', '"c"'))
    refused(tmp_path / "q", "tokenizer.json", "checksum")


def test_parts_that_share_memory_can_be_stored() -> None:
    """Tied, sliced and transposed views of one memory: each value comes back under each name."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.arange(16.0).view(4, 4)
            self.whole = nn.Parameter(memory)
            self.rows = nn.Parameter(memory[:2])
            self.turned = nn.Parameter(memory.T)
            self.tied = self.whole
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Shares().eval()
    result = quantize(model, "rtn", [torch.randn(2, 4)], bits="W4A16")
    names = [name for name in model.state_dict() if not name.startswith("layer")]
    tensors, described = snapshot.take(model, result.attachment, names, [])
    assert described["alias"] == {"tied": "whole"}
    assert torch.equal(tensors["tensor/turned"], model.whole.T) and torch.equal(tensors["tensor/rows"], model.whole[:2])
    path = Path(os.devnull).parent / "shm" if Path("/dev/shm").is_dir() else Path(".")
    file = path / f"fewbits-{os.getpid()}.safetensors"
    try:
        snapshot.write(file, tensors, described)
        with safe_open(file, "pt") as handle:
            assert set(handle.keys()) == {"tensor/whole", "tensor/rows", "tensor/turned"}
    finally:
        file.unlink(missing_ok=True)
