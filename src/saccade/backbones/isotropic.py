"""Networks whose map keeps its size and width from the first block to the last, most with a class token (ViT, DeiT)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.patches import PatchEmbed, channels_first
from saccade.backbones.positions import resize_positions
from saccade.backbones.residual import layer_norm
from saccade.errors import InputError

__all__ = ["Isotropic"]


class Isotropic(Backbone):
    """Patch embedding, positions, class tokens, blocks, norm: `forward_features` returns (B, P + N, C), the map's
    tokens row by row behind P class tokens. Stages are the blocks; `forward_stages` leaves class tokens out.

    Subclasses may override `embed`, `positions` and `run_tokens`.

    Args:
        make_block: (number of the block) -> a module called with tokens (B, P + N, C) and the map's (height, width),
            such as `TokenBlock`.
        dim: C, channels of a token.
        depth: blocks.
        image_size: pixels along each side of the images for which `pos_embed` has rows.
        patch_size: pixels along each side of a token.
        patch_embed: (B, in_chans, H, W) to (B, H', W', C), with a convolution `proj`; None takes plain patches.
        first_conv: its name, where it is not "patch_embed.proj".
        positions: "all" learns rows for patches and class tokens, "patches" for patches alone; None learns none.
        class_tokens: P.
        join: number of the block before which class tokens join the patches.
        norm: makes the norm at the end.
        num_classes, in_chans: as for every backbone.
    """

    pools: tuple[str, ...] = ("token", "avg", "max")

    def __init__(
        self,
        make_block: Callable[[int], nn.Module],
        *,
        dim: int,
        depth: int,
        image_size: int = 224,
        patch_size: int = 16,
        patch_embed: nn.Module | None = None,
        first_conv: str = "patch_embed.proj",
        positions: str | None = "all",
        class_tokens: int = 1,
        join: int = 0,
        norm: Callable[[int], nn.Module] = layer_norm,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = class_tokens
        self.global_pool = "token" if class_tokens else "avg"
        self.pools = Isotropic.pools if class_tokens else Backbone.pools
        self.first_conv, self.join, self.patch_size = first_conv, join, patch_size
        self.space = (image_size // patch_size,) * 2
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size) if patch_embed is None else patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, class_tokens, dim)) if class_tokens else None
        rows = self.space[0] * self.space[1] + (class_tokens if positions == "all" else 0)
        self.pos_embed = nn.Parameter(torch.empty(1, rows, dim)) if positions else None
        self.blocks = nn.ModuleList(make_block(number) for number in range(depth))
        self.norm = norm(dim)
        self.num_features = dim
        self.feature_info = FeatureInfo(
            {"num_chs": dim, "reduction": patch_size, "module": f"blocks.{number}"} for number in range(depth)
        )
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        self.reset_classifier(num_classes)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, in_chans, H, W) to the map (B, H', W', C) and class tokens (B, P, C), with their positions."""
        x = self.patch_embed(images)
        prefix = None if self.cls_token is None else self.cls_token.expand(len(x), -1, -1)
        positions = self.positions((x.shape[1], x.shape[2]))
        if positions is not None:
            count = positions.shape[1] - x.shape[1] * x.shape[2]
            x = x + positions[:, count:].unflatten(1, x.shape[1:3])
            prefix = prefix + positions[:, :count] if count and prefix is not None else prefix
        return x, prefix

    def positions(self, space: tuple[int, int]) -> Tensor | None:
        """Learned positions for a map, interpolated where it is not the one of `image_size`."""
        return None if self.pos_embed is None else resize_positions(self.pos_embed, space, old=self.space)

    def run_tokens(self, images: Tensor, *, keep: bool = True) -> tuple[list[Tensor], tuple[int, int]]:
        """(B, in_chans, H, W) to the tokens after each block, the last with its norm, and the map's (height, width);
        without `keep` those after the last block alone."""
        x, prefix = self.embed(images)
        space = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        seen: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number == self.join and prefix is not None:
                x = torch.cat([prefix, x], 1)
            x = self.run_block(block, x, space)
            if keep:
                seen.append(x)
        seen[-1:] = [self.norm(x)]
        return seen, space

    def run_stages(self, images: Tensor) -> list[Tensor]:
        seen, space = self.run_tokens(images)
        size = space[0] * space[1]
        return [channels_first(x[:, x.shape[1] - size :].unflatten(1, space)) for x in seen]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to tokens (B, P + N, C)."""
        self._check(images)
        return self.run_tokens(images, keep=False)[0][-1]

    def pool(self, features: Tensor) -> Tensor:
        """Tokens (B, P + N, C) to (B, C): the first class token, or the patches' mean or maximum."""
        patches = features[:, self.num_prefix_tokens :]
        match self.global_pool:
            case "token":
                return features[:, 0]
            case "avg":
                return patches.mean(1)
            case "max":
                return patches.amax(1)
        return features

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Positions of another image size are interpolated."""
        if name == "pos_embed" and tensor.ndim == 3 and tensor.shape[-1] == shape[-1]:
            return resize_positions(tensor, self.space)
        return tensor

    def _check(self, images: Tensor) -> None:
        super()._check(images)
        if min(images.shape[2:]) < self.patch_size:
            raise InputError(
                f"images is {tuple(images.shape)}: a patch has {self.patch_size} x {self.patch_size} pixels. "
                "Give images of one patch at least"
            )
