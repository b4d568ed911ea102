"""The catalogue of masks: each is what its definition says of single pairs, and the engine computes with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import MASKS, MaskLayout, Selection, build_mask, sparse_attention

LAYOUTS = [
    MaskLayout(40),
    MaskLayout(37, documents=(5, 1, 20, 11), window=3, num_global=2, block_size=4),
    MaskLayout(24, documents=(24,), window=30, prefix=0.6, num_global=24, block_size=5),
    MaskLayout(7, documents=(1, 2, 1, 3), window=0, prefix=1.0, block_size=64),
    MaskLayout(1),
]


def position(token, layout):
    """Document, place in it, its length."""
    for number, length in enumerate(layout.parts):
        if token < length:
            return number, token, length
        token -= length
    raise AssertionError("past the last document")


def segment(token, layout):
    """0 for the question of a document, 1 to 3 for its answers."""
    _, place, length = position(token, layout)
    question = max(1, int(length * layout.prefix))
    if place < question:
        return 0
    rest = length - question
    return 1 + sum(place - question >= rest * share // 3 for share in (1, 2))


def may_attend(name, i, j, layout):
    """One pair, from the definition in words."""
    (doc_i, place_i, _), (doc_j, place_j, length) = position(i, layout), position(j, layout)
    same, window = doc_i == doc_j, layout.reach
    return {
        "full": True,
        "causal": j <= i,
        "sliding_window": abs(i - j) <= window,
        "causal_sliding_window": 0 <= i - j <= window,
        "document": same,
        "causal_document": same and j <= i,
        "share_question": same and j <= i and segment(j, layout) in (0, segment(i, layout)),
        "causal_blockwise": j <= i and (same or doc_i == len(layout.parts) - 1),
        "prefix": j <= i or j < max(1, int(layout.length * layout.prefix)),
        "prefix_document": same and (place_j <= place_i or place_j < max(1, int(length * layout.prefix))),
        "global_sliding_window": abs(i - j) <= window or min(i, j) < len(layout.first),
        "block_causal_document": same and j // layout.block_size <= i // layout.block_size,
    }[name]


DRAWN = ("uniform_block_sparse", "variable_block_sparse")
STATIC = [name for name in MASKS if name not in DRAWN]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.length}")


def test_the_catalogue_has_twelve_static_masks_and_two_drawn_ones():
    assert len(STATIC) == 12
    assert set(DRAWN) < set(MASKS)


@every_layout
@pytest.mark.parametrize("name", STATIC)
def test_a_mask_is_what_its_definition_says_of_every_pair(name, layout):
    number = range(layout.length)
    expected = torch.tensor([[may_attend(name, i, j, layout) for j in number] for i in number])
    pattern = MASKS[name](layout)
    assert torch.equal(pattern.mask((layout.length,)), expected)
    assert pattern.num_visible((layout.length,)) == expected.sum()


@pytest.mark.parametrize("name", MASKS)
def test_the_engine_computes_forward_and_backward(name):
    pattern = build_mask(name, 150, block_size=16)
    query, key, value = (torch.randn(2, h, 150, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    out, expected = (sparse_attention(query, key, value, pattern, impl=impl) for impl in ("auto", "reference"))
    assert_close(out, expected)
    upstream = torch.randn_like(out)
    assert_close(*(torch.autograd.grad(each, (query, key, value), upstream) for each in (out, expected)))


@given(length=st.integers(1, 200), block=st.integers(1, 70), kept=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_drawn_masks_keep_blocks_and_follow_the_generator(length, block, kept, seed):
    def draw(name):
        rng = torch.Generator().manual_seed(seed)
        return build_mask(name, length, block_size=block, kept=kept, generator=rng)

    blocks = -(-length // block)
    for name in DRAWN:
        pattern = draw(name)
        assert isinstance(pattern, Selection)
        pairs = pattern.pairs((length,))[0, 0]
        assert pairs.shape == (blocks, blocks)
        assert pairs.any(-1).all()  # no query is without keys
        assert torch.equal(pairs, draw(name).pairs((length,))[0, 0])
        if name == "uniform_block_sparse":
            assert set(pairs.sum(-1).tolist()) == {max(1, round(blocks * kept))}


def test_variable_blocks_vary_around_the_share_that_is_kept():
    rng = torch.Generator().manual_seed(0)
    counts = build_mask("variable_block_sparse", 12800, block_size=64, kept=0.25, generator=rng).pairs((12800,)).sum(-1)
    assert counts.double().std() > 10
    assert abs(counts.double().mean() - 50) < 10


def test_wrong_names_and_sizes():
    with pytest.raises(InputError, match="mask is 'causl': did you mean causal"):
        build_mask("causl", 8)
    with pytest.raises(InputError, match="prefix is 0: give a share above 0 and at most 1"):
        build_mask("prefix", 8, prefix=0)
    with pytest.raises(InputError, match="length is 0: give an integer of at least 1"):
        build_mask("full", 0)
    with pytest.raises(InputError, match="lengths add up to 5 tokens and the map"):
        build_mask("document", 8, documents=(2, 3)).mask((8,))
