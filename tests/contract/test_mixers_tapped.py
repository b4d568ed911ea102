"""What taps see of every exported mixer made its output, and prefix tokens take part as any others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import ChannelAttention, PatternAttention, create_mixer
from saccade.ops import RelativeTable, SlidingWindow, channel_attention
from tests.contract.exceptions import AVERAGED, BEYOND, NO_PREFIX, NO_SOFTMAX, PREFIX_OPTION
from tests.contract.mixers import CASES, DIM, make_input, make_mixer, show

# What taps see


def values_of(mixer, tokens):
    """(B, heads, M, E) of a mixer with one projection to query, key and value."""
    parts = [part.unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2) for part in mixer.qkv(tokens).chunk(3, -1)]
    if isinstance(mixer, ChannelAttention):  # value, query, key, and the values' channels are averaged
        return channel_attention(parts[1], parts[2], parts[0], scale=mixer.scale)
    return parts[2]


def finish_softmax(mixer, x, attention):
    return mixer.proj((attention @ values_of(mixer, x.flatten(1, -2))).transpose(1, 2).flatten(2).view_as(x))


def finish_halo(mixer, x, attention):
    by_head = mixer.kv(x.flatten(1, -2)).unflatten(-1, (mixer.num_heads, -1))  # each head: its key, its value
    value = by_head[..., mixer.dim_head :].transpose(1, 2)
    return mixer.proj((attention @ value).transpose(1, 2).flatten(2).view_as(x))


def finish_agent(mixer, x, attention):
    space = x.shape[1:-1]
    if mixer.sr_ratio == 1:
        value, size = mixer.qkv(x).chunk(3, -1)[2], space
    else:
        reduced = mixer.norm(mixer.sr(x.movedim(-1, 1)).movedim(1, -1))
        value, size = mixer.kv(reduced).chunk(2, -1)[1], reduced.shape[1:-1]
    by_head = value.flatten(1, 2).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
    detail = value.movedim(-1, 1)
    detail = detail if size == space else F.interpolate(detail, space, mode="bilinear")
    return mixer.proj((attention @ by_head).transpose(1, 2).flatten(2).view_as(x) + mixer.dwc(detail).movedim(1, -1))


def finish_bi_level_routing(mixer, x, attention):
    value = mixer.project(x)[2]
    by_head = value.flatten(1, -2).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
    detail = mixer.lepe(value.movedim(-1, 1)).movedim(1, -1)
    return mixer.proj((attention @ by_head).transpose(1, 2).flatten(2).view_as(x) + detail)


def finish_aggregated(mixer, x, attention):
    """Shares of cells are found outside a query's window, where the matrix has nothing else."""
    space = x.shape[1:-1]
    cells, rows = mixer.cells(space), torch.eye(space.numel(), dtype=x.dtype)
    spread = F.adaptive_avg_pool2d(rows.view(-1, 1, *space), cells).flatten(1).T  # (P, N)
    reach = tuple(size // 2 for size in mixer.window_size)
    far = ~SlidingWindow(reach, reach).mask(space)
    found = torch.linalg.pinv(spread * far.unsqueeze(1))  # (N, M, P)
    shares = torch.einsum("bhnm,nmp->bhnp", attention * far, found)
    values = [
        mixer.kv(part).chunk(2, -1)[1].flatten(1, 2).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
        for part in (x, mixer.pool(x, cells))
    ]
    mixed = (attention - shares @ spread) @ values[0] + shares @ values[1]
    return mixer.proj(mixed.transpose(1, 2).flatten(2)).view_as(x)


def finish_outlook(mixer, x, attention):
    value = mixer.v(x.flatten(1, 2)).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
    return mixer.proj((attention @ value).transpose(1, 2).flatten(2).view_as(x))


def finish_cont_mix(mixer, x, attention):
    value = mixer.v(x.flatten(1, 2)).unflatten(-1, (2 * mixer.num_heads, -1)).transpose(1, 2)
    return mixer.proj((attention @ value).transpose(1, 2).flatten(2).view_as(x))


def finish_cross_shaped(mixer, x, attention):
    """What the convolutions of values add is found by leaving them out."""
    plain = copy.deepcopy(mixer)
    for conv in plain.lepe:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    value = mixer.qkv(x.flatten(1, 2)).chunk(3, -1)[2].unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
    return mixer.proj((attention @ value).transpose(1, 2).flatten(2).view_as(x)) + mixer(x) - plain(x)


def finish_factorized(mixer, x, attention):
    """From the values of tokens and coarse cells; what convolutions of values add is found by leaving them out."""
    plain = copy.deepcopy(mixer)
    for conv in (plain.local_conv_g, *plain.local_convs):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    space, side, first = x.shape[1:-1], mixer.sr_ratio, mixer.coarse_dim
    shares = attention.flatten(0, 2).unflatten(-1, space)[:, None]
    cells = (F.avg_pool2d(shares, side) * side**2).flatten(1).unflatten(0, attention.shape[:3])[:, 0]
    reduced = mixer.norm(mixer.sr(x[..., :first].movedim(-1, 1)).movedim(1, -1))
    mixed = [cells @ mixer.kv_g(reduced).chunk(2, -1)[1].flatten(1, 2)]
    source = mixer.point_conv(mixer.depth_conv(x[..., first:].movedim(-1, 1)).movedim(1, -1)).flatten(1, 2)
    by_group = attention[:, 1:].split(mixer.num_heads, 1)
    for part, weights, fc, head in zip(source.split(mixer.widths, -1), by_group, mixer.fcs, mixer.single_heads):
        value = head(fc(part.unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2))).chunk(2, -1)[1]
        mixed.append((weights @ value).transpose(1, 2).flatten(2))
    return mixer.proj(torch.cat(mixed, -1)).view_as(x) + mixer(x) - plain(x)


def finish_mobile_conv(mixer, x, attention):
    update = mixer.conv(x.movedim(-1, 1)).movedim(1, -1)
    return update + finish_softmax(mixer, mixer.norm(x + update), attention)


def finish_strip(mixer, x, attention):
    side = mixer.sr_ratio
    height, width = (-length % side for length in x.shape[1:-1])
    shares = F.pad(attention.unflatten(-1, x.shape[1:-1]), (0, width, 0, height))
    cells = shares.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).sum((-1, -3)).flatten(-2)
    value = mixer.kv(mixer.reduce(x))[..., mixer.strip :].flatten(1, 2)
    value = value.unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
    return mixer.proj((cells @ value).transpose(1, 2).flatten(2).view_as(x))


def finish_pooling(mixer, x, attention):
    return (attention.squeeze(1) @ x.flatten(1, -2)).view_as(x)


FINISH = {
    "aggregated": finish_aggregated,
    "agent": finish_agent,
    "bi_level_routing": finish_bi_level_routing,
    "cont_mix": finish_cont_mix,
    "cross_shaped": finish_cross_shaped,
    "factorized": finish_factorized,
    "gated_positional": finish_outlook,  # values of a projection of their own
    "halo": finish_halo,
    "mobile_conv": finish_mobile_conv,
    "outlook": finish_outlook,
    "pooling": finish_pooling,
    "strip": finish_strip,
}
"""How a mixer goes on from its token matrix; all others average the values of `qkv` and project them."""


exact = [case for case in CASES if case[0] not in AVERAGED | BEYOND]


@pytest.mark.parametrize(("name", "options"), exact, ids=[*map(show, exact)])
@pytest.mark.parametrize("space", [(7, 9), (8, 4)], ids=str)
def test_the_tapped_attention_is_the_one_that_made_the_output(name, options, space):
    mixer, x = make_mixer(name, options), make_input(*space)
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    attention = seen[""].attention
    assert attention.shape[0] == 2
    assert_close(FINISH.get(name, finish_softmax)(mixer, x, attention), out)
    assert_close(seen[""].features, out)
    if name not in NO_SOFTMAX:
        assert (attention >= 0).all()
        assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


@pytest.mark.parametrize("name", AVERAGED)
def test_an_averaged_matrix_is_the_mean_over_channels_before_the_projection(name):
    mixer, x = make_mixer(name), make_input(7, 9, batch=1)
    projected = []
    mixer.proj.register_forward_pre_hook(lambda module, args: projected.append(args[0].mean(-1).flatten(1)))
    with saccade.tap(mixer) as seen:
        mixer(x[..., :1].expand_as(x))
    mixer(torch.zeros_like(x))  # the biases
    with_token, biases = projected
    assert_close((seen[""].attention[:, 0] @ x[..., 0].flatten(1).unsqueeze(-1)).squeeze(-1), with_token - biases)


# Prefix tokens


def make_prefix(batch=2, tokens=3):
    return torch.randn(batch, tokens, DIM, dtype=torch.float64)


def make_serving(name, options):
    return make_mixer(name, {**options, "num_prefix": 3} if name in PREFIX_OPTION else options)


serving = [case for case in CASES if case[0] not in NO_PREFIX and "sr_ratio" not in case[1]]
serving_mixer = pytest.mark.parametrize(("name", "options"), serving, ids=[*map(show, serving)])


@serving_mixer
def test_prefix_tokens_see_all_and_are_seen_by_all(name, options):
    mixer, x, prefix = make_serving(name, options), make_input(7, 9, batch=1), make_prefix(1)
    tokens = [prefix.requires_grad_(), x.requires_grad_()]
    out, out_prefix = mixer(x, prefix)
    assert (out.shape, out_prefix.shape) == (x.shape, prefix.shape)
    for each in out_prefix[0]:
        grads = torch.autograd.grad(each.square().sum(), tokens, retain_graph=True)
        assert all((grad.abs().sum(-1) > 0).all() for grad in grads)
    for each in out[0].flatten(0, 1):
        (grad,) = torch.autograd.grad(each.square().sum(), prefix, retain_graph=True)
        assert (grad.abs().sum(-1) > 0).all()


plain = [case for case in serving if case[0] not in BEYOND]


@pytest.mark.parametrize(("name", "options"), plain, ids=[*map(show, plain)])
def test_the_tapped_attention_has_the_prefix_first(name, options):
    mixer, x, prefix = make_serving(name, options), make_input(7, 9), make_prefix()
    with saccade.tap(mixer) as seen:
        out, out_prefix = mixer(x, prefix)
    tokens = torch.cat([prefix, x.flatten(1, 2)], 1)
    mixed = (seen[""].attention @ values_of(mixer, tokens)).transpose(1, 2).flatten(2)
    if name == "agent":
        detail = mixer.qkv(x).chunk(3, -1)[2].movedim(-1, 1)
        mixed[:, 3:] += mixer.dwc(detail).flatten(2).mT
    assert_close(mixer.proj(mixed), torch.cat([out_prefix, out.flatten(1, 2)], 1))


dense = [case for case in serving if isinstance(create_mixer(case[0], DIM), PatternAttention)]


@pytest.mark.parametrize(("name", "options"), dense, ids=[*map(show, dense)])
def test_with_a_prefix_it_is_dense_attention_over_all_tokens(name, options):
    mixer, space, prefix = make_serving(name, options), (7, 9), make_prefix()
    x = make_input(*space)
    pattern, bias = mixer.pattern(space), mixer.position_bias(space)
    added = torch.zeros(mixer.num_heads, 63, 63, dtype=torch.float64)
    if isinstance(bias, RelativeTable):
        added = bias(torch.empty(0), pattern.offset(space).unsqueeze(1))[0]
    added = F.pad(added.masked_fill(~pattern.mask(space), -torch.inf), (3, 0, 3, 0))  # a prefix has no position
    tokens = torch.cat([prefix, x.flatten(1, 2)], 1)
    query, key, value = (
        part.unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2) for part in mixer.qkv(tokens).chunk(3, -1)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=mixer.scale)
    out, out_prefix = mixer(x, prefix)
    assert_close(torch.cat([out_prefix, out.flatten(1, 2)], 1), mixer.proj(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("name", NO_PREFIX)
def test_mixers_that_cannot_serve_prefix_tokens_say_so(name):
    message = "cannot serve prefix tokens .* and got 3. Pool the map instead, or choose a mixer of softmax attention"
    with pytest.raises(InputError, match=message):
        make_mixer(name)(make_input(7, 9), make_prefix())
