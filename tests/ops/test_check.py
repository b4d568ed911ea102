"""Checks of shapes: each error shows what was given, what was expected, and what to do."""

import pytest
import torch

from saccade.errors import InputError
from saccade.ops.check import check_attention, check_positive, per_axis

SHAPES = {"query": (2, 4, 6, 3), "key": (2, 2, 7, 3), "value": (2, 2, 7, 5)}


def check(axes=None, **changed):
    check_attention(*(torch.zeros(shape) for shape in (SHAPES | changed).values()), axes=axes)


def test_shapes_that_fit_pass():
    check()
    check(axes=1)
    check(query=(2, 4, 5, 6, 3), key=(2, 4, 1, 1, 3), value=(2, 4, 1, 1, 8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"value": (2, 2, 6, 5)},
            r"value is \(2, 2, 6, 5\) but key is \(2, 2, 7, 3\): both share .* one value",
        ),
        ({"key": (2, 2, 7, 4)}, r"key is \(2, 2, 7, 4\) but query is \(2, 4, 6, 3\): both share B and D. Give keys of"),
        ({"query": (1, 4, 6, 3)}, r"key is \(2, 2, 7, 3\) but query is \(1, 4, 6, 3\): both share B and D"),
        ({"query": (2, 5, 6, 3)}, "query has 5 heads and key has 2: .* Give a number of key heads that divides 5"),
        ({"query": (2, 4, 2, 3, 3)}, r"query is \(2, 4, 2, 3, 3\), key is .* same number of axes. Add the"),
        (
            {"query": (4, 6, 3), "key": (2, 7, 3), "value": (2, 7, 5)},
            r"query is \(4, 6, 3\), .* \(B, heads, \*space",
        ),
        ({"axes": 1, "query": (2, 4, 2, 3, 3)}, r"query is \(2, 4, 2, 3, 3\): give \(B, heads, space, D\)"),
        ({"axes": 2}, r"query is \(2, 4, 6, 3\): give \(B, heads, space, space, D\)"),
    ],
)
def test_shapes_that_do_not_fit(changed, message):
    with pytest.raises(InputError, match=message):
        check(**changed)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (
            (torch.float32, torch.int64, torch.float32),
            "key is torch.int64: attention takes floating-point tensors",
        ),
        ((torch.float32, torch.float32, torch.float64), "value is torch.float64 on cpu: all three share one dtype and"),
    ],
)
def test_kinds_that_do_not_fit(dtypes, message):
    with pytest.raises(TypeError, match=message):
        check_attention(*(torch.zeros(shape, dtype=dtype) for shape, dtype in zip(SHAPES.values(), dtypes)))


@pytest.mark.parametrize("value", [0, -3, 1.0, "7", None, (1, 0), [2, 2.5]])
def test_sizes_are_integers_of_at_least_1(value):
    with pytest.raises(InputError, match=r"size is .*: give an integer of at least 1, or one for each axis"):
        check_positive(size=value)


def test_one_value_serves_all_axes_and_a_sequence_needs_one_each():
    check_positive(size=7, other=(1, 2), third=[3, 4])
    assert per_axis("size", True, 3) == (True, True, True)
    assert per_axis("size", [1, 2], 2) == (1, 2)
    with pytest.raises(InputError, match=r"size is \(1, 2\): the map has 3 axes. Give one value, or 3"):
        per_axis("size", (1, 2), 3)
