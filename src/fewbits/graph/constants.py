"""What layers and batch norms add to their outputs, and what the norms multiply them by, as they are now."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbits.graph.operands import parameter
from fewbits.graph.requantize import chain_of
from fewbits.graph.types import Call, Graph
from fewbits.graph.weights import bias_of_call


def norm_constants(model: nn.Module, graph: Graph, norm: Call) -> tuple[Tensor, Tensor]:
    """(gain, offset) float64 [channels] of a batch norm with stored statistics: y = gain * x + offset."""
    names = {slot: graph.stored_in(norm, slot) for slot in ("running_mean", "running_var", "weight", "bias")}
    held = {slot: None if name is None else parameter(model, name).detach().double() for slot, name in names.items()}
    mean, var = held["running_mean"], held["running_var"]
    assert mean is not None and var is not None
    eps = float(norm.kwargs.get("eps", norm.args[7] if len(norm.args) > 7 else 1e-5))
    gain = 1 / (var + eps).sqrt()
    if held["weight"] is not None:
        gain = gain * held["weight"]
    offset = -mean * gain
    return gain, offset if held["bias"] is None else offset + held["bias"]


def layer_constants(model: nn.Module, graph: Graph, call: Call, outputs: int) -> tuple[Tensor, Tensor]:
    """(gain, constant) float64 [outputs]: a layer and the batch norm that is done in one go with it put out
    gain * (weight times input) + constant.

    The gain of a norm that was folded is 1 up to rounding, and then exactly 1 here.
    """
    bias = bias_of_call(model, graph, call)
    constant = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.double().reshape(-1).cpu()
    gain = torch.ones(outputs, dtype=torch.float64)
    norm = next((other for other in chain_of(graph, call)[1:] if other.op == "batch_norm"), None)
    if norm is None:
        return gain, constant
    found, offset = (part.cpu() for part in norm_constants(model, graph, norm))
    if not torch.allclose(found, gain, rtol=0, atol=1e-6):
        gain = found
    return gain, constant * gain + offset
