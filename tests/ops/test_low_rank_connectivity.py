"""predict_connectivity: the guess by its definition, what is kept of it, gradients, errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import predict_connectivity


def make_inputs(rank=4):
    shapes = (2, 3, 5, 4), (2, 3, 7, 4), (7, rank), (7, rank)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def guess_one(query, key, down, up, scale, keep, floor):
    """A row of the guess: coefficients of a query in the basis; the K with `keep` True; basis above the floor."""
    mixed = [sum(down[m, k] * key[m] for m in range(len(key))) for k in range(down.shape[1])]
    coefficients = torch.stack([scale * query @ each for each in mixed]).softmax(0)
    kept = torch.where(keep(coefficients), coefficients, 0)
    basis = torch.where(up.abs() > floor, up.abs(), 0)
    return kept, torch.stack([kept @ basis[m] for m in range(len(key))])


KEEP = {
    "all": ({}, lambda c: c >= 0),
    "topk": ({"topk": 2}, lambda c: c >= c.sort().values[-2]),
    "topk above the rank": ({"topk": 9}, lambda c: c >= 0),
    "threshold": ({"coefficient_threshold": 0.25}, lambda c: c > 0.25),
}


@pytest.mark.parametrize("kept", KEEP)
@pytest.mark.parametrize("floor", [0.0, 0.7])
def test_the_guess_mixes_a_sparse_basis(kept, floor):
    inputs = [each.detach() for each in make_inputs()]
    query, key, down, up = inputs
    options, keep = KEEP[kept]
    guess = predict_connectivity(*inputs, scale=0.3, basis_threshold=floor, **options)
    assert guess.scores.shape == (2, 3, 5, 7)
    for image in range(2):
        for head in range(3):
            for row in range(5):
                expected = guess_one(query[image, head, row], key[image, head], down, up, 0.3, keep, floor)
                assert_close(guess.coefficients[image, head, row], expected[0])
                assert_close(guess.scores[image, head, row], expected[1])
    assert_close(guess.coefficients @ guess.basis, guess.scores)


def test_signed_it_leaves_all_as_it_is():
    query, key, down, up = make_inputs()
    guess = predict_connectivity(query, key, down, up, topk=1, basis_threshold=5.0, signed=True)
    assert torch.equal(guess.basis, up.T)
    assert_close(guess.coefficients.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    grads = torch.autograd.grad(guess.scores.square().sum(), (query, key, down, up))
    assert all(grad.abs().max() > 1e-6 for grad in grads)


def test_gradients_are_those_of_finite_differences():
    def scores(*inputs):
        return predict_connectivity(*inputs, topk=2, basis_threshold=0.1).scores

    assert torch.autograd.gradcheck(scores, make_inputs(), fast_mode=True)


def test_errors_say_what_to_do():
    query, key, down, up = make_inputs()
    with pytest.raises(InputError, match=r"down and up take \(keys, rank\)\. Give \(7, rank\)"):
        predict_connectivity(query, key, down[:6], up[:6])
    with pytest.raises(InputError, match=r"up is \(7, 3\)"):
        predict_connectivity(query, key, down, up[:, :3])
    with pytest.raises(InputError, match="both say which coefficients are kept: give one of them"):
        predict_connectivity(query, key, down, up, topk=2, coefficient_threshold=0.1)
    with pytest.raises(InputError, match="topk is 0: give an integer of at least 1"):
        predict_connectivity(query, key, down, up, topk=0)
