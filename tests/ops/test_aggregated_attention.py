"""aggregated_attention: its definition token by token, both implementations, its coordinates, errors."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import (
    SlidingWindow,
    aggregated_attention,
    aggregated_attention_weights,
    pooled_coordinates,
    window_lengths,
)

HEADS, DIM, VALUE = 2, 4, 3


def make_inputs(space, cells=5, window=(3, 3), seed=0):
    """Query, key, value, pooled key and value, then bias of window and pooled map and weights of the window."""
    rng = torch.Generator().manual_seed(seed)
    places = torch.Size(window).numel()
    shapes = [(2, HEADS, *space, DIM), (2, HEADS, *space, DIM), (2, HEADS, *space, VALUE)]
    shapes += [(2, HEADS, cells, DIM), (2, HEADS, cells, VALUE), (HEADS, *window)]
    shapes += [(HEADS, torch.Size(space).numel(), cells), (2, HEADS, *space, places)]
    return [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]


def call(inputs, window, **options):
    *tensors, window_bias, pooled_bias, window_weights = inputs
    options = {"window_bias": window_bias, "pooled_bias": pooled_bias, "window_weights": window_weights} | options
    return aggregated_attention(*tensors, window, **options)


def attend_one(inputs, window, image, head, token, space):
    """The definition: logits of the window's places inside the map, then of the cells; one softmax; places again."""
    query, key, value, pooled_key, pooled_value, window_bias, pooled_bias, window_weights = inputs
    q = query[(image, head, *token)]
    logits, values, added = [], [], torch.zeros(VALUE, dtype=q.dtype)
    for number, place in enumerate(product(*map(range, window))):
        other = tuple(t + p - w // 2 for t, p, w in zip(token, place, window))
        if all(0 <= o < length for o, length in zip(other, space)):
            logits.append(0.7 * q @ key[(image, head, *other)] + window_bias[(head, *place)])
            values.append(value[(image, head, *other)])
            added = added + window_weights[(image, head, *token, number)] * values[-1]
    row = 0
    for t, length in zip(token, space):
        row = row * length + t
    for cell in range(pooled_key.shape[2]):
        logits.append(0.7 * q @ pooled_key[image, head, cell] + pooled_bias[head, row, cell])
        values.append(pooled_value[image, head, cell])
    return torch.stack(logits).softmax(0) @ torch.stack(values) + added


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize(
    ("space", "window"),
    [((4, 3), (3, 3)), ((1, 1), (3, 3)), ((2, 5), (1, 7)), ((6,), (3,)), ((2, 3, 2), (3, 1, 3))],
)
def test_it_is_one_softmax_over_window_and_cells(space, window, impl):
    inputs = [each.detach() for each in make_inputs(space, window=window)]
    out = call(inputs, window, scale=0.7, impl=impl)
    for image, head, token in product(range(2), range(HEADS), product(*map(range, space))):
        assert_close(out[(image, head, *token)], attend_one(inputs, window, image, head, token, space))


sizes = st.integers(1, 12)


@given(
    space=st.one_of(st.tuples(sizes), st.tuples(sizes, sizes)),
    reach=st.integers(0, 3),
    cells=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_tiled_equals_reference_in_value_and_gradient(space, reach, cells, seed):
    window = (2 * reach + 1,) * len(space)
    inputs = make_inputs(space, cells, window, seed)
    tiled, reference = (call(inputs, window, impl=impl) for impl in ("auto", "reference"))
    assert_close(tiled, reference)
    upstream = torch.randn_like(reference)
    assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (tiled, reference)))


def test_without_biases_and_weights_it_is_plain_attention_over_both():
    inputs = make_inputs((5, 4))
    none = {"window_bias": None, "pooled_bias": None, "window_weights": None}
    assert_close(*(call(inputs, 3, impl=impl, **none) for impl in ("tiled", "reference")))
    window, pooled = aggregated_attention_weights(inputs[0], inputs[1], inputs[3], 3)
    assert_close(window.sum(-1) + pooled.sum(-1), torch.ones(2, HEADS, 20, dtype=torch.float64))
    assert torch.equal(window > 0, SlidingWindow(1, 1).mask((5, 4)).expand_as(window))


def test_half_precision_stays_what_it_is():
    inputs = [each.detach().bfloat16() for each in make_inputs((5, 4))]
    for impl in ("tiled", "reference"):
        assert call(inputs, 3, impl=impl).dtype == torch.bfloat16


@given(space=st.lists(sizes, min_size=1, max_size=2), reach=st.integers(0, 4))
def test_lengths_count_the_window_inside_the_map(space, reach):
    inside = SlidingWindow(reach, reach).mask(tuple(space)).sum(-1)
    assert torch.equal(window_lengths(tuple(space), 2 * reach + 1).flatten(), inside)


@given(length=st.integers(1, 30), data=st.data())
def test_cells_stand_in_the_middle_of_their_tokens(length, data):
    cells, full = data.draw(st.integers(1, length)), data.draw(st.integers(2, 40))
    places = torch.arange(length, dtype=torch.float64)
    middle = torch.nn.functional.adaptive_avg_pool1d(places.view(1, 1, -1), cells).flatten()
    offset = 8 * (places.unsqueeze(1) - middle) / (full - 1)
    table, rows = pooled_coordinates((length,), (cells,), (full,))
    assert_close(table[rows[0], 0].double(), offset.sign() * torch.log2(offset.abs() + 1) / 3, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("space", "cells"), [((6, 5), (3, 2)), ((8, 8), (2, 2)), ((7, 7), (7, 7)), ((12, 9), (4, 3))])
def test_each_distinct_position_is_in_the_table_once(space, cells):
    table, rows = pooled_coordinates(space, cells)
    for axis, row in enumerate(rows):
        assert torch.equal(row.unique(), torch.arange(table.shape[axis]))


def test_an_axis_of_one_token_has_no_distance():
    table, rows = pooled_coordinates((1, 4), (1, 2))
    assert rows[0].tolist() == [[0]]
    assert table.isfinite().all()
    assert (table[..., 0] == 0).all()


def test_errors_say_what_to_do():
    inputs = make_inputs((5, 4))
    with pytest.raises(InputError, match=r"window_size is 4: a window has its query in the middle\. Give odd numbers"):
        call(inputs, 4)
    with pytest.raises(InputError, match=r"window_bias is \(2, 3, 3\): give \(2, 5, 5\)"):
        call(inputs, 5)
    with pytest.raises(InputError, match=r"window_weights is \(2, 2, 5, 4, 4\): give \(2, 2, 5, 4, 9\)"):
        call(inputs, 3, window_weights=inputs[-1][..., :4])
    with pytest.raises(InputError, match="impl is 'fused': choose one of auto, reference, tiled"):
        call(inputs, 3, impl="fused")
    with pytest.raises(InputError, match="the keys stand where the queries are"):
        call([inputs[0], inputs[1][:, :1], inputs[2][:, :1], *inputs[3:]], 3)
    with pytest.raises(InputError, match="both share B and D"):
        call([*inputs[:3], inputs[3][..., :2], *inputs[4:]], 3)
