"""Any image file to (3, H, W) uint8, or the reason why not.

Pillow decodes. Its modes become RGB by these rules: transparency is laid on white, as viewers and browsers show it;
16-bit grey is divided by 257, so that 65535 is white; floats within [0, 1] are multiplied by 255; other floats and
32-bit integers, of which no file says what is white, run from their own minimum to their own maximum. Of several
frames the first is taken. EXIF orientation is applied.
"""

import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from saccade.errors import InputError

__all__ = ["MAX_PIXELS", "Unreadable", "decode", "read_image", "shorter_side"]

MAX_PIXELS = 100_000_000
"""Largest image, in decoded pixels (400 MB in memory). A baseline JPEG that is reduced is decoded at down to an eighth
of its sides and may be 64 times larger."""

# Only formats with a signature: others (TGA) would take arbitrary bytes for an image, or start a program (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")

Image.init()  # registers the formats; here, since the first of several threads to do it would leave the others without


class Unreadable(Exception):
    """An image that cannot be decoded; the message is the reason, a clause about "it"."""


def read_image(path: str | Path, size: int | None = None) -> Tensor:
    """Decode an image file to RGB, upright as its EXIF orientation says.

    Args:
        path: a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF or ICO file of any colour mode.
        size: resize the shorter side to this many pixels (bicubic, antialiased) and crop the centre square; None
            keeps the image as it is.

    Returns: (3, H, W) uint8; (3, size, size) with a size.
    Raises: InputError with the file's name and the reason if it is missing, empty, damaged, no image, or larger than
        100 million pixels (a baseline JPEG may be larger if a size is given, since it is then decoded reduced).
    """
    if size is not None and size < 1:
        raise InputError(f"size is {size}: give a number of pixels from 1, or None to keep the image as it is")
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, on oddities it can live with
            return decode(Path(path), size)
    except Unreadable as error:
        raise InputError(f"the image {path} cannot be used: {error}. Give a whole image file") from error


def decode(source: Path | bytes | Image.Image, size: int | None = None) -> Tensor:
    """`read_image` for a path, a file's bytes or an open image; it raises Unreadable and lets Pillow's warnings pass,
    since they cannot be held back thread by thread."""
    if isinstance(source, Image.Image):
        return _to_tensor(source, size)
    with _open_file(source) as file:
        image = _identify(file)
        try:
            if size is not None and not image.info.get("progressive"):  # which libjpeg must hold whole, reduced or not
                image.draft(image.mode, (2 * size, 2 * size))  # JPEG only: twice the size leaves bicubic enough to do
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            return _to_tensor(image, size)
        except Unreadable:
            raise
        except Exception as error:  # of a damaged file, decoders raise anything
            raise Unreadable(f"it cannot be decoded ({_first_line(error)})") from error


def shorter_side(source: Path | bytes | Image.Image) -> int:
    """Pixels of the shorter side, from the header alone; raises Unreadable."""
    if isinstance(source, Image.Image):
        return min(source.size)
    with _open_file(source) as file:
        return min(_identify(file).size)


def _open_file(source: Path | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return BytesIO(source)
    try:
        if source.exists() and not source.is_file():  # a named pipe would be waited on for ever
            raise Unreadable("it is no regular file")
        return source.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise Unreadable(f"it cannot be opened ({getattr(error, 'strerror', None) or error})") from error


def _identify(file: IO[bytes]) -> Image.Image:
    """`Image.open` for our formats, without its limit of pixels, which knows nothing of reduced decoding and warns."""
    prefix = file.read(16)
    if not prefix:
        raise Unreadable("it is empty (0 bytes)")
    for name in _FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if isinstance(accepted, str):  # Pillow was built without this format, and says so
            raise Unreadable(f"this Pillow cannot read it ({accepted})")
        if accepted:
            file.seek(0)
            try:
                return factory(file, "")
            except Exception as error:
                raise Unreadable(f"its {name} header is damaged ({_first_line(error)})") from error
    raise Unreadable("it is no image in a format that can be read (" + ", ".join(_FORMATS) + ")")


def _to_tensor(image: Image.Image, size: int | None) -> Tensor:
    image.load()
    with suppress(Exception):  # damaged EXIF: the image itself is whole
        ImageOps.exif_transpose(image, in_place=True)
    image = _to_rgb(image)
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _WIDE_GREY:
        image = Image.fromarray(_to_eight_bits(image))
    elif image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        low, high = 0.0, 65535.0
    else:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(high - low):
            raise Unreadable("it holds values that are not finite (NaN or infinity)")
        if image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
    return ((values.astype(np.float32) - low) * (255 / ((high - low) or 1)) + 0.5).astype(np.uint8)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
