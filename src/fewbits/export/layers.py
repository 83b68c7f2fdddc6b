"""Quantized weights as export targets see them: codes with their parameters, and what happens to the layer's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.attach import Attachment
from fewbits.errors import FewbitsError
from fewbits.formats import Uniform
from fewbits.graph.operands import read
from fewbits.graph.types import Site
from fewbits.outliers.parts import Part
from fewbits.quantizer import Quantizer


@dataclass
class Layer:
    """One quantized weight.

    site: the weight's. codes: integers [out, columns], of the canonical orientation (rows are outputs, a convolution's
    kernel flattened). input: quantizer at the layer's input with its site, or None where it stays floating point.
    group_index: int64 [columns], the group of each column, where groups are not contiguous.
    """

    site: Site
    quantizer: Quantizer
    codes: Tensor
    attachment: Attachment
    group_index: Tensor | None = None
    parts: tuple[Part, ...] = ()
    input: tuple[Site, Quantizer] | None = None

    @property
    def module(self) -> str:
        """Path of the module that holds the parameter."""
        return (self.site.param or self.site.module).rpartition(".")[0]

    @property
    def uniform(self) -> Uniform:
        """The weight's uniform grid. Raises `FewbitsError` where it has another."""
        fmt = self.quantizer.spec.format
        if not isinstance(fmt, Uniform):
            raise FewbitsError(f"{self.site.name}: its codes are on a {fmt.kind} grid, not a uniform one")
        return fmt

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None for one scale a row or for the whole weight."""
        return getattr(self.quantizer.spec.granularity, "size", None)

    def scales(self) -> tuple[Tensor, Tensor]:
        """(scale, zero) float32 [out, groups]: weight = (code - zero) * scale. One scale a row has one group."""
        out, columns = self.codes.shape
        fmt, params = self.uniform, self.quantizer.params
        scale = fmt.scale_of(params)
        zero = params.get("zero_point", torch.zeros_like(scale))
        if self.quantizer.spec.granularity.kind == "group":
            groups = -(-columns // (self.group_size or columns))
            return scale.reshape(out, groups).float(), zero.reshape(out, groups).float()
        return scale.reshape(-1, 1).expand(out, 1).float(), zero.reshape(-1, 1).expand(out, 1).float()

    def signed(self) -> tuple[Tensor, Tensor]:
        """(codes, zero) moved so that codes lie in [-2^(b-1), 2^(b-1) - 1]: int8 [out, columns], float32 [out, groups].

        Codes of signed grids stay what they are; unsigned ones lose 2^(b-1), and so does their zero.
        """
        fmt = self.uniform
        shift = 0 if fmt.signed else 2 ** (fmt.bits - 1)
        return (self.codes.to(torch.int16) - shift).to(torch.int8), self.scales()[1] - shift

    def unsigned(self) -> tuple[Tensor, Tensor]:
        """(codes, zero) moved so that codes lie in [0, 2^b - 1]: uint8 [out, columns], float32 [out, groups]."""
        fmt = self.uniform
        shift = 2 ** (fmt.bits - 1) if fmt.signed else 0
        return (self.codes.to(torch.int16) + shift).to(torch.uint8), self.scales()[1] + shift

    def values(self) -> Tensor:
        """The float32 weight [out, columns] that runs: decoded codes with the parts laid over them."""
        return self.attachment.decoded(self.site.name)


def layer_of(
    attachment: Attachment, site: Site, quantizer: Quantizer, entry: tuple[Site, Quantizer] | None = None
) -> Layer:
    """One quantized weight; `entry` is what quantizes its layer's input.

    A weight without committed codes is encoded from its parameter. Raises `FewbitsError` where that holds quantized
    values which its grid cannot give back (parts of weights, say, whose codes were let go).
    """
    codes = attachment.codes.get(site.name)
    if codes is None:
        weight = read(attachment.model, site).flatten(1)
        codes = quantizer.encode(weight)
        if site.name in attachment.frozen and not torch.equal(quantizer.decode(codes).to(weight.dtype), weight):
            raise FewbitsError(f"{site.name}: its codes were let go, and the weight left does not lie on the grid")
    index, parts = attachment.group_index.get(site.name), attachment.parts.get(site.name, ())
    return Layer(site, quantizer, codes.cpu(), attachment, index, parts, entry)


def layers_of(attachment: Attachment) -> list[Layer]:
    """The quantized weights of a model, in the order of its sites.

    A weight whose quantizer was never committed (no codes) is encoded from its parameter here.
    """
    inputs = {
        (site.key, site.slot): (site, quantizer)
        for site, quantizer in attachment.items()
        if site.role != "weight" and site.slot != "output"
    }
    found = []
    for site, quantizer in attachment.items():
        if site.role != "weight":
            continue
        if site.param is None:
            raise FewbitsError(f"{site.name} is computed in the forward, not stored: it cannot be exported")
        at_input = [held for (key, _), held in inputs.items() if key == site.key]
        found.append(layer_of(attachment, site, quantizer, at_input[0] if at_input else None))
    return found


def unquantized_state(attachment: Attachment, layers: list[Layer]) -> dict[str, Tensor]:
    """Every parameter and buffer that no layer of `layers` holds in codes, by its clean name, on the CPU."""
    from fewbits.graph.trace import clean

    coded = {layer.site.param for layer in layers}
    state = attachment.model.state_dict(keep_vars=False)
    return {clean(name): value.detach().cpu() for name, value in state.items() if clean(name) not in coded}
