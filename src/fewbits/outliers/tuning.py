"""Tuning the full-precision columns of a quantized model on a task, everything else frozen.

OWQ (AAAI 2024), section "Weak column tuning". The columns are a few in a thousand of the weights, already stored in
full precision; their gradient is that of the layer's output times the inputs that they read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fewbits.errors import FewbitsError
from fewbits.outliers.parts import Columns

if TYPE_CHECKING:
    from fewbits.attach import Attachment


def weak_column_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Make the kept columns trainable: weight site -> parameter float32 (out, k), live in the model's forward.

    All other parameters stop requiring gradients. Give the values to an optimizer, train, and call
    `settle_weak_columns` when done; calling this again returns the same parameters. Raises `FewbitsError` where the
    model is not quantized or keeps no columns.
    """
    attachment = _attachment(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for site, parts in attachment.parts.items():
        for place, part in enumerate(parts):
            if not isinstance(part, Columns):
                continue
            if not isinstance(part.values, nn.Parameter):
                device = next(iter(attachment.quantizers[site.replace(".", "/")].buffers())).device
                part = Columns(part.index, nn.Parameter(part.values.detach().to(device, copy=True)))
                attachment.parts[site] = (*parts[:place], part, *parts[place + 1 :])
                attachment.thaw(site)  # from here on the forward lays the parts over the grid
            assert isinstance(part.values, nn.Parameter)
            part.values.requires_grad_()
            found[site] = part.values
    if not found:
        raise FewbitsError("this model keeps no full-precision columns to tune; quantize it with owq")
    return found


def settle_weak_columns(model: nn.Module) -> None:
    """Put the tuned columns into the weights for good: fast forwards, savable as a checkpoint, no parameters left."""
    from fewbits.graph import operands

    attachment = _attachment(model)
    for name, parts in list(attachment.parts.items()):
        if not any(isinstance(part, Columns) and isinstance(part.values, nn.Parameter) for part in parts):
            continue
        attachment.parts[name] = tuple(
            Columns(part.index, part.values.detach().float().cpu()) if isinstance(part, Columns) else part
            for part in parts
        )
        site = attachment.sites[name]
        if not site.used_by:
            shape = operands.canonical(operands.operand(model, site), site.layout, site.groups).shape
            operands.write(model, site, attachment.decoded(name).view(shape))
            attachment.freeze(name)


def _attachment(model: nn.Module) -> Attachment:
    from fewbits.attach import attachment_of

    found = attachment_of(model)
    if found is None:
        raise FewbitsError("this model is not quantized: it has no quantizers attached")
    return found
