"""Windows of varied size and place (VSA, Zhang et al., 2022, arXiv:2204.08446): each samples a lattice of its own.

After sampling, attention to the varied windows is attention inside plain ones: `sparse_attention` with a `Window`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_positive, per_axis

__all__ = ["resample_windows", "resampling_weights"]


def resample_windows(
    x: Tensor,
    window_size: int | tuple[int, int],
    move: Tensor,
    stretch: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Fill each window with samples of a region that is moved, and stretched about the window's centre.

    A window's tokens stay a regular lattice, whose points are interpolated bilinearly; outside the map there are
    zeros. Gradients reach `move` and `stretch` through the places of the points.

    Args:
        x: (B, heads, H, W, D).
        window_size: s, tokens of a window, one number or one for each axis, which divides the map.
        move: (B, heads, H / s, W / s, 2), rows and columns by which each window's region is moved, in tokens.
        stretch: likewise, the factor of its height and width: 1 keeps them, a negative one mirrors the region.
        impl: "reference" forms the N x N weights and defines what is right; "sampled" is torch's grid_sample; "auto"
            is "sampled". Places are computed in float32 at least, whatever the dtype of x.

    Returns: (B, heads, H, W, D) in the dtype of x.
    Raises: InputError for shapes that do not fit, or an unknown `impl`.

    >>> x = torch.arange(6.0).reshape(1, 1, 1, 6, 1)
    >>> right = torch.tensor([0.0, 1.5]).expand(1, 1, 1, 2, 2)
    >>> resample_windows(x, (1, 3), right, torch.ones(1, 1, 1, 2, 2)).flatten()
    tensor([1.5000, 2.5000, 3.5000, 4.5000, 2.5000, 0.0000])
    """
    check_choice("impl", impl, ("auto", "sampled", "reference"))
    if x.ndim != 5:
        raise InputError(f"x is {tuple(x.shape)}: give (B, heads, H, W, D)")
    space = (x.shape[2], x.shape[3])
    if impl == "reference":
        weights = resampling_weights(space, window_size, move, stretch)
        return (weights @ x.flatten(2, 3).to(weights.dtype)).to(x.dtype).unflatten(2, space)
    rows, columns = _places(space, window_size, move, stretch)
    grid = torch.stack(torch.broadcast_tensors(columns.unsqueeze(-2), rows.unsqueeze(-1)), -1)  # (.., s, s, 2)
    # to grid_sample's coordinates, of which -1 and 1 are the outer edges of the map
    grid = (2 * grid + 1) / grid.new_tensor([space[1], space[0]]) - 1
    grid = grid.transpose(3, 4).flatten(4, 5).flatten(2, 3).flatten(0, 1)  # (B heads, H, W, 2)
    maps = x.flatten(0, 1).permute(0, 3, 1, 2).to(grid.dtype)
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).to(x.dtype)


def resampling_weights(
    space: tuple[int, int], window_size: int | tuple[int, int], move: Tensor, stretch: Tensor
) -> Tensor:
    """Form the weights with which `resample_windows` interpolates, (B, heads, N, N): rows sum to 1 inside the map.

    Args:
        space: H and W; the others are as in `resample_windows`.
    """
    rows, columns = (_hat(places, length) for places, length in zip(_places(space, window_size, move, stretch), space))
    weights = torch.einsum("bhijru,bhijcv->bhirjcuv", rows, columns)
    return weights.flatten(6, 7).flatten(2, 5)


def _places(
    space: tuple[int, int], window_size: int | tuple[int, int], move: Tensor, stretch: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows and the columns of each window's points, in tokens of the map: (B, heads, H / s, W / s, s) each."""
    check_positive(window_size=window_size)
    sizes = per_axis("window_size", window_size, 2)
    if any(length % size for length, size in zip(space, sizes)):
        raise InputError(f"window_size is {window_size} and the map is {space}: windows must divide it. Pad the map")
    windows = tuple(length // size for length, size in zip(space, sizes))
    for name, given in (("move", move), ("stretch", stretch)):
        if given.ndim != 5 or given.shape[2:] != (*windows, 2):
            raise InputError(f"{name} is {tuple(given.shape)}: give (B, heads, {windows[0]}, {windows[1]}, 2)")
    dtype = torch.promote_types(move.dtype, torch.float32)
    places = []
    for axis, (count, size) in enumerate(zip(windows, sizes)):
        relative = torch.arange(size, dtype=dtype, device=move.device) - (size - 1) / 2
        centre = torch.arange(count, dtype=dtype, device=move.device) * size + (size - 1) / 2
        centre = (centre[:, None] if axis == 0 else centre) + move[..., axis].to(dtype)
        places.append(centre.unsqueeze(-1) + stretch[..., axis, None].to(dtype) * relative)
    return places[0], places[1]


def _hat(places: Tensor, length: int) -> Tensor:
    """Linear interpolation between the two nearest of `length` tokens, (..., length) for each place."""
    low = places.floor().unsqueeze(-1)
    share = places.unsqueeze(-1) - low
    number = torch.arange(length, dtype=places.dtype, device=places.device)
    return (number == low) * (1 - share) + (number == low + 1) * share
