"""choose_blocks and mixture_of_blocks: dense masks, gradients, exact causality, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import choose_blocks, mixture_of_blocks

CAUSAL = {"topk": 3, "scope": "query", "causal": True}
CASES = [
    ((4, 6, 4), (2, 3, 2), {}),
    ((4, 6, 4), (4, 3, 2), {"topk": 3, "scope": "head"}),
    ((7, 5), (3, 2), {"mass": 0.5, "scope": "block"}),  # smaller blocks at the end
    ((23,), 5, {"topk": 2, "scope": "all"}),
    ((23,), 5, CAUSAL),
    ((8,), 1, CAUSAL),
    ((3,), 8, CAUSAL),
]


def make_inputs(space):
    return torch.randn(3, 2, 3, *space, 4, dtype=torch.float64, requires_grad=True).unbind()


@pytest.mark.parametrize(("space", "block", "options"), CASES)
def test_fast_equals_reference_in_value_and_gradient(space, block, options):
    inputs = make_inputs(space)
    chosen = choose_blocks(*inputs[:2], block, **options)
    causal = options.get("causal", False)
    fast, slow = (mixture_of_blocks(*inputs, chosen, causal=causal, impl=impl) for impl in ("auto", "reference"))
    assert_close(fast, slow)
    upstream = torch.randn_like(slow)
    assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (fast, slow)))


def attend_as_moba(query, key, value, size, topk):
    """MoBA's equation, query by query, for one head (N, D)."""
    out = []
    for place, q in enumerate(query):
        own = place // size
        means = torch.stack([key[n * size : (n + 1) * size].mean(0) for n in range(own)] or [torch.zeros_like(q)])
        best = (means @ q).topk(min(topk - 1, own)).indices.tolist()
        seen = [token for n in best for token in range(n * size, (n + 1) * size)]
        seen += range(own * size, place + 1)
        out.append(torch.softmax(4**-0.5 * q @ key[seen].T, -1) @ value[seen])
    return torch.stack(out)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("length", "size", "topk"), [(20, 5, 2), (23, 5, 3), (23, 5, 1), (9, 1, 4), (6, 9, 2)])
def test_the_causal_form_is_moba(length, size, topk, impl):
    inputs = make_inputs((length,))
    chosen = choose_blocks(*inputs[:2], size, topk=topk, scope="query", causal=True)
    out = mixture_of_blocks(*inputs, chosen, causal=True, impl=impl)
    for image in range(2):
        for head in range(3):
            assert_close(out[image, head], attend_as_moba(*(x[image, head] for x in inputs), size, topk))


def test_a_causal_query_has_no_gradient_from_later_tokens():
    inputs = make_inputs((13,))
    chosen = choose_blocks(*inputs[:2], 4, **CAUSAL)
    out = mixture_of_blocks(*inputs, chosen, causal=True)
    for place in range(13):
        grads = torch.autograd.grad(out[:, :, place].sum(), inputs[1:], retain_graph=True)
        assert all((grad[:, :, place + 1 :] == 0).all() for grad in grads)
        assert (grads[1][:, :, place] != 0).all()


@pytest.mark.parametrize("options", [{}, {"topk": 2}, {"mass": 0.01, "scope": "all"}, {"topk": 1, "scope": "query"}])
def test_the_own_block_is_always_chosen(options):
    query, key, _ = make_inputs((7, 5))
    number = torch.arange(7).view(7, 1) // 3 * 3 + torch.arange(5) // 2
    pairs = choose_blocks(query, key, (3, 2), **options).pairs((7, 5))
    assert pairs[:, :, torch.arange(35), number.flatten()].all()


def test_all_blocks_where_nothing_but_the_own_is_chosen():
    inputs = make_inputs((12,))
    own = choose_blocks(*inputs[:2], 4, topk=1)
    assert own.pairs((12,)).sum() == 2 * 3 * 12
    chosen = choose_blocks(*inputs[:2], 4, topk=1, all_if_none=True)
    assert_close(mixture_of_blocks(*inputs, chosen), F.scaled_dot_product_attention(*inputs))
    some = [choose_blocks(*inputs[:2], 4, topk=2, all_if_none=flag).pairs((12,)) for flag in (False, True)]
    assert torch.equal(*some)


@pytest.mark.parametrize("wrong", [{"topk": None}, {"scope": "head"}, {"all_if_none": True}])
def test_causal_refuses_choices_that_look_ahead(wrong):
    query, key, _ = make_inputs((12,))
    with pytest.raises(InputError, match=r"causal is True with .* Flatten the map to a sequence"):
        choose_blocks(query, key, 4, **CAUSAL | wrong)


def test_errors_say_what_to_do():
    query, key, _ = make_inputs((4, 4))
    with pytest.raises(InputError, match="causal is True with space"):
        choose_blocks(query, key, 2, **CAUSAL)
    with pytest.raises(InputError, match="blocks are of one map"):
        choose_blocks(query, key[:, :, :2], 2)
    with pytest.raises(InputError, match="block_size is 0: give an integer"):
        choose_blocks(query, key, 0)
    with pytest.raises(InputError, match="mass is 0: give a share above 0"):
        choose_blocks(query, key, 2, mass=0)
    with pytest.raises(InputError, match="scope is 'block'"):
        choose_blocks(query, key, 2, topk=2, scope="block")
