"""Composed patterns: laws of sets, selections that are cut and joined, a pattern for each head, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import (
    Causal,
    Documents,
    Global,
    GlobalTokens,
    Halo,
    Neighborhood,
    PerHead,
    RelativeTable,
    Selection,
    SelectionUnion,
    Sinks,
    SlidingWindow,
    Window,
    select_mask,
    select_top_k,
    sparse_attention,
    sparse_attention_weights,
)
from tests.ops.cases import patterns


def make_inputs(space, *, heads=4, kv_heads=2, dim=3):
    shapes = [(2, heads, *space, dim), (2, kv_heads, *space, dim), (2, kv_heads, *space, 5)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def check_engine(inputs, pattern, **options):
    fast, slow = (
        sparse_attention(*inputs, pattern, return_lse=True, impl=impl, **options) for impl in ("auto", "reference")
    )
    assert_close(fast, slow)
    assert_close(sparse_attention(*inputs, pattern, **options), slow.out)
    upstream = torch.randn_like(slow.out)
    assert_close(*(torch.autograd.grad(each.out, inputs, upstream) for each in (fast, slow)))
    return slow


# Laws of sets


@given(first=patterns(max_tokens=60), data=st.data())
def test_masks_combine_as_sets_do(first, data):
    a, space = first
    b = data.draw(st.sampled_from([Causal(2), Sinks(2), Global(), SlidingWindow(1, 1)]))
    if a.key_space(space) != space:
        with pytest.raises(InputError, match="need the same keys"):
            (a & b).key_space(space)
        return
    left, right = a.mask(space), b.mask(space)
    assert torch.equal((a & b).mask(space), left & right)
    assert torch.equal((a | b).mask(space), left | right)
    assert torch.equal((~a).mask(space), ~left)
    assert torch.equal((~(a | b)).mask(space), (~a & ~b).mask(space))


def test_a_complement_twice_is_the_pattern_itself():
    assert ~~Window(3) == Window(3)


def test_compositions_of_one_kind_are_one_flat_composition():
    assert len(((Window(2) | Sinks(1)) | (Causal() | Sinks(2))).parts) == 4
    assert len((Window(2) & (Sinks(1) & Causal())).parts) == 3


def test_documents_are_attention_to_each_alone():
    lengths = (3, 7, 2)
    inputs = make_inputs((12,))
    apart = [
        sparse_attention(*parts, Causal()) for parts in zip(*(x.split(lengths, 2) for x in inputs))
    ]  # fmt: skip
    assert_close(sparse_attention(*inputs, Causal() & Documents(lengths)), torch.cat(apart, 2))


def test_global_tokens_have_tiles_of_their_own():
    """Without them every tile that holds a global token would take the whole map for all its queries."""
    plan = (SlidingWindow(8) | GlobalTokens((0, 700))).plan((1024,))
    pairs = [tiles.query.numel() * tiles.key.shape[1] for tiles in plan.groups]
    assert sorted(tiles.query.numel() for tiles in plan.groups)[0] == 2
    assert sum(pairs) < 1024 * 100  # 64 + 8 + 2 keys for a query, and the two rows


def test_the_whole_is_ordinary_attention():
    assert (Window(2) | Global()).sees_all((6,))
    assert (Causal() | ~Causal()).sees_all((6,))
    assert not (Causal() & Global()).sees_all((6,))


# Selections


def make_selection(space=(12,), heads=4, query_block=3, key_block=2):
    count = [torch.Size(space).numel() // block for block in (query_block, key_block)]
    return select_top_k(torch.randn(2, heads, *count), 2, query_block=query_block, key_block=key_block)


@pytest.mark.parametrize("query_block", [1, 3])
@pytest.mark.parametrize("static", [Causal(), Neighborhood(5), Sinks(3), ~Window(4)], ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_a_selection_cut_by_a_pattern(query_block, static, heads):
    selection = make_selection(query_block=query_block, heads=heads)
    cut = selection & static
    assert torch.equal(cut.mask((12,)), selection.mask((12,)) & static.mask((12,)))
    assert_close((static & selection).mask((12,)), cut.mask((12,)))
    check_engine(make_inputs((12,)), cut)
    again = cut & Causal(2)
    assert torch.equal(again.mask((12,)), cut.mask((12,)) & Causal(2).mask((12,)))
    check_engine(make_inputs((12,)), again)


@pytest.mark.parametrize("query_block", [1, 3])
@pytest.mark.parametrize("static", [SlidingWindow(2), Sinks(3), GlobalTokens((5,)), Causal() & Sinks(4)], ids=str)
def test_a_selection_joined_with_a_pattern(query_block, static):
    selection = make_selection(query_block=query_block)
    both = selection | static
    assert torch.equal(both.mask((12,)), selection.mask((12,)) | static.mask((12,)))
    check_engine(make_inputs((12,)), both)
    more = static | selection | Window(3)
    assert torch.equal(more.mask((12,)), both.mask((12,)) | Window(3).mask((12,)))
    check_engine(make_inputs((12,)), more)


def test_selections_of_the_same_blocks_combine_pair_by_pair():
    first, second = make_selection(), make_selection()
    pairs = [each.pairs((12,)) for each in (first, second)]
    assert torch.equal((first | second).pairs((12,)), pairs[0] | pairs[1])
    assert torch.equal((first & second).pairs((12,)), pairs[0] & pairs[1])
    cut = (first & Causal()) & second
    assert torch.equal(cut.mask((12,)), (first & second).mask((12,)) & Causal().mask((12,)))


def test_a_selection_on_a_map_is_cut_in_row_major_order():
    selection = select_mask(torch.rand(1, 1, 4, 6) < 0.5, query_block=(2, 3), key_block=2)
    cut = selection & Neighborhood(3) & Causal()
    check_engine(make_inputs((4, 6)), cut)


# A pattern for each head


def test_heads_see_their_own_patterns():
    per_head = PerHead([Window(2), Global(), Window(2), Causal() & SlidingWindow(2)])
    inputs = make_inputs((6,))
    check_engine(inputs, per_head)
    out = sparse_attention(*inputs, per_head)
    for head, pattern in enumerate(per_head.patterns):
        alone = [inputs[0][:, head, None], *(x[:, head // 2, None] for x in inputs[1:])]
        assert_close(out[:, head, None], sparse_attention(*alone, pattern))


def test_biases_selections_and_extra_keys_go_with_their_heads():
    table = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    inputs = make_inputs((6,))
    extra = [torch.randn(2, 2, 2, size, dtype=torch.float64) for size in (3, 5)]
    static = PerHead([Window(2), Causal(), Window(2), Sinks(2)])
    check_engine(inputs, static, bias=RelativeTable(table), extra_key=extra[0], extra_value=extra[1])
    chosen = make_selection((6,), query_block=3)
    mixed = PerHead([chosen, Causal(), chosen & Causal(), chosen | Sinks(1)])
    assert mixed.mask((6,)).shape == (2, 4, 6, 6)
    assert torch.equal(mixed.mask((6,))[:, 2], (chosen & Causal()).mask((6,))[:, 2])
    check_engine(inputs, mixed)


def test_a_composition_reaches_into_the_heads():
    per_head = PerHead([Window(2), Window(3)])
    assert (per_head & Causal()).patterns == (Window(2) & Causal(), Window(3) & Causal())
    assert (Sinks(1) | per_head).patterns == (Sinks(1) | Window(2), Sinks(1) | Window(3))
    assert (~per_head).patterns == (~Window(2), ~Window(3))
    chosen = make_selection((6,), heads=2, query_block=1)
    both = per_head & chosen
    assert torch.equal(both.mask((6,)), per_head.mask((6,)) & chosen.mask((6,)))


def test_weights_of_every_head():
    inputs = make_inputs((6,), kv_heads=4)
    per_head = PerHead([Window(2), Global(), Causal(), Sinks(1)])
    weights = sparse_attention_weights(*inputs[:2], per_head)
    assert_close(weights @ inputs[2], sparse_attention(*inputs, per_head))


# Rows that see nothing, compilers


def test_queries_that_see_nothing_get_zero_with_a_gradient_of_zero():
    nothing = Window(2) & ~Window(2)
    inputs = make_inputs((6,))
    result = check_engine(inputs, nothing)
    assert (result.out == 0).all()
    assert (result.lse == -torch.inf).all()


@pytest.mark.parametrize(
    "pattern",
    [
        (SlidingWindow(2) | Sinks(1)) & Causal(),
        PerHead([Window(2), Causal(), Window(2), Documents((4, 8))]),
        SlidingWindow(1) | GlobalTokens((3,)),
    ],
    ids=str,
)
def test_compiled_whole_and_exported_it_gives_the_same(pattern):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return sparse_attention(query, key, value, pattern)

    torch.compiler.reset()
    inputs = make_inputs((12,))
    compiled = torch.compile(Attend(), backend="aot_eager", fullgraph=True, dynamic=False)
    assert_close(compiled(*inputs), Attend()(*inputs))
    exported = torch.export.export(Attend(), tuple(inputs)).module()
    assert_close(exported(*inputs), Attend()(*inputs))


def test_a_composition_made_inside_a_compiled_function():
    def attend(query, key, value):
        return sparse_attention(query, key, value, (SlidingWindow(2) | Sinks(1)) & Causal())

    torch.compiler.reset()
    inputs = make_inputs((12,))
    assert_close(torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs), attend(*inputs))


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Window(2) & Halo(2, 1, padded=True)).key_space((4,)), r"need the same keys: .* takes keys on \(6,\)"),
        (lambda: Documents((3, 4)).key_space((8,)), r"lengths add up to 7 tokens and the map \(8,\) has 8"),
        (lambda: Documents((3, 0)), r"lengths is \(3, 0\): give an integer of at least 1"),
        (lambda: GlobalTokens((9,)).key_space((3, 3)), r"tokens is \(9,\): give numbers of 0 to 8, at least one"),
        (lambda: GlobalTokens(()).key_space((3,)), r"tokens is \(\): give numbers"),
        (lambda: SlidingWindow(-1), "before is -1: give an integer of at least 0"),
        (lambda: Causal(0), "block_size is 0: give an integer of at least 1"),
        (lambda: Sinks(0), "count is 0: give an integer of at least 1"),
        (lambda: PerHead([]), "patterns is empty: give one for each head"),
        (lambda: PerHead([PerHead([Causal()])]), "patterns holds a PerHead"),
        (lambda: PerHead([Causal()]) & PerHead([Causal()] * 2), "patterns for 1 and 2 heads meet"),
        (lambda: ~make_selection(), "a Selection does not know how many blocks it hides. Invert its pairs"),
        (lambda: make_selection() & make_selection(query_block=1), "meet: both need the same blocks"),
        (lambda: (make_selection() | Sinks(1)) & Causal(), "cannot be cut further: intersect the two first"),
        (lambda: (make_selection() & Causal()) | make_selection(), "cut by different patterns cannot be united"),
        (lambda: (make_selection() & Documents((5,))).key_space((12,)), r"lengths add up to 5"),
        (lambda: Causal().key_space(()), r"space is \(\): a pattern needs at least one axis"),
    ],
)
def test_what_cannot_be_composed(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_pattern_for_another_number_of_heads():
    with pytest.raises(InputError, match="pattern is for 3 heads and query has 4: give one each"):
        sparse_attention(*make_inputs((6,)), PerHead([Causal()] * 3))


def test_a_selection_union_keeps_its_parts_apart():
    chosen = make_selection()
    static, rest = SelectionUnion(chosen, Sinks(3)).parts()
    assert isinstance(rest, Selection)
    assert not (static.mask((12,)) & rest.mask((12,))).any()


def test_a_default_device_does_not_move_the_plans():
    with torch.device("meta"):
        plan = ((SlidingWindow(3) | Sinks(2)) & Causal() & Documents((5, 8))).plan((13,))
    assert plan.groups[0].key.device.type == "cpu"


def test_sizes_are_found_on_the_meta_device():
    query = torch.empty(2, 4, 13, 8, device="meta")
    for pattern in (Window(4, ragged=True), (SlidingWindow(3) | Sinks(2)) & Causal(), PerHead([Causal()] * 4)):
        assert sparse_attention(query, query, query, pattern).shape == query.shape
