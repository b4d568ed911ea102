"""Keypoints of an image, and the saliency that a mixture of Gaussians around them gives (2017, arXiv:1710.07859)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad

from saccade.errors import InputError, check_choice

__all__ = ["Keypoints", "find_keypoints", "keypoint_saliency", "pixel_distributions"]

_SIDE = 128  # pixels: smaller images are enlarged for SIFT, whose first octave sees little of them


@dataclass(frozen=True)
class Keypoints:
    """Where an image has structure.

    Attributes:
        positions: (K, 2) row and column, in pixels.
        sizes: (K,), in pixels.
        responses: (K,), how strong each is, above 0.
        detector: "sift", "corners" or "grid": the one that was asked for, or "grid" where it found nothing.
    """

    positions: Tensor
    sizes: Tensor
    responses: Tensor
    detector: str

    @property
    def weights(self) -> Tensor:
        """(K,) shares of the responses, which sum to 1."""
        return self.responses / self.responses.sum()


def find_keypoints(
    image: Tensor, *, detector: str = "corners", enlarge: int | None = None, most: int = 64
) -> Keypoints:
    """Find the keypoints of one image; an image without any gets a grid of 4 x 4.

    Args:
        image: (C, H, W) or (1, C, H, W); the mean over channels is read, its contrast does not matter.
        detector: "corners", the smaller eigenvalue of the structure tensor (kornia), whose keypoints are a sixteenth
            of the shorter side wide; "sift", the paper's, which needs scikit-image; "grid".
        enlarge: whole factor by which the image is enlarged for "sift"; None makes the shorter side 128 pixels at
            least. The paper's code enlarges 15 times below 50 pixels.
        most: keep the strongest ones.

    Raises: InputError for wrong arguments, and where scikit-image is missing.
    """
    check_choice("detector", detector, ("corners", "grid", "sift"))
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim != 3 or not image.is_floating_point():
        raise InputError(f"image is {image.dtype} of shape {tuple(image.shape)}: give one image of floats (C, H, W)")
    grey = image.detach().cpu().double().mean(0)
    spread = grey.max() - grey.min()
    found = None
    if detector != "grid" and spread > 0:
        grey = (grey - grey.min()) / spread
        found = _corners(grey) if detector == "corners" else _sift(grey, enlarge)
    if found is None or not len(found[0]):
        return _grid(grey.shape)
    positions, sizes, responses = found
    best = responses.argsort(descending=True, stable=True)[:most]
    return Keypoints(positions[best], sizes[best], responses[best], detector)


def keypoint_saliency(keypoints: Keypoints, size: tuple[int, int], *, spread: float = 0.0) -> Tensor:
    """(H, W) probabilities that sum to 1: a Gaussian around each keypoint, weighted by its response.

    Args:
        keypoints: of the image.
        size: (H, W).
        spread: added to each keypoint's size to make the standard deviation in pixels; 15 in the paper's code.

    >>> points = Keypoints(torch.tensor([[1.0, 1.0]]), torch.tensor([1.0]), torch.tensor([3.0]), "grid")
    >>> keypoint_saliency(points, (3, 3)).argmax().item()
    4
    """
    return (keypoints.weights.double() @ pixel_distributions(keypoints, size, spread)).view(size)


def pixel_distributions(keypoints: Keypoints, size: tuple[int, int], spread: float = 0.0) -> Tensor:
    """(K, H W): each keypoint's Gaussian on the pixels, which sums to 1."""
    sigma = keypoints.sizes.double() + spread
    rows, columns = (
        (-((torch.arange(length) - at[:, None]) ** 2) / (2 * sigma[:, None] ** 2)).softmax(1)
        for length, at in zip(size, keypoints.positions.double().T)
    )
    return (rows[:, :, None] * columns[:, None]).flatten(1)


Found = tuple[Tensor, Tensor, Tensor]


def _corners(grey: Tensor) -> Found:
    from kornia.feature import gftt_response

    padded = pad(
        grey[None, None], (4, 4, 4, 4), mode="replicate"
    )  # its blur mirrors 3 pixels, which images may not have
    response = gftt_response(padded)[0, 0, 4:-4, 4:-4]
    peaks = (response == max_pool2d(response[None], 3, 1, 1)[0]) & (response > 1e-3 * response.max())
    positions = peaks.nonzero()
    size = max(1.0, min(grey.shape) / 16)
    return positions.double(), torch.full((len(positions),), size, dtype=torch.float64), response[peaks]


def _sift(grey: Tensor, enlarge: int | None) -> Found | None:
    try:
        from skimage.feature import SIFT
    except ImportError as error:
        raise InputError(
            "detector 'sift' needs scikit-image, which is not installed: pip install 'saccade[demo]', or use "
            "'corners', which needs nothing more"
        ) from error
    factor = max(1, -(-_SIDE // min(grey.shape))) if enlarge is None else enlarge
    large = interpolate(grey[None, None], scale_factor=factor, mode="bicubic")[0, 0].clamp(0, 1)
    sift = SIFT()
    try:
        sift.detect(large.numpy())
    except RuntimeError:  # it found none
        return None
    # one point has a row for each of its orientations
    rows = torch.unique(torch.cat([torch.tensor(sift.positions), torch.tensor(sift.sigmas)[:, None]], 1), dim=0)
    positions, sizes = (rows[:, :2] + 0.5) / factor - 0.5, rows[:, 2] / factor
    points = Keypoints(positions, sizes, sizes, "sift")
    inner, outer = (
        pixel_distributions(points, (grey.shape[0], grey.shape[1]), spread) for spread in (0.0, sizes.mean().item())
    )
    responses = ((inner - outer) @ grey.flatten()).abs()  # the detector does not hand out its own
    strong = responses > 0
    return positions[strong], sizes[strong], responses[strong]


def _grid(size: torch.Size) -> Keypoints:
    rows, columns = ((torch.arange(4) + 0.5) * length / 4 - 0.5 for length in size)
    positions = torch.cartesian_prod(rows, columns)
    sizes = torch.full((16,), max(1.0, min(size) / 8))
    return Keypoints(positions, sizes, torch.ones(16), "grid")
