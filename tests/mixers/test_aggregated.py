"""AggregatedAttention and LengthScaledAttention against the paper's equations; maps of all sizes; errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import AggregatedAttention, LengthScaledAttention
from saccade.mixers.aggregated import rename

DIM, HEADS = 12, 3


def make_mixer(kind=AggregatedAttention, **options):
    mixer = kind(DIM, HEADS, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def make_input(*space):
    return torch.randn(2, *space, DIM, dtype=torch.float64)


def by_head(x):
    """(B, N, C) to (B, heads, N, D)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def position_bias(mixer, space, cells, full):
    """(heads, N, P), pair by pair: 8 (q - k) / (full - 1), log-spaced, through two linear layers."""
    places = torch.cartesian_prod(*(torch.arange(length, dtype=torch.float64) for length in space))
    middles = F.adaptive_avg_pool2d(places.T.unflatten(1, space), cells).flatten(1).T
    scaled = 8 * (places.unsqueeze(1) - middles) / (torch.tensor(full) - 1)
    spaced = scaled.sign() * torch.log2(scaled.abs() + 1) / math.log2(8)
    return mixer.cpb_fc2(F.relu(mixer.cpb_fc1(spaced))).permute(2, 0, 1)


def aggregated(mixer, x, cells, full):
    """The layer as the paper writes it: unfolded windows and pooled cells, one softmax over both."""
    space, window = tuple(x.shape[1:-1]), mixer.window_size
    tokens = x.flatten(1, 2)
    q = F.normalize(by_head(mixer.q(tokens)), dim=-1)
    half = tuple(size // 2 for size in window)

    def unfold(maps):
        """(B, C, H, W) to (B, C / D heads, N, D, places)."""
        places = F.unfold(maps, window, padding=half).unflatten(1, (maps.shape[1], -1))
        return places.unflatten(1, (HEADS, -1)).permute(0, 1, 4, 2, 3)

    inside = F.unfold(torch.ones(1, 1, *space, dtype=x.dtype), window, padding=half)[0].T > 0  # (N, places)
    length = torch.log(inside.sum(-1) + math.prod(cells)).unsqueeze(-1)
    scaled = (q + mixer.query_embedding) * F.softplus(mixer.temperature) * length
    key, value = mixer.kv(tokens).chunk(2, -1)
    key = F.normalize(by_head(key), dim=-1).transpose(1, 2).flatten(2)
    keys, values = (unfold(part.mT.unflatten(2, space)) for part in (key, value))
    near = (scaled.unsqueeze(-2) @ keys).squeeze(-2) + mixer.relative_pos_bias_local.unsqueeze(1)
    near = near.masked_fill(~inside, -torch.inf)
    pooled = F.adaptive_avg_pool2d(F.gelu(mixer.sr(x)).movedim(-1, 1), cells).flatten(2).mT
    pooled_key, pooled_value = (by_head(part) for part in mixer.kv(mixer.norm(pooled)).chunk(2, -1))
    far = scaled @ F.normalize(pooled_key, dim=-1).mT + position_bias(mixer, space, cells, full)
    weights = torch.cat([near, far], -1).softmax(-1)
    near, far = weights.split([near.shape[-1], far.shape[-1]], -1)
    near = near + q @ mixer.learnable_tokens + mixer.learnable_bias
    out = (values @ near.unsqueeze(-1)).squeeze(-1) + far @ pooled_value
    return mixer.proj(out.transpose(1, 2).flatten(2)).view_as(x)


@pytest.mark.parametrize(
    ("options", "space", "cells", "full"),
    [
        ({"sr_ratio": 2}, (6, 5), (3, 2), (6, 5)),
        ({"sr_ratio": 3, "pretrain_size": 7}, (7, 10), (2, 3), (7, 7)),
        ({"pool_size": 2, "window_size": 5, "qkv_bias": False}, (4, 7), (2, 2), (4, 7)),
        ({"pool_size": (1, 4), "window_size": (3, 1), "pretrain_size": (3, 9)}, (2, 5), (1, 4), (3, 9)),
        ({"sr_ratio": 8}, (5, 3), (1, 1), (5, 3)),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_aggregated_attention_is_the_papers(options, space, cells, full, impl):
    mixer, x = make_mixer(impl=impl, **options), make_input(*space).requires_grad_()
    assert mixer.cells(space) == cells
    # the coordinates are float32, as official code's are
    ours, published = mixer(x), aggregated(mixer, x, cells, full)
    assert_close(ours, published, atol=1e-5, rtol=1e-5)
    upstream, leaves = torch.randn_like(ours), [x, *mixer.parameters()]
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (ours, published)]
    assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("options", "full"), [({}, (4, 5)), ({"pretrain_size": (3, 9), "qkv_bias": False}, (3, 9))])
def test_length_scaled_attention_is_the_papers(options, full):
    mixer, x = make_mixer(LengthScaledAttention, **options), make_input(4, 5)
    query, key, value = (by_head(part) for part in mixer.qkv(x.flatten(1, 2)).chunk(3, -1))
    query = (F.normalize(query, dim=-1) + mixer.query_embedding) * F.softplus(mixer.temperature) * math.log(20)
    logits = query @ F.normalize(key, dim=-1).mT + position_bias(mixer, (4, 5), (4, 5), full)
    mixed = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2).view_as(x)
    assert_close(mixer(x), mixer.proj(mixed), atol=1e-5, rtol=1e-5)


def test_the_temperature_starts_at_its_published_value():
    for kind in (AggregatedAttention, LengthScaledAttention):
        assert_close(F.softplus(kind(DIM).temperature), torch.full((1, 1, 1), 1 / 0.24))


@pytest.mark.parametrize("axes", [1, 3])
def test_other_axes(axes):
    for kind in (AggregatedAttention, LengthScaledAttention):
        mixer, x = make_mixer(kind, axes=axes), make_input(*[5, 2, 3][:axes])
        assert mixer(x).shape == x.shape


def test_the_token_matrix_without_learnable_tokens_is_a_mean():
    mixer, x = make_mixer(sr_ratio=2), make_input(5, 6)
    for parameter in (mixer.learnable_tokens, mixer.learnable_bias):
        torch.nn.init.zeros_(parameter)
    with saccade.tap(mixer) as seen:
        mixer(x)
    attention = seen[""].attention
    assert (attention > 0).all()  # the pooled map reaches everywhere
    assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


def test_official_names():
    state = {"blocks.0.attn.sr.weight": torch.zeros(4, 4, 1, 1), "mlp.dwconv.dwconv.bias": torch.zeros(3)}
    state["sr.weight"], state["attn.q.weight"] = torch.zeros(4, 4, 1, 1), torch.zeros(4, 4)
    shapes = {name: tuple(tensor.shape) for name, tensor in rename(state).items()}
    assert shapes == {
        "blocks.0.attn.sr.weight": (4, 4),
        "mlp.dwconv.bias": (3,),
        "sr.weight": (4, 4),
        "attn.q.weight": (4, 4),
    }


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match=r"pool_size is \(7, 7\) and the map is \(5, 9\): a cell has a token at least"):
        make_mixer(pool_size=7)(make_input(5, 9))
    with pytest.raises(InputError, match="axes is 4: give 1, 2 or 3"):
        make_mixer(axes=4)
    with pytest.raises(InputError, match=r"the position bias is for 2 axes\. Set axes=1"):
        make_mixer(LengthScaledAttention)(make_input(5))
    with pytest.raises(InputError, match="sr_ratio is 0: give an integer of at least 1"):
        make_mixer(sr_ratio=0)
    with pytest.raises(InputError, match="window_size is 4: a window has its query in the middle"):
        make_mixer(window_size=4)
    with pytest.raises(InputError, match=r"pretrain_size is \(3,\): the map has 2 axes"):
        make_mixer(pretrain_size=(3,))
