"""ReorderedAttention: orders and blocks before and after calibration, rounding, prefix tokens, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import Attention, ReorderedAttention
from saccade.ops import axis_order, axis_orders


def make_mixer(**options):
    return ReorderedAttention(12, 6, **options).double()


def make_input(*space, batch=2):
    return torch.randn(batch, *space, 12, dtype=torch.float64)


def split(mixer, x):
    return [part.unflatten(-1, (6, 2)).transpose(1, 2) for part in mixer.qkv(x.flatten(1, -2)).chunk(3, -1)]


def dense(mixer, tokens, mask):
    query, key, value = split(mixer, tokens)
    return mixer.proj(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))


def visible(mixer, space):
    """(heads, N, N) by its definition: two tokens meet if the blocks of their places in the head's order do."""
    orders, size = axis_orders(len(space)), mixer.size(space)
    masks = []
    for head in range(6):
        place = axis_order(space, orders[int(mixer.order[head]) % len(orders)]).argsort() // size
        blocks = mixer.selection(space).pairs((place.numel(),))[0].expand(6, -1, -1)[head]
        masks.append(blocks[place][:, place])
    return torch.stack(masks)


@pytest.mark.parametrize("space", [(13,), (4, 6), (3, 4, 5)], ids=str)
def test_heads_take_turns_and_see_the_blocks_nearest_in_their_order(space):
    mixer, x = make_mixer(density=0.4), make_input(*space)
    mask = visible(mixer, space)
    assert_close(mixer(x), dense(mixer, x, mask).view_as(x))
    own = torch.eye(mask.shape[-1], dtype=torch.bool)
    assert mask[:, own].all()
    count = len(axis_orders(len(space)))
    for head in range(6):
        assert all(torch.equal(mask[head], mask[other]) == (head % count == other % count) for other in range(6))


def test_as_many_blocks_as_the_density_asks_for():
    pairs = make_mixer(block_size=4, density=0.5).selection((4, 8)).pairs((32,))
    assert (pairs.sum(-1) == 4).all()
    assert torch.equal(pairs[0, 0, 0].nonzero().flatten(), torch.arange(4))
    assert make_mixer(block_size=100, density=0.1).selection((4, 8)).pairs((32,)).all()


def test_with_all_blocks_it_is_attention():
    mixer, x = make_mixer(density=1.0), make_input(3, 4, 5)
    full = Attention(12, 6).double()
    full.load_state_dict({name: tensor for name, tensor in mixer.state_dict().items() if name != "order"})
    assert_close(mixer(x), full(x))


# Calibration


def make_striped(space=(6, 4)):
    """A mixer whose tokens see those of the next column, and maps for it."""
    mixer = ReorderedAttention(4, 1, space=space, block_size=6, density=0.25, scale=40.0).double()
    with torch.no_grad():
        eye = torch.eye(4, dtype=torch.float64)
        mixer.qkv.weight.copy_(torch.cat([eye, eye.roll(1, 1), eye]))
        mixer.qkv.bias.zero_()
    columns = torch.eye(4, dtype=torch.float64).expand(3, 6, 4, 4)
    return mixer, columns + 0.1 * torch.randn(3, 6, 4, 4, dtype=torch.float64)


def test_calibration_finds_the_order_and_the_blocks_and_loses_nothing():
    mixer, x = make_striped()
    before = mixer(x)
    choice = mixer.calibrate(x)
    assert choice.order.tolist() == mixer.order.tolist() == [1]  # columns
    assert torch.equal(mixer.kept[0], torch.eye(4).roll(1, 1).bool())
    full = Attention(4, 1, scale=40.0).double()
    full.load_state_dict({n: t for n, t in mixer.state_dict().items() if n not in ("order", "kept")})
    assert_close(mixer(x), full(x), atol=1e-5, rtol=0)
    assert (before - full(x)).abs().max() > 0.1


def test_what_was_calibrated_is_saved_and_tapped():
    mixer, x = make_striped()
    mixer.calibrate(x)
    fresh, _ = make_striped()
    fresh.load_state_dict(mixer.state_dict())
    with saccade.tap(fresh) as seen:
        assert_close(fresh(x), mixer(x))
    column = torch.arange(24) % 4
    assert ((seen[""].attention[0, 0] > 0) == ((column + 1) % 4).unsqueeze(1).eq(column)).all()


def test_a_mixer_for_one_map_says_so():
    mixer, x = make_striped()
    with pytest.raises(InputError, match=r"the map is \(4, 6\) and the blocks are kept for \(6, 4\)"):
        mixer(x.transpose(1, 2))
    with pytest.raises(InputError, match=r"the map is \(4, 6\) and the blocks are kept for \(6, 4\)"):
        mixer.calibrate(x.transpose(1, 2))
    with pytest.raises(InputError, match="build it with space="):
        make_mixer().calibrate(make_input(4, 6))


# Rounding, and prefix tokens


def test_rounded_to_many_bits_it_is_the_same_with_and_without_prefix():
    rounded, plain = make_mixer(bits=16), make_mixer()
    plain.load_state_dict(rounded.state_dict())
    x, prefix = make_input(4, 6), torch.randn(2, 3, 12, dtype=torch.float64)
    assert_close(rounded(x), plain(x), atol=1e-3, rtol=0)
    for ours, exact in zip(rounded(x, prefix), plain(x, prefix)):
        assert_close(ours, exact, atol=1e-3, rtol=0)


def test_fewer_bits_lose_more_and_every_parameter_still_learns():
    x = make_input(4, 6)
    plain, errors = make_mixer(), []
    for bits in (3, 8):
        mixer = make_mixer(bits=bits)
        mixer.load_state_dict(plain.state_dict())
        errors.append((mixer(x) - plain(x)).norm().item())
        mixer(x).square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in mixer.parameters())
    assert 0 < errors[1] < errors[0]


def test_the_tapped_attention_is_the_rounded_one():
    mixer, x = make_mixer(bits=3), make_input(4, 6)
    with saccade.tap(mixer) as seen:
        mixer(x)
    attention = seen[""].attention
    steps = torch.stack([len(head.unique()) * torch.ones(()) for head in attention[0]])
    assert (steps < 24 * 24 / 4).all()
    assert not attention[~visible(mixer, (4, 6)).expand(2, -1, -1, -1)].any()


def test_prefix_tokens_stay_first_see_all_and_are_seen_by_all():
    mixer, space = make_mixer(density=0.2), (3, 4, 5)
    x, prefix = make_input(*space), torch.randn(2, 3, 12, dtype=torch.float64)
    mask = F.pad(visible(mixer, space), (3, 0, 3, 0), value=True)
    out, seen = mixer(x, prefix)
    joint = dense(mixer, torch.cat([prefix, x.flatten(1, -2)], 1).unsqueeze(1), mask)
    assert_close(torch.cat([seen, out.flatten(1, -2)], 1), joint)


def test_a_density_of_nothing_is_refused():
    with pytest.raises(InputError, match="density is 0: give a share above 0 and at most 1"):
        make_mixer(density=0)
    with pytest.raises(InputError, match="block_size is 0"):
        make_mixer(block_size=0)
