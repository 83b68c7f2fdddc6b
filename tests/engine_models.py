"""Small models and data for the engine's tests: plain PyTorch, seeded, no optional library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block with separate projections and a ReLU MLP."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Embedding, blocks, norm, head. Input: integer tokens (batch, length)."""

    def __init__(self, width: int = 16, depth: int = 3, vocabulary: int = 23) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class SkipNet(nn.Module):
    """Convolutional stages joined by long skips, an in-place activation in the glue, and a shared layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Sequential(Residual(8), Residual(8))
        self.up = nn.Sequential(Residual(16), Residual(16))
        self.shared = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu_(self.stem(x))
        second = self.down(F.max_pool2d(first, 2))
        joined = torch.cat([first, F.interpolate(second, scale_factor=2)], 1)
        out = self.up(self.shared(joined)) + self.shared(joined.flip(-1))
        return self.head(out.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def encoder(seed: int = 0, **sizes: int) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder(**sizes)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval()


def skipnet(seed: int = 0) -> SkipNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SkipNet()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
        return model.eval()


def tokens(count: int, batch: int = 4, length: int = 6, vocabulary: int = 23, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, vocabulary, (count, length), generator=generator)
    return list(data.split(batch))


def images(count: int, batch: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, 8, 8, generator=generator).split(batch))
