"""Pictures of what heads do: importance, reach and patterns."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from saccade.explain.heads.importance import HeadImportance
    from saccade.explain.heads.patterns import HeadPatterns
    from saccade.explain.heads.strength import HeadStrength

__all__ = ["draw_importance", "draw_patterns", "draw_strength"]

_WORDS = {
    "probability": "fall of the probability",
    "loss": "rise of the loss, nats",
    "flip": "other prediction, share",
    "divergence": "Jensen-Shannon, nats",
    "distance": "embedding, distance",
    "angle": "embedding, 1 - cosine",
}
_MISSING = "#d9d9d9"


def draw_importance(found: "HeadImportance") -> "Figure":
    """Draw each metric as layers by heads, and how the metrics agree (Spearman).

    Returns: a matplotlib figure, which `savefig` writes and a notebook shows.
    """
    depth, heads = found.matrix("loss").shape
    figure = _figure(4 * max(2.3, 0.28 * heads + 1.3), 2 * max(1.9, 0.22 * depth + 1.2))
    axes = figure.subplots(2, 4).flatten()
    for axis, metric in zip(axes, found.by_image):
        _table(figure, axis, found.matrix(metric), _WORDS[metric])
    axis = axes[len(found.by_image)]
    agreement, names = found.agreement(), list(found.by_image)
    _image(figure, axis, agreement, "agreement of metrics", cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    for axis in axes[len(found.by_image) + 1 :]:
        axis.set_axis_off()
    return figure


def draw_strength(found: "HeadStrength") -> "Figure":
    """Draw attention by ring, a panel a layer and a line a head, plain (solid) and weighed by values (dashed, scaled to
    the same sum), then mean distance, entropy and attention to prefix tokens as layers by heads.

    Returns: as `draw_importance`.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    depth, heads = found.distance.shape
    columns = min(depth, 4)
    lines = -(-depth // columns)
    figure = _figure(2.5 * max(columns, 3), 1.9 * lines + max(1.9, 0.22 * depth + 1.2))
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.9 * lines, max(1.9, 0.22 * depth + 1.2)])
    above, below = parts
    panels = above.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for panel, name, rings, weighed in zip(panels, found.layers, found.rings, found.value_rings):
        for head in range(heads):
            color = colormaps["viridis"](head / max(1, heads - 1) * 0.9)
            panel.plot(rings[head], color=color, lw=1.2, marker="o", ms=2.5, label=f"head {head}")
            panel.plot(weighed[head] * (rings[head].nansum() / weighed[head].nansum()), color=color, lw=1, ls="--")
        panel.set_title(name, fontsize=7)
        panel.set_xlabel("distance, tokens", fontsize=7)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("attention to the ring", fontsize=7)
    if heads <= 8:
        panels[0].legend(fontsize=6, frameon=False)
    for panel in panels[depth:]:
        panel.set_axis_off()
    tables = {"mean distance, tokens": found.distance, "entropy, nats": found.entropy}
    tables |= {"attention to prefix tokens": found.to_prefix}
    for axis, (title, values) in zip(below.subplots(1, 3), tables.items()):
        _table(below, axis, values, title)
    return figure


def draw_patterns(found: "HeadPatterns") -> "Figure":
    """Draw each cluster's mean map and its representative, with the query in the middle; all maps on their first two
    components, coloured by cluster; and each head's share in the clusters.

    Returns: as `draw_importance`.
    """
    from matplotlib import colormaps

    clusters = len(found.means)
    depth, heads = found.shares.shape[:2]
    figure = _figure(max(1.35 * clusters, 6.5), 6.4)
    parts: Any = figure.subfigures(2, 1)
    above, below = parts
    panels = above.subplots(2, clusters, squeeze=False)
    for cluster, (mean, number) in enumerate(zip(found.means, found.representatives.tolist())):
        count = int((found.cluster == cluster).sum())
        layer, head, _, query = found.origin[number].tolist()
        shown = found.maps[number].masked_fill(~found.inside[number], torch.nan)
        titles = (f"{cluster}: {count} maps\nmean", f"layer {layer}, head {head}\nquery {query}")
        for axis, values, title in zip(panels[:, cluster], (mean, shown), titles):
            _image(None, axis, values, title, cmap="viridis", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            rows, columns = values.shape
            axis.plot(columns // 2, rows // 2, marker="+", color="#ff5050", ms=6)
    points, bars = below.subplots(1, 2)
    colors = colormaps["tab10" if clusters <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for cluster in range(clusters):
        chosen = found.points[found.cluster == cluster]
        points.scatter(*chosen.T, s=4, color=colors[cluster % len(colors)], label=str(cluster))
    points.set_title("codes, first two components", fontsize=8)
    points.tick_params(labelsize=7)
    points.legend(fontsize=6, markerscale=2, frameon=False)
    shares = found.shares.flatten(0, 1).nan_to_num(0)
    left = torch.zeros(len(shares))
    for cluster in range(clusters):
        bars.barh(range(len(shares)), shares[:, cluster], left=left, color=colors[cluster % len(colors)])
        left = left + shares[:, cluster]
    bars.set_yticks(range(0, depth * heads, heads), [f"layer {layer}" for layer in range(depth)], fontsize=7)
    bars.invert_yaxis()
    bars.set_title("share of each head's maps", fontsize=8)
    bars.tick_params(labelsize=7)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _table(figure: Any, axis: "Axes", values: torch.Tensor, title: str) -> None:
    _image(figure, axis, values, title, cmap="viridis")
    axis.set_xlabel("head", fontsize=7)
    axis.set_ylabel("layer", fontsize=7)
    axis.tick_params(labelsize=7)


def _image(figure: Any, axis: "Axes", values: torch.Tensor, title: str, **options: Any) -> None:
    axis.set_facecolor(_MISSING)  # NaN is not drawn
    shown = axis.imshow(values.numpy(), interpolation="nearest", **options)
    axis.set_title(title, fontsize=8)
    if figure is not None:
        figure.colorbar(shown, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)
