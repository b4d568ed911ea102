"""The map that knows nothing: what every method must beat."""

import torch
from torch import Tensor

from saccade.explain.classifier import Classifier
from saccade.explain.methods.attribution import Attribution

__all__ = ["random"]


def random(classify: Classifier, images: Tensor, target: Tensor, *, batch_size: int, seed: int = 0) -> Attribution:
    """Draw each pixel's relevance from a standard normal distribution; neither model nor image is looked at."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = images.shape
    return Attribution(torch.randn(batch, height, width, generator=generator).to(images))
