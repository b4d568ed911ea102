"""HaloAttention against its paper's equation, written with unfold; strides; errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import HaloAttention, WindowAttention

DIM, HEADS = 8, 2


def make_input(*space):
    return torch.randn(2, *space, DIM, dtype=torch.float64)


def attend_as_published(mixer, x, stride=1):
    """Blocks of queries, regions of the zero-padded keys and values, one row of each table for each offset."""
    block, halo = mixer.block_size, mixer.halo_size
    batch, height, width = x.shape[:-1]
    win, size = block + 2 * halo, block // stride

    query = mixer.q(x[:, ::stride, ::stride]).movedim(-1, 1)
    query = F.unfold(query, size, stride=size).view(batch, HEADS, mixer.dim_head, size * size, -1)
    both = F.unfold(F.pad(mixer.kv(x).movedim(-1, 1), [halo] * 4), win, stride=block)
    both = both.view(batch, HEADS, -1, win * win, both.shape[-1])
    key, value = both[:, :, : mixer.dim_head], both[:, :, mixer.dim_head :]

    i, j = torch.arange(size), torch.arange(win)
    rows = j[None] - i[:, None] + win - 1
    down, along = (table[rows] for table in mixer.tables)  # (size, win, D)
    tables = down[:, None, :, None] + along[None, :, None]  # (size, size, win, win, D)
    tables = tables.flatten(2, 3).flatten(0, 1)
    products = torch.einsum("bhdqn,bhdkn->bhnqk", query, key) * mixer.dim_head**-0.5
    positions = torch.einsum("bhdqn,qkd->bhnqk", query, tables)
    positions = positions * mixer.dim_head**-0.5 if mixer.scale_position else positions
    out = torch.einsum("bhnqk,bhekn->bheqn", (products + positions).softmax(-1), value)
    out = F.fold(out.flatten(1, 3), (height // stride, width // stride), size, stride=size)
    return mixer.proj(out.movedim(1, -1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"dim_head": 3, "qkv_bias": True, "scale_position": True, "dim_out": 6}], ids=str
)
def test_it_is_the_published_attention(stride, options):
    mixer = HaloAttention(DIM, HEADS, block_size=4, halo_size=2, stride=stride, **options).double()
    x = make_input(8, 12)
    out = mixer(x)
    assert out.shape == (2, 8 // stride, 12 // stride, options.get("dim_out", DIM))
    assert_close(out, attend_as_published(mixer, x, stride))


@pytest.mark.parametrize("options", [{"block_size": 4, "avg_down": True}, {"block_size": 3}], ids=str)
def test_a_stride_that_pools_attends_with_all_queries_first(options):
    mixer = HaloAttention(DIM, HEADS, halo_size=1, stride=2, out_proj=False, **options).double()
    same = HaloAttention(DIM, HEADS, halo_size=1, out_proj=False, block_size=options["block_size"]).double()
    same.load_state_dict(mixer.state_dict())
    x = make_input(12, 6)
    pooled = F.avg_pool2d(same(x).movedim(-1, 1), 2).movedim(1, -1)
    assert_close(mixer(x), pooled)


@pytest.mark.parametrize("space", [(2, 2), (6, 6), (8, 14), (16, 10)])
def test_the_default_block_serves_a_stride(space):
    out = HaloAttention(DIM, HEADS, stride=2).double()(make_input(*space))
    assert out.shape == (2, space[0] // 2, space[1] // 2, DIM)


def test_the_receptive_field_is_the_block_and_its_halo():
    mixer, x = HaloAttention(DIM, HEADS, block_size=4, halo_size=1).double(), make_input(12, 12).requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[:, 5, 9].square().sum(), x)
    field = torch.zeros(12, 12, dtype=torch.bool)
    field[3:9, 7:12] = True
    assert torch.equal(grad.abs().sum((0, -1)) > 0, field)


def test_without_a_halo_and_positions_it_is_window_attention():
    mixer, x = HaloAttention(DIM, HEADS, block_size=4, halo_size=0).double(), make_input(8, 12)
    window = WindowAttention(DIM, HEADS, window_size=4, position_bias=False, qkv_bias=False).double()
    with torch.no_grad():
        for table in mixer.tables:
            table.zero_()
        by_head = mixer.kv.weight.view(HEADS, 2, DIM // HEADS, DIM)
        window.qkv.weight.copy_(torch.cat([mixer.q.weight, *by_head.transpose(0, 1).flatten(1, 2)]))
    window.proj = mixer.proj
    assert_close(mixer(x), window(x))


def test_parameters_depend_on_block_and_halo_through_the_tables_alone():
    counts = set()
    for block, halo in [(4, 1), (8, 3), (7, 2)]:
        mixer = HaloAttention(DIM, HEADS, block_size=block, halo_size=halo)
        tables = 2 * (2 * (block + 2 * halo) - 1) * DIM // HEADS
        counts.add(sum(parameter.numel() for parameter in mixer.parameters()) - tables)
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("options", "space", "message"),
    [
        ({"stride": 3}, (8, 8), "stride is 3: HaloNet's attention keeps every query .1. or every second one .2."),
        (
            {"block_size": 9},
            (8, 12),
            r"block_size is 9 and the map is \(8, 12\): .*, block_size=None, .* clip_block=True",
        ),
        ({}, (12,), r"x is \(2, 12, 8\): the position tables are for 2 axes. Set axes=1"),
    ],
)
def test_calls_that_cannot_be_served(options, space, message):
    with pytest.raises(InputError, match=message):
        HaloAttention(DIM, **options).double()(make_input(*space))


def test_a_map_that_the_stride_does_not_divide_is_one_with_zero_keys_at_its_end():
    """Of a map without bias, a row of zeros gives zero keys and values, as the halo has them."""
    mixer, x = HaloAttention(DIM, HEADS, block_size=4, halo_size=2, stride=2).double(), make_input(7, 9)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    assert mixer(x).shape[1:3] == (4, 5)
    assert_close(mixer(x), mixer(padded))
    with saccade.tap(mixer) as seen:
        mixer(x)
    assert seen[""].attention.shape[2:] == (20, 63)


def test_a_block_larger_than_the_map_is_clipped_to_it_when_asked():
    mixer, x = HaloAttention(DIM, HEADS, block_size=6, clip_block=True, halo_size=1).double(), make_input(5, 5)
    same = HaloAttention(DIM, HEADS, block_size=5, halo_size=1).double()
    state = mixer.state_dict()
    same.load_state_dict(state | {name: state[name][1:-1] for name in ("tables.0", "tables.1")})
    assert_close(mixer(x), same(x))
