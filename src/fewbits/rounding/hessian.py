"""The layer Hessian H = (2/N) sum x^T x that second-order rounding needs, and the input patches of convolutions.

GPTQ (Frantar et al., ICLR 2023) and OBC (NeurIPS 2022): the squared output error of a linear layer, ||W X - Q X||^2, is
a quadratic in each row of W - Q with this matrix, the same for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.rounding.precision import full_float32


class HessianAccumulator:
    """Running mean of 2 x^T x, one number of N per SAMPLE (sequence or image), not per token or position.

    `columns` is the number of input columns of the weight matrix. With `groups` > 1 (grouped convolution, stacked
    experts) one matrix per group is kept. The state is `dtype` (float32 as published, or float64) whatever the inputs
    are. Nothing is read back to the host while adding.
    `mean` [groups, columns, columns] and `samples` are the whole state.

    On a GPU a float32 state is added up by tensor cores (`_add_gram`), and of a single matrix the lower triangle is
    filled in only when `value` is asked. `arithmetic` holds the names of all ways in which products were added up:
    "float32" or "float64", products and sums of that type; "bfloat16" or "float16", exact products of such inputs;
    "bfloat16x3", inputs split in two bfloat16 numbers; these three have float32 sums on tensor cores.
    """

    def __init__(
        self,
        columns: int,
        *,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.columns = columns
        self.groups = groups
        self.samples = 0
        self.arithmetic: set[str] = set()
        self._whole = True  # whether the lower triangle is what the upper one says
        self.mean = torch.zeros(groups, columns, columns, device=device, dtype=dtype)

    @torch.no_grad()
    def add(self, x: Tensor, *, samples: int | None = None) -> None:
        """Take in a batch.

        x: [N, ..., columns], or [N, groups, positions, columns] where the accumulator has groups (see `conv_patches`).
        samples: how many sequences or images x stands for; N where not given. Needed where the first axis is not the
        batch (windows of an image, tokens routed to an expert). N only sets the scale of H.
        """
        if x.shape[-1] != self.columns or (self.groups > 1 and (x.ndim != 4 or x.shape[1] != self.groups)):
            expected = (
                f"[N, {self.groups}, positions, {self.columns}]" if self.groups > 1 else f"[N, ..., {self.columns}]"
            )
            raise FewbitsError(f"Hessian: got an input of shape {tuple(x.shape)}, expected {expected}")
        m = x.shape[0] if samples is None else samples
        if m <= 0:
            if x.numel():
                raise FewbitsError(f"Hessian: samples={m} for a batch of shape {tuple(x.shape)}; give a positive count")
            return
        rows = x.transpose(0, 1).flatten(1, 2) if self.groups > 1 else x.reshape(1, -1, self.columns)
        total = self.samples + m
        if self.groups == 1 and self.mean.is_cuda and self.mean.dtype == torch.float32:
            self.arithmetic.add(
                _add_gram(self.mean[0], rows[0].to(self.mean.device), self.samples / total, 2.0 / total)
            )
            self.samples, self._whole = total, False
            return
        rows = rows.to(device=self.mean.device, dtype=self.mean.dtype) * (2.0 / total) ** 0.5
        with full_float32(self.mean.device):
            # beta rescales the old mean in the same call: H <- H n/(n+m) + x^T x
            self.mean.baddbmm_(rows.transpose(1, 2), rows, beta=self.samples / total)
        self.arithmetic.add(_name(self.mean.dtype))
        self.samples = total

    def merge(self, other: HessianAccumulator) -> None:
        """Take in what another accumulator (another batch, another process) has seen."""
        if other.mean.shape != self.mean.shape:
            raise FewbitsError(
                f"Hessian: cannot merge {tuple(other.mean.shape)} into {tuple(self.mean.shape)}; "
                "they belong to different layers"
            )
        total = self.samples + other.samples
        self.arithmetic |= other.arithmetic
        self._whole = self._whole and other._whole
        if other.samples:
            theirs = other.mean.to(self.mean) * (other.samples / total)
            self.mean.mul_(self.samples / total).add_(theirs)
        self.samples = total

    @property
    def value(self) -> Tensor:
        """H [columns, columns] ([groups, columns, columns]); all zero where nothing was added.

        Raises FewbitsError where an input held NaN or infinity (any such entry shows on the diagonal).
        """
        if not bool(torch.diagonal(self.mean, dim1=-2, dim2=-1).isfinite().all()):
            raise FewbitsError("Hessian: a calibration input holds NaN or infinity; check the model in float32")
        if not self._whole:
            mirror_upper(self.mean[0])
            self._whole = True
        return self.mean if self.groups > 1 else self.mean[0]


_PANEL = 2048  # columns of a product: wide enough for full speed, narrow enough to leave out most of the lower half


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _add_gram(mean: Tensor, rows: Tensor, keep: float, weight: float) -> str:
    """mean <- keep mean + weight rows^T rows, on and above the diagonal, on tensor cores; the name of how.

    mean: float32 [columns, columns] on a GPU; rows: [N, columns]. Products of bfloat16 or float16 numbers are exact in
    float32, where they are added. Other inputs are split in two bfloat16 numbers each, x = high + low, of which
    low^T low is left out: 2^-17 of a product at most.
    """
    left, right, name = rows, rows, _name(rows.dtype)
    if rows.dtype not in (torch.bfloat16, torch.float16):
        high = rows.to(torch.bfloat16)
        low = (rows - high).to(torch.bfloat16)
        left, right, name = torch.cat([high, high, low]), torch.cat([high, low, high]), "bfloat16x3"
    for start, stop in panels(len(mean), _PANEL):
        panel = mean[:stop, start:stop]
        torch.addmm(
            panel, left[:, :stop].T, right[:, start:stop], out_dtype=torch.float32, beta=keep, alpha=weight, out=panel
        )
    return name


def mirror_upper(matrix: Tensor) -> None:
    """Make a square matrix symmetric, in place, by what stands on and above its diagonal."""
    for start, stop in panels(len(matrix), _PANEL):
        matrix[start:stop, :start] = matrix[:start, start:stop].T
        block = matrix[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)


def panels(size: int, width: int) -> list[tuple[int, int]]:
    """(start, stop) of the parts of `width` columns, the last one shorter where they do not divide."""
    return [(start, min(start + width, size)) for start in range(0, size, width)]


def conv_patches(
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The input patches a zero-padded convolution multiplies its flattened weight with.

    x: [N, C, *spatial] for Conv1d, 2d or 3d, `kernel_size` one entry per spatial axis. Returns [N, positions, C*k]
    (groups=1) or [N, groups, positions, C/groups*k], columns in the order of `weight.flatten(1)`. padding: as in
    torch ("same" and "valid" included). Padding modes other than zeros: pad x first and pass 0.
    """
    dims = len(kernel_size)
    if x.ndim != dims + 2:
        raise FewbitsError(f"conv_patches: kernel {tuple(kernel_size)} needs an input of {dims + 2} axes, got {x.ndim}")
    if x.shape[1] % groups:
        raise FewbitsError(f"conv_patches: {x.shape[1]} channels do not divide into {groups} groups")
    strides, dilations = _per_axis(stride, dims), _per_axis(dilation, dims)
    spans = [d * (k - 1) for k, d in zip(kernel_size, dilations, strict=True)]
    if padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    elif isinstance(padding, str):
        if padding != "valid":
            raise FewbitsError(f"conv_patches: padding={padding!r}; use a number, 'same' or 'valid'")
        sides = [(0, 0)] * dims
    else:
        sides = [(p, p) for p in _per_axis(padding, dims)]
    x = F.pad(x, [amount for side in reversed(sides) for amount in side])
    for axis, (span, step, gap) in enumerate(zip(spans, strides, dilations, strict=True), start=2):
        x = x.unfold(axis, span + 1, step)[..., ::gap]
    # [N, C, *out, *kernel] -> [N, groups, positions, C/groups * kernel]
    n, c = x.shape[:2]
    out = x.shape[2 : 2 + dims]
    x = x.reshape(n, groups, c // groups, *out, *kernel_size)
    order = [0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    x = x.permute(order).reshape(n, groups, out.numel(), -1)
    return x[:, 0] if groups == 1 else x


def _per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] * dims if isinstance(value, int) else list(value)
    if len(values) != dims:
        raise FewbitsError(f"conv_patches: {value} does not give one number for each of {dims} axes")
    return values
