"""ConViT (d'Ascoli et al., 2021, arXiv:2103.10697): a vision transformer whose first blocks start as convolutions."""

from functools import partial

from torch import nn

from saccade.backbones.isotropic import Isotropic
from saccade.backbones.mlp import Mlp
from saccade.backbones.residual import TokenBlock
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import Attention, GatedPositionalAttention

__all__ = ["VARIANTS", "ConViT"]


class ConViT(Isotropic):
    """Blocks of gated positional attention on the patches alone, then of attention with a class token.

    Args:
        dim: C, channels of a token.
        depth: blocks.
        num_heads: attention heads.
        local_depth: blocks with gated positional attention.
        locality_strength: how narrow their heads start; `saccade.mixers.GatedPositionalAttention` explains it.
        image_size: pixels along each side of the images for which positions are learned; others are interpolated.
        patch_size: pixels along each side of a token.
        mlp_ratio: hidden over outer channels of the MLPs.
        qkv_bias: give the projections of attention a bias.
        scale: factor of q.k; None takes D^-0.5.
        positions: learn an embedding of each patch's place.
        norm_eps: of the norms.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        *,
        local_depth: int = 10,
        locality_strength: float = 1.0,
        image_size: int = 224,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        scale: float | None = None,
        positions: bool = True,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        if not 0 <= local_depth < depth:
            raise InputError(
                f"local_depth is {local_depth} and depth is {depth}: the class token joins behind the local blocks. "
                "Leave one block for it"
            )
        norm = partial(nn.LayerNorm, eps=norm_eps)
        local = partial(GatedPositionalAttention, locality_strength=locality_strength)

        def make_block(number: int) -> TokenBlock:
            attention = local if number < local_depth else Attention
            return TokenBlock(
                dim,
                attention(dim, num_heads, qkv_bias=qkv_bias, scale=scale),
                Mlp(dim, int(dim * mlp_ratio)),
                norm=norm,
                drop_path=drop_path_rate * number / max(1, depth - 1),
            )

        super().__init__(
            make_block,
            dim=dim,
            depth=depth,
            image_size=image_size,
            patch_size=patch_size,
            positions="patches" if positions else None,
            join=local_depth,
            norm=norm,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(_init)
        for module in self.modules():
            if isinstance(module, GatedPositionalAttention):
                module.start_local()

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        _init(layer)


def _init(layer: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and biases of 0 for linear layers; others stay."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _variant(heads: int, width: int, weights: str | None = None) -> Variant:
    return Variant(partial(ConViT, heads * width, 12, heads), weights=weights)


VARIANTS = {
    "convit_test": Variant(
        partial(ConViT, 36, 4, 9, local_depth=3, image_size=64, patch_size=8, mlp_ratio=2.0), image_size=64
    ),
    "convit_tiny": _variant(4, 48, "timm/convit_tiny.fb_in1k"),
    "convit_small": _variant(9, 48, "timm/convit_small.fb_in1k"),
    "convit_base": _variant(16, 48, "timm/convit_base.fb_in1k"),
    "convit_tiny_plus": _variant(4, 64),
    "convit_small_plus": _variant(9, 64),
    "convit_base_plus": _variant(16, 64),
}
