"""A part of a quantized model as tensors plus JSON.

This is what a commit writes, what a resumed run reads and what a checkpoint is made of. Weights whose quantized values
are final are stored as packed integer codes with their parameters; everything else as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.attach import Attachment
from fewbits.engine.tree import to_host
from fewbits.errors import FewbitsError
from fewbits.formats import Params, expand_params
from fewbits.graph import operands
from fewbits.graph.trace import clean
from fewbits.graph.types import CallKey, Site
from fewbits.outliers.parts import part_from_tensors
from fewbits.quantizer import Quantizer
from fewbits.rounding.column_grids import spread_columns

METADATA = "fewbits"
VERSION = 1


def take(
    model: nn.Module, attachment: Attachment, names: Iterable[str], sites: Iterable[Site]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of the named parameters and buffers and of the quantizers at `sites`.

    A parameter that committed codes cover is left out (`coded`), one that shares its memory with another is named as
    its `alias`. The model's run-time rewrites (`factors`, `replacements`), which are few and small, go along whole.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {"version": VERSION, "quantizers": {}, "codes": {}, "alias": {}, "coded": {}}
    described["replacements"] = [[list(key), op] for key, op in sorted(attachment.replacements.items())]
    described["factors"] = {name: axis for name, (_, axis) in attachment.factors.items()}
    for name, (factor, _) in attachment.factors.items():
        tensors[f"factor/{name}"] = factor.detach().cpu().contiguous()
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
        index = attachment.group_index.get(site.name)
        packed = quantizer.spec.format.pack(codes, _laid_out(quantizer, index, codes.shape, codes.device))
        tensors[f"codes/{site.name}"] = to_host(packed)
        described["codes"][site.name] = {"shape": list(codes.shape), "frozen": site.name in attachment.frozen}
        if index is not None:
            tensors[f"group_index/{site.name}"] = index.cpu().to(torch.int32)
        parts = attachment.parts.get(site.name, ())
        if parts:
            described["codes"][site.name]["parts"] = [part.kind for part in parts]
        for place, part in enumerate(parts):
            for name, value in part.tensors().items():
                tensors[f"part/{site.name}/{place}/{name}"] = value.detach().cpu().contiguous()
        if site.name in attachment.frozen and site.param is not None:
            covered[site.param] = covered.get(site.param, 0) + codes.numel()
    values = {name: operands.parameter(model, name).detach() for name in map(clean, names)}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in values.items():
        if name in covered and covered[name] == value.numel():
            described["coded"][name] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            first.setdefault(_memory(value), name)
    stored: set[int] = set()
    for name, value in values.items():
        if name in described["coded"]:
            continue
        known = first.setdefault(_memory(value), name) if value.numel() else name
        if known != name:
            described["alias"][name] = known
            continue
        out = to_host(value).contiguous()
        if out.untyped_storage().data_ptr() in stored:
            out = out.clone()  # overlapping parts of one memory cannot stand in one file
        stored.add(out.untyped_storage().data_ptr())
        tensors[f"tensor/{name}"] = out
    return tensors, described


def _memory(value: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same view of the same memory."""
    place = value.device, value.untyped_storage().data_ptr(), value.storage_offset()
    return *place, value.dtype, value.shape, value.stride()


def put(
    model: nn.Module,
    attachment: Attachment,
    tensors: dict[str, Tensor],
    described: dict[str, Any],
    device: torch.device | None = None,
) -> None:
    """Restore what `take` took into a model with the same sites. Raises `FewbitsError` where they do not fit."""
    try:
        _put(model, attachment, tensors, described, device)
    except FewbitsError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise FewbitsError(f"the stored values do not fit this model ({type(error).__name__}: {error})") from error


def _put(
    model: nn.Module,
    attachment: Attachment,
    tensors: dict[str, Tensor],
    described: dict[str, Any],
    device: torch.device | None,
) -> None:
    for key, value in tensors.items():
        if key.startswith("tensor/"):
            assign(model, key.removeprefix("tensor/"), value)
    for (path, op, ordinal), new in described.get("replacements", ()):
        call: CallKey = (str(path), str(op), int(ordinal))
        attachment.set_replacement(call, str(new))
    for name, axis in described.get("factors", {}).items():
        factor = tensors[f"factor/{name}"]
        attachment.set_factor(name, factor if device is None else factor.to(device), int(axis))
    params: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("quantizer/"):
            site_name, _, name = key.removeprefix("quantizer/").rpartition("/")
            params.setdefault(site_name, {})[name] = value
    covered: dict[str, int] = {}
    for site_name, description in described["quantizers"].items():
        site = attachment.sites.get(site_name)
        if site is None:
            raise FewbitsError(f"the stored quantizer of {site_name} has no site in this model")
        quantizer = Quantizer.from_state({**description, "name": site_name}, params.pop(site_name, {}))
        if device is not None:
            quantizer.to(device)
        attachment.set_quantizer(site_name, quantizer)
        coded = described["codes"].get(site_name)
        if coded is not None:
            _put_codes(model, attachment, site, quantizer, tensors, coded)
            if coded["frozen"] and site.param is not None:
                covered[site.param] = covered.get(site.param, 0) + attachment.codes[site_name].numel()
        elif quantizer.ready and site.role != "weight":
            expand_params(quantizer.spec.format, quantizer.spec.granularity, quantizer.params, site.shape)
    stray = [*params, *(name for name in described["codes"] if name not in described["quantizers"])]
    if stray:
        raise FewbitsError(f"values are stored for a quantizer at {stray[0]}, but no quantizer")
    for name, expected in described["coded"].items():
        held = operands.parameter(model, name)
        _check_like(name, held, tuple(expected["shape"]), str(expected["dtype"]))
        if covered.get(name) != held.numel():
            raise FewbitsError(f"the stored codes do not make up the whole of {name}")
    for name, known in described["alias"].items():
        if f"tensor/{known}" not in tensors and known not in described["coded"]:
            raise FewbitsError(f"{name} shares the values of {known}, which are not stored")
        assign(model, name, operands.parameter(model, known).detach())


def _put_codes(
    model: nn.Module,
    attachment: Attachment,
    site: Site,
    quantizer: Quantizer,
    tensors: dict[str, Tensor],
    coded: dict[str, Any],
) -> None:
    """Restore one committed weight."""
    fmt = quantizer.spec.format
    weight = operands.canonical(operands.operand(model, site), site.layout, site.groups)
    shape = tuple(weight.flatten(1).shape)
    if tuple(coded["shape"]) != shape:
        raise FewbitsError(f"the stored codes of {site.name} have shape {tuple(coded['shape'])}, its weight {shape}")
    index = tensors.get(f"group_index/{site.name}")
    if index is not None:
        groups = max(value.shape[-1] for value in quantizer.params.values() if value.dim())
        fits = index.dtype == torch.int32 and index.shape == (shape[1],)
        if not fits or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < groups):
            raise FewbitsError(
                f"the stored group index of {site.name} does not give each of {shape[1]} columns one of {groups} groups"
            )
        index = index.long()
        attachment.group_index[site.name] = index
    packed = tensors[f"codes/{site.name}"]
    codes = fmt.unpack(packed, _laid_out(quantizer, index, shape, packed.device), shape)
    if codes.numel() and not fmt.code_min <= int(codes.min()) <= int(codes.max()) <= fmt.code_max:
        raise FewbitsError(f"the stored codes of {site.name} are not those of {fmt.kind} with {fmt.bits} bits")
    attachment.codes[site.name] = codes
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"part/{site.name}/"):
            place, _, name = key.removeprefix(f"part/{site.name}/").partition("/")
            found.setdefault(int(place), {})[name] = value
    kinds = coded.get("parts", [])
    if sorted(found) != list(range(len(kinds))):
        raise FewbitsError(f"the stored parts of {site.name} are not those it lists")
    parts = tuple(part_from_tensors(kind, found[place], site.name) for place, kind in enumerate(kinds))
    for part in parts:
        part.check(shape, site.name)
    if parts:
        attachment.parts[site.name] = parts
    if coded["frozen"]:
        operands.write(model, site, attachment.decoded(site.name).view(weight.shape))
        attachment.freeze(site.name)
    else:
        attachment.decoded(site.name)  # would the parameters not fit the codes, it is said now
        attachment.thaw(site.name)


def _laid_out(quantizer: Quantizer, index: Tensor | None, shape: Sequence[int], device: torch.device) -> Params:
    """A quantizer's parameters on a device so that they broadcast against the codes of its weight."""
    fmt = quantizer.spec.format
    params = {name: value.detach().to(device) for name, value in quantizer.params.items()}
    if index is None:
        return expand_params(fmt, quantizer.spec.granularity, params, shape)
    return spread_columns(fmt, params, index.to(device), shape)


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a stored tensor into a parameter or buffer; a bias the float model lacked is created."""
    path, _, leaf = name.rpartition(".")
    root = operands.unwrapped(model)
    try:
        module = root.get_submodule(path)
    except AttributeError as error:
        raise FewbitsError(f"the stored tensor {name} belongs to a module this model does not have") from error
    held: Tensor | None = module._parameters.get(leaf)
    if held is None:
        held = module._buffers.get(leaf)
    if held is None:
        weight = module._parameters.get("weight")
        if leaf != "bias" or weight is None or value.dim() != 1 or not value.is_floating_point():
            raise FewbitsError(f"the stored tensor {name} has no parameter or buffer in this model")
        module.register_parameter(leaf, nn.Parameter(value.to(weight.device), requires_grad=False))
        return
    _check_like(name, held, tuple(value.shape), str(value.dtype).removeprefix("torch."))
    with torch.no_grad():
        held.detach().copy_(value)


def _check_like(name: str, held: Tensor, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(held.shape) != shape:
        raise FewbitsError(f"the stored tensor {name} has shape {shape}, the model's {tuple(held.shape)}")
    if str(held.dtype).removeprefix("torch.") != dtype:
        raise FewbitsError(f"the stored tensor {name} is {dtype}, the model's {str(held.dtype).removeprefix('torch.')}")


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
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (a file, not a dict)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise FewbitsError(f"{path}: damaged or truncated ({error}); restore the file or quantize again") from error
    if not isinstance(described, dict) or described.get("version") != VERSION:
        found = described.get("version") if isinstance(described, dict) else "?"
        raise FewbitsError(f"{path}: written by another version of fewbits ({found})")
    parts = ("quantizers", "codes", "alias", "coded")
    missing = [key for key in parts if not isinstance(described.get(key), dict)]
    if not missing:
        missing = [f"codes/{site}" for site in described["codes"] if f"codes/{site}" not in tensors]
    if missing:
        raise FewbitsError(f"{path}: incomplete, it lacks {', '.join(missing[:3])}")
    return tensors, described
