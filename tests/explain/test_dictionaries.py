"""Dictionaries: laws of the encoders, streams of activations, training, measures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import DivergedError, InputError
from saccade.explain.dictionaries import (
    Activations,
    MatchingPursuit,
    ReluAutoencoder,
    TopKAutoencoder,
    babel,
    babel_of_chosen,
    effective_rank,
    explained_variance,
    modality_score,
    num_active,
    train_dictionary,
)

KINDS = {
    "pursuit": lambda: MatchingPursuit(7, 12, k=3),
    "pursuit to the end": lambda: MatchingPursuit(7, 12, k=None, rectify=True),
    "relu": lambda: ReluAutoencoder(7, 12),
    "top-k": lambda: TopKAutoencoder(7, 12, k=3),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def rows(count=20, dim=7, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x, atoms, k):
    """Matching pursuit of one activation, literally."""
    codes, residual = torch.zeros(len(atoms), dtype=x.dtype), x.clone()
    for _ in range(k):
        fits = atoms @ residual
        best = fits.argmax()
        codes[best] += fits[best]
        residual = residual - fits[best] * atoms[best]
    return codes, residual


# Laws


@every_kind
def test_rows_do_not_see_one_another_and_axes_are_kept(make):
    model, x = make().double().eval(), rows(6)
    model.calibrate(rows(50))
    whole = model(x)
    assert_close(model(x.view(2, 3, 7)).codes, whole.codes.view(2, 3, 12))
    assert_close(model(x[2:4]).reconstruction, whole.reconstruction[2:4])


@every_kind
def test_scale_and_centre_of_the_activations_do_not_matter(make):
    model, x = make().double().eval(), rows()
    model.calibrate(x)
    before = model(x)
    model.calibrate(50 * x + 3)
    after = model(50 * x + 3)
    assert_close(after.codes, before.codes)
    assert_close(after.reconstruction, 50 * before.reconstruction + 3)


@every_kind
def test_gradients_are_those_of_finite_differences(make):
    model, x = make().double().eval(), rows(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x).reconstruction, x)
    parameters = [each for each in model.parameters() if each.requires_grad]
    for slope in torch.autograd.grad(model.loss(x), parameters):
        assert slope.abs().sum() > 0


@every_kind
def test_the_length_of_a_row_does_not_matter(make):
    model, x = make().double().eval(), rows()
    before = model(x).reconstruction
    with torch.no_grad():
        model.weight.mul_(3)
    assert_close(model(x).reconstruction, before)
    (slope,) = torch.autograd.grad(model.loss(x), model.weight)
    assert_close((slope * model.weight).sum(-1), torch.zeros(12).double(), atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_pursuit_is_the_loop_by_hand(k, seed):
    model, x = MatchingPursuit(7, 12, k=k).double(), rows(5, seed=seed)
    found = model.pursue(x)
    for row, codes, residual in zip(x, *found):
        expected = by_hand(row, model.atoms, k)
        assert_close((codes, residual), expected)


def test_pursuit_to_the_end_stops_by_itself():
    model, x = MatchingPursuit(7, 12, k=None, rectify=True).double().eval(), rows()
    codes, residual = model.pursue(x)
    assert (codes >= 0).all()
    assert_close(codes @ model.atoms + residual, x)
    lone = MatchingPursuit(2, 1, k=None, rectify=True).double()
    lone.weight.data = torch.tensor([[1.0, 0.0]]).double()
    assert_close(lone.encode(torch.tensor([[2.0, 1.0], [-2.0, 1.0]]).double()), torch.tensor([[2.0], [0.0]]).double())


def test_threshold_leaves_short_residuals():
    model, x = MatchingPursuit(7, 12, k=4, absolute=True, threshold=2.2).double(), rows()
    short = x.norm(dim=-1) < 2.2
    assert 0 < short.sum() < len(x)
    codes, residual = model.pursue(x)
    assert ((codes == 0).all(-1) == short).all()
    assert_close(residual[short], x[short])
    model.k = 200
    assert (model.pursue(x)[1].norm(dim=-1) < 2.2).all()


def test_dropped_atoms_are_not_chosen_in_training_alone():
    model, x = MatchingPursuit(7, 12, k=8, rectify=True, dropout=0.5), rows(200).float()
    assert ((model.train().encode(x) != 0).any(0).sum() < 12).item()
    assert (model.eval().encode(x) != 0).any(0).all()


def test_half_precision_keeps_its_residual_in_single():
    model, x = MatchingPursuit(7, 12, k=9), rows().float()
    assert model.pursue(x.bfloat16())[0].dtype == torch.float32
    assert_close(model.pursue(x.bfloat16())[0], model.pursue(x.bfloat16().float())[0])


def test_projecting_takes_the_radial_part_of_the_gradient_away():
    pairs = []
    for project in (True, False):
        torch.manual_seed(0)
        model = MatchingPursuit(7, 12, k=3, project=project).double()
        model.renormalise()
        pairs.append((torch.autograd.grad(model.loss(rows()), model.weight)[0], model.atoms.detach()))
    (projected, atoms), (whole, _) = pairs
    assert_close(projected, whole - (whole * atoms).sum(-1, keepdim=True) * atoms)
    assert not torch.allclose(projected, whole)


def test_top_k_keeps_no_more_than_k_and_all_of_them_are_relu():
    model, x = TopKAutoencoder(7, 12, k=3).double(), rows()
    assert (model.encode(x) != 0).sum(-1).max() == 3
    model.k = 12
    relu = ReluAutoencoder(7, 12).double()
    relu.load_state_dict(model.state_dict())
    assert_close(model.encode(x), relu.encode(x))


# Streams and training


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten())


def test_a_layers_rows_are_its_outputs():
    net, images = make_net(), torch.randn(5, 3, 4, 6)
    found = list(Activations(net, images.split(2), "0", axis=1))
    assert [tuple(part.shape) for part in found] == [(12, 8), (12, 8), (6, 8)]
    assert_close(torch.cat(found), net[0](images).detach().movedim(1, -1).flatten(0, 2))  # before the in-place ReLU
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())


def test_a_tap_is_read_by_its_kind():
    mixer = saccade.create_mixer("window", 8, num_heads=2, window_size=2)
    stream = Activations(nn.Sequential(mixer), [torch.randn(3, 4, 4, 8)], "0", kind="attention")
    for _ in range(2):  # again from the start
        (found,) = stream
        assert found.shape == (3 * 2 * 16, 16)
        assert_close(found.sum(-1), torch.ones(96))


def test_streams_and_tables_train_alike_and_repeat_with_the_seed():
    x = rows(12).float()  # 12 directions, one a row
    x = x[torch.arange(300) % 12] * rows(300, 1).float().abs()

    def train(rows, **options):
        torch.manual_seed(0)
        model = MatchingPursuit(7, 12, k=2)
        generator = torch.Generator().manual_seed(1)
        return train_dictionary(
            model, rows, steps=100, batch_size=32, rate=1e-2, generator=generator, **options
        ).losses, model

    table, again = train(x)[0], train(x)[0]
    assert_close(table, again, rtol=0, atol=0)
    stream, model = train(list(x.split(50)), buffer=100)
    assert stream[-10:].mean() < 0.8 * stream[0]
    assert table[-10:].mean() < 0.8 * table[0]
    assert_close(model.weight.norm(dim=-1), torch.ones(12))
    assert not model.training


def test_an_atom_that_cannot_be_used_is_not_active():
    model = ReluAutoencoder(7, 12)
    model.encoder_bias.data[3:] = -1e3
    assert train_dictionary(model, rows(64).float(), steps=10, batch_size=16).active == 3 / 12


def test_errors_of_streams_and_training():
    net = make_net()
    with pytest.raises(InputError, match="layer is '9'"):
        Activations(net, [], "9")
    with pytest.raises(InputError, match="kind is 'maps'"):
        Activations(net, [], "0", kind="maps")
    model = ReluAutoencoder(7, 12)
    with pytest.raises(InputError, match="empty or at its end"):
        train_dictionary(model, iter([rows(8).float()]), steps=5)
    with pytest.raises(InputError, match=r"activations are torch.float64 of shape \(4, 6\): .* \(..., 7\)"):
        train_dictionary(model, rows(4, 6), steps=5)
    with pytest.raises(DivergedError, match="in step 0"):
        train_dictionary(model, torch.full((4, 7), float("nan")), steps=5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": None}, "k is None without rectify"),
        ({"k": 0}, "k is 0"),
        ({"k": 2, "rectify": True, "absolute": True}, "rectify and absolute"),
        ({"k": 2, "dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(InputError, match=words):
        MatchingPursuit(7, 12, **options)


# Measures


def test_measures_of_known_cases():
    atoms = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]).double()
    half = 0.5**0.5
    assert babel(atoms, 1) == pytest.approx(half)
    assert babel(atoms, 2) == pytest.approx(2 * half)
    codes = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 0.0, 2.0]]).double()
    assert babel_of_chosen(atoms, codes) == pytest.approx(half / 2)  # rows: 0 and half; the last has one atom
    assert num_active(codes) == pytest.approx(5 / 3)
    assert effective_rank(torch.eye(3)[:, :2]) == pytest.approx(2)
    assert effective_rank(torch.ones(5, 4)) == pytest.approx(1, abs=1e-6)
    x = rows()
    assert explained_variance(x, x) == 1
    assert explained_variance(x, x.mean(0).expand_as(x)) == 0
    score = modality_score(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]]))
    assert_close(score, torch.tensor([0.25, 1.0, float("nan")]), equal_nan=True)
    with pytest.raises(InputError, match="two active atoms"):
        babel_of_chosen(atoms, codes[2:])
