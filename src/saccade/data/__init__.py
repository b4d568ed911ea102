"""Images with classes, from a folder, a Hugging Face dataset or the bundled sets, ready to train on and to look at."""

from saccade.data.augment import Augment, normalize
from saccade.data.decode import read_image
from saccade.data.evidence import Evidence, known_evidence
from saccade.data.images import ImageData, Images, Skipped
from saccade.data.load import load_images

__all__ = [
    "Augment",
    "Evidence",
    "ImageData",
    "Images",
    "Skipped",
    "known_evidence",
    "load_images",
    "normalize",
    "read_image",
]
