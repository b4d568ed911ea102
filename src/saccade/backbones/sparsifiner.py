"""Vision transformer with predicted connections and pruned tokens (Sparsifiner, Wei et al., 2023, arXiv:2303.13755).

The names are those of official weights.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.backbones.isotropic import Isotropic
from saccade.backbones.mlp import Mlp
from saccade.backbones.residual import Block, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers.low_rank_connectivity import Connected, LowRankConnectivityAttention
from saccade.ops import select_top_k

__all__ = ["VARIANTS", "PruningBlock", "Sparsifiner", "SparsifinerResult", "prune_tokens"]


class SparsifinerResult(NamedTuple):
    """What the network computed.

    Attributes:
        logits: (B, num_classes).
        features: (B, N, C), normalised tokens of the patches.
        layers: of each block's attention.
        alive: (B, N) booleans after each block; None until a block prunes.
    """

    logits: Tensor
    features: Tensor
    layers: list[Connected]
    alive: list[Tensor | None]


def prune_tokens(attention: Tensor, count: int, alive: Tensor | None = None) -> Tensor:
    """Keep the patches that the class token attends to most.

    Args:
        attention: (B, heads, N), of the class token to the patches.
        count: patches to keep; fewer where fewer are alive.
        alive: (B, N) booleans; the others stay pruned. None: all.

    Returns: (B, N) booleans. Choosing is not differentiable.

    >>> prune_tokens(torch.tensor([[[0.1, 0.5, 0.4]]]), 2)
    tensor([[False,  True,  True]])
    """
    score = attention.mean(1)
    score = score if alive is None else score.masked_fill(~alive, -torch.inf)
    chosen = select_top_k(score[:, None, None], count, key_size=score.shape[1:])
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, chosen.blocks[:, 0, 0], chosen.used[:, 0, 0])


class PruningBlock(Block):
    """x + attention(norm(x)), then x + mlp(norm(x)); tokens that are pruned are 0 from there on.

    Args:
        dim: C, channels of a token.
        keep_tokens: share of all patches that this block keeps; None prunes none.
        mlp_ratio: hidden over outer channels of the MLP.
        drop_path: probability of leaving a branch out.
        options: of `LowRankConnectivityAttention`, for one class token.
    """

    attn: LowRankConnectivityAttention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        keep_tokens: float | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        if keep_tokens is not None and not 0 < keep_tokens <= 1:
            raise InputError(f"keep_tokens is {keep_tokens}: give a share above 0 and at most 1, or None")
        attention = LowRankConnectivityAttention(dim, num_heads, num_prefix=1, **options)
        super().__init__(dim, attention, Mlp(dim, int(dim * mlp_ratio)), drop_path=drop_path)
        self.keep_tokens = keep_tokens

    def forward(  # type: ignore[override]
        self, x: Tensor, space: tuple[int, ...], alive: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Connected]:
        """Tokens (B, 1 + N, C), class token first, and which patches are alive: both after the block."""
        connected = self.attn.connect(self.norm1(x), space, alive)
        x = x + self.drop_path(connected.out)
        if self.keep_tokens is not None:
            count = math.ceil(self.keep_tokens * (x.shape[1] - 1))
            alive = prune_tokens(connected.prefix_attention[:, :, 0, 1:], count, alive)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if alive is not None:
            x = x * F.pad(alive, (1, 0), value=True).unsqueeze(-1)
        return x, alive, connected


class Sparsifiner(Isotropic):
    """Vision transformer whose tokens see predicted keys; its published sizes are those of DeiT.

    Images of another size are served by resizing positions and the predictors' bases as they come; a network that is
    built for another size has predictors of another rank, which published weights do not fit.

    Args:
        dim, depth, num_heads, mlp_ratio: of the transformer.
        keep_tokens: block -> share of all patches that it keeps.
        keep_rate: share of all tokens that a token sees, one number or one a block.
        attention_options: other options of `LowRankConnectivityAttention`. Unless they say otherwise, the class token
            competes with the patches for a place among a patch's keys, as published weights expect.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        image_size, patch_size, num_classes, in_chans: as for `Isotropic`.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        keep_tokens: Mapping[int, float] | None = None,
        keep_rate: float | tuple[float, ...] = 0.25,
        attention_options: Mapping[str, Any] | None = None,
        drop_path_rate: float = 0.0,
        image_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        rates = keep_rate if isinstance(keep_rate, tuple) else (keep_rate,) * depth
        if len(rates) != depth:
            raise InputError(f"keep_rate is {keep_rate} and depth is {depth}: give one number, or one a block")
        keep = keep_tokens or {}
        if not set(keep) <= set(range(depth)):
            raise InputError(f"keep_tokens is {dict(keep)}: blocks have numbers 0 to {depth - 1}")
        drops = drop_path_rates(drop_path_rate, (depth,))[0]
        options = {"size": image_size // patch_size, "mlp_ratio": mlp_ratio, "keep_prefix": False}
        options |= attention_options or {}
        super().__init__(
            lambda block: PruningBlock(
                dim,
                num_heads,
                keep_tokens=keep.get(block),
                keep_rate=rates[block],
                drop_path=drops[block],
                **options,
            ),
            dim=dim,
            depth=depth,
            image_size=image_size,
            patch_size=patch_size,
            num_classes=num_classes,
            in_chans=in_chans,
        )

    def run(self, images: Tensor) -> SparsifinerResult:
        """(B, in_chans, H, W) to logits, with all that led there."""
        self._check(images)
        tokens, layers, alive, _ = self._run_blocks(images)
        return SparsifinerResult(self.forward_head(tokens[-1]), tokens[-1][:, 1:], layers, alive)

    def run_tokens(self, images: Tensor, *, keep: bool = True) -> tuple[list[Tensor], tuple[int, int]]:
        tokens, _, _, space = self._run_blocks(images)
        return tokens, space

    def _run_blocks(self, images: Tensor) -> tuple[list[Tensor], list[Connected], list[Tensor | None], tuple[int, int]]:
        x, prefix = self.embed(images)
        assert prefix is not None
        space = (x.shape[1], x.shape[2])
        x = torch.cat([prefix, x.flatten(1, 2)], 1)
        alive: Tensor | None = None
        tokens, layers, alive_after = [], [], []
        for block in self.blocks:
            x, alive, connected = self.run_block(block, x, space, alive)
            tokens.append(x)
            layers.append(connected)
            alive_after.append(alive)
        tokens[-1] = self.norm(x)
        return tokens, layers, alive_after, space


VARIANTS = {
    "sparsifiner_test": Variant(
        partial(Sparsifiner, dim=48, depth=3, num_heads=3, image_size=64, patch_size=8, keep_tokens={1: 0.7}),
        image_size=64,
    ),
    "sparsifiner_tiny": Variant(partial(Sparsifiner, dim=192, num_heads=3)),
    "sparsifiner_small": Variant(partial(Sparsifiner)),
    "sparsifiner_base": Variant(partial(Sparsifiner, dim=768, num_heads=12)),
}
