"""Pictures of patterns: the mask, and what single queries see on the map."""

from collections.abc import Sequence
from math import prod
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.compose import PerHead
from saccade.ops.pattern import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_pattern"]

LARGEST_MASK = 4096  # tokens; beyond, a mask has more entries than a picture can show
SEEN, HIDDEN, QUERY = "#1f6f8b", "#e8eaec", "#d1495b"  # told apart in grey and by the colour-blind
SIDE, LINE = 2.6, 36  # inches of a panel, letters of a line above it


def draw_pattern(
    pattern: Pattern,
    space: tuple[int, ...],
    *,
    queries: Sequence[int | tuple[int, ...]] | None = None,
    image: int = 0,
    figure: "Figure | None" = None,
) -> "Figure":
    """Draw a pattern: its mask, queries down and keys across, and on maps what single queries see.

    Args:
        pattern: what to draw; of patterns that differ by head each different one has a row.
        space: the axes of the queries; each frame of a video is a panel.
        queries: which to show on the map, by number or place; None shows a corner, the middle and a later one.
        image: which image of a batch, for selections.
        figure: to draw on, such as a new one of pyplot; None makes one.

    Returns: a matplotlib figure, which `savefig` writes and a notebook shows.
    Raises: InputError for a query outside the map, or more than 4096 tokens.
    """
    from matplotlib.figure import Figure

    keys = pattern.key_space(space)
    if max(prod(space), prod(keys)) > LARGEST_MASK:
        raise InputError(f"the map {space} has {prod(space)} tokens: a picture shows up to {LARGEST_MASK}. Draw less")
    chosen = _numbers(queries, space)
    rows = list(_masks(pattern, space, image).items())
    panels = 1 + len(chosen) * (0 if len(space) == 1 else 1 if len(space) == 2 else keys[0])
    figure = Figure() if figure is None else figure
    figure.set_layout_engine("constrained")
    figure.set_size_inches(SIDE * panels, (SIDE + 0.5) * len(rows))
    axes = figure.subplots(len(rows), panels, squeeze=False)
    for row, (title, mask) in zip(axes, rows):
        _show(row[0], mask.numpy(), [])
        row[0].set_title(f"{_wrap(title)}\n{mask.float().mean().item():.0%} of pairs", fontsize=8)
        row[0].set_xlabel("keys", fontsize=7)
        row[0].set_ylabel("queries", fontsize=7)
        rest = iter(row[1:])
        for number in chosen if len(space) > 1 else []:
            place = np.unravel_index(number, space)
            seen = mask[number].view(keys).numpy()
            for frame, part in enumerate(seen if len(space) == 3 else [seen]):
                own = len(space) == 2 or frame == place[0]
                mark = [place[-2:]] if own and keys == space else []
                axis = next(rest)
                _show(axis, part, mark)
                name = tuple(int(each) for each in place)
                axis.set_title(
                    f"query {name}" + (f", frame {frame}" if len(space) == 3 else "") + f"\n{int(part.sum())} keys",
                    fontsize=8,
                )
    return figure


def _masks(pattern: Pattern, space: tuple[int, ...], image: int) -> dict[str, Tensor]:
    """(N, M) masks under their titles."""
    if isinstance(pattern, PerHead):
        return {
            f"heads {', '.join(map(str, heads))}: {part}": _single(part.mask(space), image)
            for part, heads in pattern.by_pattern()
        }
    mask = pattern.mask(space).cpu()
    if mask.ndim == 4 and mask.shape[1] > 1:
        return {f"head {head}: {pattern}": each for head, each in enumerate(mask[image])}
    return {str(pattern): _single(mask, image)}


def _single(mask: Tensor, image: int) -> Tensor:
    return mask[min(image, len(mask) - 1), 0].cpu() if mask.ndim == 4 else mask.cpu()


def _wrap(title: str) -> str:
    return fill(title, LINE)


def _numbers(queries: Sequence[int | tuple[int, ...]] | None, space: tuple[int, ...]) -> list[int]:
    if queries is None:
        middle = tuple(length // 2 for length in space)
        later = tuple(length * 3 // 4 for length in space)
        queries = list(dict.fromkeys([(0,) * len(space), middle, later])) if len(space) < 3 else [middle]
    found = []
    for query in queries:
        place = (
            tuple(query)
            if isinstance(query, tuple | list)
            else tuple(map(int, np.unravel_index(query % prod(space), space)))
        )
        inside = len(place) == len(space) and all(0 <= at < length for at, length in zip(place, space))
        if not inside or (isinstance(query, int) and not 0 <= query < prod(space)):
            raise InputError(f"query {query} is not on the map {space}: give its number or its place")
        found.append(int(np.ravel_multi_index(place, space)))
    return found


def _show(axis: "Axes", seen: Any, marks: list[tuple[Any, ...]]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    axis.imshow(seen, cmap=ListedColormap([HIDDEN, SEEN]), vmin=0, vmax=1, interpolation="nearest")
    for row, column in marks:
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=QUERY, linewidth=2))
    axis.set_xticks([])
    axis.set_yticks([])
