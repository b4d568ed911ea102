"""Position tables: the row that an offset reads, their gradients, the published layouts, errors."""

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import Grid, Halo, Neighborhood, QueryTables, RelativeTable, Window, sparse_attention
from tests.ops.cases import patterns

HEADS, DIM = 2, 3


def make_inputs(space, value_dim=2):
    return [torch.randn(1, HEADS, *space, dim, dtype=torch.float64) for dim in (DIM, DIM, value_dim)]


def make_table(*sizes):
    return torch.randn(HEADS, *(2 * size - 1 for size in sizes), dtype=torch.float64, requires_grad=True)


@given(patterns(max_tokens=30))
def test_a_table_of_numbers_is_read_at_the_offset_of_each_axis(case):
    pattern, space = case
    offset, mask = pattern.offset(space), pattern.mask(space)
    reach = [int(along.abs().max()) for along in offset]
    table = make_table(*(each + 1 for each in reach))
    bias = RelativeTable(table)(torch.empty(0), offset.unsqueeze(1))[0]
    for n, m in mask.nonzero().tolist()[:50]:
        rows = [int(along[n, m]) + middle for along, middle in zip(offset, reach)]
        assert_close(bias[:, n, m], table[(slice(None), *rows)])


@given(patterns(max_tokens=30))
def test_vectors_are_read_at_the_offset_of_each_axis_and_summed(case):
    pattern, space = case
    offset, mask = pattern.offset(space), pattern.mask(space)
    reach = [int(along.abs().max()) for along in offset]
    tables = [torch.randn(2 * each + 1, DIM, dtype=torch.float64) for each in reach]
    query = torch.randn(2, 1, HEADS, len(mask), DIM, dtype=torch.float64)
    bias = QueryTables(tables)(query, offset.unsqueeze(1))
    for n, m in mask.nonzero().tolist()[:50]:
        vector = sum(table[int(along[n, m]) + middle] for table, along, middle in zip(tables, offset, reach))
        assert_close(bias[..., n, m], query[..., n, :] @ vector)


def test_a_table_gets_the_gradient_of_every_pair_that_reads_it():
    """With equal keys and a value of 1 for one key, the gradient is that of softmax over the window, summed by hand."""
    table = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    zeros, value = torch.zeros(1, 1, 4, 1, dtype=torch.float64), torch.tensor([1.0, 0, 0, 0]).double().view(1, 1, 4, 1)
    out = sparse_attention(zeros, zeros, value, Window(2), bias=RelativeTable(table))
    (grad,) = torch.autograd.grad(out.sum(), table)
    # query 0 sees itself (offset 0, value 1) and key 1 (offset 1); query 1 sees key 0 (offset -1, value 1) and itself
    assert_close(grad, torch.tensor([[0.25, 0.25 - 0.25, -0.25]], dtype=torch.float64))


def test_swins_table_is_the_same_read_from_query_to_key():
    """Swin's index counts query minus key, so its table stands the other way round on every axis."""
    height, width = 3, 4
    coordinate = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
    relative = coordinate[:, :, None] - coordinate[:, None, :]
    index = (relative[0] + height - 1) * (2 * width - 1) + relative[1] + width - 1
    table = make_table(height, width)
    swin = table.flatten(1)[:, index]
    offset = Window((height, width)).offset((height, width)).unsqueeze(1)
    assert_close(RelativeTable(table.flip(1, 2))(torch.empty(0), offset)[0], swin)


@pytest.mark.parametrize("table_of", ["numbers", "vectors"])
def test_a_grid_reads_its_table_as_a_window_does_on_the_reordered_map(table_of):
    """MaxViT's grid attention is window attention after a transposed reshape, its table included."""
    size, step = (2, 3), (3, 2)
    inputs = make_inputs((6, 6))
    bias = RelativeTable(make_table(*size))
    if table_of == "vectors":
        bias = QueryTables([torch.randn(2 * n - 1, DIM, dtype=torch.float64) for n in size])

    def reorder(x, rows, columns):
        return x.unflatten(3, columns).unflatten(2, rows).transpose(2, 3).transpose(4, 5).flatten(4, 5).flatten(2, 3)

    windows = [reorder(x, (size[0], step[0]), (size[1], step[1])) for x in inputs]
    windowed = sparse_attention(*windows, Window(size), bias=bias)
    expected = reorder(windowed, (step[0], size[0]), (step[1], size[1]))
    assert_close(sparse_attention(*inputs, Grid(size), bias=bias), expected)


def test_a_dilated_window_reads_its_table_as_an_undilated_one_on_each_interleaved_map():
    inputs, bias = make_inputs((9, 7)), RelativeTable(make_table(3, 3))
    out = sparse_attention(*inputs, Neighborhood(3, dilation=2), bias=bias)
    for row in (0, 1):
        for column in (0, 1):
            part = [x[:, :, row::2, column::2] for x in (*inputs, out)]
            assert_close(sparse_attention(*part[:3], Neighborhood(3), bias=bias), part[3])


def test_a_dead_row_of_a_halo_table_stays_without_gradient():
    """Rows 0..2h-1 of a block's table are never read, as in HaloNet."""
    block, halo = 3, 2
    table = torch.zeros(2 * (block + 2 * halo) - 1, DIM, dtype=torch.float64, requires_grad=True)
    inputs = make_inputs((6,))
    inputs[1:] = [torch.nn.functional.pad(x, (0, 0, halo, halo)) for x in inputs[1:]]
    out = sparse_attention(*inputs, Halo(block, halo, padded=True), bias=QueryTables([table]))
    (grad,) = torch.autograd.grad(out.square().sum(), table)
    assert torch.equal(grad.abs().sum(1) > 0, torch.arange(len(table)) >= 2 * halo)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (
            RelativeTable(torch.zeros(HEADS, 3, 4)),
            r"the tables have \(3, 4\) rows for 2 axes: give an odd number for each",
        ),
        (RelativeTable(torch.zeros(HEADS, 3)), r"the tables have \(3,\) rows for 2 axes"),
        (QueryTables([torch.zeros(3, DIM)]), r"the tables have \(3,\) rows for 2 axes"),
        (QueryTables([torch.zeros(3, DIM), torch.zeros(2, DIM)]), r"the tables have \(3, 2\) rows for 2 axes"),
    ],
)
def test_tables_that_do_not_fit_the_map(bias, message):
    with pytest.raises(InputError, match=message):
        sparse_attention(*make_inputs((4, 4)), Window(2), bias=bias)
