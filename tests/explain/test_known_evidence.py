"""On a trained network whose evidence is known, maps lie on it, follow the weights, and the mask is the best order."""

from functools import cache

import pytest
import torch
from torch import nn

from saccade.data import known_evidence, normalize
from saccade.explain import explain, faithfulness, localization, parameter_randomization

METHODS = ["grad_cam", "input_x_gradient", "integrated_gradients", "normgrad", "occlusion", "relevance"]
MEAN, STD = (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)


@cache
def trained():
    """A network that is right on nearly all images it has not seen, these images, and the evidence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        train, held = known_evidence(1600), known_evidence(64, seed=1)
        images, x = (normalize(part.images, MEAN, STD) for part in (train, held))
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(32, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(6):
            for chosen in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[chosen]), train.labels[chosen]).backward()
                optimizer.step()
        assert (model(x).argmax(1) == held.labels).double().mean() > 0.95
        return model.eval(), x, held


@pytest.mark.parametrize("method", METHODS)
def test_twice_the_random_share_of_a_map_lies_on_the_evidence(method):
    model, x, held = trained()
    found = localization(explain(model, x, method=method, target=held.labels), held.masks)
    assert found.mass.low > 2 * found.mass.random
    assert found.pointing.low > 2 * found.pointing.random
    assert found.top.low > 2 * found.top.random


def test_the_evidence_as_a_map_is_faithful():
    model, x, held = trained()
    options = {"target": held.labels, "patch": 2, "repeats": 2, "steps": 8, "batch_size": 256}
    noise = torch.rand(held.masks.shape, generator=torch.Generator().manual_seed(0))
    found = faithfulness(model, x, noise, oracle=held.masks.double(), **options)
    assert found.verdict == "not distinguishable from random"
    assert found.abpc.oracle_low > found.abpc.random_high


def test_maps_follow_the_weights():
    model, x, held = trained()
    found = parameter_randomization(model, x[:16], method="integrated_gradients", target=held.labels[:16], steps=8)
    assert found.verdict == "follows the weights"
