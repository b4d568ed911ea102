"""A folder of photographs as people have them: JPEGs of several sizes, odd names, and some files that are no images."""

from pathlib import Path

from PIL import Image
from skimage import data

PHOTOS = {"Ziegel rot": data.brick, "草": data.grass}  # a class each: a space, and letters beyond ASCII
SIZES = ((40, 40), (48, 36), (33, 61))
BROKEN = {  # path: what the reason says
    "Ziegel rot/abgebrochen é.jpg": "cannot be decoded",
    "草/text.png": "no image in a format that can be read",
}


def write_photos(folder: Path, count: int = 12) -> Path:
    """Cut `count` readable JPEGs a class from scikit-image's photos, and add a truncated one and a text called .png."""
    for name, read in PHOTOS.items():
        photo = Image.fromarray(read())
        (folder / name).mkdir(parents=True)
        for index in range(count):
            width, height = SIZES[index % len(SIZES)]
            left, top = 97 * index % (photo.width - width), 61 * index % (photo.height - height)
            photo.crop((left, top, left + width, top + height)).save(folder / name / f"Bild {index} ü.jpg")
    cut, text = (folder / path for path in BROKEN)
    whole = (cut.parent / "Bild 0 ü.jpg").read_bytes()
    cut.write_bytes(whole[: len(whole) * 4 // 5])
    text.write_text("These are notes, not an image.")
    return folder
