"""Training: how a network learns, saved so that it can be stopped at any moment."""

from saccade.training.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from saccade.training.evaluate import Evaluation, evaluate
from saccade.training.fit import FitResult, fit
from saccade.training.settings import TrainSettings

__all__ = [
    "Checkpoint",
    "Evaluation",
    "FitResult",
    "TrainSettings",
    "evaluate",
    "fit",
    "read_checkpoint",
    "save_checkpoint",
]
