"""Linear layers in 8-bit floating point: torch's scaled product, or the weight decoded as it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.export.layers import Layer
from fewbits.formats import Float8
from fewbits.packed.modules import Packed
from fewbits.packed.weight import NotPackable
from fewbits.quantizer import Quantizer


class Float8Linear(Packed):
    """Weights of 8 bits each with one scale, or one a row; activations are cast on the way in where `activations`
    says how, and the product is then one of 8-bit floats (`torch._scaled_mm`, sums in float32)."""

    codes: Tensor
    scale: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, kernel: str, activations: Quantizer | None
    ) -> None:
        super().__init__(codes.shape, bias, kernel)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.reshape(-1))
        self.activations = activations

    def product(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.activations is None:
            out = (flat @ self.codes.to(x.dtype).T).float() * self.scale
        else:
            out = self._scaled(flat).float()
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _scaled(self, flat: Tensor) -> Tensor:
        """Cast rows times the weight, both scaled back."""
        assert self.activations is not None
        fmt = self.activations.spec.format
        assert isinstance(fmt, Float8)
        given = self.activations._spread(flat)["scale"]
        cast = fmt._cast(flat.float() / given)
        rows = given.reshape(-1, 1).float()
        if self.kernel != "torch_scaled_mm":
            return (cast.to(flat.dtype) @ self.codes.to(flat.dtype).T).float() * rows * self.scale
        # a scale a row wants one a column, on a GPU bfloat16 out
        if len(rows) == 1 and len(self.scale) == 1 and flat.shape[0] != 1:
            left, right = rows[0, 0], self.scale[0]
        else:
            left = rows.expand(len(flat), 1).contiguous()
            right = self.scale.expand(self.out_features).contiguous().view(1, -1)
        wide = torch.bfloat16 if flat.is_cuda and left.dim() else flat.dtype
        return torch._scaled_mm(cast, self.codes.t(), left, right, out_dtype=wide)

    def decoded(self) -> Tensor:
        return self.codes.float() * self.scale[:, None]


def float8_codes(layer: Layer) -> tuple[Tensor, Tensor]:
    """(weight [out, in] in an 8-bit floating-point type, scale [out] or [1]). Raises `NotPackable` with the reason."""
    quantizer = layer.quantizer
    fmt, grain = quantizer.spec.format, quantizer.spec.granularity
    assert isinstance(fmt, Float8)
    if grain.kind not in ("tensor", "channel") or getattr(grain, "axis", 0) != 0 or layer.group_index is not None:
        raise NotPackable(f"8-bit floats are multiplied with one scale a row or in all, not per {grain.describe()}")
    if layer.parts:
        raise NotPackable("8-bit floats are packed without parts beside them")
    codes = layer.codes.to(torch.uint8).contiguous().view(fmt.dtype)
    return codes, quantizer.params["scale"].float().reshape(-1).cpu()


def float8_activations(quantizer: Quantizer) -> str | None:
    """Why activations cannot enter a product of 8-bit floats; None where they can."""
    spec = quantizer.spec
    if not isinstance(spec.format, Float8) or spec.format.variant != "e4m3":
        return "they are not E4M3 floats"
    grain = spec.granularity
    if not (grain.kind == "tensor" or (grain.kind == "token" and getattr(grain, "axis", None) == -1 and spec.dynamic)):
        return f"their scales vary per {grain.describe()}, not per tensor or token"
    return None if spec.dynamic or quantizer.ready else "they are not calibrated yet"
