"""Concepts: where a model is cut, extraction, importance of codes, their measures, strategies."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import overlay
from saccade.explain.classifier import evaluating
from saccade.explain.concepts import (
    LinearBank,
    atom_distance,
    code_importance,
    concept_curves,
    concept_faithfulness,
    crop,
    draw_strategies,
    explain_concepts,
    extract_concepts,
    find_cut,
    find_strategies,
    halton_design,
    hsic_indices,
    list_importances,
    measure_extraction,
    relative_error,
    score_importance,
    sobol_indices,
    wasserstein,
)
from saccade.explain.dictionaries import MatchingPursuit
from tests.explain.nets import ConvNet, images

EXTRACTORS = ("kmeans", "matching_pursuit", "nmf", "pca", "relu", "top_k")
every_extractor = pytest.mark.parametrize("method", EXTRACTORS)
FAST = {"matching_pursuit": {"steps": 30}, "relu": {"steps": 30}, "top_k": {"steps": 30}, "nmf": {"max_iter": 20_000}}


def rows(count=40, dim=7, seed=0):
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(*, last=False):
    return ConvNet(last=last).double()


def photos(batch=3, height=12, width=8):
    return images(batch, 3, height, width).double()


class Tokens(nn.Module):
    """Patches of 4 pixels as tokens (B, N, 6), a block on them, a head on their mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).mT).mean(1))


class Reused(nn.Module):
    """One activation that runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x)))).mean((2, 3))


# Where a model is cut


@pytest.mark.parametrize(
    ("model", "layer", "shape"),
    [
        (net(), None, (3, 6, 4, 6)),
        (net(last=True), "body", (3, 6, 4, 6)),
        (net(), "stem", (3, 6, 4, 5)),
        (net(), "norm", (3, 6)),
        (Tokens().double(), "block", (3, 6, 6)),
        (Reused().double(), "act", (3, 12, 8, 4)),
    ],
)
def test_the_rest_of_the_model_continues_where_it_was_cut(model, layer, shape):
    x = photos()
    with evaluating(model, grad=True) as classify:
        cut = find_cut(classify, x[:1], layer)
        activation = cut.read(classify, x, 2)
        assert activation.shape == shape
        logits = classify(x)
        assert_close(cut.resume(classify, x, activation), logits)
        changed = activation.clone().requires_grad_()
        (slope,) = torch.autograd.grad(cut.resume(classify, torch.zeros_like(x), changed)[:, 1].sum(), changed)
        assert slope.abs().sum() > 0
        assert not torch.allclose(cut.resume(classify, x, 2 * activation), logits)


def test_cut_errors():
    with evaluating(net(), grad=False) as classify:
        with pytest.raises(InputError, match="layer is 'stam'"):
            find_cut(classify, photos()[:1], "stam")
        classify.model.add_module("spare", nn.ReLU())
        with pytest.raises(InputError, match="'spare' does not run"):
            find_cut(classify, photos()[:1], "spare")


def test_crops_are_squares_of_the_image_enlarged():
    x = photos(2, 10, 9)
    found = crop(x, 5)
    assert found.shape == (2 * 2 * 2, 3, 10, 9)  # a step of 4
    assert_close(crop(x, 9)[:1], nn.functional.interpolate(x[:1, :, :9], size=(10, 9), mode="bilinear"))
    lit = torch.zeros(1, 1, 8, 8).double()
    lit[..., 4:, :4] = 1
    assert crop(lit, 4, overlap=0.0).mean((1, 2, 3)).tolist() == [0, 0, 1, 0]
    with pytest.raises(InputError, match="patch is 11"):
        crop(x, 11)


# Extraction


@every_extractor
def test_banks_serve_any_shape_and_repeat_with_the_seed(method):
    x = rows()
    bank, again = (extract_concepts(x, 3, method=method, **FAST.get(method, {})) for _ in range(2))
    assert_close(bank.atoms, again.atoms, rtol=0, atol=0)
    assert bank.atoms.shape == (3, 7)
    codes = bank.encode(x.view(5, 8, 7))
    assert codes.shape == (5, 8, 3)
    assert codes.dtype == torch.float64
    assert_close(bank.encode(x[3:5]), codes.flatten(0, 1)[3:5])
    assert bank.decode(codes).shape == (5, 8, 7)
    codes = codes.clone().requires_grad_()
    assert torch.autograd.gradcheck(bank.decode, codes)


@settings(max_examples=15, deadline=None)
@given(concepts=st.integers(1, 10), dim=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_codes_of_nmf_are_least_squares_without_negatives(concepts, dim, seed):
    atoms, x = rows(concepts, dim, seed) - 0.3, rows(6, dim, seed + 1)
    codes = LinearBank("nmf", atoms, torch.zeros(dim).double()).encode(x)
    assert (codes >= 0).all()
    for row, code in zip(x, codes):  # atoms that depend on one another have more than one solution, of one error
        error = nnls(atoms.numpy().T, row.numpy())[1]
        assert (code @ atoms - row).norm().item() == pytest.approx(error, abs=1e-9)
        slope = (code @ atoms - row) @ atoms.T  # of the error: 0 where a code is positive, not negative elsewhere
        assert slope.min() > -1e-9
        assert (slope * code).abs().max() < 1e-9


def test_codes_of_each_family_have_its_form():
    x = rows()
    pca, kmeans, nmf = (extract_concepts(x, 3, method=name, **FAST.get(name, {})) for name in ("pca", "kmeans", "nmf"))
    assert_close(pca.atoms @ pca.atoms.T, torch.eye(3).double())
    assert_close(pca.encode(x).mean(0), torch.zeros(3).double(), atol=1e-12, rtol=0)
    one = kmeans.encode(x)
    assert_close(one.sum(-1), torch.ones(40).double())
    assert_close(kmeans.decode(one), kmeans.atoms[torch.cdist(x, kmeans.atoms).argmin(1)])
    assert (nmf.atoms >= 0).all()
    best = torch.linalg.svdvals(x - x.mean(0))[3:].square().sum().sqrt() / x.norm()
    assert relative_error(x, pca.decode(pca.encode(x))) == pytest.approx(best.item())
    whole = extract_concepts(x, 7, method="pca")
    assert_close(whole.decode(whole.encode(x)), x)


@pytest.mark.parametrize(
    ("given", "count", "options", "words"),
    [
        (rows() - 1, 3, {}, "nmf needs a layer without negative ones"),
        (rows(), 8, {"method": "pca"}, "pca finds at most 7"),
        (rows(4), 5, {"method": "kmeans"}, "kmeans finds at most 4"),
        (rows(), 0, {}, "num_concepts is 0"),
        (rows(), 3, {"method": "nfm"}, "did you mean nmf"),
        (rows(), 3, {"max_iters": 9}, "did you mean max_iter"),
        (rows(), 3, {"method": "top_k", "l1": 0.1}, "'l1' is no option"),
        (rows()[None], 3, {}, r"\(1, 40, 7\): give floats \(N, dim\)"),
        (rows() * float("nan"), 3, {}, "NaN"),
    ],
)
def test_extraction_errors(given, count, options, words):
    with pytest.raises(InputError, match=words):
        extract_concepts(given, count, **options)


def test_measures_of_known_cases():
    a = LinearBank("nmf", torch.eye(3).double(), torch.zeros(3).double())
    b = LinearBank("nmf", 2 * torch.eye(3).double()[[2, 0, 1]], torch.zeros(3).double())
    assert atom_distance(a, b) == pytest.approx(0, abs=1e-12)
    turned = LinearBank("pca", -torch.eye(3).double(), torch.zeros(3).double())
    assert atom_distance(turned, LinearBank("pca", a.atoms, a.centre)) == pytest.approx(0, abs=1e-12)
    # one cannot do better than match two axes, for the opposite of the third has none left but itself
    assert atom_distance(a, LinearBank("nmf", torch.diag(torch.tensor([1.0, 1, -1])).double(), a.centre)) == (
        pytest.approx(2 / 3)
    )
    x = rows()
    assert wasserstein(x, x.flip(0)) == 0
    assert wasserstein(x, x + 2) == pytest.approx(2 * 7**0.5)
    line = rows(30, 1), rows(30, 1, seed=1)
    by_sorting = (line[0].sort(0).values - line[1].sort(0).values).abs().mean().item()
    assert wasserstein(*line) == pytest.approx(by_sorting)
    found = measure_extraction(x, 3, method="kmeans")
    assert found.num_active == 1
    assert 0 < found.instability < 1
    with pytest.raises(InputError, match="same size"):
        atom_distance(a, LinearBank("nmf", a.atoms[:2], a.centre))


# Importance


def linear_head(batch=3, concepts=4, space=(), seed=0):
    """Codes, a linear function of their mean over positions with a bias, and each concept's part in it."""
    codes = torch.rand(batch, *space, concepts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = torch.tensor([1.5, -2.0, 0.3, 1.0, -0.2, 0.7])[:concepts].double()
    pooled = codes.flatten(1, -2).mean(1) if space else codes

    def answer(codes, index):
        pooled = codes.flatten(1, -2).mean(1) if space else codes
        return pooled @ weight + 0.4

    return codes, answer, pooled * weight


@pytest.mark.parametrize("space", [(), (5,), (2, 3)])
@pytest.mark.parametrize("method", ["input_x_gradient", "integrated_gradients", "occlusion", "shapley"])
def test_a_linear_answer_is_shared_out_exactly(method, space):
    codes, answer, parts = linear_head(space=space)
    assert_close(code_importance(answer, codes, method=method, batch_size=2), parts, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", list_importances())
def test_the_batch_size_does_not_matter_and_images_do_not_see_one_another(method):
    codes, _, _ = linear_head(space=(2, 2))
    scale = torch.tensor([1.0, 2.0, 3.0]).double()

    def answer(codes, index):
        return (codes.mean((1, 2)) * scale[index, None]).square().sum(-1).tanh()

    options = {"samples": 20} if method in ("rise", "hsic") else {}
    whole = code_importance(answer, codes, method=method, **options)
    assert_close(code_importance(answer, codes, method=method, batch_size=3, **options), whole)
    if method != "shapley":  # which draws orders for each batch anew
        assert_close(code_importance(answer, codes, method=method, batch_size=1, **options), whole)
    assert whole.shape == (3, 4)


def test_gradient_and_its_sign():
    codes, answer, _ = linear_head(space=(2, 3))
    weight = torch.tensor([1.5, -2.0, 0.3, 1.0]).double()
    assert_close(code_importance(answer, codes, method="gradient"), weight.expand(3, -1))
    assert_close(code_importance(answer, codes, method="tcav"), weight.sign().expand(3, -1))


def test_shapley_and_gradients_sum_to_the_answer_of_a_curved_head():
    codes, _, _ = linear_head()

    def answer(codes, index):
        return codes.prod(-1) + codes[:, 0] ** 2

    total = answer(codes, None)
    for method in ("shapley", "integrated_gradients"):
        assert_close(code_importance(answer, codes, method=method).sum(1), total, atol=1e-6, rtol=1e-6)
    lone = code_importance(lambda codes, index: codes[:, 0] * codes[:, 1], codes, method="shapley", samples=400)
    assert_close(lone[:, 2:], torch.zeros(3, 2).double())
    assert_close(lone[:, 0], codes[:, 0] * codes[:, 1] / 2, atol=0.05, rtol=0.2)


def test_total_indices_of_a_known_function():
    masks = halton_design(3, 8192)
    assert masks.shape == (8192 * 5, 3)
    a, b = masks[: 2 * 8192].chunk(2)
    assert_close(masks[3 * 8192 : 4 * 8192], torch.stack([a[:, 0], b[:, 1], a[:, 2]], 1))
    answers = masks[:, 0] + 2 * masks[:, 0] * masks[:, 1]
    # by hand: var = 1/12 + 1/3 + 2 cov..., E[var | all but i] over it
    spread = 4 / 9 + 2 / 3 + 1 / 3 - 1  # E[(x + 2xy)^2] = 1/3 + 4/6 + 4/9, mean 1
    expected = torch.tensor([(1 + 2 + 4 / 3) / 12, 4 / 3 / 12, 0]).double() / spread
    for variance in ("both", "first"):
        assert_close(sobol_indices(answers, 3, variance=variance), expected, atol=2e-3, rtol=0)
    assert_close(sobol_indices(torch.ones(2, 10), 3), torch.zeros(2, 3).double())


def test_hsic_is_a_trace_and_vanishes_with_dependence():
    masks = torch.randint(2, (30, 3), generator=torch.Generator().manual_seed(0))
    answers = masks[:, 0] * 2.0 + 0.1 * rows(30, 1)[:, 0]
    found = hsic_indices(answers, masks)
    centre = torch.eye(30).double() - 1 / 30
    apart = (answers[:, None] - answers).abs()
    kernel = torch.exp(-(apart**2) / (2 * apart.flatten().median() ** 2))
    for i in range(3):
        same = (masks[:, None, i] == masks[:, i]).double()
        assert found[i].item() == pytest.approx(torch.trace(centre @ same @ centre @ kernel).item() / 29**2)
    assert found[0] > 5 * found[1:].max()
    assert_close(hsic_indices(torch.ones(30), masks), torch.zeros(3).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "sobel"}, "did you mean sobol"),
        ({"samples": 5}, "'samples' is no option of sobol"),
        ({"method": "gradient", "steps": 5}, "it has no options"),
        ({"designs": 1}, "designs is 1"),
        ({"variance": "last"}, "variance is 'last'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_importance_errors(options, words):
    codes, answer, _ = linear_head()
    with pytest.raises(InputError, match=words):
        code_importance(answer, codes, **options)
    with pytest.raises(InputError, match=r"codes are \(4,\)"):
        code_importance(answer, codes[0])


# Is it right?


def test_scores_of_a_linear_head_by_hand():
    codes, answer, parts = linear_head(concepts=5, space=(2, 2))
    found = score_importance(answer, codes, parts, repeats=20)
    for image in range(3):
        left = parts[image].sort(descending=True).values
        assert_close(found.deletion_curves[image], 0.4 + left.sum() - torch.cat([torch.zeros(1), left]).cumsum(0))
        assert_close(found.insertion_curves[image], 0.4 + torch.cat([torch.zeros(1), left]).cumsum(0))
    assert found.deletion.value == pytest.approx(torch.trapezoid(found.deletion_curves, dx=0.2).mean().item())
    assert found.insertion.value == pytest.approx(torch.trapezoid(found.insertion_curves, dx=0.2).mean().item())
    assert found.mu_fidelity.value == pytest.approx(1)
    assert found.deletion.high < found.deletion.random_low
    assert found.insertion.low > found.insertion.random_high
    every = torch.tensor(list(permutations(range(5)))).expand(3, -1, -1)
    best = torch.trapezoid(concept_curves(answer, codes, every), dx=0.2).amin(1)
    assert_close(torch.trapezoid(found.deletion_curves, dx=0.2), best)


def test_scores_of_the_opposite_are_the_opposite():
    codes, answer, parts = linear_head(concepts=5)
    one, other = (score_importance(answer, codes, sign * parts, repeats=20) for sign in (1, -1))
    assert other.mu_fidelity.value == pytest.approx(-1)
    assert other.deletion.value == pytest.approx(one.insertion.value)
    with pytest.raises(InputError, match=r"importance is \(4,\)"):
        score_importance(answer, codes, parts[0, :4])


# The whole


@pytest.mark.parametrize("model", [net(), net(last=True), Reused().double()])
def test_a_picture_of_each_concept_of_any_model(model):
    x = photos(4)
    layer = {"layer": "act"} if isinstance(model, Reused) else {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = explain_concepts(model, x, num_concepts=3, importance="occlusion", method="pca", **layer)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.target.tolist() == model.eval()(x).argmax(1).tolist()
    assert_close(found.answers, model(x).amax(1))
    assert_close(found.importance, found.per_image.mean(0))
    assert found.map(1).shape == (4, 12, 8)
    assert overlay(torch.zeros(3, 12, 8, dtype=torch.uint8), found.map(1)[0]).shape == (3, 12, 8)
    assert found.ranking()[0] == found.importance.argmax()
    strongest = found.codes[..., 2].flatten(1).mean(1).argmax()
    assert found.prototypes(2, 1) == [strongest]
    whole = explain_concepts(model, x, num_concepts=found.codes.shape[-1], method=found.bank, **layer)
    assert_close(whole.codes, found.codes)


def test_a_whole_basis_answers_as_the_model():
    x = photos(4)
    found = explain_concepts(net(), x, layer="norm", method="pca", num_concepts=4, against=2, target=1)
    assert found.against.tolist() == [2] * 4
    rest = explain_concepts(net(), x, layer="body", method="pca", num_concepts=6, target=1, against=2)
    assert rest.relative_error < 1e-12
    assert_close(rest.answers_from_codes, rest.answers)
    logits = net().eval()(x)
    assert_close(rest.answers, logits[:, 1] - logits[:, 2])


def test_importance_is_that_of_the_models_own_gradient():
    model, x = net(), photos(2)
    found = explain_concepts(model, x, layer="body", method="pca", num_concepts=6, importance="gradient", target=3)
    with torch.no_grad():
        activation = model.eval().body(model.act(model.stem(x)))
    activation.requires_grad_()
    logits = model.head(model.norm(activation.relu().mean((2, 3))))
    (slope,) = torch.autograd.grad(logits[:, 3].sum(), activation)
    assert_close(found.per_image, slope.movedim(1, -1).flatten(1, 2).sum(1) @ found.bank.atoms.T)


def test_tokens_have_places_where_they_form_a_grid():
    found = explain_concepts(Tokens(), images(2, 3, 12, 8), layer="block", num_concepts=2, importance="occlusion")
    assert found.map(0).shape == (2, 12, 8)
    with_class = replace(found, codes=torch.cat([9 + found.codes[:, :1], found.codes], 1))
    assert_close(with_class.map(0), found.map(0))  # a class token has no place
    with pytest.raises(InputError, match="23 tokens fit no grid in the proportions of a 12 x 8 image"):
        replace(found, codes=torch.randn(2, 23, 2)).map(0)
    other = explain_concepts(Tokens(), images(2, 3, 12, 8), layer="head", method="pca", num_concepts=2)
    with pytest.raises(InputError, match="nowhere in particular"):
        other.map(0)
    with pytest.raises(InputError, match="concept is 2"):
        found.map(2)


def test_crops_other_sources_and_dictionaries_make_banks_too():
    x = photos(4, 12, 12)
    crops = explain_concepts(net(), x, num_concepts=3, patch=6, method="kmeans", importance="tcav")
    source = explain_concepts(net(), x[:2], num_concepts=3, source=x, method="kmeans", importance="tcav")
    few = explain_concepts(net(), x, num_concepts=3, max_rows=10, method="kmeans", importance="tcav")
    assert crops.codes.shape == few.codes.shape == (4, 6, 6, 3)
    assert source.codes.shape == (2, 6, 6, 3)
    own = explain_concepts(net(), x, method=MatchingPursuit(6, 9, k=2).double(), importance="tcav")
    assert own.method == "MatchingPursuit"
    assert own.codes.shape[-1] == 9
    with pytest.raises(InputError, match="method is a bank"):
        explain_concepts(net(), x, method=own.bank, patch=4)
    with pytest.raises(InputError, match=r"this bank reads \(..., 6\)"):
        explain_concepts(net(), x, method=crops.bank, layer="stem")


def test_faithfulness_of_an_explanation():
    x = photos(6)
    found = explain_concepts(net(), x, method="pca", num_concepts=5, importance="shapley")
    scores = concept_faithfulness(net(), x, found)
    assert_close(scores.deletion_curves[:, 0], found.answers_from_codes)
    assert scores.insertion.value > scores.insertion.random
    assert scores.mu_fidelity.value > 0.5
    with pytest.raises(InputError, match="there are 5 images but codes of 6"):
        concept_faithfulness(net(), x[:5], found)


# Strategies


def test_images_fall_into_the_strategies_that_were_made():
    rng = torch.Generator().manual_seed(0)
    kinds = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1]]).repeat_interleave(torch.tensor([9, 14, 5]), 0)
    importance = kinds * (1 + torch.rand(28, 1, generator=rng)) + 0.02 * torch.randn(28, 3, generator=rng)
    right = torch.tensor([1.0] * 9 + [0.0] * 14 + [0.5] * 5)
    found = find_strategies(importance, right)
    assert found.prevalence.tolist() == [14 / 28, 9 / 28, 5 / 28]
    assert found.reliability.tolist() == [0.0, 1.0, 0.5]
    assert found.labels.tolist() == [1] * 9 + [0] * 14 + [2] * 5
    assert found.main_concepts(1, 1) == [0]
    assert found.main_concepts(2, 1, distinct=True) == [2]
    for seed in range(6):  # K-means numbers its clusters as it likes
        again = find_strategies(importance, right, num_clusters=4, seed=seed)
        assert_close(torch.bincount(again.labels) / 28, again.prevalence.float())
        assert (again.prevalence.diff() <= 0).all()
        assert_close(again.centres[0], importance[again.labels == 0].double().mean(0))
    figure = draw_strategies(found, names=["ear", "eye", "paw"])
    plane, graph = figure.axes
    assert [text.get_text() for text in plane.get_legend().get_texts()][2].startswith("2: paw")
    assert graph.get_xlabel().startswith("prevalence")
    assert len(graph.collections) == 3
    with pytest.raises(InputError, match="2 names for 3 concepts"):
        draw_strategies(found, names=["ear", "eye"])


def test_strategies_need_images():
    with pytest.raises(InputError, match="have no clusters"):
        find_strategies(torch.ones(5, 3), torch.ones(5))
    with pytest.raises(InputError, match=r"reliability \(4,\)"):
        find_strategies(torch.ones(5, 3), torch.ones(4))
    assert find_strategies(torch.eye(3), torch.ones(3), num_clusters=1).prevalence.tolist() == [1.0]
