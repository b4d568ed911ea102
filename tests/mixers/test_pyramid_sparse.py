"""PyramidSparseAttention: orders and blocks, causal sequences, sampling, errors."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import Attention, PyramidSparseAttention


def make_mixer(**options):
    return PyramidSparseAttention(8, 2, **options).double()


def make_map(*space):
    return torch.randn(2, *space, 8, dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "block"), [(1, 8), (63, 8), (196, 32), (784, 64), (9000, 64)])
def test_blocks_cut_a_sequence_in_about_eight(tokens, block):
    assert make_mixer().blocks(tokens) == (block, block)
    assert make_mixer(query_block=5).blocks(tokens) == (5, block)


@pytest.mark.parametrize("order", ["gilbert", "row", "tile"])
@pytest.mark.parametrize("space", [(30,), (5, 7), (3, 4, 5)], ids=str)
def test_with_all_blocks_in_full_every_order_is_dense_attention(order, space):
    mixer, dense, x = make_mixer(ends={1: 1.0}, order=order), Attention(8, 2).double(), make_map(*space)
    dense.load_state_dict(mixer.state_dict())
    assert_close(mixer(x), dense(x))


def test_the_order_decides_what_a_block_holds():
    x = make_map(8, 8)
    mixers = [make_mixer(order=order, ends={8: 1.0}, least=None) for order in ("gilbert", "row", "tile")]
    for mixer in mixers:
        mixer.load_state_dict(mixers[0].state_dict())
    groups = []
    for mixer in mixers:
        with saccade.tap(mixer) as seen:
            mixer(x)
        weights = seen[""].attention[0, 0, 0]
        groups.append((weights == weights[0]).nonzero().flatten().tolist())  # with whom the first token is averaged
    assert groups[1] == groups[2] == list(range(8))  # the first row, of the map and of a tile of 8 x 8
    assert groups[0] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_causal_sequences_and_what_taps_see_of_them():
    mixer, x = make_mixer(causal=True, query_block=8, key_block=8), make_map(45)
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    assert not seen[""].attention.triu(1).any()
    changed = x.clone()
    changed[:, 32:] += 1
    assert_close(mixer(changed)[:, :32], out[:, :32])


def test_similar_keys_are_read_coarsely_and_others_are_not():
    mixer = make_mixer(ends={8: 1.0}, least=None, similarity={2: 0.999, 4: 0.999, 8: 0.999}, order="row")
    constant = make_map(1).expand(2, 64, 8)
    for x, expected in ((constant, {8}), (make_map(64), {1})):
        query, key, _ = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in mixer.qkv(x).chunk(3, -1))
        assert set(mixer.levels(query, key).unique().tolist()) == expected


def test_a_sample_follows_the_seed():
    mixer, x = make_mixer(sample=0.25), make_map(12, 12)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(mixer(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="order is 'hilbert': did you mean gilbert"):
        make_mixer(order="hilbert")
    with pytest.raises(InputError, match="causal is True: an order of tokens is one of sequences"):
        make_mixer(causal=True)(make_map(4, 4))
    with pytest.raises(InputError, match="key_block is 12 and a level is 8"):
        make_mixer(key_block=12)(make_map(4, 4))
    with pytest.raises(InputError, match="the curve fills one to three axes"):
        make_mixer()(make_map(2, 2, 2, 2))
