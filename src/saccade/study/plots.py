"""The pictures of a study's report, as SVG that stands inside a page: its fonts, its colours (dark too), its ids.

Colours of mixers keep three to one against white and differ for colour-blind readers, and they never speak alone: each
mixer also has a marker of its own, and its name stands beside it.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Style", "accuracy_against_cost", "cost_against_side", "mixer_styles", "number_at", "pareto_front", "short"]

_COLORS = ("#0060a8", "#c44000", "#00936b", "#b03a80", "#2a1f7a", "#95953a", "#3f9be0", "#5a3a20")
_INK, _MUTED, _LINE, _PAPER = "#1a2230", "#5b6573", "#dce1e8", "#ffffff"
_WIDTH, _HEIGHT, _FONT = 360, 250, 10  # points: a phone shows a picture at about this size
_LETTER = 0.55  # width of a letter against the font's size; most fonts are a little narrower


@dataclass(frozen=True)
class Style:
    """How a mixer is drawn wherever it appears: a colour, the CSS variable that may replace it, a marker's corners."""

    color: str
    variable: str
    corners: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Cost:
    title: str
    key: str
    scaling: str
    exponent: str
    show: Callable[[float], str]


def mixer_styles(names: Sequence[str]) -> dict[str, Style]:
    """Give each mixer its style by its place in the list; the first 64 are all different."""
    styles = {}
    for i, name in enumerate(names):
        turn, color = divmod(i, len(_COLORS))
        styles[name] = Style(_COLORS[color], f"--mixer-{color}", _MARKERS[(i + turn) % len(_MARKERS)])
    return styles


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names than which no other is both cheaper and more accurate, from cheap to dear; points are (cost, accuracy).

    >>> pareto_front({"a": (1, 0.8), "b": (2, 0.7), "c": (3, 0.9)})
    ['a', 'c']
    """
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def accuracy_against_cost(mixers: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], cost: str) -> str:
    """Draw accuracy with its interval over one cost ("latency" or "flops"), the Pareto front as a dashed stair.

    Returns: SVG, or "" where no mixer has both figures.
    """
    known, axis = {}, _COSTS[cost]
    for mixer in mixers:
        figures = [number_at(mixer, key) for key in (axis.key, "accuracy.value", "accuracy.low", "accuracy.high")]
        if None not in figures:
            known[mixer["name"]] = np.array(figures, dtype=float) * (1, 100, 100, 100)
    if not known:
        return ""
    figure, axes = _canvas(right=14)
    _scale_x(axes, [x for x, *_ in known.values()], axis.show, room=12 + _LETTER * _FONT * max(map(len, known)))
    for name, (x, y, low, high) in known.items():
        axes.plot([x, x], [low, high], color=styles[name].color, lw=1.4, alpha=0.55, zorder=2)
        _mark(axes, [x], [y], styles[name], size=9)
    front = pareto_front({name: (x, y) for name, (x, y, *_) in known.items()})
    xs, ys = [known[name][0] for name in front], [known[name][1] for name in front]
    stair = np.array([[*xs, axes.get_xlim()[1]], [*ys, ys[-1]]])
    axes.plot(*stair, ds="steps-post", color=_MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    bottom, top = min(low for *_, low, _ in known.values()), max(high for *_, high in known.values())
    pad = max(0.4, 0.08 * (top - bottom))
    axes.set_ylim(bottom - pad, top + pad)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %" if value <= 100 else "")
    axes.set_title("Accuracy on held-out images", **_TITLE)
    axes.set_xlabel(axis.title, color=_INK, fontsize=_FONT)
    _label_points(axes, known, stair)
    text = f"Accuracy against {axis.title}. On the Pareto front, from cheap to dear: {', '.join(front)}."
    return _svg(figure, f"accuracy-{cost}", text)


def cost_against_side(mixers: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], cost: str) -> str:
    """Draw how one cost ("latency" or "flops") grows with the image's side, log over log, each line with its exponent.

    Returns: SVG, or "" where no mixer was measured at two sides or more.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    axis = _COSTS[cost]
    curves: dict[str, tuple[str, list[int], list[float]]] = {}
    for mixer in mixers:
        scaling = mixer.get("scaling") or {}
        pairs = [pair for pair in zip(scaling.get("sides") or (), scaling.get(axis.scaling) or ()) if pair[1]]
        if len(pairs) > 1:
            exponent = number_at(scaling, f"{axis.exponent}.value")
            label = mixer["name"] if exponent is None else f"{mixer['name']}  {exponent:.2f}"
            curves[mixer["name"]] = (label, [side for side, _ in pairs], [value for _, value in pairs])
    if not curves:
        return ""
    figure, axes = _canvas(right=132, height=max(_HEIGHT, 70 + 14 * len(curves)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, (_, sides, values) in curves.items():
        axes.plot(sides, values, color=styles[name].color, lw=1.6)
        _mark(axes, sides, values, styles[name], size=5)
    axes.set_xticks(_spread_ticks(sorted({side for _, sides, _ in curves.values() for side in sides})))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: axis.show(value))
    every = [value for _, _, values in curves.values() for value in values]
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(every) < 100 * min(every) else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(axis.title, **_TITLE)
    axes.set_xlabel("side of the image, pixels", color=_INK, fontsize=_FONT)
    _label_ends(axes, {label: (sides[-1], values[-1]) for label, sides, values in curves.values()})
    text = f"{axis.title} against the side of the image. Exponents: {'; '.join(curve[0] for curve in curves.values())}."
    return _svg(figure, f"side-{cost}", text)


def short(value: float) -> str:
    """A large number with three digits and a prefix.

    >>> short(12345678), short(950)
    ('12.3 M', '950')
    """
    power = 0
    while abs(value) >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {' kMGTP'[power]}".strip()


def number_at(record: Mapping[str, Any], path: str) -> float | None:
    """The finite number at a dotted path of keys, or None where a key is missing.

    >>> number_at({"latency_ms": {"median": 3.1}}, "latency_ms.median")
    3.1
    """
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _canvas(right: float, height: float = _HEIGHT) -> "tuple[Figure, Axes]":
    """An empty picture whose axes leave `right` points free for labels; at 72 dots an inch a dot is a point."""
    from matplotlib.figure import Figure

    left, bottom, top = 50, 42, 26
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    box = (left / _WIDTH, bottom / height, 1 - (left + right) / _WIDTH, 1 - (bottom + top) / height)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.grid(axis="y", color=_LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_MUTED, labelsize=_FONT - 1, length=0, pad=5)
    return figure, axes


def _scale_x(axes: "Axes", values: Sequence[float], show: Callable[[float], str], room: float) -> None:
    """A linear axis, or a logarithmic one over a range of eight and more, with `room` points right of all values."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    left, right = 0.1, 1.1 / (1 - min(0.5, room / axes.bbox.width)) - 1.0
    if high > 8 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** left, high * (high / low) ** right)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        span = high - low or high
        axes.set_xlim(low - left * span, high + right * span)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: show(value))


def _mark(axes: "Axes", xs: Sequence[float], ys: Sequence[float], style: Style, size: float) -> None:
    shape: dict[str, Any] = {"marker": list(style.corners), "ms": size, "mfc": style.color, "mec": _PAPER, "mew": 0.6}
    axes.plot(xs, ys, ls="", zorder=3, clip_on=False, **shape)


def _spread_ticks(sides: Sequence[int]) -> list[int]:
    """The sides that have room for a label on a logarithmic axis: the last, and those a quarter or more apart."""
    kept = [sides[-1]]
    for side in reversed(sides[:-1]):
        if kept[-1] >= 1.25 * side:
            kept.append(side)
    return kept[::-1]


def _label_points(axes: "Axes", points: Mapping[str, NDArray[np.float64]], stair: NDArray[np.float64]) -> None:
    """Write each name near its point (x, y, low, high) where it covers least: markers, lines, names, the edge."""
    place = axes.transData.transform
    spots = {name: place([(x, y), (x, low), (x, high)]) for name, (x, y, low, high) in points.items()}
    steps = place(stair.T)
    marks = {name: (x - 12, y - 9, x + 12, y + 9) for name, ((x, y), *_) in spots.items()}  # with room around
    lines = [(x - 1, low, x + 1, high) for _, (x, low), (_, high) in spots.values()]
    lines += [(x, y - 1, end, y + 1) for (x, y), (end, _) in pairwise(steps)]
    lines += [(x - 1, y, x + 1, top) for (_, y), (x, top) in pairwise(steps)]
    names: list[tuple[float, ...]] = []
    polar = np.array([(r, math.radians(a)) for r, a in product((9, 14, 20, 28, 40, 54), range(0, 360, 30))])
    dot = np.array([-2, -2, 2, 2])  # four of them stand for the line from a name to its point
    far, toward = polar[:, :1], np.stack([np.cos(polar[:, 1]), np.sin(polar[:, 1])], axis=1).round(6)
    for name in sorted(points, key=lambda name: tuple(spots[name][0])):
        size, here = np.array([_LETTER * _FONT * len(name), 1.1 * _FONT]), np.tile(spots[name][0], 2)
        corners = far * toward + (np.sign(toward) - 1) / 2 * size  # the corner that faces the point is `far` away
        boxes = np.hstack([corners, corners + size]) + here
        leads = [np.tile(part * far * toward, 2) + here + dot for part in (0.4, 0.55, 0.7, 0.85)]
        others = [mark for other, mark in marks.items() if other != name]
        cost = far[:, 0] + 3 * (size.prod() - _overlap(boxes, [axes.bbox.extents]))
        cost += 2 * _overlap(boxes, others + lines) + 8 * _overlap(boxes, names)
        if_far = 4 * (far[:, 0] > 20)
        for lead in leads:
            cost += if_far * _overlap(lead, [*others, *names])
        best = np.argmin(cost)
        names.append(tuple(boxes[best]))
        line = None
        if far[best] > 20:
            lines += [tuple(lead[best]) for lead in leads]
            line = _LEADER | {"relpos": tuple((1 - np.sign(toward[best])) / 2)}
        (x, y, *_), at = points[name], (corners[best, 0], corners[best, 1])
        axes.annotate(name, (x, y), at, textcoords="offset points", va="bottom", arrowprops=line, **_LABEL)


def _overlap(boxes: NDArray[Any], others: Sequence[ArrayLike]) -> NDArray[Any]:
    """For each of `boxes` (x0, y0, x1, y1) the area that it shares with `others`, summed."""
    rest = np.array(others).reshape(1, -1, 4)
    shared = np.minimum(boxes[:, None, 2:], rest[..., 2:]) - np.maximum(boxes[:, None, :2], rest[..., :2])
    return np.clip(shared, 0, None).prod(-1).sum(-1)


def _label_ends(axes: "Axes", ends: Mapping[str, tuple[float, float]]) -> None:
    """Write each label right of its curve's end, moved up or down until lines of text keep apart."""
    heights = {label: axes.transData.transform(end)[1] for label, end in ends.items()}
    order, gap = sorted(heights, key=lambda label: heights[label]), 1.35 * _FONT
    spread = [heights[label] for label in order]
    for i in range(1, len(spread)):
        spread[i] = max(spread[i], spread[i - 1] + gap)
    spread[-1] = min(spread[-1], axes.bbox.y1)
    for i in reversed(range(len(spread) - 1)):
        spread[i] = min(spread[i], spread[i + 1] - gap)
    for label, height in zip(order, spread):
        at = (axes.bbox.x1 + 18, height)
        axes.annotate(label, ends[label], at, textcoords="figure points", va="center", arrowprops=_LEADER, **_LABEL)


def _svg(figure: "Figure", name: str, text: str) -> str:
    """The figure as an <svg> for inside a page: described by `text`, colours by CSS, ids that start with `name`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{name}-", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var({variable}, {color})")
    width, height = (72 * side for side in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(text)}">{body}'


def _polygon(corners: int, turn: float = 90, inner: float = 1.0) -> tuple[tuple[float, float], ...]:
    """A regular polygon: the first corner at `turn` degrees, every second one at `inner` of the radius."""
    steps = [(inner if i % 2 else 1.0, math.radians(turn + 360 * i / corners)) for i in range(corners)]
    return tuple((round(r * math.cos(a), 3), round(r * math.sin(a), 3)) for r, a in steps)


_COSTS = {
    "latency": _Cost("milliseconds for one image", "latency_ms.median", "milliseconds", "time_exponent", "{:g}".format),
    "flops": _Cost("FLOPs for one image", "flops", "flops", "flops_exponent", short),
}
_HALF_CROSS = ((0.35, 1.0), (0.35, 0.35), (1.0, 0.35), (1.0, -0.35), (0.35, -0.35), (0.35, -1.0))
_MARKERS = (
    _polygon(24),
    _polygon(4, turn=45),
    _polygon(3),
    _polygon(4),
    _polygon(3, turn=270),
    (*_HALF_CROSS, *((-x, -y) for x, y in _HALF_CROSS)),
    _polygon(5),
    _polygon(10, inner=0.45),
)
_TITLE: dict[str, Any] = {"loc": "left", "color": _INK, "fontsize": _FONT, "fontweight": "bold", "pad": 10}
_LABEL: dict[str, Any] = {"color": _INK, "fontsize": _FONT, "parse_math": False}
_LEADER = {"arrowstyle": "-", "lw": 0.7, "color": _MUTED, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)}
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _PAPER: "--paper"} | {
    color: f"--mixer-{i}" for i, color in enumerate(_COLORS)
}
