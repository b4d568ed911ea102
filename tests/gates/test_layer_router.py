"""LayerRouter: what it averages, when it decides how, errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.gates import LayerRouter


def make_router(**options):
    router = LayerRouter(4, **{"start": 0.0} | options).double()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return router


def pool_by_hand(tokens, first, last, size):
    """The first and the last `size` tokens of the segment, as lists."""
    part = tokens[first : last + 1]
    return torch.cat([part[:size], part[-size:]]).mean(0) if len(part) else torch.zeros(4, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_both_ends_of_each_samples_segment_are_averaged(size):
    x = torch.randn(5, 12, 4, dtype=torch.float64)
    segment = torch.tensor([[0, 11], [3, 8], [5, 5], [7, 3], [0, 1]])
    expected = torch.stack([pool_by_hand(each, *ends, size) for each, ends in zip(x, segment.tolist())])
    assert_close(make_router(pool_size=size).pool(x, segment), expected)


def test_without_a_segment_the_map_and_without_a_size_all_of_it():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    tokens = x.flatten(1, 2)
    assert_close(make_router().pool(x), tokens.mean(1))
    assert_close(make_router(pool_size=2).pool(x), torch.cat([tokens[:, :2], tokens[:, -2:]], 1).mean(1))
    assert_close(make_router().pool(x, torch.tensor([[2, 5], [2, 5]])), tokens[:, 2:6].mean(1))


def test_official_ends_reach_out_of_short_segments():
    x = torch.randn(3, 12, 4, dtype=torch.float64)
    segment = torch.tensor([[0, 0], [4, 5], [10, 11]])
    router = make_router(pool_size=4, overrun=True)
    pooled = router.pool(x, segment)
    # Python's slices: x[first : first + 4] and x[last - 3 : last + 1], where a negative start counts from the end
    expected = [torch.cat([t[a : a + 4], t[b - 3 : b + 1]]).mean(0) for t, (a, b) in zip(x, segment.tolist())]
    assert_close(pooled, torch.stack(expected))
    assert (router.pool(x[:1], torch.tensor([[7, 3]])) == 0).all()


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_it_starts_as_full_attention(form):
    x = torch.randn(64, 5, 4)
    router = LayerRouter(4, form=form)
    assert (router.eval()(x) == 1).all()
    assert router.train()(x).mean() > 0.9
    assert (LayerRouter(4, form=form, start=-4.5).eval()(x) == 0).all()


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_training_draws_and_evaluation_decides(form):
    x = torch.randn(1, 5, 4, dtype=torch.float64).expand(4000, -1, -1)
    router = make_router(form=form)
    logits = router.logits(router.features(router.pool(x[:1])))[0]
    drawn = router.train()(x)
    assert ((drawn - drawn.round()).abs() < 1e-12).all()
    if form == "softmax":  # the larger of two noisy logits
        assert_close(drawn.mean(), logits.softmax(-1)[1], atol=0.03, rtol=0)
    else:  # noise above -logit, by the distribution of Gumbel's
        assert_close(drawn.mean(), 1 - (-(logits[0].exp())).exp(), atol=0.03, rtol=0)
    decided = router.eval()(x)
    full = logits[1] > logits[0] if form == "softmax" else logits[0] > 0
    assert (decided == full.double()).all()
    assert not decided.requires_grad


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_the_temperature_divides_logits_and_noise_and_stays_out_of_the_state(form):
    router = make_router(form=form)
    logits, noise = torch.randn(2, 30, 2 if form == "softmax" else 1, dtype=torch.float64)
    router.temperature.fill_(0.7)
    scaled = (logits + noise) / 0.7
    expected = torch.stack([scaled[:, 1] - scaled[:, 0] if form == "softmax" else scaled[:, 0]]).sigmoid()[0]
    assert_close(router.soften(logits, noise), expected)
    assert "temperature" not in router.state_dict()


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="form is 'sigmod': did you mean sigmoid"):
        LayerRouter(4, form="sigmod")
    with pytest.raises(InputError, match="pool_size is 0"):
        LayerRouter(4, pool_size=0)
    with pytest.raises(InputError, match=r"segment is \(2,\): give \(3, 2\), the first and the last token"):
        make_router()(torch.zeros(3, 5, 4, dtype=torch.float64), torch.tensor([0, 1]))
