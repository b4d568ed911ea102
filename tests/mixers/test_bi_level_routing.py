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
