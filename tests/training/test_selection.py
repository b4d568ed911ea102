"""Selectors: laws of the loss and of whose gradients are whose, three settings, training, errors."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import saccade
from saccade.errors import DivergedError, InputError
from saccade.training import SelectionGame, Selector, selection_loss, train_selection

LABELS = torch.tensor([0, 3, 1, 2, 3])


def batch(count=5, height=7, width=9, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, classes),
    )


def make_game(num_players=3, **options):
    torch.manual_seed(0)
    selector = Selector(nn.Conv2d(3, 4, 3, padding=1), [4])
    detector = None if num_players == 1 else classifier()
    return SelectionGame(selector, classifier(), detector, num_players=num_players, **options).double()


def gradients(module):
    return {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


# Laws of the loss


def test_the_selectors_loss_is_the_sum_of_its_parts():
    mask, shown, hidden = torch.rand(5, 1, 7, 9), torch.randn(5, 4), torch.randn(5, 4)
    found = selection_loss(
        mask, shown, hidden, LABELS, prediction_weight=0.7, completeness_weight=3, gap=9, area_weight=5, free_area=0.2
    )
    first, second = cross_entropy(shown, LABELS), cross_entropy(hidden, LABELS)
    area = sum(max(0, each.sum().item() / 63 - 0.2) for each in mask) / 5  # of its own pixels, whatever the size
    assert_close(found.predictor, first)
    assert_close(found.completeness, first - second + 9)
    assert found.area.item() == pytest.approx(area)
    assert_close(found.selector, 0.7 * first + 3 * (first - second + 9) + 5 * found.area)


def test_what_costs_nothing():
    right = 20.0 * nn.functional.one_hot(LABELS, 4)
    free = selection_loss(torch.full((5, 1, 3, 3), 0.6), right, -right, LABELS)
    assert free.area == free.completeness == 0
    assert free.selector == free.predictor < 1e-6
    one = torch.zeros(5, 1, 3, 3)
    one[0] = 1  # means of images are held against what is free, not the mean of all
    assert selection_loss(one, right, -right, LABELS).area == pytest.approx(0.4 / 5)


# Whose gradient is whose


@pytest.mark.parametrize("num_players", [3, 2, 1])
@pytest.mark.parametrize("gap", [-50.0, 50.0], ids=["complete", "not complete"])
def test_every_player_gets_the_gradient_of_its_own_loss_alone(num_players, gap):
    game, images = make_game(num_players, loss=partial(selection_loss, gap=gap)).train(), batch()
    players = {"selector": game.selector, "predictor": game.predictor, "detector": game.detector}
    losses = game.losses(images, LABELS)
    found = game.backward(images, LABELS)
    assert_close(tuple(found), tuple(each.detach() for each in losses))
    for name, player in players.items():
        if player is not None and name in game.players:
            wanted = torch.autograd.grad(getattr(losses, name), list(player.parameters()), retain_graph=True)
            assert_close(list(gradients(player).values()), list(wanted))
            assert any(each.abs().sum() > 0 for each in wanted)
        elif player is not None:
            assert not gradients(player)
            assert not player.training


def test_gradients_add_up_as_backward_does_and_frozen_parameters_have_none():
    game, images = make_game(2), batch()
    game.predictor[0].requires_grad_(False)
    game.backward(images, LABELS)
    once = {name: each.clone() for name, each in gradients(game).items()}
    assert not any(name.startswith("predictor.0") or name.startswith("detector") for name in once)
    game.eval()
    game.zero_grad()
    game.backward(images, LABELS)
    once = {name: each.clone() for name, each in gradients(game).items()}
    game.backward(images, LABELS)
    assert_close(gradients(game), {name: 2 * each for name, each in once.items()})


def test_who_does_not_learn_stays_as_it_was():
    game, images = make_game(2), batch()
    before = {name: each.clone() for name, each in game.state_dict().items()}
    train_selection(game, [(images, LABELS)], steps=3)
    for name, each in game.state_dict().items():
        same = torch.equal(each, before[name])
        assert same == name.startswith("detector"), name  # running means too
    assert not any(module.training for module in game.modules())


# The classifier that shows its evidence


def test_hidden_pixels_take_the_fill_and_a_tap_sees_the_mask():
    game, images = make_game(1, fill=(-2.0, 0.5, 3.0)).eval(), batch()
    fill = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64).view(3, 1, 1)
    with torch.no_grad(), saccade.tap(game) as seen:
        logits = game(images)
    mask = seen[""].gate
    assert mask.shape == (5, 1, 7, 9)
    assert_close(logits, game.predictor(images * mask + fill * (1 - mask)).detach())
    assert_close(game.mask(images).detach(), mask)
    with torch.no_grad():
        game.selector.votes[0].bias.fill_(1e9)
    assert_close(game(images), game.predictor(images))


def test_backbones_play_every_part():
    torch.manual_seed(0)
    encoder = saccade.create_model("study_xxs", features_only=True)
    players = [saccade.create_model("study_xxs", num_classes=4) for _ in range(2)]
    game = SelectionGame(Selector(encoder, encoder.feature_info.channels()), *players, num_players=3)
    images = torch.randn(5, 3, 32, 32)
    game.backward(images, LABELS)
    assert all(each.grad is not None for each in game.predictor.parameters())
    assert all(each.grad is not None for each in game.selector.votes.parameters())
    found = saccade.explain(game, images, method="selection")
    assert_close(found.map, game.eval().mask(images)[:, 0].detach())
    checked = saccade.faithfulness(game.predictor, images, found)
    assert checked.target.tolist() == found.target.tolist()


# Training


def test_training_finds_the_pixel_that_tells_the_classes():
    torch.manual_seed(0)
    images = torch.randn(256, 1, 3, 3).abs() + 0.1
    labels = torch.arange(256) % 2
    images[:, 0, 1, 2] *= 2 * labels - 1  # the sign of one pixel
    where = nn.Linear(9, 2)
    with torch.no_grad():
        where.weight.zero_()
        where.weight[:, 5] = torch.tensor([-8.0, 8.0])
    mask = _Constant(3, 3)
    loss = partial(selection_loss, free_area=1 / 9, area_weight=10.0)
    game = SelectionGame(mask, nn.Sequential(nn.Flatten(), where), loss=loss, num_players=1)
    losses = train_selection(game, list(zip(images.split(64), labels.split(64))), steps=200, rate=0.1)
    assert losses.selector.shape == (200,)
    assert losses.selector[-1] < 0.5 * losses.selector[0]
    shown = game.mask(images[:1])[0, 0].flatten()
    assert shown[5] > 0.9
    assert shown[torch.arange(9) != 5].max() < 0.1


class _Constant(nn.Module):
    """The same mask for every image."""

    def __init__(self, height, width):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(1, 1, height, width))

    def forward(self, images):
        return self.logits.expand(len(images), -1, -1, -1)


# Errors


def test_errors_say_what_to_do():
    selector, network = nn.Conv2d(3, 1, 1), classifier()
    for number, detector in ((1, network), (2, None), (4, network)):
        with pytest.raises(InputError, match=f"num_players is {number}"):
            SelectionGame(selector, network, detector, num_players=number)
    images = batch().float()
    with pytest.raises(InputError, match=r"the selector returns \(5, 1, 5, 7\): .* \(5, 1, 7, 9\)"):
        SelectionGame(nn.Conv2d(3, 1, 3), network, num_players=1)(images)
    with pytest.raises(InputError, match=r"gives 1 map\(s\), channels has 2"):
        Selector(selector, [1, 2])(images)
    with pytest.raises(InputError, match=r"mask is \(5, 7, 9\)"):
        selection_loss(images[:, 0], torch.zeros(5, 4), torch.zeros(5, 4), LABELS)
    game = SelectionGame(selector, network, num_players=1)
    with pytest.raises(InputError, match="steps is 0"):
        train_selection(game, [(images, LABELS)], steps=0)
    with pytest.raises(InputError, match="empty or at their end"):
        train_selection(game, iter([(images, LABELS)]), steps=2)
    with pytest.raises(DivergedError, match="in step 0"):
        train_selection(game, [(images * torch.nan, LABELS)], steps=2)
    with pytest.raises(InputError, match="Sequential has no selector"):
        saccade.explain(network, images, method="selection")
    with pytest.raises(InputError, match=r"the selector returns \(5, 2, 7, 9\)"):
        saccade.explain(network, images, method="selection", selector=nn.Conv2d(3, 2, 1))
