"""The strategies of a class: its images clustered by which concepts their answers rest on, and a picture of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saccade.errors import InputError
from saccade.explain.classifier import check_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Strategies", "draw_strategies", "find_strategies"]

_MOST = 6  # clusters that are tried
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555")


@dataclass(frozen=True)
class Strategies:
    """What `find_strategies` found.

    Attributes:
        labels: (N,) long, the cluster of each image; 0 has most images.
        centres: (clusters, concepts), mean importance.
        prevalence: (clusters,), share of the images.
        reliability: (clusters,), mean of the numbers given.
        plane: (N, 2), the images by their first two principal components.
        shares: (2,), of the variance that these two hold.
    """

    labels: Tensor
    centres: Tensor
    prevalence: Tensor
    reliability: Tensor
    plane: Tensor
    shares: Tensor

    def main_concepts(self, cluster: int, count: int = 2, *, distinct: bool = False) -> list[int]:
        """The concepts with the largest mean importance, or those that matter more here than among all images."""
        check_whole("cluster", cluster, 0, len(self.centres) - 1)
        shown = self.centres
        if distinct:
            shown = normalize(shown, dim=-1)
            shown = shown - self.prevalence @ shown
        return shown[cluster].argsort(descending=True)[:count].tolist()


def find_strategies(
    importance: Tensor, reliability: Tensor, *, num_clusters: int | None = None, seed: int = 0
) -> Strategies:
    """Cluster images by the importance of concepts for them: which ways lead to this class, how often, how surely?

    Each image's importance counts by its direction, not its length. Where 2023, arXiv:2306.07304 draws UMAP, we take
    principal components, which need no further package and repeat exactly.

    Args:
        importance: (N, concepts) of images of one class, such as `per_image` of `explain_concepts`.
        reliability: (N,), how well the model does on each: whether it is right, or its probability of the class.
        num_clusters: None takes, of 2 to 6, the number with the best silhouette.
        seed: of K-means.

    Raises: InputError for wrong shapes, fewer than three images, and fewer kinds of images than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    if importance.ndim != 2 or tuple(reliability.shape) != (len(importance),):
        raise InputError(
            f"importance is {tuple(importance.shape)} and reliability {tuple(reliability.shape)}: give "
            "(N, concepts) and (N,)"
        )
    if not importance.isfinite().all():
        raise InputError("importance holds NaN or infinite values: it cannot be clustered")
    rows = normalize(importance.detach().cpu().double(), dim=-1)
    kinds = len(rows.unique(dim=0))
    if num_clusters is not None:
        check_whole("num_clusters", num_clusters, 1, kinds)
    if len(rows) < 3 or kinds < 2:
        raise InputError(f"{len(rows)} images of {kinds} kind(s) have no clusters: give three images at least")
    tried = range(2, min(_MOST, kinds, len(rows) - 1) + 1) if num_clusters is None else [num_clusters]
    found = {k: KMeans(k, n_init=10, random_state=seed).fit_predict(rows.numpy()) for k in tried}
    best = max(found, key=lambda k: silhouette_score(rows.numpy(), found[k])) if len(found) > 1 else next(iter(found))
    labels = torch.from_numpy(found[best]).long()
    order = torch.bincount(labels, minlength=best).argsort(descending=True, stable=True)
    labels = order.argsort()[labels]
    members = torch.nn.functional.one_hot(labels, best).double()
    sizes = members.sum(0)
    centred = rows - rows.mean(0)
    left, lengths, _ = torch.linalg.svd(centred, full_matrices=False)
    plane = torch.zeros(len(rows), 2, dtype=torch.double)
    shown = min(2, len(lengths))
    plane[:, :shown] = (left * lengths)[:, :shown]
    shares = torch.zeros(2, dtype=torch.double)
    shares[:shown] = (lengths.square() / lengths.square().sum())[:shown]
    return Strategies(
        labels=labels,
        centres=members.T @ importance.detach().cpu().double() / sizes[:, None],
        prevalence=sizes / len(rows),
        reliability=members.T @ reliability.detach().cpu().double() / sizes,
        plane=plane,
        shares=shares,
    )


def draw_strategies(
    found: Strategies, *, names: Sequence[str] | None = None, figure: "Figure | None" = None
) -> "Figure":
    """Draw the strategic cluster graph: images on a plane, and each cluster's prevalence against its reliability.

    Args:
        found: from `find_strategies`.
        names: of the concepts; None numbers them.
        figure: to draw on, such as a new one of pyplot; None makes one.

    Returns: a matplotlib figure, which `savefig` writes and a notebook shows.
    Raises: InputError for another number of names.
    """
    from matplotlib.figure import Figure

    count = found.centres.shape[1]
    if names is not None and len(names) != count:
        raise InputError(f"there are {len(names)} names for {count} concepts: give one each")
    figure = Figure() if figure is None else figure
    figure.set_layout_engine("constrained")
    figure.set_size_inches(9, 4)
    plane, graph = figure.subplots(1, 2)
    for cluster, (often, well) in enumerate(zip(found.prevalence.tolist(), found.reliability.tolist())):
        colour = _COLOURS[cluster % len(_COLOURS)]
        main = [names[i] if names else f"concept {i}" for i in found.main_concepts(cluster, distinct=True)]
        x, y = found.plane[found.labels == cluster].T.numpy()
        plane.scatter(x, y, s=14, color=colour, edgecolor="white", linewidth=0.3, label=f"{cluster}: {', '.join(main)}")
        graph.scatter(often, well, s=900 * often + 60, color=colour, alpha=0.85)
        graph.annotate(
            str(cluster), (often, well), ha="center", va="center", fontsize=9, color="white", fontweight="bold"
        )
    plane.set_xlabel(f"first component ({found.shares[0]:.0%} of the variance)")
    plane.set_ylabel(f"second component ({found.shares[1]:.0%})")
    plane.set_title("images by the importance of concepts", fontsize=10)
    plane.legend(fontsize=7, title_fontsize=7, frameon=False, title="cluster: what matters more than in others")
    graph.set_xlabel("prevalence: share of the images")
    graph.set_ylabel("reliability")
    graph.set_xlim(0, 1)
    graph.margins(y=0.35)
    graph.set_title("strategies of the class", fontsize=10)
    for axes in (plane, graph):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure
