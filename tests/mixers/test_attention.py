"""Mixers of softmax attention: what the published modules compute, sizes that fit the map by default, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade import tap
from saccade.errors import InputError
from saccade.mixers import Attention, GridAttention, NeighborhoodAttention, WindowAttention

DIM, HEADS = 8, 2


def make_input(*space):
    return torch.randn(2, *space, DIM, dtype=torch.float64)


def attend_in_groups(mixer, groups, table=None):
    """Multi-head attention inside each group of tokens, (G, tokens, C), as Swin and MaxViT compute it."""
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in mixer.qkv(groups).chunk(3, -1))
    logits = query @ key.mT * (DIM // HEADS) ** -0.5
    weights = (logits if table is None else logits + table).softmax(-1)
    return mixer.proj((weights @ value).transpose(1, 2).flatten(2))


def swin_bias(table, size):
    """Swin's index of query minus key, into a table that stands the other way round."""
    place = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    relative = place[:, None] - place[None] + size - 1
    return table.flip(1, 2)[:, relative[..., 0], relative[..., 1]]


def cut(x, size):
    """(B, H, W, ...) to (B windows, size^2, ...), as Swin cuts a map into windows."""
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


@pytest.mark.parametrize("shift", [False, True])
def test_windows_are_those_of_swin(shift):
    size, height, width = 4, 8, 12
    mixer, x = WindowAttention(DIM, HEADS, window_size=size, shift=shift).double(), make_input(height, width)
    torch.nn.init.normal_(mixer.position_bias_table)
    moved = size // 2 if shift else 0
    region = torch.zeros(2, height, width)  # what the roll brings together stays apart
    region[:, height - moved :] += 1
    region[:, :, width - moved :] += 2
    region = cut(region.unsqueeze(-1), size).squeeze(-1)
    apart = (region[:, :, None] != region[:, None]).double() * -1e9
    rolled = x.roll((-moved, -moved), (1, 2))
    out = attend_in_groups(mixer, cut(rolled, size), swin_bias(mixer.position_bias_table, size) + apart.unsqueeze(1))
    rows = out.view(2, height // size, width // size, size, size, DIM).transpose(2, 3)
    assert_close(mixer(x), rows.reshape(2, height, width, DIM).roll((moved, moved), (1, 2)))


def test_grids_are_those_of_maxvit():
    size = 4
    mixer = GridAttention(DIM, HEADS, window_size=size).double()
    torch.nn.init.normal_(mixer.position_bias_table)
    x = make_input(8, 12)
    grids = x.view(2, size, 2, size, 3, DIM).permute(0, 2, 4, 1, 3, 5).reshape(-1, size * size, DIM)
    out = attend_in_groups(mixer, grids, swin_bias(mixer.position_bias_table, size))
    assert_close(mixer(x), out.view(2, 2, 3, size, size, DIM).permute(0, 3, 1, 4, 2, 5).reshape(2, 8, 12, DIM))


def test_global_attention_is_that_of_torch():
    mixer, x = Attention(DIM, HEADS).double(), make_input(3, 5)
    tokens, weights = x.flatten(1, 2), (mixer.qkv.weight, mixer.qkv.bias)
    expected, _ = F.multi_head_attention_forward(
        *(tokens.transpose(0, 1),) * 3, DIM, HEADS, *weights, None, None, False, 0.0, mixer.proj.weight, mixer.proj.bias
    )
    assert_close(mixer(x).flatten(1, 2), expected.transpose(0, 1))


def test_a_neighborhood_of_the_whole_map_is_global_and_of_one_token_is_the_token():
    whole, x = NeighborhoodAttention(DIM, HEADS, window_size=(5, 7)).double(), make_input(5, 7)
    every = Attention(DIM, HEADS).double()
    every.load_state_dict(whole.state_dict())
    assert_close(whole(x), every(x))
    alone = NeighborhoodAttention(DIM, HEADS, window_size=1).double()
    assert_close(alone(x), alone.proj(alone.qkv(x).chunk(3, -1)[2]))


def test_no_output_depends_on_a_later_row_of_a_causal_axis():
    mixer = NeighborhoodAttention(DIM, HEADS, window_size=3, causal=(True, False)).double()
    x = make_input(5, 4).requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[:, 2].square().sum(), x)
    assert (grad[:, 3:] == 0).all()
    assert (grad[:, :3] != 0).all()


@pytest.mark.parametrize(
    ("length", "block", "window"), [(1, 1, 1), (5, 5, 5), (7, 7, 7), (8, 4, 4), (14, 7, 7), (15, 5, 7), (56, 7, 7)]
)
def test_default_sizes_fit_the_map(length, block, window):
    assert WindowAttention(DIM).pattern((length,)).window_size == (block,)
    assert GridAttention(DIM).pattern((length,)).grid_size == (block,)
    assert NeighborhoodAttention(DIM).pattern((length,)).window_size == (window,)


def test_default_windows_are_smaller_where_they_are_dilated():
    pattern = NeighborhoodAttention(DIM, dilation=3).pattern((9, 30))
    assert pattern.window_size == (3, 5)
    assert pattern.key_space((9, 30)) == (9, 30)


@pytest.mark.parametrize("kind", [WindowAttention, GridAttention, NeighborhoodAttention])
def test_sizes_may_be_lists_as_a_configuration_file_gives_them(kind):
    listed, x = kind(DIM, window_size=[2, 3]).double(), make_input(4, 6)
    tupled = kind(DIM, window_size=(2, 3)).double()
    tupled.load_state_dict(listed.state_dict())
    assert_close(listed(x), tupled(x))


def test_dropout_acts_in_training_alone():
    mixer, x = Attention(DIM, proj_drop=0.5).double(), make_input(3, 5)
    assert (mixer(x) == 0).any()
    assert not (mixer.eval()(x) == 0).any()


@pytest.mark.parametrize("kind", [WindowAttention, GridAttention])
def test_a_window_larger_than_the_map(kind):
    message = r"window_size is \(9, 9\) and the map is \(8, 12\): .* Take a smaller window, or window_size=None"
    with pytest.raises(InputError, match=message):
        kind(DIM, window_size=9).double()(make_input(8, 12))


def test_a_neighborhood_larger_than_the_map():
    with pytest.raises(InputError, match=r"window_size 9 .* axis 0 has 8: take a window of at most 8"):
        NeighborhoodAttention(DIM, window_size=9).double()(make_input(8, 12))


@pytest.mark.parametrize("heads", [0, 3, 9])
def test_heads_that_do_not_share_the_channels_evenly(heads):
    message = rf"num_heads is {heads} and dim is 8: .* Take one of \[1, 2, 4, 8\]"
    with pytest.raises(InputError, match=message):
        Attention(DIM, heads)


@pytest.mark.parametrize("kind", [WindowAttention, GridAttention])
@pytest.mark.parametrize(("space", "window"), [((6, 9), (2, 3)), ((7, 4), (3, 2)), ((1, 2), (1, 1))])
def test_a_number_of_windows_follows_the_map_and_its_table_is_interpolated(kind, space, window):
    mixer = kind(DIM, HEADS, num_windows=3, table_size=(4, 3)).double()
    torch.nn.init.normal_(mixer.position_bias_table)
    assert mixer.window(space) == window
    fixed = kind(DIM, HEADS, window_size=window).double()
    rows = [2 * size - 1 for size in window]
    table = F.interpolate(mixer.position_bias_table[None], rows, mode="bilinear")[0]
    fixed.load_state_dict({**mixer.state_dict(), "position_bias_table": table})
    x = make_input(*space)
    assert_close(mixer(x), fixed(x))


def test_a_table_of_the_window_is_not_interpolated():
    plain, sized = (WindowAttention(DIM, HEADS, window_size=3, **extra).double() for extra in ({}, {"table_size": 3}))
    sized.load_state_dict(plain.state_dict())
    x = make_input(6, 9)
    assert torch.equal(sized(x), plain(x))
    assert WindowAttention(DIM, HEADS, num_windows=2).position_bias_table.shape == (HEADS, 13, 13)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_tables_of_every_number_of_axes_are_interpolated(axes):
    mixer = WindowAttention(DIM, HEADS, num_windows=1, table_size=2, axes=axes).double()
    torch.nn.init.constant_(mixer.position_bias_table, 3.0)  # a constant says nothing, however it is interpolated
    x = make_input(*[3, 4, 5][:axes])
    plain = Attention(DIM, HEADS).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != "position_bias_table"})
    assert_close(mixer(x), plain(x))


def test_a_number_of_windows_and_their_size():
    with pytest.raises(InputError, match="window_size is 7 and num_windows is 2: one follows from the other"):
        WindowAttention(DIM, window_size=7, num_windows=2)
    with pytest.raises(InputError, match="num_windows is 0"):
        GridAttention(DIM, num_windows=0)


@pytest.mark.parametrize(("space", "size"), [((8, 6), 4), ((7,), 3), ((3, 2, 5), 2), ((2, 2), 5)])
def test_padded_windows_attend_to_zeros_at_the_end_of_the_map(space, size):
    layer = WindowAttention(8, 2, window_size=size, padded=True, position_bias=False).double()
    x = torch.randn(2, *space, 8, dtype=torch.float64)
    larger = [-(-length // size) * size for length in space]
    padded = x.new_zeros(2, *larger, 8)
    inside = (slice(None), *(slice(length) for length in space))
    padded[inside] = x
    plain = WindowAttention(8, 2, window_size=size, position_bias=False).double()
    plain.load_state_dict(layer.state_dict())
    assert_close(layer(x), plain(padded)[inside])
    with tap(layer) as seen:
        layer(x)
    tokens = torch.arange(torch.Size(larger).numel()).view(larger)[inside[1:]].flatten()
    with tap(plain) as whole:
        plain(padded)
    assert_close(seen.attention[""], whole.attention[""][:, :, tokens][..., tokens])
    with pytest.raises(InputError, match="padded windows serve none"):
        layer(x, x.new_zeros(2, 1, 8))


@pytest.mark.parametrize(("space", "options"), [((8, 6), {}), ((6, 9, 3), {}), ((7, 5), {"padded": True})])
def test_windows_are_cut_before_the_projection_or_after_it(space, options):
    """Zeros as a table of positions take the other way."""
    cut = WindowAttention(8, 2, position_bias=False, window_size=3 if len(space) == 3 else 2, **options).double()
    whole = WindowAttention(8, 2, axes=len(space), window_size=cut.window_size, **options).double()
    whole.load_state_dict(cut.state_dict() | {"position_bias_table": torch.zeros_like(whole.position_bias_table)})
    x = torch.randn(2, *space, 8, dtype=torch.float64, requires_grad=True)
    outs = cut(x), whole(x)
    assert_close(*outs)
    upstream = torch.randn_like(x)
    assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in outs))
