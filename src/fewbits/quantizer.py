"""A format with state, at one site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.formats import Params, expand_params

if TYPE_CHECKING:
    from fewbits.recipe import QSpec


class Quantizer(nn.Module):
    """Puts a tensor on the grid of `spec`, in simulation: same shape and dtype out as in.

    The format's parameters are float32 buffers in the granularity's param shape. Once sized they keep their storage:
    new values are copied in. The forward reads no value back from the device and branches on none, so it can be
    compiled as one graph, exported and captured. `name` is the site, used in messages.
    """

    def __init__(self, spec: QSpec, name: str = "quantizer") -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.enabled = True
        self.ready = False
        for item in spec.format.param_specs():
            self.register_buffer(item.name, torch.empty(0))

    # -- parameters --------------------------------------------------------------------------------------------------

    @property
    def params(self) -> Params:
        """The stored parameters in param shape (the live tensors). Raises FewbitsError before they are set."""
        if not self.ready:
            raise FewbitsError(f"{self.name}: the quantizer has no parameters yet; calibrate it first")
        return {item.name: getattr(self, item.name) for item in self.spec.format.param_specs()}

    def fit(self, x: Tensor) -> Params:
        """Parameters that the range of the spec finds for `x`; nothing is stored. FewbitsError for empty or non-finite
        `x`."""
        return self.spec.range.fit(x, self.spec.format, self.spec.granularity, where=self.name)

    def calibrate(self, x: Tensor) -> None:
        """Fit the parameters to the values of `x` and store them."""
        self.set_params(self.fit(x))

    def set_params(self, params: Mapping[str, Tensor]) -> None:
        """Copy `params` (param shape) in. Raises FewbitsError where one is missing, unknown, not finite, not positive
        where it must be, or of another shape than the one stored (`reset` first to change granularity or tensor
        shape)."""
        self.spec.format.check_params(params, self.name)
        with torch.no_grad():
            for name, value in params.items():
                stored = getattr(self, name)
                if not self.ready:
                    # the first values decide shape and device
                    setattr(self, name, value.detach().float().clone())
                elif stored.shape != value.shape:
                    raise FewbitsError(
                        f"{self.name}: parameter {name} has shape {tuple(value.shape)}, stored is "
                        f"{tuple(stored.shape)}; call reset() to give the site a tensor of another shape"
                    )
            if self.ready:
                for name, value in params.items():
                    getattr(self, name).copy_(value)
        self.ready = True

    def reset(self) -> None:
        """Forget the parameters."""
        self.freeze_learned(check=False)
        for item in self.spec.format.param_specs():
            setattr(self, item.name, torch.empty(0, device=getattr(self, item.name).device))
        self.ready = False

    # -- values ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """`x` quantized and dequantized, in its own dtype; unchanged where the quantizer is not `enabled`."""
        if not self.enabled or (self.spec.dynamic and x.numel() == 0):
            return x
        return self.spec.format.quantize(x, self._spread(x)).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of `x`."""
        return self.spec.format.encode(x, self._spread(x))

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of `codes`, with the stored parameters."""
        return self.spec.format.decode(codes, self._expand(self.params, codes.shape))

    def _spread(self, x: Tensor) -> Params:
        if self.spec.dynamic:
            spec = self.spec
            found = spec.range.fit(x, spec.format, spec.granularity, check=False, where=self.name)
            return self._expand(found, x.shape)
        return self._expand(self.params, x.shape)

    def _expand(self, params: Params, shape: Sequence[int]) -> Params:
        try:
            return expand_params(self.spec.format, self.spec.granularity, params, shape)
        except FewbitsError as error:
            raise FewbitsError(f"{self.name}: {error}") from error

    # -- learning ----------------------------------------------------------------------------------------------------

    def learn(self, names: Sequence[str] = ("scale",)) -> list[nn.Parameter]:
        """Make the named parameters trainable, in place of their buffers and on the same storage; returns them.

        Raises FewbitsError for a parameter the format has no gradient for, for a dynamic quantizer, and before
        calibration.
        """
        if self.spec.dynamic:
            raise FewbitsError(
                f"{self.name}: a dynamic quantizer fits its parameters on every call; there is nothing to learn"
            )
        learnable = [item.name for item in self.spec.format.param_specs() if item.learnable]
        unknown = [name for name in names if name not in learnable]
        if unknown:
            raise FewbitsError(f"{self.name}: {self.spec.format.kind} cannot learn {unknown}; learnable: {learnable}")
        values = self.params
        out = []
        for name in names:
            if name not in self._parameters:
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(values[name]))
            out.append(self._parameters[name])
        return out  # type: ignore[return-value]

    def freeze_learned(self, check: bool = True) -> None:
        """Make every learned parameter a buffer again. Raises FewbitsError where learning left the valid values."""
        for name in list(self._parameters):
            value = self._parameters.pop(name)
            assert value is not None
            self.register_buffer(name, value.detach())
        if check and self.ready:
            self.spec.format.check_params(self.params, self.name)

    # -- saving ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(description, tensors): JSON-able data and the parameters, empty where there are none yet."""
        tensors = {name: value.detach() for name, value in self.params.items()} if self.ready else {}
        return {"spec": self.spec.to_dict(), "name": self.name, "enabled": self.enabled, "ready": self.ready}, tensors

    @classmethod
    def from_state(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Quantizer:
        """The quantizer `state` described. Raises FewbitsError for data that no quantizer wrote."""
        from fewbits.recipe import QSpec

        try:
            name, spec_data = str(description["name"]), description["spec"]
            enabled, ready = description["enabled"], description["ready"]
            spec = QSpec.from_dict(spec_data)
        except (KeyError, TypeError) as error:
            raise FewbitsError(f"not a quantizer description: {error!r} in {description!r}") from error
        if not isinstance(enabled, bool) or not isinstance(ready, bool):
            raise FewbitsError(f"{name}: 'enabled' and 'ready' must be true or false")
        out = cls(spec, name)
        if ready:
            out._check_shapes(tensors)
            out.set_params(tensors)
        elif tensors:
            raise FewbitsError(f"{name}: parameters {sorted(tensors)} for a quantizer that has none")
        out.enabled = enabled
        return out

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        """Loaded parameters must be float32 and agree on one param shape."""
        self.spec.format.check_params(tensors, self.name)
        shapes = set()
        for item in self.spec.format.param_specs():
            value = tensors[item.name]
            if value.dtype != torch.float32:
                raise FewbitsError(f"{self.name}: parameter {item.name} is {value.dtype}, expected float32")
            shape = tuple(value.shape)
            if item.width > 1:
                if shape[:1] != (item.width,):
                    raise FewbitsError(
                        f"{self.name}: parameter {item.name} of shape {shape} needs {item.width} in front"
                    )
                shape = shape[1:]
            if item.per == "block":
                shapes.add(shape)
        if len(shapes) > 1:
            raise FewbitsError(f"{self.name}: parameters disagree on their shape: {sorted(shapes)}")

    def extra_repr(self) -> str:
        state = "dynamic" if self.spec.dynamic else "ready" if self.ready else "not calibrated"
        grid = f"{self.spec.format.kind} {self.spec.format.bits} bits"
        return f"{self.name}: {grid}, {self.spec.granularity.describe()}, {state}"
