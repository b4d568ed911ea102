"""ReusedBlocksAttention: steps, what taps see of them, options."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import Attention, ReusedBlocksAttention
from saccade.ops import ReuseState


def make_mixer(**options):
    return ReusedBlocksAttention(8, 2, **options).double()


def full(mixer, x):
    twin = Attention(8, 2).double()
    twin.load_state_dict(mixer.state_dict())
    return twin(x)


def test_steps_attend_in_full_and_then_in_the_blocks_of_one_step():
    mixer, maps, state = make_mixer(keep=0.2), torch.randn(4, 2, 8, 6, 8, dtype=torch.float64), ReuseState()
    for step, x in enumerate(maps):
        with saccade.tap(mixer) as seen:
            out, state = mixer.step(x, state, choose_at=1)
        value = mixer.qkv(x).chunk(3, -1)[2].flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2)
        mixed = (seen[""].attention @ value).transpose(1, 2).flatten(2)
        assert_close(mixer.proj(mixed).view_as(x), out)
        if step <= 1:
            assert_close(out, full(mixer, x))
    query, key, _ = mixer._project(maps[1])
    assert torch.equal(state.pattern.mask((8, 6)), mixer.choose(query, key).mask((8, 6)))
    assert ((seen[""].attention > 0) == state.pattern.mask((8, 6))).all()


def test_one_pass_chooses_for_itself():
    mixer, x = make_mixer(keep=0.2), torch.randn(2, 8, 6, 8, dtype=torch.float64)
    query, key, _ = mixer._project(x)
    out, _ = mixer.step(x, ReuseState(5, mixer.choose(query, key)), choose_at=0)
    assert_close(mixer(x), out)


def test_everything_kept_is_full_attention():
    mixer, x = make_mixer(keep=1.0), torch.randn(2, 7, 5, 8, dtype=torch.float64)
    assert_close(mixer(x), full(mixer, x))


def test_the_scale_of_choosing_is_its_own():
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    one, other = (make_mixer(block_size=2, keep=0.2, choosing_scale=scale) for scale in (None, 30.0))
    chosen = [each.choose(*one._project(x)[:2]).mask((16,)) for each in (one, other)]
    assert not torch.equal(*chosen)


def test_sequences_with_a_generated_part():
    mixer, x = make_mixer(block_size=2, generated=6), torch.randn(1, 16, 8, dtype=torch.float64)
    pairs = mixer.choose(*mixer._project(x)[:2]).pairs((16,))
    assert (pairs[..., 5:].sum(-1) == 1).all()
    assert mixer(x).shape == x.shape
    with pytest.raises(InputError, match="one axis of space"):
        mixer(x.view(1, 4, 4, 8))
