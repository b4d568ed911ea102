"""reuse_attention: which steps attend in full, when it chooses, what it keeps."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import Global, ReuseState, Window, choosing_step, reuse_attention, sparse_attention


def run(steps, choose_at, inputs):
    seen, state = [], ReuseState()

    def choose(query, key):
        seen.append(query)
        return Window(2)

    for query, key, value in inputs[:steps]:
        out, state = reuse_attention(query, key, value, state, choose, choose_at=choose_at)
        yield out, seen


@pytest.mark.parametrize("choose_at", [0, 1, 3, 9])
def test_full_up_to_the_choosing_step_and_the_pattern_after_it(choose_at):
    inputs = torch.randn(5, 3, 1, 2, 6, 4, dtype=torch.float64)
    for step, (out, seen) in enumerate(run(5, choose_at, inputs)):
        assert_close(out, sparse_attention(*inputs[step], Global() if step <= choose_at else Window(2)))
        assert len(seen) == (step >= choose_at)
        assert all(torch.equal(each, inputs[choose_at][0]) for each in seen)


def test_states_are_values():
    query = torch.randn(1, 2, 6, 4)
    state = ReuseState()
    results = [
        reuse_attention(query, query, query, state, lambda query, key: Window(2), choose_at=0).state for _ in "ab"
    ]
    assert state == ReuseState(0, None)
    assert results == [ReuseState(1, Window(2))] * 2


@pytest.mark.parametrize(("steps", "skip", "expected"), [(128, 0.2, 26), (10, 0.0, 1), (10, 1.0, 11), (1, 0.5, 1)])
def test_the_choosing_step(steps, skip, expected):
    assert choosing_step(steps, skip) == expected


def test_errors_say_what_to_do():
    query = torch.randn(1, 2, 6, 4)
    with pytest.raises(InputError, match="state is at step 3 without a pattern, and choose_at is 1: begin with Reuse"):
        reuse_attention(query, query, query, ReuseState(3), lambda query, key: Window(2), choose_at=1)
    with pytest.raises(InputError, match=r"skip is 1\.2"):
        choosing_step(10, 1.2)
