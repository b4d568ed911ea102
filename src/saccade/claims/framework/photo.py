"""Queries and keys with the structure of a photograph, for experiments on what attention may leave out."""

from math import tau

import torch
from torch import Tensor

__all__ = ["photo_tokens", "project_alike"]


def photo_tokens(patch: int = 6, features: int = 24) -> Tensor:
    """Tokens of scikit-learn's photo of a temple, a token for each patch: (71, 106, features + 4) for patches of 6.

    Their features are the largest principal components of the pixels, of variance 1 on average, and a sine and a
    cosine of twice that weight along each axis.
    """
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).double().movedim(-1, 0) / 255
    height, width = (length // patch for length in photo.shape[1:])
    cut = photo[:, : height * patch, : width * patch].unflatten(2, (width, patch)).unflatten(1, (height, patch))
    pixels = cut.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
    pixels = pixels - pixels.mean(0)
    left, sizes, _ = torch.linalg.svd(pixels, full_matrices=False)
    components = left[:, :features] * sizes[:features]
    angles = [torch.arange(length, dtype=torch.float64) * (tau / length) for length in (height, width)]
    places = torch.stack(
        [wave(axis) for axis in torch.meshgrid(*angles, indexing="ij") for wave in (torch.sin, torch.cos)]
    )
    return torch.cat([(components / components.std()).view(height, width, features), 2 * places.movedim(0, -1)], -1)


def project_alike(tokens: Tensor, heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of heads with 32 channels, (B, heads, *space, 32) from (B, *space, C), by random projections
    that are similar for query and key, so that tokens attend to what is like them. Both are doubled."""
    channels = tokens.shape[-1]
    to_query, other, to_value = torch.randn(3, channels, 32 * heads, dtype=tokens.dtype) / channels**0.5
    query, key, value = (
        (tokens @ matrix).unflatten(-1, (heads, 32)).movedim(-2, 1)
        for matrix in (2 * to_query, 2 * (to_query + 0.3 * other), to_value)
    )
    return query, key, value
