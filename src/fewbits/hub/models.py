"""Model references to models: `load_model`, and building a model again without its weights: `rebuild`, `from_spec`.

| reference | loader |
| --- | --- |
| `timm:NAME`, `timm:hf-hub:ORG/NAME`, a timm directory | `timm.create_model(..., pretrained=True)` |
| `torchvision:NAME`, a directory with `"library": "torchvision"` | `torchvision.models.get_model` |
| `hf:NAME`, a transformers directory | `from_pretrained` of the class named in the configuration |
| a diffusers pipeline or model directory | `from_pretrained` of the denoiser's class |
| `demo:NAME` | `fewbits.demo.load` |
| `module:FILE.py:FUNCTION[:ARGUMENT]` | your function |
| a fewbits checkpoint directory | `fewbits.hub.checkpoint.load` |
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.hub.loaded import LoadedModel, dtype_name, dtype_of
from fewbits.hub.references import is_checkpoint, parse_model_ref

__all__ = ["LoadedModel", "check_device", "from_spec", "load_model", "rebuild", "save_companions"]

_KINDS = ("timm", "torchvision", "transformers", "diffusers", "demo", "module")


def _adapter(kind: str) -> Any:
    if kind not in _KINDS:
        raise FewbitsError(f"unknown model kind {kind!r}; known: {', '.join(_KINDS)}")
    return importlib.import_module(f"fewbits.hub.adapters.{kind}")


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it; FewbitsError otherwise."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise FewbitsError(f"device {device!r} is not one torch knows: use cpu, cuda, cuda:0, mps ...") from None
    if parsed.type == "cuda":
        count = torch.cuda.device_count()
        if (parsed.index or 0) >= count:
            raise FewbitsError(f"device {str(parsed)!r} is not there: this machine has {count} CUDA devices")
    elif parsed.type == "mps" and not torch.backends.mps.is_available():
        raise FewbitsError("device 'mps' is not available here")
    return parsed


def load_model(
    ref: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    code_module: str | None = None,
) -> LoadedModel:
    """Load the model that a reference names (see the table above), in eval mode, in `dtype`, on `device`.

    Args:
        ref: the reference. A directory's kind is told from its files.
        dtype: floating-point type of the model; checkpoints of fewbits keep the one they were made in.
        code_module: `FILE.py:FUNCTION` that loads the model; called with `ref`. For a fewbits checkpoint of such a
            model, the code that builds it.

    Raises:
        FewbitsError: nothing found under the reference, a package missing, weights truncated, corrupt or unfitting.
    """
    target = check_device(device)
    folder = Path(str(ref)).expanduser()
    parsed = parse_model_ref(ref) if is_checkpoint(folder) else parse_model_ref(ref, code_module)
    if parsed.kind == "fewbits":
        return _load_checkpoint(folder, target, code_module)
    loaded: LoadedModel = _adapter(parsed.kind).load(parsed, dtype)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    loaded.model.to(target)
    loaded.rebuild_spec = _complete(loaded, dtype)
    return loaded


def _load_checkpoint(folder: Path, device: torch.device, code_module: str | None) -> LoadedModel:
    from fewbits.hub import checkpoint

    loaded = checkpoint.load(folder, **({"code_module": code_module} if code_module else {}))
    loaded.model.to(device)
    return loaded


def _complete(loaded: LoadedModel, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "kind": loaded.kind,
        "ref": loaded.ref,
        "domain": loaded.domain,
        "dtype": dtype_name(dtype),
        **loaded.rebuild_spec,
        "preprocessing": loaded.preprocessing,
        "model_config": loaded.config,
    }


def rebuild(spec: dict[str, Any], *, code_module: str | None = None) -> nn.Module:
    """The architecture that `LoadedModel.rebuild_spec` describes, in eval mode, in its dtype, on the CPU. Its
    weights mean nothing.

    Args:
        code_module: for models of kind `module`, the code that builds it: it is never run unasked.
    """
    adapter = _adapter(str(spec.get("kind")))
    model = adapter.rebuild(spec, code_module) if spec["kind"] == "module" else adapter.rebuild(spec)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dtype = dtype_of(spec["dtype"])
    if any(p.dtype != dtype for p in model.parameters() if p.is_floating_point()):
        model = model.to(dtype)
    return model.eval()


def save_companions(loaded: LoadedModel, folder: Path) -> None:
    """Write what the rebuild_spec cannot hold (the tokenizer) into a checkpoint's folder."""
    if loaded.kind == "transformers":
        _adapter("transformers").save_companions(loaded, folder)


def from_spec(spec: dict[str, Any], folder: Path | None = None, *, code_module: str | None = None) -> LoadedModel:
    """`rebuild` with its surroundings.

    Tokenizer (from `folder`, written by `save_companions`), preprocessing, domain, configuration.
    """
    tokenizer = None
    if spec["kind"] == "transformers" and folder is not None:
        tokenizer = _adapter("transformers").load_companions(folder)
    elif spec["kind"] == "demo":
        tokenizer = _adapter("demo").demo_tokenizer(spec["model_config"])
    model = rebuild(spec, code_module=code_module)
    return LoadedModel(
        spec["ref"],
        spec["kind"],
        model,
        spec["domain"],
        spec["model_config"],
        dict(spec),
        spec["preprocessing"],
        tokenizer,
    )
