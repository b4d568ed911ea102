"""ChunkedHistoryAttention: chunks of a video, at once and one by one, what they see, errors."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import ChunkedHistoryAttention
from saccade.ops import Global


def make_mixer(**options):
    return ChunkedHistoryAttention(8, 2, **options).double()


def make_input(*space):
    return torch.randn(2, *space, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("frames", "chunk_frames", "bounds"),
    [
        (8, None, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (7, None, [(0, 2), (2, 4), (4, 6), (6, 7)]),
        (2, None, [(0, 1), (1, 2)]),
        (1, None, [(0, 1)]),
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (2, 3, [(0, 2)]),
    ],
)
def test_time_is_cut_in_chunks_and_sparsity_grows_at_the_cost_that_was_asked(frames, chunk_frames, bounds):
    schedule = make_mixer(chunk_frames=chunk_frames, sparsity=0.6).schedule(frames)
    assert [(start, stop) for start, stop, _ in schedule] == bounds
    assert schedule[0][2] == 0
    costs = [(stop - start) * stop for start, stop in bounds[1:]]
    if costs:
        spent = sum(cost * sparsity for cost, (_, _, sparsity) in zip(costs, schedule[1:]))
        assert spent / sum(costs) == pytest.approx(0.6)


@pytest.mark.parametrize("space", [(8, 4, 3), (7, 6), (5,), (3, 1, 1)], ids=str)
def test_one_by_one_chunks_give_what_they_give_at_once(space):
    mixer, x = make_mixer(frames=1), make_input(*space)
    history, outs = None, []
    for start, stop, sparsity in mixer.schedule(space[0]):
        out, history = mixer.extend(x[:, start:stop], history, sparsity=sparsity)
        outs.append(out)
    assert_close(torch.cat(outs, 1), mixer(x))


def test_no_chunk_sees_a_later_one():
    mixer, x = make_mixer(), make_input(8, 4, 3)
    out = mixer(x)
    for start in (2, 4, 6):
        changed = x.clone()
        changed[:, start:] += torch.randn_like(changed[:, start:])
        assert_close(mixer(changed)[:, :start], out[:, :start])
        assert (mixer(changed)[:, start:] - out[:, start:]).abs().max() > 0.01


def test_taps_show_the_dense_first_chunk_and_the_density_of_the_others():
    mixer, x = make_mixer(block_size=2, frames=None), make_input(8, 4, 4)
    with saccade.tap(mixer) as seen:
        mixer(x)
    shown = (seen[""].attention > 0).unflatten(2, (8, 16)).unflatten(4, (8, 16))
    for start, stop, sparsity in mixer.schedule(8):
        share = shown[:, :, start:stop, :, :stop].double().mean((2, 3, 4, 5))
        kept = round((1 - sparsity) * stop * 4) / (stop * 4)
        assert_close(share, torch.full_like(share, kept))
        assert not shown[:, :, start:stop, :, stop:].any()


def test_own_and_first_and_last_frames_can_always_be_chosen():
    mixer = make_mixer(frames=1, sink_frames=1, recent_frames=1, chunk_frames=2, sparsity=0.0, base=0.5, block_size=2)
    query, key, _ = mixer._project(make_input(8, 4, 4))
    chosen = mixer.pattern(query[:, :, 6:], key, 1e-9).pairs((2, 4, 4)).unflatten(-1, (8, 4)).any(-1)
    assert chosen[..., [0, 5, 6, 7]].all()
    assert (chosen.sum(-1) == 5).all()


def test_a_first_chunk_is_global_and_a_dense_later_one_sees_all():
    mixer = make_mixer(frames=1)
    query, key, _ = mixer._project(make_input(6, 4, 4))
    assert mixer.pattern(query, key, 0.0) == Global()
    assert mixer.pattern(query[:, :, 5:], key, 0.0).mask((1, 4, 4)).all()


def test_blocks_fit_into_frames():
    mixer = make_mixer()
    assert mixer._block((30, 45)) == (8, 8)
    assert mixer._block((4, 1)) == (2, 1)
    assert mixer._block(()) == ()
    assert make_mixer(block_size=(3, 50))._block((4, 6)) == (3, 6)


def test_errors_say_what_to_give():
    with pytest.raises(InputError, match=r"target is 1\.5"):
        make_mixer(sparsity=1.5)
    with pytest.raises(InputError, match=r"base is 0\.5: give 0 <= target <= base < 1"):
        make_mixer(sparsity=0.75, base=0.5)
    with pytest.raises(InputError, match="chunk_frames is 0"):
        make_mixer(chunk_frames=0)
    with pytest.raises(InputError, match="the map has 2 axes"):
        make_mixer(block_size=(2, 2, 2))(make_input(8, 4, 4))
