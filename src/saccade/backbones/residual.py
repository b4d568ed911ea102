"""Residual branches: a block of a mixer and an MLP, and what scales or leaves out a branch."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["Block", "DropPath", "LayerScale", "PostNormBlock", "Stage", "TokenBlock", "drop_path_rates", "layer_norm"]

MakeNorm = Callable[[int], nn.Module]
layer_norm: MakeNorm = partial(nn.LayerNorm, eps=1e-6)  # as in most vision transformers


class DropPath(nn.Module):
    """Leave a residual branch out, image by image, with some probability (stochastic depth, 2016, arXiv:1603.09382)."""

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        kept = x.new_empty(len(x), *(1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * kept / keep

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


class LayerScale(nn.Module):
    """A learned factor for each channel, on channels-last maps (CaiT, 2021, arXiv:2103.17239).

    Args:
        dim: C, channels.
        init: where the factors start.
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), channels last: (B, *space, C) to the same.

    Args:
        dim: C, channels of a token.
        mixer, mlp: the two branches.
        norm: makes their norms.
        drop_path: probability of leaving a branch out.
        layer_scale: where a learned factor for each channel of a branch starts; None has none.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        *,
        norm: MakeNorm = layer_norm,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = mixer
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PostNormBlock(Block):
    """x + norm(mixer(x)), then x + norm(mlp(x)): the norms stand behind the branches (Swin V2, 2021,
    arXiv:2111.09883)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.norm1(self.attn(x))))
        return x + self.drop_path(self.ls2(self.norm2(self.mlp(x))))


class TokenBlock(Block):
    """The same for tokens (B, P + N, C) of which the first P are no part of the map, such as a class token."""

    def forward(self, x: Tensor, space: tuple[int, ...] = ()) -> Tensor:
        x = x + self.drop_path(self.ls1(self.mix(self.norm1(x), space)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def mix(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        """Call the mixer with the map (B, *space, C) and the tokens before it."""
        count = x.shape[1] - torch.Size(space).numel()
        tokens = x[:, count:].unflatten(1, space)
        if not count:
            out: Tensor = self.attn(tokens).flatten(1, -2)
            return out
        tokens, prefix = self.attn(tokens, x[:, :count])
        return torch.cat([prefix, tokens.flatten(1, -2)], 1)


class Stage(nn.Module):
    """Blocks on one map, and the step down from the map before."""

    downsample: nn.Module
    blocks: nn.Sequential

    def __init__(self, downsample: nn.Module, blocks: nn.Sequential) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = blocks


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Probabilities of leaving a block out, for each stage: from 0 at the first block to `rate` at the last.

    >>> drop_path_rates(0.3, (1, 3))
    [[0.0], [0.1, 0.2, 0.3]]
    """
    total = sum(depths)
    rates = iter([round(rate * block / max(1, total - 1), 10) for block in range(total)])
    return [[next(rates) for _ in range(depth)] for depth in depths]
