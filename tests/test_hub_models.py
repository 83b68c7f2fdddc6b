"""Loading through every library's own loader, on tiny models written here and on the zoo where FEWBITS_ZOO is set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbits.engine.tree import as_call, map_tensors
from fewbits.errors import FewbitsError
from fewbits.hub.models import LoadedModel, from_spec, load_model, rebuild, save_companions
from golden import folder

CODE = """
import torch
from torch import nn
from safetensors.torch import load_file

def load(folder=None):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return model, {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}

def wrong(folder=None):
    return 3

def fails(folder=None):
    raise RuntimeError("no such weights")
"""


def write_timm(path: Path) -> Path:
    timm = pytest.importorskip("timm")
    args = {"img_size": [16, 16], "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 7}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **args)
    cfg = {"input_size": [3, 16, 16], "mean": [0.4] * 3, "std": [0.3] * 3, "num_classes": 7, "fixed_input_size": True}
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps(
            {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "model_args": args, "pretrained_cfg": cfg}
        )
    )
    save_file(model.state_dict(), path / "model.safetensors")
    return path


def write_torchvision(path: Path) -> Path:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=6)
    config = {"library": "torchvision", "architecture": "shufflenet_v2_x0_5", "model_args": {"num_classes": 6}}
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({**config, "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3})
    )
    save_file(model.state_dict(), path / "model.safetensors")
    return path


def write_llama(path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=40,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def write_diffusers(path: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(path)
    return path


def write_module(path: Path) -> Path:
    path.mkdir()
    (path / "code.py").write_text(CODE)
    return path


WRITERS = {
    "timm": write_timm,
    "torchvision": write_torchvision,
    "transformers": write_llama,
    "diffusers": write_diffusers,
    "module": write_module,
}


def loaded_of(kind: str, path: Path, **options: Any) -> LoadedModel:
    where = WRITERS[kind](path)
    return load_model(f"module:{where}/code.py:load:{where}" if kind == "module" else where, **options)


def output(model: torch.nn.Module, batch: Any) -> Tensor:
    args, kwargs = as_call(batch)
    with torch.no_grad():
        out = model(*args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def check_loaded(loaded: LoadedModel, code_module: str | None, tmp_path: Path) -> None:
    """Eval mode, a repeatable example, and a JSON spec that rebuilds the same function once the weights are put in."""
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    batch = loaded.example_batch(2)
    want = output(loaded.model, batch)
    assert len(want) == 2 and torch.isfinite(want).all()
    assert torch.equal(want, output(loaded.model, loaded.example_batch(2)))
    spec = json.loads(json.dumps(loaded.rebuild_spec))
    made = rebuild(spec, code_module=code_module)
    assert type(made) is type(loaded.model) and not made.training
    with torch.no_grad():
        for value in made.state_dict().values():
            value.zero_()  # nothing of the rebuilt weights may matter
    made.load_state_dict(loaded.model.state_dict())
    assert torch.equal(want, output(made, batch))
    save_companions(loaded, tmp_path)
    again = from_spec(spec, tmp_path, code_module=code_module)
    assert (again.kind, again.domain, again.preprocessing) == (loaded.kind, loaded.domain, loaded.preprocessing)
    assert again.rebuild_spec == spec and (again.tokenizer is None) == (loaded.tokenizer is None)
    assert map_tensors(lambda t: t.shape, again.example_batch(3)) == map_tensors(
        lambda t: t.shape, loaded.example_batch(3)
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_load_example_and_rebuild(kind: str, tmp_path: Path) -> None:
    loaded = loaded_of(kind, tmp_path / "m")
    assert loaded.kind == kind
    check_loaded(loaded, f"{tmp_path}/m/code.py:load" if kind == "module" else None, tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
def test_dtype_holds_for_model_example_and_rebuilt(kind: str, tmp_path: Path) -> None:
    loaded = loaded_of(kind, tmp_path / "m", dtype=torch.bfloat16)
    code = f"{tmp_path}/m/code.py:load" if kind == "module" else None
    for model in (loaded.model, rebuild(loaded.rebuild_spec, code_module=code)):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    floats = [
        t
        for t in torch.utils._pytree.tree_leaves(loaded.example_batch())
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    assert all(t.dtype == torch.bfloat16 for t in floats)


@pytest.mark.parametrize("name", ["text", "digits"])
def test_demos(name: str, tmp_path: Path) -> None:
    loaded = load_model(f"demo:{name}")
    assert loaded.kind == "demo"
    check_loaded(loaded, None, tmp_path)


@pytest.mark.parametrize("kind", ["timm", "torchvision", "transformers", "diffusers"])
def test_corrupt_weights_give_one_error(kind: str, tmp_path: Path) -> None:
    where = WRITERS[kind](tmp_path / "m")
    file = next(where.rglob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FewbitsError, match=f"{file.name} is truncated"):
        load_model(where)


@pytest.mark.parametrize("kind", ["timm", "torchvision", "transformers", "diffusers"])
def test_weights_that_do_not_fit_are_refused(kind: str, tmp_path: Path) -> None:
    """A tensor that is missing must not become a random one."""
    where = WRITERS[kind](tmp_path / "m")
    file = next(where.rglob("*.safetensors"))
    tensors = load_file(file)
    dropped = next(key for key in sorted(tensors) if key.endswith("weight") and "embed" not in key)
    del tensors[dropped]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FewbitsError):
        load_model(where)


def test_unknown_names_give_the_nearest() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    for ref, near in (
        ("timm:resnet1O", "resnet10t|resnet18"),
        ("torchvision:resnet181", "resnet18"),
        ("timm:resnet18.a1_in1", "resnet18.a1_in1k"),
    ):
        with pytest.raises(FewbitsError, match=f"did you mean .*({near})"):
            load_model(ref)


def test_unknown_architecture_in_a_directory(tmp_path: Path) -> None:
    where = write_torchvision(tmp_path / "m")
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, "architecture": "shufflenet_v2_x0_7"}))
    with pytest.raises(FewbitsError, match="did you mean shufflenet_v2_x0_5"):
        load_model(where)


def test_quantized_originals_and_remote_code_are_refused(tmp_path: Path) -> None:
    where = write_llama(tmp_path / "m")
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(FewbitsError, match="quantized already"):
        load_model(where)


def test_code_is_run_only_where_it_is_named(tmp_path: Path) -> None:
    where = write_module(tmp_path / "m")
    loaded = load_model(f"module:{where}/code.py:load")
    with pytest.raises(FewbitsError, match="not run unasked"):
        rebuild(loaded.rebuild_spec)
    for function, words in (("laod", "did you mean load"), ("wrong", "returned int"), ("fails", "no such weights")):
        with pytest.raises(FewbitsError, match=words):
            load_model(f"module:{where}/code.py:{function}")


def test_devices_are_checked() -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(FewbitsError, match="device"):
            load_model("demo:digits", device=device)


ZOO = folder("FEWBITS_ZOO")
MODELS = sorted(p.parent.name for p in ZOO.glob("*/metrics.json")) if ZOO else []


@pytest.mark.skipif(ZOO is None, reason="FEWBITS_ZOO is not set")
@pytest.mark.parametrize("name", MODELS)
def test_zoo_models(name: str, tmp_path: Path) -> None:
    assert ZOO is not None
    configured = ZOO / name / "config.json"
    library = json.loads(configured.read_text()).get("library", "") if configured.is_file() else ""
    code = f"{ZOO / library}:load" if library.endswith(".py") else None
    loaded = load_model(ZOO / name, code_module=code)
    metrics = json.loads((ZOO / name / "metrics.json").read_text())
    assert sum(p.numel() for p in loaded.model.parameters()) == metrics["params"]
    check_loaded(loaded, code, tmp_path)
