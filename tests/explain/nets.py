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


class ForeignAttention(nn.Module):
    """Attention as others write it, without a tap; `kind` says how. Keeps what its weights were."""

    def __init__(self, dim: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        if kind == "apart":
            self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        elif kind == "torch":
            self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        if kind != "torch":
            self.out = nn.Conv2d(dim, dim, 1) if kind == "convolution" else nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "torch":
            out, weights = self.mha(x, x, x, average_attn_weights=False)
            self.weights = weights
            return out
        if self.kind == "apart":
            query, key, value = (part(x) for part in (self.query, self.key, self.value))
        else:
            query, key, value = self.qkv(x).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        if self.kind == "channels":
            query, key, value = query.mT, key.mT, value.mT
        scale = query.shape[-1] ** -0.5
        self.weights = weights = (query @ key.mT * scale).softmax(-1)
        if self.kind == "fused":
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        elif self.kind == "einsum":
            mixed = torch.einsum("bhnm,bhmd->bhnd", weights, value)
        elif self.kind == "einsum, turned":
            mixed = torch.einsum("bhmd,bhnm->bhnd", value, weights)
        else:
            mixed = weights @ value
        if self.kind == "channels":
            return self.out(mixed.permute(0, 3, 1, 2).flatten(2))
        if self.kind == "convolution":
            side = int(x.shape[1] ** 0.5)
            return self.out(mixed.mT.flatten(1, 2).unflatten(-1, (side, side))).flatten(2).mT
        return self.out(mixed.transpose(1, 2).flatten(2))


FOREIGN = ("product", "fused", "apart", "einsum", "einsum, turned", "torch", "convolution")


class ForeignViT(nn.Module):
    """Patches, prefix tokens, blocks, class token (or mean), head."""

    def __init__(self, kind="product", *, dim=12, heads=3, depth=3, prefix=1, patch=4, classes=5, linear_patches=False):
        super().__init__()
        self.patch, self.linear_patches = patch, linear_patches
        self.embed = nn.Linear(3 * patch**2, dim) if linear_patches else nn.Conv2d(3, dim, patch, patch)
        self.prefix = nn.Parameter(torch.randn(1, prefix, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.layers = nn.ModuleList(ForeignAttention(dim, heads, kind) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear_patches:
            x = self.embed(nn.functional.unfold(x, self.patch, stride=self.patch).mT)
        else:
            x = self.embed(x).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for norm, layer, mlp in zip(self.norms, self.layers, self.mlps):
            x = x + layer(norm(x))
            x = x + mlp(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.prefix.shape[1] else x.mean(1))


def foreign_vit(kind="product", seed=0, **options):
    torch.manual_seed(seed)
    return ForeignViT(kind, **options).double().eval()
