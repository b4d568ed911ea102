"""One decision for a whole layer and each sample (Flux Attention, 2026, arXiv:2604.07394)."""

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.gates.gate import Gate
from saccade.ops import gumbel, straight_through
from saccade.ops.check import check_positive

__all__ = ["LayerRouter"]


class LayerRouter(Gate):
    """Decide for each sample between two forms of a whole layer: 1 for the full one, 0 for the sparse one (Flux
    Attention, 2026, arXiv:2604.07394).

    In training a decision is drawn, with Gumbel noise: hard in value, with the gradient of its probability at
    `temperature`, a buffer that training sets (`anneal_temperature`). In evaluation it is hard, without noise and
    without gradient.

    Args:
        dim: C, channels of a token; of attention's queries, averaged over the heads, the width of a head.
        pool_size: tokens at both ends of the map, or of the segment, over which it averages, in row-major order. A
            token at both ends counts twice. None averages the whole map, since images have no ends; 100 is published,
            for prompts.
        form: "softmax" over two logits, or "sigmoid" of one.
        start: bias of the logit of the full form; with the published 4.5 nearly all decisions are full at first.
        overrun: let the two ends reach out of a segment that is shorter than pool_size, as official code does, where
            an end that begins before the map is lost.
    """

    temperature: Tensor

    def __init__(
        self,
        dim: int,
        *,
        pool_size: int | None = None,
        form: str = "softmax",
        start: float = 4.5,
        overrun: bool = False,
    ) -> None:
        super().__init__(dim)
        check_positive(pool_size=1 if pool_size is None else pool_size)
        check_choice("form", form, ("sigmoid", "softmax"))
        self.pool_size = pool_size
        self.form = form
        self.overrun = overrun
        outputs = 2 if form == "softmax" else 1
        self.cls_feat_extractor = nn.Sequential(nn.Linear(dim, 8 * dim), nn.SiLU(), nn.Linear(8 * dim, 2 * dim))
        self.cls_router_head_agnostic = nn.Sequential(
            nn.Linear(2 * dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim), nn.SiLU(), nn.Linear(dim, outputs)
        )
        last = self.cls_router_head_agnostic[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        with torch.no_grad():
            last.bias[-1] = start
        self.register_buffer("temperature", torch.ones(()), persistent=False)

    def decide(self, x: Tensor, segment: Tensor | None = None) -> Tensor:
        """(B, 1, ..., 1) of 0 and 1, from x (B, *space, C).

        Args:
            x: the map.
            segment: (B, 2) integers, the first and the last token of the part that counts, such as the question of a
                prompt; a sample whose last stands before its first gives zeros to the router. None takes all.
        """
        logits = self.logits(self.features(self.pool(x, segment)))
        if self.training:
            soft = self.soften(logits, gumbel(torch.rand_like(logits)))
            gate = straight_through((soft > 0.5).to(soft.dtype), soft)
        else:
            gate = (self.soften(logits.detach()) > 0.5).to(x.dtype)
        return gate.view(-1, *(1,) * (x.ndim - 1))

    def pool(self, x: Tensor, segment: Tensor | None = None) -> Tensor:
        """Average the tokens at both ends, (B, *space, C) to (B, C)."""
        tokens = x.flatten(1, -2)
        if segment is None and self.pool_size is None:
            return tokens.mean(1)
        length = tokens.shape[1]
        if segment is None:
            segment = torch.tensor([0, length - 1], device=x.device).expand(len(x), 2)
        if segment.shape != (len(x), 2):
            raise InputError(f"segment is {tuple(segment.shape)}: give ({len(x)}, 2), the first and the last token")
        first, last = (end.unsqueeze(1) for end in segment.unbind(1))
        size = length if self.pool_size is None else self.pool_size
        head_stop, tail_start = first + size, last - size + 1
        if self.overrun:
            tail_start = torch.where(tail_start < 0, tail_start + length, tail_start)
        else:
            head_stop, tail_start = torch.minimum(head_stop, last + 1), torch.maximum(tail_start, first)
        place = torch.arange(length, device=x.device)
        times = ((place >= first) & (place < head_stop)).to(x.dtype) + ((place >= tail_start) & (place <= last))
        times = times * (last >= first)
        return (times.unsqueeze(1) @ tokens).squeeze(1) / times.sum(1, keepdim=True).clamp(min=1)

    def features(self, pooled: Tensor) -> Tensor:
        """(B, C) to (B, 2 C)."""
        features: Tensor = self.cls_feat_extractor(pooled)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """(B, 2 C) to (B, 2), the sparse form first, or (B, 1)."""
        logits: Tensor = self.cls_router_head_agnostic(features)
        return logits

    def soften(self, logits: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Probability of the full form, (B,), at the temperature; noise is added to the logits."""
        scaled = (logits + noise) / self.temperature
        return scaled.softmax(-1)[:, 1] if self.form == "softmax" else scaled.sigmoid()[:, 0]
