"""Pictures of maps: colour over the greyed image, readable in print and with any colour vision."""

from pathlib import Path

import torch
from torch import Tensor

from saccade.errors import InputError, WorkError

__all__ = ["colour_scale", "enlarge_pixels", "full_colour", "overlay", "save_overlay", "write_picture"]


def overlay(image: Tensor, map: Tensor, *, signed: bool | None = None, percentile: float = 99.0) -> Tensor:
    """Colour an image by a map: the stronger a pixel's relevance, the more its colour covers the greyed image.

    Args:
        image: (3, H, W) uint8.
        map: (H, W), any scale.
        signed: whether values below 0 mean "speaks against": then orange is for and blue against (two hues that all
            kinds of colour vision tell apart), else the upper part of cividis runs from grey to yellow, lighter
            in even steps, and negative values count as 0. None: signed if any value is negative.
        percentile: of the absolute values, drawn in full colour; a few outliers above it then cannot pale the rest.

    Returns: (3, H, W) uint8, on the CPU.
    Raises: InputError if shapes or kinds do not fit, or the map is not finite.
    """
    _check(image, map, percentile)
    map = map.detach().cpu().double()
    signed = bool((map < 0).any()) if signed is None else signed
    map = map if signed else map.clamp(min=0)
    strength = (map.abs() / _scale(map.abs(), percentile)).clamp(max=1)
    colour = _two_hues(map) if signed else _cividis(strength)
    grey = torch.einsum("chw,c->hw", image.cpu().double() / 255, torch.tensor([0.299, 0.587, 0.114]).double())
    grey = 0.25 + 0.4 * grey  # between blue and orange in lightness, so that grey print shows both
    cover = 0.85 * strength
    return ((grey * (1 - cover) + colour * cover) * 255).round().to(torch.uint8)


def save_overlay(
    path: str | Path, image: Tensor, map: Tensor, *, signed: bool | None = None, percentile: float = 99.0
) -> Path:
    """Write `overlay(image, map)` as a picture in the format that the path's suffix names, making its folder.

    Returns: the path.
    Raises: InputError as `overlay`, and for an unknown suffix; WorkError if the file cannot be written.
    """
    return write_picture(path, overlay(image, map, signed=signed, percentile=percentile))


def write_picture(path: str | Path, picture: Tensor) -> Path:
    """Write (3, H, W) uint8 in the format that the path's suffix names, making its folder."""
    from PIL import Image

    path = Path(path)
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"{path.name!r} names no picture format: end it with .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise WorkError(f"cannot write {path}: {error}. Choose a folder that can be written and has space") from error
    return path


def colour_scale(*, signed: bool, width: int = 160, height: int = 12) -> Tensor:
    """The colours of `overlay` over mid-grey, (3, height, width) uint8: from 0 to full colour, or from full colour
    against to full colour for."""
    ramp = torch.linspace(-1 if signed else 0, 1, width, dtype=torch.double).expand(height, width)
    return overlay(torch.full((3, height, width), 128, dtype=torch.uint8), ramp, signed=signed, percentile=100.0)


def full_colour(map: Tensor, *, signed: bool | None = None, percentile: float = 99.0) -> float:
    """The absolute value from which `overlay` draws in full colour, in the map's unit."""
    map = map.detach().cpu().double()
    signed = bool((map < 0).any()) if signed is None else signed
    return float(_scale((map if signed else map.clamp(min=0)).abs(), percentile))


def enlarge_pixels(map: Tensor, least: int = 128) -> Tensor:
    """Small maps or pictures (C, H, W) as larger ones with visible pixels, of at least `least` on the longer side."""
    factor = -(-least // max(map.shape[-2:]))
    return map.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _check(image: Tensor, map: Tensor, percentile: float) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"image is {image.dtype} of shape {tuple(image.shape)}: give uint8 (3, H, W)")
    if map.shape != image.shape[1:]:
        raise InputError(
            f"map is {tuple(map.shape)} but the image is {tuple(image.shape)}: give a map of {tuple(image.shape[1:])}"
        )
    if not map.isfinite().all():
        raise InputError("the map holds NaN or infinite values: it cannot be drawn")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile is {percentile}: give more than 0 and at most 100")


def _scale(strength: Tensor, percentile: float) -> Tensor:
    """The percentile, or where most of the map is 0 the largest value, so that a lone bright pixel is still seen."""
    high = strength.flatten().kthvalue(max(1, round(percentile / 100 * strength.numel()))).values
    high = high if high > 0 else strength.max()
    return high if high > 0 else torch.ones_like(high)


def _cividis(strength: Tensor) -> Tensor:
    from matplotlib import colormaps

    upper = 0.4 + 0.6 * strength.numpy()  # its dark end would ring every spot with shadow
    return torch.from_numpy(colormaps["cividis"](upper)[..., :3]).permute(2, 0, 1)


def _two_hues(map: Tensor) -> Tensor:
    """(3, H, W): orange where the map is positive, else blue; the orange is lighter, so that grey print keeps the
    sign."""
    orange, blue = torch.tensor([[1.0, 0.72, 0.2], [0.0, 0.2, 0.65]], dtype=torch.double)
    return torch.where(map > 0, orange[:, None, None], blue[:, None, None])
