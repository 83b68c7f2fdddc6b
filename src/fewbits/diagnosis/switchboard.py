"""A quantized model whose sites can be put in floating point, on their grid, or on another grid, one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fewbits.attach import Attachment
from fewbits.errors import FewbitsError
from fewbits.graph import operands
from fewbits.graph.types import Site
from fewbits.quantizer import Quantizer


class Switchboard:
    """`floats` are the float weights (out, in, *kernel) of the quantized weight sites, transforms done.

    Everything is compared on `device`, that of the model: codes and grids of a checkpoint, which lie beside its model
    and do not move with it, are brought there once, float weights from wherever they lie as they are read.
    """

    def __init__(
        self, model: nn.Module, attachment: Attachment, floats: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self.model = model
        self.attachment = attachment
        self.floats = floats
        self.device = device
        attachment.move(attachment.sites, device, quantizers=True)
        self.quantizers = {site.name: quantizer for site, quantizer in attachment.items()}
        self.sites = {site.name: site for site, _ in attachment.items()}
        self._now: dict[str, Quantizer | None] = dict(self.quantizers)
        self._held = {
            name: tuple(kind.get(name) for kind in self._kinds)
            for name, site in self.sites.items()
            if site.role == "weight" and name not in attachment.frozen
        }
        missing = [n for n, s in self.sites.items() if s.role == "weight" and n not in floats]
        if missing:
            raise FewbitsError(f"{missing[0]}: its float weight is not known")

    @property
    def _kinds(self) -> tuple[dict, dict, dict]:
        return self.attachment.codes, self.attachment.group_index, self.attachment.parts

    def weight(self, site: Site) -> Tensor:
        """The float weight as a float32 matrix (out, columns) on the device."""
        return self.floats[site.name].to(self.device, torch.float32).flatten(1)

    def quantized_weight(self, site: Site) -> Tensor:
        """What runs in its place, float32 (out, columns) on the device."""
        if site.name in self.attachment.codes:
            return self.attachment.decoded(site.name).float()
        return self.quantizers[site.name](self.weight(site))

    def use(self, quantized: Collection[str], changed: Mapping[str, Quantizer | None] | None = None) -> None:
        """Quantize exactly the named sites; those in `changed` on another grid than their own (None: not at all)."""
        changed = changed or {}
        for name in self.sites:
            wanted = self.quantizers[name] if name in quantized else None
            wanted = changed.get(name, wanted) if name in changed else wanted
            if wanted is not self._now[name]:
                self._put(self.sites[name], wanted)
                self._now[name] = wanted

    def _put(self, site: Site, quantizer: Quantizer | None) -> None:
        own = quantizer is self.quantizers[site.name]
        if site.role != "weight":
            self.attachment.set_quantizer(site.name, quantizer)
        elif site.name not in self._held:
            weight = self.floats[site.name]
            if quantizer is not None:
                matrix = self.quantized_weight(site) if own else quantizer(self.weight(site))
                weight = matrix.view(weight.shape)
            operands.write(self.model, site, weight)
        else:  # the parameter is read elsewhere too: quantized in the forward
            self.attachment.set_quantizer(site.name, quantizer)
            if own:
                for kind, value in zip(self._kinds, self._held[site.name], strict=True):
                    if value is not None:
                        kind[site.name] = value
