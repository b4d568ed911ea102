"""Salient relevance: context-aware saliency against its definition and laws, the method, the recipe, errors."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import context_aware_saliency, explain
from saccade.explain.methods.salient_relevance import _distance
from saccade.explain.relevance import On, relevance, rules
from tests.explain.nets import ConvNet, images


def make_map(height=11, width=9, channels=None, seed=0):
    shape = (1, height, width) if channels is None else (1, channels, height, width)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(map, patch, neighbours, nearness, focus):
    """One scale, in loops; patches at half and quarter scale are of `interpolate`d maps, as they are there."""
    from torch.nn.functional import interpolate

    image = (map - map.min()) / (map.max() - map.min())
    height, width = image.shape[1:]
    half = patch // 2
    patches = []
    for part in (1, 2, 4):
        sides = [max(1, round(side / part)) for side in (height, width)]
        level = image[None]
        if part > 1:
            level = interpolate(level, size=sides, mode="bilinear", antialias=True)
        for y in range(sides[0]):
            for x in range(sides[1]):
                rows = [min(max(y + i, 0), sides[0] - 1) for i in range(-half, half + 1)]
                columns = [min(max(x + i, 0), sides[1] - 1) for i in range(-half, half + 1)]
                place = torch.tensor([y + 0.5, x + 0.5]) / max(sides)
                patches.append((level[0][:, rows][:, :, columns].flatten(), place))
    found = torch.zeros(height * width, dtype=torch.float64)
    for i in range(height * width):
        d = [
            (patches[i][0] - other).norm() / math.sqrt(len(other)) / (1 + nearness * (patches[i][1] - place).norm())
            for j, (other, place) in enumerate(patches)
            if j != i
        ]
        found[i] = 1 - math.exp(-torch.stack(d).sort().values[:neighbours].mean())
    found = ((found - found.min()) / (found.max() - found.min())).view(height, width)
    if focus is None:
        return found
    foci = (found > focus).nonzero().double()
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).double()
    away = torch.cdist(grid.view(-1, 2), foci).amin(1).view(height, width) / max(height, width)
    return found * (1 - away).clamp(min=0)


@pytest.mark.parametrize(("channels", "focus", "pairs"), [(None, None, 2**22), (None, 0.8, 200), (2, 0.6, 1)])
def test_one_scale_is_its_definition(channels, focus, pairs):
    map = make_map(channels=channels)
    options = {"patch": 3, "neighbours": 8, "nearness": 3.0, "focus": focus}
    found = context_aware_saliency(map, stride=1, scales=(1.0,), pairs=pairs, **options)
    expected = by_definition(map[0] if channels else map, **options)
    assert_close(found[0], expected, rtol=1e-6, atol=1e-6)


def test_scales_are_averaged():
    map = make_map(20, 17)
    each = [context_aware_saliency(map, patch=3, scales=(scale,)) for scale in (1.0, 0.5)]
    assert_close(context_aware_saliency(map, patch=3, scales=(1.0, 0.5)), (each[0] + each[1]) / 2)


def test_a_batch_is_its_images_and_pairs_change_nothing():
    maps = torch.cat([make_map(seed=seed) for seed in range(3)])
    whole = context_aware_saliency(maps, pairs=100)
    assert_close(whole, torch.cat([context_aware_saliency(map[None]) for map in maps]))
    assert ((whole >= 0) & (whole <= 1)).all()


@pytest.mark.parametrize("factor", [1e-6, 7.0, 1e5])
def test_neither_a_factor_nor_a_constant_changes_anything(factor):
    map = make_map(16, 13)
    assert_close(context_aware_saliency(factor * map + factor), context_aware_saliency(map), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_uniform_map_gives_zeros(value, dtype):
    found = context_aware_saliency(torch.full((2, 15, 8), value, dtype=dtype))
    assert found.dtype == dtype
    assert not found.any()


def test_a_pattern_that_moves_moves_its_saliency():
    map = torch.zeros(1, 40, 40, dtype=torch.float64)
    map[:, 12:16, 14:17] = make_map(4, 3)
    options = {"patch": 5, "neighbours": 8, "stride": 1, "scales": (1.0,), "nearness": 0.0}  # or borders count
    moved = context_aware_saliency(map.roll((8, 4), (1, 2)), **options).roll((-8, -4), (1, 2))
    found = context_aware_saliency(map, **options)
    assert_close(moved, found, rtol=0, atol=1e-6)


def test_what_repeats_does_not_stand_out():
    map = torch.zeros(1, 30, 30, dtype=torch.float64)
    map[:, 3::6, 3::6] = 1
    map[:, 14:17, 14:17] = 1  # one of the dots is a blob
    found = context_aware_saliency(map, patch=3, neighbours=20, stride=1)
    y, x = (place.item() for place in torch.unravel_index(found[0].argmax(), found.shape[1:]))
    assert 11 <= y <= 19
    assert 11 <= x <= 19


def test_distance_is_the_nearest_focus():
    foci = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)) < 0.05
    assert foci.any()
    grid = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(12), indexing="ij"), -1).double().view(-1, 2)
    expected = torch.cdist(grid, foci.nonzero().double()).amin(1).view(7, 12) / 12
    assert_close(_distance(foci), expected)


def test_larger_maps_are_resized_and_come_back():
    assert context_aware_saliency(make_map(33, 70), size=20).shape == (1, 33, 70)
    assert context_aware_saliency(make_map(1, 2)).shape == (1, 1, 2)


# the method


def test_it_is_context_aware_saliency_of_the_relevance():
    model, x = ConvNet().eval().double(), images().double()
    options = {"patch": 3, "neighbours": 8, "scales": (1.0,), "stride": 1}
    found = explain(model, x, method="salient_relevance", target=1, batch_size=1, **options)
    lrp = relevance(model, x, target=1, recipe="salient_relevance").map
    assert_close(found.map, context_aware_saliency(lrp.abs(), **options))
    positive = explain(model, x, method="salient_relevance", target=1, part="positive", **options)
    assert_close(positive.map, context_aware_saliency(lrp.clamp(min=0), **options))
    assert not torch.equal(found.map, positive.map)
    assert found.error is None


# the recipe


def make_net(bias=True):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(6, 5, 3, bias=bias)
    head = nn.ReLU(), nn.Flatten(), nn.Linear(45, 8), nn.ReLU(), nn.Linear(8, 4)
    return nn.Sequential(*body, *head).double()


def test_dense_layers_conserve_without_their_biases():
    found = relevance(make_net(), images(2, 3, 12, 12).double(), recipe="salient_relevance", inner=["6:in", "8:in"])
    for layer in ("6:in", "8:in"):
        assert_close(found.inner[layer].flatten(1).sum(1), found.start, rtol=1e-6, atol=1e-9)
    assert {layer for layer, row in found.by_layer().items() if abs(row.get("bias", 0)) > 1e-6} == {"0", "3"}


def test_the_coded_recipe_explodes_where_a_result_is_minus_epsilon_and_ours_does_not():
    layer = nn.Conv2d(1, 1, 1, bias=False).double()
    nn.init.constant_(layer.weight, -1.0)
    x = torch.full((1, 1, 1, 1), 1e-9 * (1 + 1e-6), dtype=torch.double)
    start = torch.ones_like(x)
    assert relevance(layer, x, recipe="official_salient_relevance", start=start).map.abs() > 1e5
    assert relevance(layer, x, recipe="salient_relevance", start=start).map.abs() <= 1


def test_windows_that_share_a_winner_add_up_unless_unpooled():
    pool = nn.MaxPool2d(3, 2)
    x = torch.zeros(1, 1, 5, 5, dtype=torch.double)
    x[..., 2, 2] = 2.0  # in all four windows
    start = torch.ones(1, 1, 2, 2, dtype=torch.double)
    assert relevance(pool, x, recipe="salient_relevance", start=start).map.sum() == 4
    unpooled = relevance(pool, x, recipe="official_salient_relevance", start=start).map
    assert_close(unpooled.sum().item(), 1.0)
    hand = torch.nn.functional.max_unpool2d(
        start / 2, torch.full((1, 1, 2, 2), 12), 3, 2, output_size=(5, 5)
    )  # the same place four times
    assert_close(unpooled, x * hand)


def test_a_bias_that_takes_nothing_is_the_rule_without_it():
    x, layer = images(4, 6, 1, 1).flatten(1).double(), nn.Linear(6, 5).double()
    start = torch.randn(4, 5, dtype=torch.double)
    found = relevance(layer, x, rules=[On("dense", rules.z_plus(bias="none"))], start=start).map
    plain = nn.Linear(6, 5, bias=False).double()
    plain.load_state_dict({"weight": layer.weight})
    assert_close(found, relevance(plain, x, rules=[On("dense", rules.z_plus())], start=start).map)


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 4}, "patch is 4: give an odd number"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"scales": ()}, "give one or more numbers"),
        ({"scales": (1.0, 2.0)}, "at most 1"),
        ({"stride": 0}, "stride is 0"),
        ({"nearness": -1.0}, "nearness is -1.0"),
        ({"focus": 1.0}, "focus is 1.0"),
        ({"size": 0}, "size is 0"),
        ({"pairs": 0}, "pairs is 0"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises(InputError, match=message):
        context_aware_saliency(make_map(), **options)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.ones(3, 3), r"\(3, 3\): give floats \(B, H, W\)"),
        (torch.ones(1, 3, 3).long(), "torch.int64"),
        ([1.0], "a list"),
        (torch.full((1, 2, 2), torch.nan), "NaN"),
    ],
)
def test_errors_of_maps(maps, message):
    with pytest.raises(InputError, match=message):
        context_aware_saliency(maps)


def test_an_unknown_part_is_named():
    with pytest.raises(InputError, match="part is 'negative'"):
        explain(ConvNet(), images(), method="salient_relevance", part="negative")
