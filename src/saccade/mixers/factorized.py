"""Factorized self-attention (FaSA of FaViT, 2023, arXiv:2312.08614): coarse and fine keys for groups of channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError, check_choice
from saccade.mixers.mixer import Mixer, merge_heads, split_heads
from saccade.ops import dilated_windows, softmax_attention
from saccade.ops.check import check_positive
from saccade.ops.softmax_attention import attention_weights

__all__ = ["FactorizedAttention"]

FEWEST_COARSE = 4  # channels: a norm over fewer says hardly more than which one is the larger


class FactorizedAttention(Mixer):
    """Softmax attention to a coarse map and to one window of 49 keys fused from all (FaViT, 2023, arXiv:2312.08614).

    An eighth of the channels attends to a map reduced by `sr_ratio`, in one head; the others, in groups of plain and
    of dilated windows, to the windows' mean. All queries share the keys, so the cost of a query hardly depends on the
    map.

    Taps show the coarse head first, then the heads of each group. Their token matrix spreads the weight of a key evenly
    over the tokens that it was made of; the convolutions before and beside the attention are left out.

    Args:
        dim: C, channels of a token.
        num_heads: heads of each fine group; None takes one for each 32 channels where the groups divide so.
        sr_ratio: factor by which the coarse map is reduced, and the dilation of the second fine group, which there is
            with a factor above 1.
        window_size: side of the fused window of keys.
        coarse_dim: channels of the coarse group; None takes an eighth of C, at least 4.
        fusion: "mean" of the windows, as the paper has it; "runs" is what the official code computes: the mean over
            successive channels of the same window instead, which agrees where there is one window.
        qkv_bias: give the projections to query, key and value a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        sr_ratio: int = 2,
        window_size: int = 7,
        coarse_dim: int | None = None,
        fusion: str = "mean",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim)
        check_positive(sr_ratio=sr_ratio, window_size=window_size)
        check_choice("fusion", fusion, ("mean", "runs"))
        self.sr_ratio = sr_ratio
        self.window_size = window_size
        self.fusion = fusion
        self.dilations = (1,) if sr_ratio == 1 else (1, sr_ratio)
        self.coarse_dim = max(FEWEST_COARSE, dim // 8) if coarse_dim is None else coarse_dim
        self.widths = _share(dim - self.coarse_dim, len(self.dilations))
        self.num_heads = self._choose_heads(num_heads)
        fine, by_head = sum(self.widths), [width // self.num_heads for width in self.widths]
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.sr = nn.Conv2d(self.coarse_dim, self.coarse_dim, sr_ratio, sr_ratio)
        self.norm = nn.LayerNorm(self.coarse_dim)
        self.kv_g = nn.Linear(self.coarse_dim, 2 * self.coarse_dim, bias=qkv_bias)
        self.local_conv_g = _depthwise(self.coarse_dim)
        self.depth_conv = _depthwise(fine)
        self.point_conv = nn.Linear(fine, fine)
        self.fcs = nn.ModuleList(nn.Linear(width, width) for width in by_head)
        self.single_heads = nn.ModuleList(nn.Linear(width, 2 * width, bias=qkv_bias) for width in by_head)
        self.local_convs = nn.ModuleList(_depthwise(width) for width in self.widths)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InputError(
                f"x is {tuple(x.shape)}: windows and a coarse map are of images. Give (B, H, W, {self.dim})"
            )
        space = (x.shape[1], x.shape[2])
        coarse_query, fine_query = self.q(x).flatten(1, 2).split([self.coarse_dim, sum(self.widths)], -1)
        by_head = [width // self.num_heads for width in self.widths]
        queries = [coarse_query.unsqueeze(1), *split_heads(fine_query, self.num_heads).split(by_head, -1)]
        keys, values = zip(self._coarse(x), *self._fine(x))  # (B, 1 | heads, keys, D) each

        def attention() -> Tensor:
            spreads = self._spreads(space, x)
            groups = zip(queries, keys, spreads)
            return torch.cat(
                [attention_weights(q, k, None, q.shape[-1] ** -0.5) @ spread for q, k, spread in groups], 1
            )

        taps.record(self, "attention", attention)
        out = [merge_heads(softmax_attention(*group)) for group in zip(queries, keys, values)]
        projected: Tensor = self.proj(torch.cat(out, -1)).unflatten(1, space)
        return projected

    def _coarse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the coarse head, (B, 1, H W / sr_ratio^2, D)."""
        reduced = self.sr(_at_least(x[..., : self.coarse_dim].movedim(-1, 1), self.sr_ratio))
        key, value = self.kv_g(self.norm(reduced.movedim(1, -1))).chunk(2, -1)
        value = value + self.local_conv_g(value.movedim(-1, 1)).movedim(1, -1)
        return key.flatten(1, 2).unsqueeze(1), value.flatten(1, 2).unsqueeze(1)

    def _fine(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each fine group, (B, heads, window_size^2, D)."""
        source = self.point_conv(self.depth_conv(x[..., self.coarse_dim :].movedim(-1, 1)).movedim(1, -1))
        pairs = []
        for part, dilation, fc, head, conv in zip(
            source.split(self.widths, -1), self.dilations, self.fcs, self.single_heads, self.local_convs
        ):
            windows = dilated_windows(split_heads(part, self.num_heads), self.window_size, dilation)
            key, value = head(fc(self._fuse(windows))).chunk(2, -1)
            window = value.transpose(2, 3).flatten(1, 2).unflatten(-1, (self.window_size, -1))  # (B, heads D, s, s)
            detail = conv(window).flatten(2).unflatten(1, (self.num_heads, -1)).mT
            pairs.append((key, value + detail))
        return pairs

    def _fuse(self, windows: Tensor) -> Tensor:
        """(B, heads, windows, s * s, D) to (B, heads, s * s, D)."""
        if self.fusion == "mean":
            return windows.mean(2)
        return windows.transpose(2, 3).flatten(3).unflatten(3, (windows.shape[-1], -1)).mean(-1)

    def _spreads(self, space: tuple[int, int], like: Tensor) -> list[Tensor]:
        """(keys, N) for each group: the share of each token in a key, a mean over channels with "runs"."""
        tokens = torch.eye(
            space[0] * space[1], dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
        )
        shown = tokens.unflatten(0, space)  # (H, W, N)
        padded = _at_least(shown.movedim(-1, 0).unsqueeze(1), self.sr_ratio)
        coarse = F.avg_pool2d(padded, self.sr_ratio).flatten(1).mT
        fine = [dilated_windows(shown[None, None], self.window_size, d)[0, 0].mean(0) for d in self.dilations]
        return [coarse, *fine]

    def _choose_heads(self, asked: int | None) -> int:
        possible = [n for n in range(1, min(self.widths) + 1) if all(width % n == 0 for width in self.widths)]
        heads = max(n for n in possible if n <= max(1, self.dim // 32)) if asked is None else asked
        if heads not in possible:
            raise InputError(
                f"num_heads is {heads}: the fine groups have {self.widths} channels. Take one of {possible}"
            )
        return heads


def _share(channels: int, groups: int) -> list[int]:
    """Channels shared among groups as evenly as they can be."""
    if channels < groups:
        raise InputError(f"{channels} channels are left to {groups} groups: take a smaller coarse_dim or a larger dim")
    return [channels * (group + 1) // groups - channels * group // groups for group in range(groups)]


def _depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def _at_least(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) with zeros at the end where an axis is shorter than `size`."""
    height, width = (max(0, size - length) for length in x.shape[2:])
    return F.pad(x, (0, width, 0, height))
