"""BiLevelRoutingAttention against its paper's equations, with both official ways to pad; taps; errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import BiLevelRoutingAttention

DIM, HEADS, REGIONS = 12, 3, 3


def make_mixer(**options):
    options = {"num_regions": REGIONS, "topk": 2, "lepe_size": 3} | options
    mixer = BiLevelRoutingAttention(DIM, HEADS, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def make_input(*space):
    return torch.randn(2, *space, DIM, dtype=torch.float64)


def to_regions(x, size):
    """(B, C, H, W) to (B, regions, tokens, C)."""
    (height, width), (h, w) = x.shape[2:], size
    return x.view(*x.shape[:2], height // h, h, width // w, w).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def attend_regions(mixer, q, k, v, q_means, k_means, size):
    """Steps 3 to 5 of the paper's module on maps (B, C, H, W) that the regions divide."""
    routes = (q_means @ k_means.mT).topk(mixer.topk).indices
    queries, keys, values = (to_regions(x, size) for x in (q, k, v))
    image = torch.arange(len(q)).view(-1, 1, 1)
    keys, values = (x[image, routes].flatten(2, 3) for x in (keys, values))  # (B, regions, k tokens, C)
    by_head = [x.unflatten(-1, (HEADS, -1)).transpose(2, 3) for x in (queries, keys, values)]
    weights = torch.softmax(mixer.qk_dim**-0.5 * by_head[0] @ by_head[1].mT, -1)
    out = (weights @ by_head[2]).transpose(2, 3).flatten(3)
    columns = q.shape[3] // size[1]
    grid = out.unflatten(1, (-1, columns)).unflatten(3, size)  # (B, rows, columns, h, w, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def project(mixer, x):
    parts = mixer.qkv(x).split([mixer.qk_dim, mixer.qk_dim, DIM], -1)
    return [part.movedim(-1, 1) for part in parts]


def older_layer(mixer, x):
    """Zeros are appended before the projection."""
    height, width = x.shape[1:-1]
    x = F.pad(x, (0, 0, 0, -width % REGIONS, 0, -height % REGIONS))
    q, k, v = project(mixer, x)
    size = q.shape[2] // REGIONS, q.shape[3] // REGIONS
    out = attend_regions(mixer, q, k, v, to_regions(q, size).mean(2), to_regions(k, size).mean(2), size)
    return mixer.proj((out + mixer.lepe(v)).movedim(1, -1))[:, :height, :width]


def newer_layer(mixer, x):
    """Zeros are appended after the projection, and do not count in the means."""
    height, width = x.shape[1:-1]
    q, k, v = project(mixer, x)
    size = height // REGIONS, width // REGIONS
    means = [F.avg_pool2d(t, size, ceil_mode=True, count_include_pad=False).flatten(2).mT.detach() for t in (q, k)]
    padded = [F.pad(t, (0, -width % size[1], 0, -height % size[0])) for t in (q, k, v)]
    out = attend_regions(mixer, *padded, *means, size)[:, :, :height, :width]
    return mixer.proj((out + mixer.lepe(v)).movedim(1, -1))


LAYERS = {"input": older_layer, "projected": newer_layer}


@pytest.mark.parametrize("padding", LAYERS)
@pytest.mark.parametrize("space", [(6, 9), (7, 10), (5, 3), (8, 11)], ids=str)
@pytest.mark.parametrize("options", [{}, {"qk_dim": 6, "topk": 4}, {"lepe_size": 5}], ids=str)
def test_both_official_ways_to_pad(padding, space, options):
    mixer, x = make_mixer(padding=padding, **options), make_input(*space).requires_grad_()
    ours, published = mixer(x), LAYERS[padding](mixer, x)
    assert_close(ours, published)
    upstream, leaves = torch.randn_like(ours), [x, *mixer.parameters()]
    assert_close(*(torch.autograd.grad(out, leaves, upstream) for out in (ours, published)))


def test_all_are_the_same_where_the_regions_divide_the_map():
    mixers, x = [make_mixer(padding=padding) for padding in ("none", "input", "projected")], make_input(6, 9)
    for other in mixers[1:]:
        other.load_state_dict(mixers[0].state_dict())
        assert_close(other(x), mixers[0](x))


def test_without_padding_no_zero_is_attended_to():
    mixer, x = make_mixer(topk=REGIONS**2), make_input(7, 10)
    q, k, v = (t.flatten(2).unflatten(1, (HEADS, -1)).mT for t in project(mixer, x))
    dense = F.scaled_dot_product_attention(q, k, v, scale=DIM**-0.5).transpose(1, 2).flatten(2).view_as(x)
    detail = mixer.lepe(project(mixer, x)[2]).movedim(1, -1)
    assert_close(mixer(x), mixer.proj(dense + detail))


@pytest.mark.parametrize("padding", ["none", "input", "projected"])
def test_the_token_matrix_leaves_appended_zeros_out(padding):
    mixer, x = make_mixer(padding=padding, topk=9), make_input(7, 10)
    with saccade.tap(mixer) as seen:
        mixer(x)
    attention = seen[""].attention
    assert attention.shape == (2, HEADS, 70, 70)
    sums = attention.sum(-1)
    assert (sums <= 1 + 1e-9).all()
    assert (sums.min() < 0.99) == (padding != "none")


def test_without_convolution_and_projection():
    mixer = make_mixer(lepe_size=0, out_proj=False)
    assert [name for name, _ in mixer.named_parameters()] == ["qkv.weight", "qkv.bias"]
    assert mixer(make_input(4, 5)).shape == (2, 4, 5, DIM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lepe_size": 4}, "lepe_size is 4: a kernel has a middle. Give an odd number, or 0 for none"),
        ({"topk": 0}, "topk is 0: give an integer of at least 1"),
        ({"num_regions": 0}, "num_regions is 0: give an integer of at least 1"),
        ({"qk_dim": 8}, "qk_dim is 8 and num_heads is 3: the heads share it evenly"),
        ({"padding": "inputs"}, "padding is 'inputs': did you mean input"),
        ({"axes": 4}, "axes is 4: give 1, 2 or 3"),
    ],
)
def test_options_that_make_no_mixer(options, message):
    with pytest.raises(InputError, match=message):
        make_mixer(**options)


def test_a_map_that_is_too_small_for_its_regions():
    with pytest.raises(InputError, match="padding='projected' needs a token for each region"):
        make_mixer(padding="projected")(make_input(2, 5))


def gather_softly(mixer, x, pool):
    """The official order of things: regions' keys and values pooled, gathered, multiplied by the regions' weights."""
    q, k, v = (to_regions(part, (4, 2)) for part in project(mixer, x))  # (B, 9, 8, C)
    means = [part.mean(2) for part in (q, k)]
    if not mixer.differentiable:
        means = [part.detach() for part in means]
    if mixer.match is not None:
        means = [mixer.match(part) for part in means]
    logits, routes = (mixer.scale * means[0] @ means[1].mT).topk(mixer.topk)
    weights = logits.softmax(-1)[..., None, None] if mixer.soft else 1.0
    cells = [part.unflatten(2, (4, 2)).permute(0, 1, 4, 2, 3).flatten(0, 1) for part in (k, v)]
    keys, values = (pool(cell).flatten(2).mT.unflatten(0, (2, 9)) for cell in cells)
    image = torch.arange(2).view(-1, 1, 1)
    keys, values = ((part[image, routes] * weights).flatten(2, 3) for part in (keys, values))
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(2, 3) for part in (q, keys, values))
    out = (mixer.scale * query @ key.mT).softmax(-1) @ value
    out = out.transpose(2, 3).flatten(3).unflatten(1, (3, 3)).unflatten(3, (4, 2))
    out = out.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    return mixer.proj(out + mixer.lepe(project(mixer, x)[2]).movedim(1, -1))


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({"soft": True}, lambda x: x),
        ({"soft": True, "differentiable": True, "learned": True}, lambda x: x),
        ({"learned": True}, lambda x: x),
        ({"pool": "avg", "pool_size": 1}, lambda x: F.adaptive_avg_pool2d(x, 1)),
        ({"pool": "max", "pool_size": 3}, lambda x: F.adaptive_max_pool2d(x, 3)),
        ({"pool": "max", "pool_ratio": 2}, lambda x: F.max_pool2d(x, 2)),
        ({"pool": "avg", "pool_ratio": 2, "soft": True, "differentiable": True}, lambda x: F.avg_pool2d(x, 2)),
    ],
)
def test_pooled_keys_and_soft_routing_are_those_of_the_official_order(options, pool):
    mixer, x = make_mixer(**options), make_input(12, 6).requires_grad_()
    out, expected = mixer(x), gather_softly(mixer, x, pool)
    assert_close(out, expected)
    upstream = torch.randn_like(out)
    leaves = [x, *mixer.parameters()]
    ours, theirs = (torch.autograd.grad(y, leaves, upstream, allow_unused=True) for y in (out, expected))
    assert [grad is None for grad in ours] == [grad is None for grad in theirs]
    assert_close([g for g in ours if g is not None], [g for g in theirs if g is not None])


@pytest.mark.parametrize("options", [{"soft": True}, {"pool": "avg", "pool_size": 2}, {"soft": True, "pool": "max"}])
def test_taps_show_what_soft_routing_and_pooled_keys_take(options):
    mixer, x = make_mixer(**{"lepe_size": 0, "pool_ratio": 2} | options), make_input(12, 6)
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    weights = seen[""].attention
    value = project(mixer, x)[2]
    if "pool" in options:
        cells = to_regions(value, (4, 2)).unflatten(2, (4, 2)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        cells = F.adaptive_avg_pool2d(cells, 2) if options["pool"] == "avg" else F.max_pool2d(cells, 2)
        cells = cells.unflatten(0, (2, 3, 3)).permute(0, 3, 1, 4, 2, 5)
        value = cells.flatten(4, 5).flatten(2, 3)
    value = value.flatten(2).mT.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    assert_close(out, mixer.proj((weights @ value).transpose(1, 2).flatten(2).unflatten(1, (12, 6))))


@pytest.mark.parametrize(
    ("options", "space", "message"),
    [
        ({"pool": "avg"}, (7, 6), "pooled keys need whole regions"),
        ({"pool": "avg", "pool_ratio": 3}, (6, 6), "take a smaller ratio"),
        ({"pool": "mean"}, (6, 6), "pool is 'mean'"),
        ({"pool": "avg", "axes": 1}, (6,), "keys are pooled on maps of two axes"),
        ({"pool": "avg", "pool_size": 0}, (6, 6), "pool_size"),
    ],
)
def test_pools_that_do_not_fit_are_named(options, space, message):
    with pytest.raises(InputError, match=message):
        make_mixer(**options)(make_input(*space))


def test_pooled_keys_on_a_padded_map():
    mixer, x = make_mixer(pool="avg", pool_size=2, padding="input"), make_input(10, 5)
    padded = F.pad(x, (0, 0, 0, 1, 0, 2))
    plain = make_mixer(pool="avg", pool_size=2)
    plain.load_state_dict(mixer.state_dict())
    assert_close(mixer(x), plain(padded)[:, :10, :5])
    with saccade.tap(mixer) as seen:
        mixer(x)
    assert seen[""].attention.shape == (2, HEADS, 50, 36)
