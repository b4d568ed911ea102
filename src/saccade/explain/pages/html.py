"""Pages that need no other file and no network: the template that they share, pictures as data, whole files or none."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saccade.errors import WorkError

__all__ = ["embed_picture", "place_on_track", "render", "write_text"]

_THUMBNAIL, _EMBED_BELOW = 224, 24_000  # pixels of the longer side; bytes of a file that goes in as it is
_SMALL = 64  # pixels: below, a browser's smoothing would blur what the network saw


def render(package: str, template: str, values: Mapping[str, Any]) -> str:
    """Fill in a template of `package`, which may extend `base.html.j2` and import from `parts.html.j2`."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = ChoiceLoader([PackageLoader(package), PackageLoader("saccade.explain.pages")])
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["tidy"] = lambda words: str(words).replace(" %", "\u00a0%")
    env.filters["soft"] = lambda name: Markup("_<wbr>").join(name.split("_"))
    return env.get_template(template).render(values)


def embed_picture(content: bytes) -> dict[str, Any] | None:
    """An image file as `uri` and whether it is `small`; made smaller if it is large, None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, small = image.get_format_mimetype(), max(image.size) <= _SMALL
            if len(content) > _EMBED_BELOW:
                image.thumbnail((_THUMBNAIL, _THUMBNAIL))
                smaller = io.BytesIO()
                image.convert("RGB").save(smaller, "JPEG", quality=85)
                content, kind = smaller.getvalue(), "image/jpeg"
    except OSError:
        return None
    return {"uri": f"data:{kind};base64,{base64.b64encode(content).decode()}", "small": small}


def place_on_track(own: Sequence[float], every: Sequence[float]) -> list[float]:
    """Figures as per cent of the way from the least to the greatest of `every`.

    >>> place_on_track([1.0, 2.0], [0.0, 1.0, 2.0, 4.0])
    [25.0, 50.0]
    """
    least, span = min(every), (max(every) - min(every)) or 1.0
    return [round(100 * (value - least) / span, 1) for value in own]


def write_text(path: Path, text: str) -> Path:
    """Write the whole file or none of it."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror or error
        raise WorkError(f"{path} could not be written ({reason}): make room there, or give another folder.") from error
    return path
