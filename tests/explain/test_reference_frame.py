"""frame_scores: a loop by hand, symmetries, the blur against scipy's, then errors."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import frame_scores
from saccade.explain.removal import blur_mirrored
from tests.explain.nets import ConvNet, images, linear

QUESTION = {"target": 1, "against": 2, "group": {0, 1}, "group_against": {2, 3}}


def maps(batch=3, height=8, width=8):
    return images(batch, 1, height, width, seed=9)[:, 0]


@pytest.mark.parametrize("combine", ["sum", "difference"])
def test_it_is_the_loop_by_hand(combine):
    model, x = ConvNet().eval().double(), images(3).double()
    found = frame_scores(model, x, maps(), combine=combine, **QUESTION)
    sign = 1 if combine == "sum" else -1
    curves = {name: torch.zeros(3, 9).double() for name in ("ccs", "cgc", "pgs", "cgs")}
    for image in range(3):
        order = maps()[image].flatten().argsort(descending=True)
        p0 = model(x[image : image + 1]).softmax(1)[0]
        for step, alpha in enumerate(np.linspace(0.1, 0.9, 9)):
            changed = x[image].clone().flatten(1)
            changed[:, order[: int(alpha * 64)]] = 0
            p = model(changed.view_as(x[:1])).softmax(1)[0]
            rest = [0, 1] if combine == "sum" else [0]
            curves["ccs"][image, step] = p[1] - p[2]
            curves["cgc"][image, step] = 0.5 * (p[1] - p0[1] + sign * (p - p0)[rest].mean())
            curves["pgs"][image, step] = (p0 - p)[[0, 1]].mean()
            curves["cgs"][image, step] = 0.5 * ((p - p0)[[0, 1]].mean() + sign * (p - p0)[[2, 3]].mean())
    for name, curve in curves.items():
        assert_close(found.curves[name], curve.detach())
        area = torch.trapezoid(curve.detach(), dx=0.1).mean()
        assert getattr(found, name).value == pytest.approx(area.item(), abs=1e-9)


def test_symmetries():
    model, x = ConvNet(), images(4)
    one = frame_scores(model, x, maps(4), **QUESTION)
    two = frame_scores(model, x, maps(4), target=2, against=1, group={2, 3}, group_against={0, 1})
    assert one.ccs.value == pytest.approx(-two.ccs.value)
    assert one.cgs.value == pytest.approx(two.cgs.value)
    apart = [
        frame_scores(
            model, x, maps(4), target=min(a), against=min(b), group=a, group_against=b, combine="difference"
        ).cgs.value
        for a, b in (({0, 1}, {2, 3}), ({2, 3}, {0, 1}))
    ]
    assert apart[0] == pytest.approx(-apart[1])


def test_the_oracle_is_best_on_a_linear_model_and_random_orders_are_not():
    model, x = linear(), images(8, seed=4)
    contrast = ((model.weight[0] - model.weight[1]) * x).sum(1).detach()
    found = frame_scores(model, x, maps(8), target=0, against=1, oracle=contrast)
    assert found.ccs.oracle < found.ccs.random_low
    assert found.cgc is None
    assert list(found.curves) == ["ccs"]


@pytest.mark.parametrize("filler", ["blur", "mean", "noise", "zero"])
def test_fillers_and_patches(filler):
    found = frame_scores(ConvNet(), images(), maps(), filler=filler, patch=3, **QUESTION)
    assert found.curves["pgs"].shape == (3, 9)
    again = frame_scores(ConvNet(), images(), maps(), filler=filler, patch=3, **QUESTION)
    assert_close(found.curves, again.curves, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "sigma"), [((8, 8), 5.0), ((3, 11), 2.0), ((1, 4), 1.0)])
def test_the_blur_is_scipys(size, sigma):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = images(2, 3, *size).double()
    expected = ndimage.gaussian_filter(x.numpy(), sigma=(0, 0, sigma, sigma))
    assert_close(blur_mirrored(x, sigma), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "minus"}, "combine is 'minus'"),
        ({"filler": "black"}, "filler is 'black'"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"group": {4}}, "group is the group .4.: give at least one class"),
        ({"group": None}, "group_against is given without group"),
        ({"group": {1}, "combine": "difference"}, "needs another member"),
        ({"against": 7}, "against is 7"),
        ({"patch": 9}, "patch is 9"),
    ],
)
def test_wrong_calls_say_what_to_do(options, message):
    with pytest.raises(InputError, match=message):
        frame_scores(ConvNet(), images(), maps(), **(QUESTION | options))
