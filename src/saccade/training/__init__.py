"""Training: how a network learns, saved so that it can be stopped at any moment."""

from saccade.training.block_diffusion import (
    NoisedTokens,
    choose_filled,
    hide_tokens,
    masked_token_loss,
    noise_tokens,
)
from saccade.training.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from saccade.training.evaluate import Evaluation, evaluate
from saccade.training.fit import FitResult, fit
from saccade.training.next_block import NextBlock, next_block
from saccade.training.selection import (
    SelectionGame,
    SelectionLoss,
    Selector,
    selection_loss,
    train_selection,
)
from saccade.training.settings import TrainSettings
from saccade.training.token_labels import token_label_loss

__all__ = [
    "Checkpoint",
    "Evaluation",
    "FitResult",
    "NextBlock",
    "NoisedTokens",
    "SelectionGame",
    "SelectionLoss",
    "Selector",
    "TrainSettings",
    "choose_filled",
    "evaluate",
    "fit",
    "hide_tokens",
    "masked_token_loss",
    "next_block",
    "noise_tokens",
    "read_checkpoint",
    "save_checkpoint",
    "selection_loss",
    "token_label_loss",
    "train_selection",
]
