"""Weights in one orientation: rows are output channels, whatever the model's layer does with them.

`canonical` turns the operand of a call into (out, in, *kernel); `restore` is its inverse. `read` and `write` do so for
a site of a model, through the views (transposes, chunks, expert slices) the recorded forward took.
"""

from __future__ import annotations

from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.graph.types import Site


def canonical(operand: Tensor, layout: str, groups: int = 1) -> Tensor:
    """(out, in, *kernel) from a call's weight operand; a view where the layout allows one.

    "oi" is already so; "io" (`addmm`, `x @ w`) is transposed; "io_conv" (transposed convolution, (in, out/groups, *k))
    becomes (out, in/groups, *k); "expert_io" (experts, in, out) and "expert_oi" (experts, out, in) become (experts *
    out, in).
    """
    if layout == "oi":
        return operand
    if layout == "io":
        return operand.transpose(-2, -1)
    if layout == "io_conv":
        if groups == 1:
            return operand.transpose(0, 1)
        split = operand.unflatten(0, (groups, operand.shape[0] // groups)).transpose(1, 2)
        return split.flatten(0, 1)
    if layout == "expert_io":
        return operand.transpose(-2, -1).flatten(0, 1)
    if layout == "expert_oi":
        return operand.flatten(0, 1)
    raise FewbitsError(f"unknown weight layout {layout!r}")


def restore(weight: Tensor, layout: str, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """The operand of the given shape from its canonical form."""
    if layout == "oi":
        return weight
    if layout == "io":
        return weight.transpose(-2, -1)
    if layout == "io_conv":
        if groups == 1:
            return weight.transpose(0, 1)
        return weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)
    if layout == "expert_io":
        experts, rows, columns = shape
        return weight.view(experts, columns, rows).transpose(-2, -1)
    if layout == "expert_oi":
        return weight.view(shape)
    raise FewbitsError(f"unknown weight layout {layout!r}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers (DDP, compile)."""
    while len(model._modules) == 1:
        inner = model._modules.get("module") or model._modules.get("_orig_mod")
        if inner is None:
            break
        model = inner
    return model


def parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter by its clean name, whatever wrapper surrounds the model. Raises `FewbitsError` if there is none."""
    root = unwrapped(model)
    path, _, leaf = name.rpartition(".")
    try:
        held = getattr(root.get_submodule(path), leaf)
    except AttributeError as error:
        raise FewbitsError(f"the model has no parameter {name!r}") from error
    assert isinstance(held, Tensor)
    return held


def read(model: nn.Module, site: Site) -> Tensor:
    """The site's weight, (out, in, *kernel), detached and in its own memory."""
    return canonical(operand(model, site), site.layout, site.groups).contiguous().clone()


def write(model: nn.Module, site: Site, weight: Tensor) -> None:
    """Put a canonical weight back into the model's parameter, in place. Raises `FewbitsError` on a wrong shape."""
    target = operand(model, site)
    new = restore(weight, site.layout, tuple(target.shape), site.groups)
    if new.shape != target.shape:
        raise FewbitsError(
            f"{site.name}: a weight of shape {tuple(weight.shape)} does not fit the parameter {tuple(target.shape)}"
        )
    target.copy_(new)


def operand(model: nn.Module, site: Site) -> Tensor:
    """The site's weight as its call reads it: a view of the parameter. Raises `FewbitsError` where there is none."""
    if site.param is None or site.view is None:
        raise FewbitsError(f"{site.name} is computed in the forward, not stored: its weight cannot be read or replaced")
    stored = parameter(model, site.param).detach()
    if not stored.is_contiguous():
        raise FewbitsError(f"{site.name}: parameter {site.param} is not contiguous; call .contiguous() on it first")
    size, stride, offset = site.view
    return stored.as_strided(size, stride, stored.storage_offset() + offset)
