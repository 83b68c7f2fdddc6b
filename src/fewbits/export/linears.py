"""Formats that store quantized weights of `nn.Linear` modules: which layers fit, and scales as they are stored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.export.base import Obstacle, Subject
from fewbits.export.layers import Layer
from fewbits.graph.types import Site
from fewbits.hub.loaded import dtype_name, dtype_of

#: Of the largest answer, for files whose scales and other parameters are rounded to 16 bits.
HALF_TOLERANCE = 0.02


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear modules by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def unfit(subject: Subject, target: str, *, whole_groups: bool = True) -> list[Obstacle]:
    """Sites of quantized weights that are not the whole weight of one linear module, and inputs quantized without one.

    whole_groups: also those whose columns a group does not divide.
    """
    try:
        layers = subject.layers
    except FewbitsError as error:  # a weight that is computed in the forward
        return [Obstacle("the model", str(error))]
    if not layers:
        return [Obstacle("the model", "none of its weights is quantized")]
    model = subject.loaded.model
    modules = linears(model)
    names: dict[int, list[str]] = {}
    for name, held in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(held), []).append(name)
    found, keys = [], set()
    for layer in layers:
        site = layer.site
        keys.add(site.key)
        module = modules.get(layer.module)
        if module is None or site.param != f"{layer.module}.weight" or site.sliced or site.layout != "oi":
            where = site.param or site.module
            found.append(Obstacle(site.name, f"{target} holds weights of linear modules only; {where} is none"))
            continue
        shared = [name for name in names[id(module.weight)] if name != site.param]
        if shared:
            found.append(
                Obstacle(
                    site.name, f"{shared[0]} is the same parameter, which {target} cannot hold in low bits at one place"
                )
            )
        size, columns = layer.group_size, layer.codes.shape[1]
        if whole_groups and size and size < columns and columns % size:
            found.append(Obstacle(site.name, f"{target} needs groups that divide its {columns} columns; {size} do not"))
    found += [
        Obstacle(site.name, f"{target} quantizes the input of a layer only where its weight is quantized too")
        for site, _ in _inputs(subject)
        if site.key not in keys
    ]
    return found


def _inputs(subject: Subject) -> Iterable[tuple[Site, object]]:
    return ((site, held) for site, held in subject.attachment.items() if site.role == "input")


def stored(layer: Layer, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(scale in `dtype`, largest relative change) of positive scales.

    Raises `FewbitsError`, naming the site, where a scale does not keep the digits of the type.
    """
    kept = scale.to(dtype)
    change = float((kept.double() / scale.double() - 1).abs().max())
    if not change <= torch.finfo(dtype).eps:  # overflow, or too small to keep all digits
        raise FewbitsError(
            f"{layer.site.name}: scales from {float(scale.min()):.3g} to {float(scale.max()):.3g} do not fit "
            f"{dtype_name(dtype)}; keep the layer in floating point, or take a target that stores float32 scales "
            "(compressed-tensors)"
        )
    return kept, change


def half(name: str) -> torch.dtype:
    """The type that a `dtype` option names, of 16 bits. Raises `FewbitsError` for another."""
    dtype = dtype_of(name)
    if dtype.itemsize != 2:
        raise FewbitsError(f"dtype={name!r}: files of this target are read as float16 or bfloat16")
    return dtype


def group_of(layer: Layer) -> int:
    """Columns a group; -1 where a row has one scale."""
    columns = layer.codes.shape[1]
    size = layer.group_size or columns
    return -1 if size >= columns else size
