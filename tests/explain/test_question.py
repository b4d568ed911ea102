"""Questions: the four of the taxonomy are maps of another model's class, in maps and in curves; then errors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import explain, faithfulness
from tests.explain.nets import ConvNet, images, linear

METHODS = ["gradient", "grad_cam", "input_x_gradient", "integrated_gradients", "normgrad", "occlusion", "relevance"]
QUESTIONS = {
    "class": ({"target": 1}, [0.0, 1, 0, 0]),
    "class against class": ({"target": 1, "against": 3}, [0.0, 1, 0, -1]),
    "group": ({"target": {0, 2}}, [0.5, 0, 0.5, 0]),
    "class against group": ({"target": 1, "against": {0, 2}}, [-0.5, 1, -0.5, 0]),
    "group against group": ({"target": {0, 2}, "against": {1, 3}}, [0.5, -0.5, 0.5, -0.5]),
}


class Answer(nn.Module):
    """One logit: a weighted sum of another model's."""

    def __init__(self, model, weights):
        super().__init__()
        self.model = model
        self.weights = torch.tensor(weights)

    def forward(self, x):
        return (self.model(x) * self.weights.to(x)).sum(1, keepdim=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_is_explained_like_a_logit_of_its_own(method, question):
    model, x = ConvNet().double(), images(3).double()
    asked, weights = QUESTIONS[question]
    expected = explain(Answer(model, weights), x, method=method, target=0)
    found = explain(model, x, method=method, **asked)
    assert_close(found.map, expected.map)
    assert (found.error is None) == (expected.error is None)


def test_each_image_may_have_its_own_question():
    model, x = ConvNet(), images(3)
    groups = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]]).bool()
    against = torch.tensor([2, 3, 3])
    found = explain(model, x, method="input_x_gradient", target=groups, against=against, batch_size=2)
    assert_close(found.target, groups)
    assert_close(found.against, against)
    for image, (group, other) in enumerate([({0, 1}, 2), ({2}, 3), ({0, 1}, 3)]):
        alone = explain(model, x[image : image + 1], method="input_x_gradient", target=group, against=other)
        assert_close(found.map[image], alone.map[0])


def test_the_prediction_is_asked_about_unless_another_class_is():
    model, x = ConvNet().eval(), images(4)
    other = (model(x).argmax(1) + 1) % 4
    found = explain(model, x, method="gradient", against=other)
    assert_close(found.target, model(x).argmax(1))
    assert_close(found.against, other)


@pytest.mark.parametrize("question", QUESTIONS)
def test_curves_read_mean_probabilities_and_their_difference(question):
    model, x = ConvNet().eval(), images(3)
    asked, weights = QUESTIONS[question]
    found = faithfulness(model, x, explain(model, x, method="input_x_gradient", **asked), filler="zero")
    expected = model(x).double().softmax(1) @ torch.tensor(weights).double()
    assert_close(found.deletion_curves[:, 0], expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_question_given_replaces_the_explanations_own():
    model, x = ConvNet(), images(3)
    found = explain(model, x, method="gradient", target=1, against=2)
    assert faithfulness(model, x, found).against.tolist() == [2, 2, 2]
    assert faithfulness(model, x, found, target=1).against is None
    assert faithfulness(model, x, found, against=3).against.tolist() == [3, 3, 3]


def test_on_a_linear_model_the_contrast_is_the_best_order_for_the_contrast():
    model, x = linear(), images(8, seed=4)
    one, two = (
        faithfulness(
            model,
            x,
            explain(model, x, method="input_x_gradient", target=0, against=against),
            target=0,
            against=1,
            filler="zero",
        )
        for against in (None, 1)
    )
    assert two.deletion.value < one.deletion.value


def test_the_oracle_stands_beside_the_map():
    model, x = linear(), images(4, seed=2)
    weights = model.weight.detach()
    oracle = ((weights[0] - weights[1:].mean(0)) * x).sum(1)
    found = faithfulness(model, x, torch.zeros(4, 8, 8), target=0, oracle=oracle, filler="zero", patch=1)
    same = faithfulness(model, x, oracle, target=0, filler="zero", patch=1)
    bare = faithfulness(model, x, torch.zeros(4, 8, 8), target=0, filler="zero", patch=1)
    for name in ("deletion", "insertion", "abpc"):
        score = getattr(found, name)
        assert score.oracle == pytest.approx(getattr(same, name).value, abs=1e-12)
        assert score.oracle_low <= score.oracle <= score.oracle_high
        assert score.random == pytest.approx(getattr(bare, name).random, abs=1e-12)
    assert bare.abpc.oracle is None
    assert_close(found.random_curves, bare.random_curves)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target": set()}, "at least one class"),
        ({"target": {1, 4}}, "each from 0 to 3"),
        ({"target": {True}}, "each from 0 to 3"),
        (
            {"target": torch.ones(2, 4).bool()},
            r"torch.bool of shape \(2, 4\): a group is a set of classes, or.*\(3, 4\)",
        ),
        ({"target": torch.zeros(3, 4).bool()}, "an image with an empty group"),
        ({"target": 1, "against": {0, 1}}, r"class 1 stands in target and in against \(image 0\)"),
        ({"target": 1, "against": 4}, "against is 4 but the model knows 4 classes"),
        ({"target": 1, "against": torch.tensor([0, 2])}, r"against is torch.int64 of shape \(2,\)"),
    ],
)
def test_wrong_questions_say_what_to_do(asked, message):
    with pytest.raises(InputError, match=message):
        explain(ConvNet(), images(), method="gradient", **asked)
