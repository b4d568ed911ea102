"""Search for the nearest misclassified image: laws, players, keypoints; the certificate; errors."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain.testing import Keypoints, certify_radius, find_keypoints, keypoint_saliency, nearest_misclassified


def make_net(seed=0, size=7 * 9, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).double()


def make_image(seed=0, height=7, width=9):
    return torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.count = net, 0

    def forward(self, x):
        self.count += len(x)
        return self.net(x)


OPTIONS = [
    {},
    {"player": "adversarial"},
    {"player": "nature", "pixels": 2},
    {"rule": "coded"},
    {"strategy": "uniform"},
    {"strategy": "saliency", "manipulation": "high"},
    {"norm": "l1", "manipulation": "step"},
    {"norm": "l2", "manipulation": "step", "step": 0.3, "backtrack": ()},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_found_is_what_it_says(options):
    net, image = make_net(), make_image()
    found = nearest_misclassified(net, image, queries=300, batch_size=7, **options)
    assert found.image is not None
    assert net(found.image[None]).argmax(1).item() == found.label != found.target == net(image).argmax(1).item()
    change = (found.image - image[0]).flatten()
    norms = {"l0": (change != 0).sum(), "l1": change.abs().sum(), "l2": change.norm()}
    assert found.distance == pytest.approx(norms[options.get("norm", "l0")].item())
    assert image.min() <= found.image.min()
    assert found.image.max() <= image.max()
    distances = [distance for _, distance in found.record]
    assert distances == sorted(set(distances), reverse=True)
    assert found.record[-1][0] <= found.queries <= 300
    assert found.best_after(found.record[0][0] - 1) == math.inf
    assert found.best_after(300) == found.distance
    again = nearest_misclassified(net, image, queries=300, batch_size=7, **options)
    assert again.record == found.record


def test_no_more_queries_than_allowed():
    net = Counting(make_net())
    found = nearest_misclassified(net, make_image(), queries=50, target=int(make_net()(make_image()).argmax()))
    assert found.queries == 50
    assert net.count <= 50 + 1  # one to read the number of classes


def test_one_pixel_that_decides_is_found_alone():
    net = make_net()
    net[1].weight.data.zero_()
    net[1].bias.data = torch.tensor([0.1, 0.0, -1.0]).double()
    net[1].weight.data[1, 31] = 1
    image = make_image().clone()
    image.flatten(1)[:, 31] = 0
    found = nearest_misclassified(net, image, queries=1000)
    assert found.distance == 1
    assert (found.image - image[0]).flatten().nonzero().tolist() == [[31]]


def test_a_wrong_image_has_distance_0():
    net, image = make_net(), make_image()
    wrong = (int(net(image).argmax()) + 1) % 3
    found = nearest_misclassified(net, image, target=wrong)
    assert (found.distance, found.queries) == (0, 1)


def test_nothing_found_is_said():
    net = make_net()
    net[1].weight.data.zero_()
    found = nearest_misclassified(net, make_image(), queries=60)
    assert (found.image, found.distance, found.label, found.record) == (None, math.inf, None, ())
    near = nearest_misclassified(make_net(), make_image(), queries=200, within=0.5)
    assert near.image is None


def test_saliency_is_a_mixture_of_gaussians():
    points = Keypoints(
        torch.tensor([[2.0, 3.0], [5.0, 1.0]]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), "grid"
    )
    found = keypoint_saliency(points, (7, 9), spread=0.5)
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    parts = [
        torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * (s + 0.5) ** 2)).double()
        for (y, x), s in zip(points.positions, points.sizes)
    ]
    expected = 0.75 * parts[0] / parts[0].sum() + 0.25 * parts[1] / parts[1].sum()
    assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("detector", ["corners", "sift"])
def test_keypoints_lie_where_structure_is(detector):
    if detector == "sift":
        pytest.importorskip("skimage")
    image = torch.zeros(3, 60, 70)
    image[:, 30:42, 40:55] = 1
    found = find_keypoints(image, detector=detector)
    assert found.detector == detector
    assert found.weights.sum().item() == pytest.approx(1)
    near = (found.weights[:, None] * (found.positions - torch.tensor([35.5, 47.0]))).sum(0)
    assert near.abs().max() < 5
    flat = find_keypoints(torch.ones(3, 8, 12), detector=detector)
    assert (flat.detector, len(flat.positions)) == ("grid", 16)


def test_certificate_of_one_value_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    net[1].weight.data = torch.tensor([[1.0], [-1.0]]).double()
    image = torch.full((1, 1, 1, 1), 0.52).double()
    found = certify_radius(net, image, lipschitz=2.0, tau=0.1, within=1.0)
    assert (found.radius, found.nearest, found.points) == (pytest.approx(0.45), pytest.approx(0.6), 21)
    far = certify_radius(net, image, lipschitz=2.0, tau=0.1, within=0.3)
    assert (far.radius, far.nearest) == (pytest.approx(0.25), math.inf)
    assert certify_radius(net, image, lipschitz=2.0, tau=2.0, within=2.5).radius == 0


def test_free_values_alone_change():
    net, image = make_net(size=4, classes=2), make_image(1, 2, 2)
    free = torch.zeros(1, 2, 2, dtype=torch.bool)
    free[0, 1] = True
    weight = (net[1].weight[0] - net[1].weight[1]).abs()[2:]
    margin = net(image).diff().abs().item()
    for norm, dual in (("l1", weight.max()), ("l2", weight.norm()), ("linf", weight.sum())):
        exact = margin / dual.item()
        found = certify_radius(
            net, image, lipschitz=dual.item(), tau=exact / 50, within=1.2 * exact, free=free, norm=norm
        )
        assert 0.9 * exact < found.radius <= exact <= found.nearest + 1e-9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "l3"}, "norm is 'l3'"),
        ({"bounds": (0.5, 1.0)}, "bounds are"),
        ({"pixels": 64}, "pixels is 64"),
        ({"step": 0.0, "manipulation": "step"}, "step is 0.0"),
        ({"keypoints": "blobs"}, "detector is 'blobs'"),
        ({"backtrack": (0,)}, "backtrack is 0"),
        ({"player": "nobody"}, "player is 'nobody'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(InputError, match=words):
        nearest_misclassified(make_net(), make_image(), **options)


def test_other_wrong_arguments():
    with pytest.raises(InputError, match="image holds 2 images"):
        nearest_misclassified(make_net(), make_image().repeat(2, 1, 1, 1))
    with pytest.raises(InputError, match=r"more than 200000 points"):
        certify_radius(make_net(), make_image(), lipschitz=1.0, tau=0.1, within=0.2)
    with pytest.raises(InputError, match="tau is 0"):
        certify_radius(make_net(), make_image(), lipschitz=1.0, tau=0, within=0.2)
    with pytest.raises(InputError, match="not all false"):
        certify_radius(
            make_net(), make_image(), lipschitz=1.0, tau=0.1, within=0.2, free=torch.zeros(1, 7, 9, dtype=torch.bool)
        )
