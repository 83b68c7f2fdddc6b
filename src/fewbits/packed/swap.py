"""`fewbits.pack`: put packed layers in the place of simulated ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.attach import Attachment, attachment_of
from fewbits.errors import FewbitsError
from fewbits.export.layers import Layer, layer_of
from fewbits.graph.operands import unwrapped
from fewbits.graph.types import Site
from fewbits.kernels.choose import choose
from fewbits.kernels.needs import Case
from fewbits.packed.forms import form_of
from fewbits.packed.modules import Packed
from fewbits.packed.shared import SharedInput, share
from fewbits.packed.weight import NotPackable
from fewbits.quantizer import Quantizer


@dataclass(frozen=True)
class PackedLayer:
    """One layer that was packed: its weight's site, the kernel and why it, and bytes before and after."""

    site: str
    kernel: str
    why: str
    bits: int
    bytes_before: int
    bytes_after: int
    note: str = ""


@dataclass
class PackResult:
    """What `pack` did. `skipped` maps the sites that stay simulated, or floating point, to the reason.

    `shared`: inputs that are quantized once for several layers, or by the norm that makes them.
    """

    model: nn.Module
    layers: dict[str, PackedLayer] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    shared: list[SharedInput] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def sharing(self) -> str:
        """In words, how many layers quantize their input together, and how many norms do it for them."""
        together = [shared for shared in self.shared if len(shared.layers) > 1]
        norms = sum(bool(shared.norm) for shared in self.shared)
        layers = sum(len(shared.layers) for shared in together)
        return f"{layers} layers share {len(together)} inputs, quantized once each; {norms} norms quantize as they norm"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "layers": {path: vars(layer) for path, layer in self.layers.items()},
            "skipped": dict(self.skipped),
            "shared": [vars(shared) for shared in self.shared],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


def pack(model: nn.Module, *, kernel: str = "auto", rows: int = 1) -> PackResult:
    """Swap, in place, every quantized linear layer of `model` for one that holds codes.

    The outputs stay those of the simulation up to the order of sums; beside 16-bit activations scales may be rounded to
    float16 too (2^-10), by "torch_int4" and "humming" to the type of the activations. "gemlite" sums few rows in an
    order that is another at every call. Activation quantizers that a kernel does not do itself go on in simulation.
    Layers in 8-bit integers that have their input in common quantize it once; on a GPU the norm that makes it does, in
    one kernel, whose 16-bit results differ from torch's in few last bits. Afterwards the model no longer knows its
    float weights or its recipe: keep the checkpoint.

    Args:
        model: with quantizers attached: after `fewbits.quantize`, or `fewbits.load(DIR).model`. It is packed for the
            device it is on.
        kernel: "auto" measures which is fastest; or the name of the one to take wherever it is for such weights:
            "triton_mma", "triton", "native", "torch_int4", "torch_int_mm", "torch_scaled_mm", "humming", "gemlite",
            "reference". humming and gemlite take part where they are installed (`pip install 'fewbits[humming]'`); they
            compile for each shape, which takes seconds: FEWBITS_SKIP_KERNELS=humming,gemlite leaves them out.
        rows: tokens (or samples) in a batch that kernels are chosen for; 1 is decoding. Below 128 they are chosen for
            a prompt of 128 before as many such batches.

    Raises:
        FewbitsError: no quantizers attached, an unknown kernel, or nothing in the model can be packed.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise FewbitsError(
            "this model has no quantizers attached: quantize it, or load a checkpoint, before packing it"
        )
    if rows < 1:
        raise FewbitsError(f"rows must be at least 1, not {rows}")
    result = PackResult(model, bytes_before=held_bytes(attachment.model))
    root = unwrapped(attachment.model)
    plans = []
    for site, quantizer in attachment.items():
        if site.role != "weight":
            continue
        try:
            plans.append(_plan(attachment, root, site, quantizer, kernel, rows))
        except NotPackable as reason:
            result.skipped[site.name] = str(reason)
    if not plans:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(result.skipped.items())[:3])
        raise FewbitsError(f"nothing in this model can be packed ({reasons or 'no weight is quantized'})")
    attachment.remove()
    while plans:  # each plan is let go as it is carried out, so that a weight is held once
        path, module, made = plans.pop(0)
        _swap(attachment, root, path, module)
        result.layers[path] = made
    _share(attachment, root, result)
    _leave(attachment, result)
    result.bytes_after = held_bytes(attachment.model)
    return result


def held_bytes(model: nn.Module) -> int:
    """Bytes of the distinct parameters and buffers, codes and quantizers included."""
    seen: dict[int, int] = {}
    for held in (*model.parameters(), *model.buffers()):
        storage = held.untyped_storage()
        seen[storage.data_ptr() if storage.nbytes() else id(held)] = storage.nbytes()
    return sum(seen.values())


# -- one layer -----------------------------------------------------------------------------------------------------


def _plan(
    attachment: Attachment, root: nn.Module, site: Site, quantizer: Quantizer, kernel: str, rows: int
) -> tuple[str, Packed, PackedLayer]:
    """(path, packed module, description) for a weight site. Raises `NotPackable` with the reason."""
    path, old = _module(root, site)
    layer = _layer(attachment, site, quantizer)
    parameter = old.get_parameter("weight")
    device, dtype = parameter.device, parameter.dtype
    acting, factor = _around(attachment, site)
    form = form_of(layer, old, acting.get("input"))

    def make(name: str) -> Packed:
        return form.make(name).to(device)

    outputs, inputs = layer.codes.shape
    case = Case(
        form.kind, form.bits, form.group, outputs, inputs, rows, dtype, device, form.table, form.extras, form.small
    )
    choice = choose(case, _runner(make, inputs, dtype, device), kernel)
    module = make(choice.kernel)
    if factor is not None:
        module.factor = factor.to(device)
    module.input_quantizer = None if form.takes_input else acting.get("input")
    module.output_quantizer = acting.get("output")
    module.train(old.training)
    made = PackedLayer(site.name, choice.kernel, choice.why, form.bits, held_bytes(old), held_bytes(module), form.note)
    return path, module, made


def _around(attachment: Attachment, site: Site) -> tuple[dict[str, Quantizer], Tensor | None]:
    """The quantizers that act at the input and output of a weight's call, by slot, and the factor at its input."""
    around = {held.slot: (held, found) for held, found in attachment.items() if held.key == site.key and held != site}
    factors = [attachment.sites[held] for held in attachment.factors if attachment.sites[held].key == site.key]
    if any(held.slot != "input" for held in factors) or set(around) - {"input", "output"}:
        raise NotPackable("something else than its input and output is quantized or scaled at its call")
    waiting = [held.name for held, _ in around.values() if held.name in attachment.calibrating]
    if waiting:
        raise NotPackable(f"{waiting[0]} is not calibrated yet")
    factor = None
    if factors:
        factor, axis = attachment.factors[factors[0].name]
        if axis not in (-1, len(factors[0].shape) - 1):
            raise NotPackable(f"{factors[0].name} is multiplied along axis {axis}, not along its channels")
    return {slot: found for slot, (_, found) in around.items() if found.enabled and attachment.activations}, factor


def _runner(
    make: Callable[[str], Packed], inputs: int, dtype: torch.dtype, device: torch.device
) -> Callable[[str], Callable[[int], Any]]:
    def prepared(name: str) -> Callable[[int], Any]:
        module = make(name)
        generator = torch.Generator().manual_seed(0)
        batches: dict[int, Tensor] = {}

        def run(rows: int) -> Tensor:
            if rows not in batches:
                batches[rows] = torch.randn(rows, inputs, generator=generator).to(device, dtype)
            with torch.no_grad():
                return module.product(batches[rows])

        return run

    return prepared


def _module(root: nn.Module, site: Site) -> tuple[str, nn.Module]:
    """(path, module) of a weight that is the whole of one linear module's, read by that module alone."""
    path = site.key[0]
    if site.op not in ("linear", "addmm"):
        raise NotPackable(f"kernels multiply weights of linear layers; this one is of {site.op}")
    if site.param is None:
        raise NotPackable("it is computed in the forward, not stored")
    if site.sliced or site.param != f"{path}.weight":
        raise NotPackable(
            f"its parameter {site.param} is read by {path or 'the model'}, not by a linear module of its own"
        )
    module = root.get_submodule(path)
    plain = type(module).forward is nn.Linear.forward or (type(module).__name__ == "Conv1D" and site.op == "addmm")
    if not plain or site.key[2]:
        raise NotPackable(f"{path} is a {type(module).__name__}, which does more than a linear layer")
    weight = module.get_parameter("weight")
    others = [
        name for name, held in root.named_parameters(remove_duplicate=False) if held is weight and name != site.param
    ]
    shared = [*others, *site.used_by]
    if shared:
        raise NotPackable(f"its parameter is also read as {shared[0]}, which needs it in floating point")
    return path, module


def _layer(attachment: Attachment, site: Site, quantizer: Quantizer) -> Layer:
    if not quantizer.enabled:
        raise NotPackable("its quantizer is switched off")
    if site.name not in attachment.codes and not quantizer.ready:
        raise NotPackable("its quantizer has no parameters yet")
    try:
        return layer_of(attachment, site, quantizer)
    except FewbitsError as error:
        raise NotPackable(str(error)) from error


# -- the model -----------------------------------------------------------------------------------------------------


def _swap(attachment: Attachment, root: nn.Module, path: str, module: Packed) -> None:
    """Put the packed module in, and take everything that it does itself off the attachment."""
    parent, _, leaf = path.rpartition(".")
    for site in [held for held in attachment.sites.values() if held.key[0] == path]:
        if site.name in attachment.factors:
            attachment.set_factor(site.name, None)
        if attachment.quantizer(site.name) is not None:
            attachment.set_quantizer(site.name, None)
    setattr(root.get_submodule(parent), leaf, module)


def _share(attachment: Attachment, root: nn.Module, result: PackResult) -> None:
    """Let packed layers quantize together what they have in common."""
    sources = {site.key[0]: site.source for site in attachment.sites.values() if site.role == "input"}
    acting = [site.key for site, _ in attachment.items()]
    acting += [attachment.sites[name].key for name in attachment.factors] + list(attachment.replacements)
    wanted = {path: sources.get(path, "") for path in result.layers}
    result.shared = share(root, wanted, {path for path, _, _ in acting})
    for shared in result.shared:
        for path in shared.layers:
            layer = result.layers[path]
            result.layers[path] = replace(layer, note=f"{layer.note}, {shared.note()}")


def _leave(attachment: Attachment, result: PackResult) -> None:
    """What is not packed: quantizers that still act stay attached, the rest of the attachment goes."""
    for site, _ in attachment.items():
        if site.role != "weight":
            result.skipped.setdefault(
                site.name, f"the {site.op} there is no packed layer; its quantizer stays in simulation"
            )
    attachment.forget_codes([site.name for site, _ in attachment.items()])
    acting = [site for site, quantizer in attachment.items() if site.name not in attachment.frozen]
    if acting or attachment.factors or attachment.replacements:
        attachment.install(attachment.model)
    else:
        attachment.detach()
