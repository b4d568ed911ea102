"""Hidden tokens of blocks: how many, which, the loss, and what decoding fills."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.training import choose_filled, hide_tokens, masked_token_loss, noise_tokens


@given(level=st.floats(0, 1), length=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_the_level_says_how_many_and_the_generator_which(level, length, seed):
    levels = torch.full((3, 2), level, dtype=torch.float64)
    one, same = (hide_tokens(levels, length, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(one, same)
    assert one.shape == (3, 2, length)
    assert (one.sum(-1) == max(1, round(level * length))).all()


@pytest.mark.parametrize("count", [1, 2])
def test_positions_are_drawn_one_after_the_other_by_their_weights(count):
    """Of four tokens with weights w_i = exp(beta (1 - t) i): probabilities of draws without replacement."""
    level, draws = count / 4 - 0.05, 200_000
    weights = (-torch.log(torch.tensor(0.1)) / 4 * (1 - level) * torch.arange(4)).exp().double()
    expected = torch.zeros(4, dtype=torch.float64)
    for order in permutations(range(4), count):
        left, chance = weights.sum(), 1.0
        for place in order:
            chance, left = chance * weights[place] / left, left - weights[place]
        expected[list(order)] += chance
    found = hide_tokens(torch.full((draws,), level), 4).double().mean(0)
    assert_close(found, expected, atol=0.005, rtol=0)


@pytest.mark.parametrize(("per", "levels"), [("block", 4), ("sample", 1)])
def test_noised_sequences_have_the_clean_one_behind(per, levels):
    tokens = torch.randint(1, 9, (5, 12))
    noised = noise_tokens(tokens, 0, 3, per=per, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noised.both[:, 12:], tokens)
    assert torch.equal(noised.both[:, :12], tokens.where(~noised.hidden, 0))
    assert noised.hidden.unflatten(1, (4, 3)).any(-1).all()
    by_block = noised.level.unflatten(1, (4, 3))
    assert (by_block == by_block[..., :1]).all()
    assert len(by_block[0].unique()) == levels


def test_a_level_that_is_given_is_kept():
    noised = noise_tokens(torch.ones(2, 6, dtype=torch.long), 0, 3, level=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert noised.hidden.unflatten(1, (2, 3)).sum(-1).tolist() == [[3, 1], [1, 3]]


def test_the_loss_is_that_of_hidden_tokens_over_their_level():
    logits, tokens = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (2, 4))
    hidden, level = torch.rand(2, 4) < 0.5, torch.rand(2, 4, dtype=torch.float64)
    level[0, 0], hidden[0, 0] = 0.0, True
    total = 0
    for b in range(2):
        for n in range(4):
            if hidden[b, n]:
                chance = logits[b, n].softmax(-1)[tokens[b, n]]
                total = total - chance.log() / max(level[b, n].item(), 1e-3)
    loss = masked_token_loss(logits, tokens, hidden, level)
    assert_close(loss, total / 8)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad.abs().sum(-1) > 0, hidden)


@given(seed=st.integers(0, 10_000), threshold=st.floats(0, 1.5))
def test_decoding_fills_what_is_sure_and_always_something(seed, threshold):
    torch.manual_seed(seed)
    confidence, hidden = torch.rand(3, 6), torch.rand(3, 6) < 0.5
    hidden[0] = False
    filled = choose_filled(confidence, hidden, threshold=threshold)
    assert not (filled & ~hidden).any()
    assert (filled | ~hidden | (confidence < threshold)).all()
    assert torch.equal(filled.any(-1), hidden.any(-1))
    for row, mine, took in zip(confidence, hidden, filled):
        if mine.any():
            assert took[row.masked_fill(~mine, -1).argmax()]
            assert took.sum() == max(1, (mine & (row >= threshold)).sum())


def test_errors_say_what_to_do():
    tokens = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(InputError, match=r"tokens is \(2, 6\) and block_size is 4: give .* a block that divides L"):
        noise_tokens(tokens, 0, 4)
    with pytest.raises(InputError, match=r"level is \(2, 3\): give \(2, 2\), or \(2, 1\)"):
        noise_tokens(tokens, 0, 3, level=torch.zeros(2, 3))
    with pytest.raises(InputError, match="last_to_first is 0: give a ratio above 0 and at most 1"):
        hide_tokens(torch.zeros(1), 4, last_to_first=0)
    with pytest.raises(InputError, match=r"a noise level is no number of 0 \.\. 1"):
        hide_tokens(torch.tensor([1.5]), 4)
    with pytest.raises(InputError, match="length is 0: a block has at least one token"):
        hide_tokens(torch.zeros(1), 0)
    with pytest.raises(InputError, match=r"are \(2, 4, 5\), \(2, 6\)"):
        masked_token_loss(torch.zeros(2, 4, 5), tokens, tokens.bool(), torch.zeros(2, 6))
    with pytest.raises(InputError, match=r"confidence is \(2, 3\) and hidden is torch.bool \(2, 4\)"):
        choose_filled(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="per is 'blok': did you mean block"):
        noise_tokens(tokens, 0, 3, per="blok")
