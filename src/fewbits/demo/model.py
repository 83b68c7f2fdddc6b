"""The demo models: two small transformers in plain PyTorch, without anything that knows about quantization."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConfig:
    """Shape of a `ByteLM`: 256 symbols in, 256 logits out, `context` positions at most."""

    width: int = 128
    depth: int = 7
    heads: int = 4
    context: int = 256
    vocabulary: int = 256

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ImageConfig:
    """Shape of a `DigitViT`: grey images of `size` x `size` pixels cut into `patch` x `patch` squares."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    size: int = 8
    patch: int = 2
    classes: int = 10

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


#: Of the digits' grey levels, 0 to 16.
PIXEL_MEAN, PIXEL_DEVIATION = 4.9, 6.0


def normalise(images: Tensor) -> Tensor:
    """Grey levels 0 to 16 [n, 8, 8] of any type -> what `DigitViT` takes, float32 [n, 1, 8, 8]."""
    return (images.float()[:, None] - PIXEL_MEAN) / PIXEL_DEVIATION


class Attention(nn.Module):
    """Multi-head self-attention over [batch, length, width] with separate projections."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            proj(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them; four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _initialise(model: nn.Module, depth: int) -> None:
    """Normal(0, 0.02) weights; the two projections that write to the residual stream are scaled by 1/sqrt(2 depth)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        residual = name.endswith(("o_proj.weight", "down.weight"))
        nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if residual else 0.02)


class ByteLM(nn.Module):
    """A decoder-only language model over bytes, with learned positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, causal=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        _initialise(self, config.depth)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, length, 256] of the next byte for `input_ids` [batch, length], int64, length <= context."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DigitViT(nn.Module):
    """A vision transformer for small grey images, with a class token."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        patches = (config.size // config.patch) ** 2
        self.patch_embed = nn.Conv2d(1, config.width, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, causal=False) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        _initialise(self, config.depth)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] for `images` [batch, 1, size, size], float, about zero mean and unit variance."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
