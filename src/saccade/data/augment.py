"""Random changes of training images that leave the class as it is, by kornia, on whole batches."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice

__all__ = ["LEVELS", "Augment", "normalize"]

LEVELS = ("none", "light", "standard")


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std of each colour, as models expect it.

    Args:
        images: (..., 3, H, W) uint8.
        mean, std: one number a colour, of images in [0, 1], as in `ImageData`.

    Returns: (..., 3, H, W) float32.
    Raises: InputError if the images are not uint8: floats may be in [0, 1] or normalised already.
    """
    if images.dtype != torch.uint8:
        raise InputError(f"images are {images.dtype}: give uint8 from 0 to 255, as load_images and read_image do")
    scale, shift = (images.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (std, mean))
    return images * (1 / (255 * scale)) - shift / scale


class Augment(nn.Module):
    """Change a batch of training images at random, each its own way; in `eval` the batch passes unchanged.

    - "none": nothing.
    - "light": rotation by up to 8 degrees, shift by up to 8 %, scale by up to 10 %; borders are continued.
      No mirror, since digits, letters and signs change their meaning in it.
    - "standard": a random crop of 35 to 100 % of the area, mirrored in half of the cases, brightness, contrast and
      saturation by up to 30 %, and in a quarter of the cases a rectangle set to 0, the mean of normalised images:
      for photos.

    Randomness is drawn from torch's global generator, so `torch.manual_seed` makes it repeat.

    Args:
        level: one of the above.
        image_size: H = W of the images, in pixels.
        mean, std: how the batches have been normalised; the default is not at all, values in [0, 1]. Colours are
            changed within [0, 1], so "standard" must know.

    Raises: InputError for an unknown level.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        level: str,
        image_size: int,
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        check_choice("level", level, LEVELS)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.move, self.colour, self.erase = _COMPOSE[level](image_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) floats to the same."""
        if not self.training:
            return images
        images = self.move(images)
        if not isinstance(self.colour, nn.Identity):
            images = (self.colour(images * self.std + self.mean) - self.mean) / self.std
        return self.erase(images)


def _none(image_size: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.Identity(), nn.Identity(), nn.Identity()


def _light(image_size: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    from kornia.augmentation import RandomAffine

    move = RandomAffine(8.0, translate=(0.08, 0.08), scale=(0.9, 1.1), padding_mode="border", p=1.0)
    return move, nn.Identity(), nn.Identity()


def _standard(image_size: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    from kornia.augmentation import ColorJitter, RandomErasing, RandomHorizontalFlip, RandomResizedCrop

    move = nn.Sequential(RandomResizedCrop((image_size, image_size), scale=(0.35, 1.0)), RandomHorizontalFlip(p=0.5))
    # No hue: it would more than double the cost of the whole.
    return move, ColorJitter(0.3, 0.3, 0.3, 0.0, p=1.0), RandomErasing(scale=(0.02, 0.2), p=0.25)


_COMPOSE = {"none": _none, "light": _light, "standard": _standard}
