"""Feature-guided testing: the nearest misclassified image, by a game on keypoints and without gradients."""

import math
from functools import cache
from itertools import combinations, pairwise
from statistics import median

import torch
from torch import Tensor, nn

from saccade.claims.framework import Paper, at_least, at_most, claim, rounding
from saccade.claims.framework.convnet import make_convnet, train_convnet
from saccade.claims.framework.experiment import load_digits
from saccade.explain.testing import Misclassified, certify_radius, nearest_misclassified

PAPER = Paper(
    title="Feature-Guided Black-Box Safety Testing of Deep Neural Networks",
    arxiv="1710.07859",
    published="2017-10-21",
    summary="Keypoints of an image say which pixels matter; two players who pick a keypoint and pixels near it look "
    "for the nearest misclassified image, by Monte Carlo tree search and without gradients. Of a Lipschitz network a "
    "fine enough grid without such an image is a proof.",
    home=("saccade.explain.testing.nearest_misclassified", "saccade.explain.testing.certify_radius"),
    missing=("figures on MNIST, CIFAR-10, ImageNet, GTSRB and traffic lights, beside JSMA and C&W",),
    differences=(
        "Official code draws a keypoint from pi + sqrt(ln(visits of the child) / visits of the node), which is no "
        "upper bound and has the two counts the other way round; rule='coded' does that, our default is UCB1.",
        "Official code does not reset the list of changed pixels between simulations, which makes distances too "
        "large; ours does.",
        "Official code knows L0 alone, takes pixels back at the end, in tens, and cuts a play that is as far as the "
        "best image; ours has L1 and L2, takes back after each find in tens and then one by one, and lets a play go "
        "farther, since most of its changes are taken back.",
        "Our default finds keypoints as corners, which needs no scikit-image; keypoints='sift' is the paper's. The "
        "deviation of a keypoint's Gaussian is its size, in official code its size and 15: spread=15.",
        "The certificate's correction by the distance between grid points is derived here; the paper's is recalled.",
    ),
)

EXPERIMENT = "an experiment of ours: digits of 16 x 16, a network of three convolutions"


@claim("property", True, source="algorithm", slow=True)
def the_best_distance_falls_with_queries() -> bool:
    """The distance reached does not rise with the number of queries, and each image recorded is nearer than the one
    before."""
    net, images = _digits()
    for index, norm in enumerate(("l0", "l1", "l2")):
        found = nearest_misclassified(
            net, images[index : index + 1], norm=norm, manipulation="flip" if norm == "l0" else "step", queries=600
        )
        reached = [found.best_after(queries) for queries in range(0, 601, 50)]
        if not all(a >= b for a, b in pairwise(reached)) or not all(a[1] > b[1] for a, b in pairwise(found.record)):
            return False
    return True


@claim("theory", {"ucb1": 0.0, "coded": 0.0}, at_most(0, "both are counts of pixels"), source="cooperative game")
def the_cooperative_game_finds_the_smallest_change() -> dict[str, float]:
    """Flipping pixels of 3 x 3 binary images before linear classifiers of three classes, 3000 queries find the smallest
    number that changes the class: the largest difference from looking at all subsets, for four of them."""
    apart = {"ucb1": 0.0, "coded": 0.0}
    for _ in range(4):
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()
        image = (torch.rand(1, 1, 3, 3) < 0.5).double()
        image[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
        smallest = _smallest_flip(net, image)
        for rule in apart:
            found = nearest_misclassified(net, image, rule=rule, queries=3000).distance
            apart[rule] = max(apart[rule], abs(found - smallest) if found != smallest else 0.0)
    return apart


@claim("theory", "never exceeds the exact distance", rounding, source="Lipschitz guarantee, recalled")
def certified_radius_is_never_too_large() -> dict[str, float]:
    """For linear classifiers, whose margins have a known distance and Lipschitz constant, the certified radius less the
    exact distance: the largest over three models and four steps of the grid."""
    return {
        norm: max(
            certify_radius(net, image, lipschitz=lipschitz, tau=tau, within=2 * exact, norm=norm).radius - exact
            for net, image, lipschitz, exact in (_linear(norm) for _ in range(3))
            for tau in (exact / 2, exact / 4, exact / 8, exact / 16)
        )
        for norm in ("l1", "l2", "linf")
    }


@claim(
    "theory",
    "tends to the exact distance",
    at_most(0.05, "what steps of a hundredth leave"),
    source="Lipschitz guarantee, recalled",
)
def certified_radius_tends_to_the_exact_distance() -> dict[str, float]:
    """The share of the exact distance that is not certified for linear classifiers, at a step of a hundredth of it."""
    shares = {}
    for norm in ("l1", "l2", "linf"):
        net, image, lipschitz, exact = _linear(norm)
        found = certify_radius(net, image, lipschitz=lipschitz, tau=exact / 100, within=1.2 * exact, norm=norm)
        shares[norm] = 1 - found.radius / exact
    return shares


@claim(
    "property",
    "fewer",
    at_least(0, "the order is claimed"),
    source="saliency guides the search; " + EXPERIMENT,
    slow=True,
)
def saliency_finds_the_first_image_with_fewer_queries() -> float:
    """Queries up to the first misclassified image when pixels are drawn uniformly less those when they are drawn near
    keypoints, single pixels flipped, mean of 60 digits."""
    net, images = _digits()
    counts = dict.fromkeys(("uniform", "saliency"), 0.0)
    for index in range(60):
        for strategy in counts:
            found = nearest_misclassified(
                net, images[index : index + 1], strategy=strategy, queries=257, batch_size=257, backtrack=(), seed=index
            )
            counts[strategy] += (found.record[0][0] if found.record else 257) / 60
    return counts["uniform"] - counts["saliency"]


@claim(
    "property",
    {"saliency before uniform": 0.0, "tree before saliency": 0.0},
    at_least(0, "the order is expected"),
    source="saliency and tree search guide the search; " + EXPERIMENT,
    slow=True,
    guess="most of what a play changes is taken back after each find, with or without a tree, and 1000 queries are "
    "some ten plays, too few for a tree to learn from",
)
def tree_search_and_saliency_come_nearer() -> dict[str, float]:
    """Median L0 distance that 1000 queries reach for 30 digits: by how much it is smaller near keypoints than
    uniformly, and with the tree than without."""
    medians = {name: median(each.distance for each in _searched(name)) for name in ("uniform", "saliency", "mcts")}
    return {
        "saliency before uniform": medians["uniform"] - medians["saliency"],
        "tree before saliency": medians["saliency"] - medians["mcts"],
    }


@claim(
    "accuracy",
    "competitive in L0",
    source="tables on MNIST and CIFAR-10; figures not seen",
    needs="MNIST, CIFAR-10, and JSMA and C&W to compare with",
)
def distances_are_those_of_attacks_with_gradients() -> None:
    """The L0 distances are competitive with those of JSMA and C&W, which know the gradients."""


def _smallest_flip(net: nn.Module, image: Tensor) -> float:
    """The fewest of nine binary pixels whose flip changes the class; infinite if none does."""
    with torch.no_grad():
        label = net(image).argmax(1)
        for count in range(1, 10):
            for places in combinations(range(9), count):
                flipped = image.flatten().clone()
                flipped[list(places)] = 1 - flipped[list(places)]
                if net(flipped.view_as(image)).argmax(1) != label:
                    return count
    return math.inf


def _linear(norm: str) -> tuple[nn.Module, Tensor, float, float]:
    """A linear model of three classes on two values, an image, the margin's Lipschitz constant, and the distance of the
    nearest point where the margin is 0."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3)).double()
    image = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        logits = net(image)[0]
        label = int(logits.argmax())
        others = [i for i in range(3) if i != label]
        weight = net[1].weight
        assert isinstance(weight, Tensor)
        dual = {"l1": math.inf, "l2": 2.0, "linf": 1.0}[norm]
        slopes = torch.linalg.vector_norm(weight[label] - weight[others], dual, dim=1)
        distances = (logits[label] - logits[others]) / slopes
    return net, image, slopes.max().item(), distances.min().item()


@cache
def _digits() -> tuple[nn.Module, Tensor]:
    """A network, and held-out digits that it names rightly."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        (train, labels), (held, truth) = load_digits(16)
        net = train_convnet(make_convnet(1, 10), train, labels, epochs=6)
    with torch.no_grad():
        return net, held[net(held).argmax(1) == truth]


@cache
def _searched(strategy: str) -> list[Misclassified]:
    net, images = _digits()
    return [
        nearest_misclassified(net, images[index : index + 1], strategy=strategy, queries=1000, seed=index)
        for index in range(30)
    ]
