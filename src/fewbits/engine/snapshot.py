"""A part of a quantized model as tensors plus JSON: what a commit writes, a resumed run reads and a checkpoint is made of.

Weights whose quantized values are final are stored as packed integer codes with their parameters; everything else as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.attach import Attachment
from fewbits.errors import FewbitsError
from fewbits.formats import pack_codes, unpack_codes
from fewbits.graph import operands
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer

METADATA = "fewbits"
VERSION = 1


def take(model: nn.Module, attachment: Attachment, names: Iterable[str], sites: Iterable[Site]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of the named parameters and buffers and of the quantizers at `sites`."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {"version": VERSION, "quantizers": {}, "codes": {}, "alias": {}, "coded": {}}
    covered: dict[str, int] = {}
    for site in sites:
        quantizer = attachment.quantizer(site.name)
        if quantizer is None:
            continue
        description, params = quantizer.state()
        described["quantizers"][site.name] = description
        for name, value in params.items():
            tensors[f"quantizer/{site.name}/{name}"] = value.detach().cpu().contiguous()
        if site.name not in attachment.codes:
            continue
        codes = attachment.codes[site.name]
        fmt = quantizer.spec.format
        tensors[f"codes/{site.name}"] = pack_codes(codes, fmt.code_bits, offset=fmt.code_min)
        described["codes"][site.name] = {"shape": list(codes.shape), "frozen": site.name in attachment.frozen}
        if site.name in attachment.group_index:
            tensors[f"group_index/{site.name}"] = attachment.group_index[site.name].to(torch.int32)
        if site.name in attachment.frozen and site.param is not None:
            covered[site.param] = covered.get(site.param, 0) + codes.numel()
    first: dict[int, str] = {}
    for name in names:
        value = operands.parameter(model, name).detach()
        if covered.get(name) == value.numel():
            described["coded"][name] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            continue
        known = first.setdefault(value.data_ptr() if value.numel() else id(value), name)
        if known != name and operands.parameter(model, known).shape == value.shape:
            described["alias"][name] = known
            continue
        tensors[f"tensor/{name}"] = value.cpu().contiguous()
    return tensors, described


def put(model: nn.Module, attachment: Attachment, tensors: dict[str, Tensor], described: dict[str, Any], device: torch.device | None = None) -> None:
    """Restore what `take` took into a model with the same sites. Raises `FewbitsError` where they do not fit."""
    values = {key.removeprefix("tensor/"): value for key, value in tensors.items() if key.startswith("tensor/")}
    values |= {name: values[known] for name, known in described["alias"].items()}
    for name, value in values.items():
        assign(model, name, value)
    for site_name, description in described["quantizers"].items():
        site = attachment.sites.get(site_name)
        if site is None:
            raise FewbitsError(f"the stored quantizer of {site_name} has no site in this model")
        prefix = f"quantizer/{site_name}/"
        params = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        quantizer = Quantizer.from_state(description, params)
        if device is not None:
            quantizer.to(device)
        attachment.set_quantizer(site_name, quantizer)
        coded = described["codes"].get(site_name)
        if coded is None:
            continue
        fmt = quantizer.spec.format
        attachment.codes[site_name] = unpack_codes(tensors[f"codes/{site_name}"], fmt.code_bits, coded["shape"], offset=fmt.code_min)
        index = tensors.get(f"group_index/{site_name}")
        if index is not None:
            attachment.group_index[site_name] = index.long()
        else:
            attachment.group_index.pop(site_name, None)
        if coded["frozen"]:
            shape = operands.canonical(operands.operand(model, site), site.layout, site.groups).shape
            operands.write(model, site, attachment.decoded(site_name).view(shape))
            attachment.freeze(site_name)
        else:
            attachment.thaw(site_name)


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a stored tensor into a parameter or buffer; a parameter the float model lacked (a bias) is created."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise FewbitsError(f"the stored tensor {name} belongs to a module this model does not have") from error
    held = getattr(module, leaf, None)
    if held is None:
        device = next((p.device for p in module.parameters(recurse=False)), torch.device("cpu"))
        module.register_parameter(leaf, nn.Parameter(value.to(device), requires_grad=False))
        return
    if held.shape != value.shape:
        raise FewbitsError(f"the stored tensor {name} has shape {tuple(value.shape)}, the model's {tuple(held.shape)}")
    with torch.no_grad():
        held.data.copy_(value)


def write(path: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Write atomically: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata={METADATA: json.dumps(described, sort_keys=True)})
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote. Raises `FewbitsError` for a missing, truncated, corrupt or foreign file."""
    if not path.is_file():
        raise FewbitsError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            if METADATA not in metadata:
                raise FewbitsError(f"{path}: a safetensors file, but not one that fewbits wrote")
            described = json.loads(metadata[METADATA])
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise FewbitsError(f"{path}: damaged or truncated ({error}); restore the file or quantize again") from error
    if not isinstance(described, dict) or described.get("version") != VERSION:
        raise FewbitsError(f"{path}: written by another version of fewbits ({described.get('version') if isinstance(described, dict) else '?'})")
    missing = [key for key in ("quantizers", "codes", "alias", "coded") if key not in described]
    missing += [f"codes/{site}" for site in described.get("codes", {}) if f"codes/{site}" not in tensors]
    if missing:
        raise FewbitsError(f"{path}: incomplete, it lacks {', '.join(missing[:3])}")
    return tensors, described
