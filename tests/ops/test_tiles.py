"""Tiles in chunks: any chunk gives the reference; what is kept for the backward pass; derivatives of all kinds."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from saccade.ops import (
    Grid,
    Neighborhood,
    QueryTables,
    RelativeTable,
    Selection,
    Sinks,
    Window,
    select_top_k,
    sparse_attention,
    tiles,
)

SPACE, HEADS, KV_HEADS, DIM = (9, 10), 4, 2, 3
BLOCKS = {"query_block": (3, 4), "key_block": (3, 4), "ragged": True}
PATTERNS = {
    "one kind of tile": Window((3, 5)),
    "tiles in another order": Grid((3, 5)),
    "kinds of tiles": Neighborhood(3),
    "groups of tiles": Neighborhood(3) | Sinks(2),
    "nobody sees": Neighborhood(3) & Window((3, 5)) & ~Window((3, 5)),
    "lists of each head": select_top_k(
        torch.randn(2, HEADS, 9, 9), 2, query_block=(3, 4), key_block=(3, 4), ragged=True
    ),
    "lists of all heads": select_top_k(torch.randn(2, 1, 9, 9), 2, query_block=(3, 4), key_block=(3, 4), ragged=True),
}
BIASES = ("no bias", "number tables", "query tables")


def make_inputs(batch=2, dtype=torch.float64):
    shapes = [(batch, HEADS, *SPACE, DIM), (batch, KV_HEADS, *SPACE, DIM), (batch, KV_HEADS, *SPACE, 5)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def make_bias(name, dtype=torch.float64):
    """The bias, and its tables."""
    if name == "number tables":
        table = torch.randn(HEADS, 21, 21, dtype=dtype, requires_grad=True)
        return RelativeTable(table), [table]
    if name == "query tables":
        tables = [torch.randn(21, DIM, dtype=dtype, requires_grad=True) for _ in SPACE]
        return QueryTables(tables), tables
    return None, []


@pytest.mark.parametrize("chunk", [1, 4000, 10**9], ids=["a tile", "some tiles", "all tiles"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("return_lse", [False, True])
def test_chunks_of_any_size_give_the_reference(pattern, bias, chunk, return_lse, monkeypatch):
    if isinstance(pattern, Selection) and bias != "no bias":
        pytest.skip("selections take no bias")
    monkeypatch.setattr(tiles, "CHUNK_BYTES", chunk)
    inputs, (bias, tables) = make_inputs(), make_bias(bias)
    options = {"bias": bias, "return_lse": return_lse}
    results = [sparse_attention(*inputs, pattern, impl=impl, **options) for impl in ("tiled", "reference")]
    ours, expected = (tuple(each) if return_lse else (each,) for each in results)
    assert_close(ours, expected)
    upstream = [torch.randn_like(x) for x in expected]
    leaves = [*inputs, *tables]
    grads = [torch.autograd.grad(each, leaves, upstream, materialize_grads=True) for each in (ours, expected)]
    assert_close(*grads)


def test_a_gradient_of_the_log_sum_exp_alone():
    inputs = make_inputs()
    grads = [
        torch.autograd.grad(
            sparse_attention(*inputs, Neighborhood(3), return_lse=True, impl=impl).lse.sin().sum(), inputs[:2]
        )
        for impl in ("tiled", "reference")
    ]
    assert_close(*grads)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_window():
    def kept(window):
        inputs, found = [torch.randn(1, 4, 32, 32, 8, requires_grad=True) for _ in range(3)], {}
        table = torch.randn(4, 25, 25, requires_grad=True)

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sparse_attention(*inputs, Neighborhood(window), bias=RelativeTable(table))
        return sum(found.values())

    tensor = 4 * 32 * 32 * 8 * 4
    assert kept(3) == kept(11) <= 6 * tensor  # query, key, value, output, the log-sum-exp, places and the table


def test_most_tiles_of_a_map_are_of_one_kind():
    (region,), _ = Neighborhood(7).plan_regions((56, 56), True, torch.float32)
    assert len(region.query) == 49
    assert len(region.hidden) == region.offset.shape[1] == 9  # inside, four sides, four corners


@pytest.mark.parametrize("bias", BIASES)
def test_second_derivatives(bias):
    inputs, (bias, tables) = make_inputs(batch=1), make_bias(bias)
    for return_lse in (False, True):

        def gradients(impl, return_lse=return_lse):
            result = sparse_attention(*inputs, Neighborhood(3), bias=bias, return_lse=return_lse, impl=impl)
            total = sum(x.sin().sum() for x in (result if return_lse else (result,)))
            first = torch.autograd.grad(total, [*inputs, *tables], create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), [*inputs, *tables])

        assert_close(gradients("tiled"), gradients("reference"))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own imports
def test_transforms_of_functions():
    inputs, pattern = [x.detach() for x in make_inputs()], Neighborhood(3)

    def loss(query, impl="tiled"):
        out, lse = sparse_attention(query, *inputs[1:], pattern, return_lse=True, impl=impl)
        return out.square().sum() + lse.sum()

    query, direction = inputs[0], torch.randn_like(inputs[0])
    expected = torch.func.grad(lambda x: loss(x, "reference"))(query)
    assert_close(torch.func.grad(loss)(query), expected)
    assert_close(torch.func.jvp(loss, (query,), (direction,))[1], (expected * direction).sum())
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(query, direction))
        assert_close(forward_ad.unpack_dual(dual).tangent, (expected * direction).sum())
    assert_close(torch.func.vmap(loss)(torch.stack([query, direction])), torch.stack([loss(query), loss(direction)]))


def test_under_autocast_the_result_is_that_of_torchs_attention():
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparse_attention(*inputs, Neighborhood(3))
    assert out.dtype == torch.bfloat16
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    expected = sparse_attention(*halves, Neighborhood(3))
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    grads, half_grads = (torch.autograd.grad(x, leaves, upstream) for x, leaves in ((out, inputs), (expected, halves)))
    for grad, half in zip(grads, half_grads):
        assert torch.equal(grad, half.float())


@pytest.mark.parametrize("bias", BIASES)
def test_the_same_call_gives_the_same_bits(bias, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 4000)
    inputs, (bias, tables) = make_inputs(dtype=torch.float32), make_bias(bias, torch.float32)

    def call():
        out = sparse_attention(*inputs, Neighborhood(3), bias=bias)
        return out, *torch.autograd.grad(out.square().sum(), [*inputs, *tables])

    assert all(map(torch.equal, call(), call()))


def test_a_gradient_that_is_one_number_expanded():
    inputs = [torch.randn(1, 2, 12, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    grads = [
        torch.autograd.grad(sparse_attention(*inputs, Window(4), impl=impl).sum(), inputs)
        for impl in ("tiled", "reference")
    ]
    assert_close(*grads)
