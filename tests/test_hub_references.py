"""Model references: what they mean and how they fail, before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fewbits.errors import FewbitsError
from fewbits.hub.references import check_model_ref, check_weights, parse_model_ref


def folder(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("ref", "kind", "name"),
    [
        ("timm:resnet18.a1_in1k", "timm", "resnet18.a1_in1k"),
        ("timm:hf-hub:org/name", "timm", "hf-hub:org/name"),
        ("torchvision:resnet18", "torchvision", "resnet18"),
        ("hf:org/name", "transformers", "org/name"),
        ("demo:text", "demo", "text"),
    ],
)
def test_prefixes(ref: str, kind: str, name: str) -> None:
    parsed = parse_model_ref(ref)
    assert (parsed.kind, parsed.name) == (kind, name)


def test_code_references(tmp_path: Path) -> None:
    code = tmp_path / "my.py"
    code.write_text("")
    parsed = parse_model_ref(f"module:{code}:load:{tmp_path}/a:b")
    assert (parsed.kind, parsed.code, parsed.function, parsed.argument) == (
        "module",
        str(code),
        "load",
        f"{tmp_path}/a:b",
    )
    assert parse_model_ref("weights", f"{code}:load").argument == "weights"
    assert parse_model_ref("module:package.sub:make").code == "package.sub"
    for ref, given in (("module:my.txt", None), (f"module:{tmp_path}/no.py:load", None), ("x", f"{code}:load:arg")):
        with pytest.raises(FewbitsError):
            parse_model_ref(ref, given)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architecture": "resnet18", "pretrained_cfg": {}}, "timm"),
        ({"architecture": "resnet18", "library": "torchvision"}, "torchvision"),
        ({"model_type": "llama"}, "transformers"),
        ({"_class_name": "UNet2DModel"}, "diffusers"),
    ],
)
def test_directories_tell_their_kind(tmp_path: Path, config: dict, kind: str) -> None:
    assert parse_model_ref(folder(tmp_path / "m", **config)).kind == kind


def test_foreign_and_missing_directories(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for ref, words in (
        (tmp_path / "none", "does not exist"),
        (empty, "not a model directory"),
        (folder(tmp_path / "foreign", name="x"), "no kind known"),
        (folder(tmp_path / "own", library="mine.py"), "not run unasked"),
        (broken, "cannot be read as JSON"),
        ("", "empty"),
        ("timm:", "names nothing"),
        ("nothing-here", "neither a directory"),
    ):
        with pytest.raises(FewbitsError, match=words):
            parse_model_ref(ref)


def test_weights_truncated_at_any_byte_are_found(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, dtype=np.float16)}, whole)
    assert check_weights(tmp_path) == [whole]
    content = whole.read_bytes()
    for length in range(len(content)):
        whole.write_bytes(content[:length])
        with pytest.raises(FewbitsError, match=r"model\.safetensors is truncated or no safetensors file"):
            check_weights(tmp_path)


def test_weights_missing_or_in_another_format(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="holds no weights"):
        check_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FewbitsError, match=r"pytorch_model\.bin is not read"):
        check_weights(tmp_path)
    save_file({"a": np.ones(1)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "model-2.safetensors"}}))
    with pytest.raises(FewbitsError, match=r"lacks 1 of the files its index names: model-2\.safetensors"):
        check_weights(tmp_path)


def test_unknown_demo_names_the_nearest() -> None:
    with pytest.raises(FewbitsError, match="did you mean digits"):
        check_model_ref("demo:digit")


def test_references_are_checked_without_torch() -> None:
    code = (
        "import sys; from fewbits.hub.references import check_model_ref; check_model_ref('demo:text');"
        "import fewbits.hub.sources, fewbits.workflow; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["timm", "torchvision", "transformers"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    prefix = {"transformers": "hf"}.get(package, package)
    from fewbits.hub.models import load_model

    with pytest.raises(FewbitsError, match=rf"needs the package '{package}'.*pip install 'fewbits\["):
        load_model(f"{prefix}:resnet18")
