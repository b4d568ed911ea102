"""Small models of characters, for papers on language: the text is the documentation that comes with Python."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework.experiment import Block

__all__ = ["SYMBOLS", "CharacterModel", "draw_texts", "train_on_text"]

FIRST, LAST = 32, 126  # printable ASCII; anything else is a space
SYMBOLS = LAST - FIRST + 1


@cache
def _text() -> Tensor:
    from pydoc_data.topics import topics

    codes = torch.tensor([ord(character) for name in sorted(topics) for character in topics[name]])
    return codes.where((codes >= FIRST) & (codes <= LAST), FIRST) - FIRST


def draw_texts(count: int, length: int, *, held_out: bool = False) -> Tensor:
    """(count, length) characters, 0 to SYMBOLS - 1, from random places in nine tenths of the text, or in the tenth."""
    text = _text()
    border = len(text) * 9 // 10
    text = text[border:] if held_out else text[:border]
    return text[torch.randint(len(text) - length, (count, 1)) + torch.arange(length)]


class CharacterModel(nn.Module):
    """Characters (B, N) to logits (B, N, SYMBOLS): learned positions, blocks, a norm and a linear layer.

    Args:
        make_mixer: channels -> a mixer of sequences.
        length: the longest text.
        dim: channels of a token.
        depth: blocks.
    """

    def __init__(self, make_mixer: Callable[[int], nn.Module], length: int, dim: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 1, dim)  # the last stands for a hidden character
        self.position = nn.Parameter(0.3 * torch.randn(length, dim))  # distances are found in hundreds of steps
        self.blocks = nn.ModuleList(Block(dim, make_mixer(dim)) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, SYMBOLS))

    def start(self, codes: Tensor) -> Tensor:
        """Characters to tokens, (B, N, C), before the blocks."""
        tokens: Tensor = self.embed(codes) + self.position[: codes.shape[1]]
        return tokens

    def forward(self, codes: Tensor) -> Tensor:
        x = self.start(codes)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def train_on_text(
    model: CharacterModel, make_task: Callable[[], tuple[Tensor, Tensor]], steps: int, *, rate: float = 3e-3
) -> None:
    """Train with Adam, whose learning rate falls to 0 as a cosine, and leave the model in eval mode.

    Args:
        model: is trained in place.
        make_task: draws characters (B, N) and what to predict at each place; -1 counts nothing.
        steps: of the optimizer.
        rate: the first learning rate.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        codes, targets = make_task()
        loss = F.cross_entropy(model(codes).flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
