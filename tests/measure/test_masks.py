"""Timing masks: what is counted, what is compared, and what is told where something cannot run."""

import json

import pytest
import torch

from saccade.errors import InputError
from saccade.measure import bench_masks
from saccade.ops import MASKS, build_mask


def test_every_mask_is_timed_beside_dense_attention_which_agrees():
    told = []
    rows = bench_masks(list(MASKS), [70], heads=2, head_dim=8, peers=["dense"], progress=told.append)
    assert [row.mask for row in rows] == list(MASKS)
    assert told == [f"{name}, 70 tokens" for name in MASKS]
    for row in rows:
        dense = row.peers["dense"]
        assert dense.error < 1e-5
        assert min(row.tiled.forward, row.tiled.backward, dense.forward, dense.backward, dense.prepare) > 0
        assert row.speedups("dense") == (
            dense.forward / row.tiled.forward,
            dense.backward / row.tiled.backward,
        )
        forward, backward = row.tflops(row.tiled)
        assert forward == pytest.approx(row.cost.flops / (1e9 * row.tiled.forward))
        assert backward == pytest.approx(2.5 * row.cost.flops / (1e9 * row.tiled.backward))


def test_shares_are_those_of_the_mask():
    rng = torch.Generator().manual_seed(3)
    expected = build_mask("causal_document", 300, generator=rng).mask((300,))
    (row,) = bench_masks(["causal_document"], [300], batch=2, heads=3, head_dim=4, peers=[], tile=32, backward=False)
    assert row.density == pytest.approx(expected.double().mean().item())
    assert row.cost.flops == 4 * 4 * 6 * expected.sum()
    padded = torch.zeros(320, 320, dtype=torch.bool)
    padded[:300, :300] = expected
    tiles = padded.unflatten(1, (10, 32)).unflatten(0, (10, 32)).any(3).any(1)
    assert row.visited == pytest.approx(tiles.double().mean().item())
    assert row.density <= row.computed <= 1
    assert row.tiled.backward is None
    assert json.loads(json.dumps(row.as_dict()))["cost"]["pairs"] == 6 * expected.sum()


def test_a_peer_that_fails_is_named_with_its_reason(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler here\nand more")

    # the names that the function reads: doctests import the file as a module of their own
    monkeypatch.setitem(bench_masks.__globals__, "_flex", fail)
    monkeypatch.setitem(bench_masks.__globals__, "LARGEST_DENSE", 8)
    (row,) = bench_masks(["causal"], [9], heads=1, head_dim=4)
    assert row.peers["flex_attention"].note == "RuntimeError: no compiler here"
    assert row.peers["dense"].note == "a dense mask of 9 tokens is too large"
    assert row.speedups("flex_attention") == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["share_question", "variable_block_sparse"])
def test_flex_attention_agrees_and_says_that_it_does_not_train_on_a_cpu(name):
    (row,) = bench_masks([name], [256], heads=1, head_dim=16, peers=["flex_attention"])
    flex = row.peers["flex_attention"]
    assert flex.error < 1e-5
    assert flex.note == "no backward pass on this device"
    assert flex.backward is None


def test_other_forms_of_the_engine_are_timed_or_say_why_not():
    (row,) = bench_masks(["uniform_block_sparse"], [64], heads=1, head_dim=8, peers=["flex", "triton"])
    for peer in row.peers.values():
        assert peer.forward is None
        assert peer.note.startswith("InputError: impl is ")


def test_wrong_calls_say_what_to_do():
    with pytest.raises(InputError, match="mask is 'causl': did you mean causal"):
        bench_masks(["causl"], [8])
    with pytest.raises(InputError, match="peer is 'flexx': did you mean flex"):
        bench_masks(["causal"], [8], peers=["flexx"])
    with pytest.raises(InputError, match="length is 0: give a whole number of at least 1"):
        bench_masks(["causal"], [8, 0])
