"""Small models whose explanations are known."""

import torch
from torch import Tensor, nn

from saccade import taps


def images(batch=3, channels=3, height=8, width=8, seed=0):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """logits = weight @ pixels; the weight is (classes, C, H, W)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight)


def linear(classes=4, channels=3, height=8, width=8, seed=1):
    return Linear(images(classes, channels, height, width, seed))


class ConvNet(nn.Module):
    """Two convolutions, pooling, a head; with `last`, the second one hands on a channels-last map."""

    def __init__(self, *, last: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.stem = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Linear(5, 6) if last else nn.Conv2d(5, 6, 1)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)
        self.last = last
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.body(x.movedim(1, -1) if self.last else x).relu_()
        return self.head(self.norm(self.drop(x).mean((1, 2) if self.last else (2, 3))))


class ShowsAttention(nn.Module):
    """Not a mixer: shows given attention for a map (B, h, w, C), which it hands on."""

    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.attention = attention  # (B or 1, heads, N, N)

    def forward(self, x: Tensor) -> Tensor:
        taps.record(self, "attention", lambda: self.attention.expand(len(x), -1, -1, -1))
        taps.record(self, "features", lambda: x)
        return x


class Stages(nn.Module):
    """Channels-last maps at given strides; each shows the attention of its layers."""

    def __init__(self, *stages: tuple[int, list[Tensor]]) -> None:
        super().__init__()
        self.strides = [stride for stride, _ in stages]
        self.stages = nn.ModuleList(nn.ModuleList(ShowsAttention(a) for a in layers) for _, layers in stages)

    def forward(self, x: Tensor) -> Tensor:
        for stride, stage in zip(self.strides, self.stages, strict=True):
            x = nn.functional.avg_pool2d(x, stride)
            for layer in stage:
                layer(x.movedim(1, -1))
        return x.mean((2, 3))


def softmax_attention(tokens, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, tokens, generator=generator, dtype=torch.double).softmax(-1)
