"""The networks that are measured, in PyTorch: exported here so that the graphs are what an exporter writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer with separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            part(y).view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(y)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """A BERT-like encoder: 6 layers of width 512 over a vocabulary of 8,000."""

    def __init__(self, layers: int = 6, width: int = 512, heads: int = 8, vocabulary: int = 8000) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(1, 512, width) * 0.02)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids [batch, tokens] to [batch, tokens, width]."""
        x = self.words(tokens) + self.places[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.norm(x)
        return result


class Residual(nn.Module):
    """A residual block, basic or bottleneck (He et al., arXiv 1512.03385)."""

    def __init__(self, inner: int, outer: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        sizes = [(inner, width, 1, 1), (width, width, 3, stride), (width, outer, 1, 1)]
        if not bottleneck:
            sizes = [(inner, width, 3, stride), (width, outer, 3, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.skip = nn.Identity()
        if stride != 1 or inner != outer:
            self.skip = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inner, h, w] to [batch, outer, h/stride, w/stride]."""
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if index + 1 < len(self.convs):
                y = functional.relu(y)
        return functional.relu(y + self.skip(x))


class ResNet(nn.Module):
    """ResNet for 224x224 images (He et al., arXiv 1512.03385)."""

    def __init__(self, blocks: Sequence[int], bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        layers: list[nn.Module] = []
        inner = 64
        for stage, count in enumerate(blocks):
            width = 64 << stage
            outer = width * 4 if bottleneck else width
            for index in range(count):
                layers.append(Residual(inner, outer, width, 2 if stage and not index else 1, bottleneck))
                inner = outer
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inner, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 3, 224, 224] to scores [batch, 1000]."""
        result: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return result


class Inverted(nn.Module):
    """An inverted residual block (Sandler et al., arXiv 1801.04381)."""

    def __init__(self, inner: int, outer: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inner * expand
        parts: list[nn.Module] = []
        if expand != 1:
            parts += [nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        parts += [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        parts += [nn.Conv2d(width, outer, 1, bias=False), nn.BatchNorm2d(outer)]
        self.parts = nn.Sequential(*parts)
        self.skip = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inner, h, w] to [batch, outer, h/stride, w/stride]."""
        y: Tensor = self.parts(x)
        return x + y if self.skip else y


class MobileNet(nn.Module):
    """MobileNetV2 for 224x224 images (Sandler et al., arXiv 1801.04381)."""

    def __init__(self) -> None:
        super().__init__()
        table = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        inner = 32
        for expand, outer, count, stride in table:
            for index in range(count):
                layers.append(Inverted(inner, outer, stride if not index else 1, expand))
                inner = outer
        layers += [nn.Conv2d(inner, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 3, 224, 224] to scores [batch, 1000]."""
        result: Tensor = self.head(self.body(x).mean((2, 3)))
        return result


class MLP(nn.Module):
    """Four layers of 4096."""

    def __init__(self, width: int = 4096, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, width] to [batch, width]."""
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x


class Recurrent(nn.Module):
    """Embedding, two bidirectional GRU layers of 256, and a projection."""

    def __init__(self, vocabulary: int = 8000) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, 256)
        self.gru = nn.GRU(256, 256, 2, bidirectional=True)
        self.out = nn.Linear(512, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids [tokens, batch] to [tokens, batch, 512]."""
        result: Tensor = self.out(self.gru(self.words(tokens))[0])
        return result


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics that are not the identity, so that no fold is trivial."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in ((part.running_mean, -0.2, 0.2), (part.running_var, 0.7, 1.3)):
                if tensor is not None:
                    tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=generator))
            with torch.no_grad():
                part.weight.copy_(torch.empty_like(part.weight).uniform_(0.7, 1.2, generator=generator))
                part.bias.copy_(torch.empty_like(part.bias).uniform_(-0.2, 0.2, generator=generator))
    return module.eval()
