"""LowRankConnectivityAttention: what its guess picks, tokens that are gone, other maps, how it learns, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import LowRankConnectivityAttention
from saccade.ops import predict_connectivity

DIM, HEADS, SPACE, TOKENS = 12, 3, (4, 5), 21


def make_mixer(**options):
    options = {"size": SPACE, "num_prefix": 1, "keep_rate": 0.3, "reduce_n": 3, "topk": 4} | options
    mixer = LowRankConnectivityAttention(DIM, HEADS, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def make_tokens():
    return torch.randn(2, TOKENS, DIM, dtype=torch.float64)


def by_head(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def published(mixer, tokens, alive, prefix_competes):
    """The layer as official code has it: everything dense, then masked. Output and mask."""
    there = torch.ones(2, TOKENS, dtype=torch.bool)
    there[:, 1:] = alive
    query, key, value = (by_head(part) * there[:, None, :, None] for part in mixer.qkv(tokens).chunk(3, -1))
    predictor = mixer.mask_predictor
    q, k = (layer(x) * there[:, None, :, None] for layer, x in ((predictor.proj_c_q, query), (predictor.proj_c_k, key)))
    low = q @ (k.mT @ predictor.proj_n) * HEADS**-0.5
    coefficients = low[:, :, 1:].softmax(-1)
    kept = coefficients.topk(mixer.topk, -1)
    coefficients = torch.zeros_like(coefficients).scatter(-1, kept.indices, kept.values)
    guess = coefficients @ F.threshold(predictor.proj_back_n.abs(), mixer.basis_threshold, 0.0).T
    guess = guess.masked_fill(~there[:, None, None], -torch.inf)
    if not prefix_competes:
        guess[..., 0] = torch.inf
    budget = min(math.ceil(mixer.keep_rate * TOKENS), int(alive.sum(-1).max()))
    mask = torch.zeros_like(guess).scatter(-1, guess.topk(budget, -1).indices, 1.0)
    mask = F.pad(mask, (0, 0, 1, 0), value=1.0)
    logits = (DIM // HEADS) ** -0.5 * query @ key.mT
    weights = logits.masked_fill(mask == 0, -torch.inf).softmax(-1)
    return mixer.proj((weights @ value).transpose(1, 2).flatten(2)), mask[:, :, 1:].bool()


@pytest.mark.parametrize("keep_prefix", [False, True])
@pytest.mark.parametrize("living", [20, 13, 3], ids=lambda living: f"{living} alive")
def test_it_is_masked_attention(keep_prefix, living):
    mixer, tokens = make_mixer(keep_prefix=keep_prefix), make_tokens()
    alive = torch.rand(2, 20).argsort(-1) < living
    connected = mixer.connect(tokens, SPACE, None if living == 20 else alive)
    out, mask = published(mixer, tokens, alive, prefix_competes=not keep_prefix)
    assert_close(connected.out[:, :1], out[:, :1])
    assert_close(connected.out[:, 1:][alive], out[:, 1:][alive])  # what becomes of the others is never seen
    rows = alive.unsqueeze(1).expand(-1, HEADS, -1)
    assert torch.equal(mask_of(connected)[rows], mask[rows])


def mask_of(connected):
    return connected.selection.mask((20,))


def test_tokens_that_are_gone_change_nothing():
    mixer, tokens = make_mixer(), make_tokens()
    alive = torch.rand(2, 20).argsort(-1) < 11
    other = tokens.clone()
    other[:, 1:][~alive] = 7.0
    first, second = (mixer.connect(each, SPACE, alive) for each in (tokens, other))
    assert_close(first.out[:, 1:][alive], second.out[:, 1:][alive])
    assert_close(first.out[:, 0], second.out[:, 0])
    assert not mask_of(first)[..., 1:].movedim(-1, 1)[~alive].any()


def test_a_threshold_chooses_what_exceeds_it():
    mixer, tokens = make_mixer(threshold=0.4, keep_prefix=False), make_tokens()
    connected = mixer.connect(tokens, SPACE)
    assert torch.equal(mask_of(connected), connected.guess.scores > 0.4)
    assert 0 < mask_of(connected).double().mean() < 1


def test_the_map_and_its_prefix_come_apart_again():
    mixer, tokens = make_mixer(), make_tokens()
    out, prefix = mixer(tokens[:, 1:].unflatten(1, SPACE), tokens[:, :1])
    assert_close(torch.cat([prefix, out.flatten(1, 2)], 1), mixer.connect(tokens, SPACE).out)


def test_on_a_map_of_twice_the_side_a_flat_basis_stays_as_it_is():
    mixer = make_mixer(num_prefix=0)
    predictor = mixer.mask_predictor
    with torch.no_grad():
        predictor.proj_n.copy_(torch.randn(1, 6))  # the same for all tokens
        predictor.proj_back_n.fill_(0.5)
    x = torch.randn(1, 4, 5, DIM, dtype=torch.float64)
    large = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    small, big = (mixer.connect(each.flatten(1, 2), tuple(each.shape[1:-1])).guess for each in (x, large))
    at_corner = big.coefficients.unflatten(2, (8, 10))[:, :, ::2, ::2].flatten(2, 3)
    assert_close(at_corner, small.coefficients)
    assert_close(big.basis, torch.full_like(big.basis, 0.5))


def test_resized_bases_are_interpolated_along_the_map_and_not_the_prefix():
    mixer = make_mixer(size=(2, 3), reduce_n=7, reconstruct=True)
    basis = mixer.mask_predictor.proj_back_n  # (1 + 2 x 3, 1)
    resized = mixer.connect(make_tokens()[:, :11], (2, 5)).guess.basis[0]
    assert_close(resized[0], basis[0, 0])
    assert_close(resized[1:], F.interpolate(basis[1:].view(1, 2, 3), 5, mode="linear").flatten())


def test_a_shared_basis_is_one_parameter():
    mixer = make_mixer(share_basis=True)
    assert mixer.mask_predictor.proj_back_n is mixer.mask_predictor.proj_n
    assert {"mask_predictor.proj_n", "mask_predictor.proj_back_n"} <= set(mixer.state_dict())


def test_while_the_guess_learns_attention_is_dense():
    mixer, tokens = make_mixer(reconstruct=True), make_tokens()
    query, key, value = (by_head(part) for part in mixer.qkv(tokens).chunk(3, -1))
    with saccade.tap(mixer) as seen:
        connected = mixer.connect(tokens, SPACE)
    dense = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    assert_close(connected.out, mixer.proj(dense))
    attention = seen[""].attention
    assert_close((attention @ value).transpose(1, 2).flatten(2), dense)
    predictor = mixer.mask_predictor
    guess = predict_connectivity(
        predictor.proj_c_q(query)[:, :, 1:],
        predictor.proj_c_k(key),
        predictor.proj_n,
        predictor.proj_back_n,
        scale=HEADS**-0.5,
        signed=True,
    )
    assert_close(connected.guess, guess)
    loss = (connected.guess.scores - attention[:, :, 1:]).square().sum()
    loss.backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in predictor.parameters())


def test_official_names():
    names = [name for name, _ in make_mixer().named_parameters() if name.startswith("mask_predictor")]
    parts = ["proj_n", "proj_back_n", "proj_c_q.weight", "proj_c_q.bias", "proj_c_k.weight", "proj_c_k.bias"]
    assert names == [f"mask_predictor.{part}" for part in parts]


def test_errors_say_what_to_do():
    x, prefix = torch.zeros(1, 4, 5, DIM).double(), torch.zeros(1, 2, DIM).double()
    with pytest.raises(InputError, match="prefix has 2 tokens: num_prefix is 1"):
        make_mixer()(x, prefix)
    with pytest.raises(InputError, match="prefix has 0 tokens: num_prefix is 1"):
        make_mixer()(x)
    with pytest.raises(InputError, match="keep_rate is 0: give a share above 0 and at most 1"):
        make_mixer(keep_rate=0)
    with pytest.raises(InputError, match=r"the bases are for 2 axes\. Set axes=1"):
        make_mixer(num_prefix=0)(x[:, 0])
    with pytest.raises(InputError, match="reduce_n is 0"):
        make_mixer(reduce_n=0)
    with pytest.raises(InputError, match="axes is 0: give 1, 2 or 3"):
        make_mixer(axes=0, size=3)
