"""region_scores and route_regions: against their equation on odd maps, no gradient, errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import region_scores, route_regions, sparse_attention


def make_inputs(*space, heads=3, dim=4):
    return torch.randn(2, 2, heads, *space, dim, dtype=torch.float64, requires_grad=True).unbind()


def cut(x, size):
    """Regions of (B, heads, H, W, D) in row-major order, each (B, heads, tokens, D)."""
    return [
        column.flatten(2, 3) for row in x.split(size[0], 2) for column in row.split(size[1], 3)
    ]  # the last of each axis may be smaller


@pytest.mark.parametrize(("space", "size"), [((6, 8), (2, 4)), ((7, 5), (3, 2)), ((1, 4), (1, 3))])
def test_scores_are_products_of_means_over_all_heads(space, size):
    query, key = make_inputs(*space)
    means = [torch.stack([region.mean(2) for region in cut(x, size)], 2) for x in (query, key)]  # (B, heads, T, D)
    expected = torch.einsum("bhtd,bhsd->bts", *means)
    assert_close(region_scores(query, key, size), expected.unsqueeze(1).detach())


@pytest.mark.parametrize("count", [1, 3])
def test_tokens_attend_to_the_tokens_of_the_best_regions(count):
    size, (query, key) = (3, 2), make_inputs(7, 5)
    value = torch.randn_like(query)
    queries, keys, values = (cut(x, size) for x in (query, key, value))
    out = cut(sparse_attention(query, key, value, route_regions(query, key, size, count)), size)
    for image in range(2):
        for region, own in enumerate(queries):
            match = [(own[image].mean(1) * other[image].mean(1)).sum() for other in keys]
            best = torch.stack(match).topk(count).indices
            k, v = (torch.cat([x[each][image] for each in best], 1) for x in (keys, values))
            weights = torch.softmax(4**-0.5 * own[image] @ k.mT, -1)
            assert_close(out[region][image], weights @ v)


def test_choosing_has_no_gradient_and_more_than_all_is_all():
    query, key = make_inputs(4, 4)
    assert not region_scores(query, key, 2).requires_grad
    selection = route_regions(query, key, 2, 9)
    assert selection.mask((4, 4)).all()


def test_errors_say_what_to_do():
    query, key = make_inputs(4, 4)
    with pytest.raises(InputError, match="regions are of one map"):
        route_regions(query, key[:, :, :2], 2, 1)
    with pytest.raises(InputError, match="count is 0: give an integer of at least 1"):
        route_regions(query, key, 2, 0)
    with pytest.raises(InputError, match="region_size is 0: give an integer"):
        region_scores(query, key, 0)
