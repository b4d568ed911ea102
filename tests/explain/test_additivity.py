"""additivity: exact maps of linear models, a loop by hand, cost, then errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import additivity, explain
from tests.explain.nets import ConvNet, images, linear


def exact(model, x, target=0):
    return (model.weight[target] * x).sum(1).detach()


@pytest.mark.parametrize("patch", [1, 3])
def test_the_exact_map_of_a_linear_model_is_perfect(patch):
    model, x = linear().double(), images(4).double()
    for scale in ("fitted", "given"):
        found = additivity(model, x, exact(model, x), target=0, scale=scale, patch=patch)
        assert found.sensitivity_n.value == pytest.approx(1)
        assert found.infidelity.value == pytest.approx(0, abs=1e-12)
        assert abs(found.sensitivity_n.random) < 0.2
        assert found.infidelity.random > 0.3


def test_the_unit_of_a_map_matters_only_where_it_is_given():
    model, x = linear().double(), images(4).double()
    third = exact(model, x) / 3
    assert additivity(model, x, third, target=0).infidelity.value == pytest.approx(0, abs=1e-12)
    assert additivity(model, x, third, target=0, scale="given").infidelity.value == pytest.approx(4 / 9)
    assert additivity(model, x, 0 * third, target=0).infidelity.value == pytest.approx(1)


def test_contrasts_are_read_as_contrasts():
    model, x = linear().double(), images(4).double()
    found = explain(model, x, method="input_x_gradient", target={0, 1}, against=2)
    assert additivity(model, x, found, scale="given").infidelity.value == pytest.approx(0, abs=1e-12)
    assert additivity(model, x, found, target=0).infidelity.value > 0.1


def test_it_is_the_loop_by_hand():
    model, x = ConvNet().eval().double(), images(2).double()
    maps = images(2, 1, 8, 8, seed=3)[:, 0].double()
    found = additivity(model, x, maps, target=1, fractions=(0.25, 0.5), subsets=5, repeats=4, patch=1, seed=4)
    generator = torch.Generator().manual_seed(4)
    shuffle = torch.rand(2, 5, 64, generator=generator).argsort(-1)  # equal scores, sorted stably, keep this order
    for image in range(2):
        for column, size in enumerate((16, 32)):
            sums, falls = [], []
            for subset in range(5):
                chosen = shuffle[image, subset, :size]
                changed = x[image].clone().flatten(1)
                changed[:, chosen] = 0
                before, after = (model(each[None])[0, 1] for each in (x[image], changed.view_as(x[image])))
                sums.append(maps[image].flatten()[chosen].sum())
                falls.append((before - after).detach())
            expected = torch.corrcoef(torch.stack([torch.stack(sums), torch.stack(falls)]))[0, 1]
            assert_close(found.by_fraction[image, column], expected)


def test_shuffled_maps_and_the_oracle_cost_no_pass():
    passes = []
    model, x = linear(), images(2)
    model.register_forward_hook(lambda _module, args, _out: passes.append(len(args[0])))
    found = additivity(
        model, x, torch.zeros(2, 8, 8), target=0, subsets=4, fractions=(0.5,), oracle=exact(model, x), batch_size=3
    )
    assert sum(passes) == 2 * (4 + 2) + 2  # the two of the question count classes
    assert max(passes) <= 3
    assert found.sensitivity_n.oracle == pytest.approx(1, abs=1e-5)
    assert found.sensitivity_n.value == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": ()}, "at least one share"),
        ({"fractions": (0.5, 1.0)}, "between 0 and 1"),
        ({"subsets": 2}, "subsets is 2"),
        ({"scale": "fit"}, "did you mean fitted"),
        ({"filler": "grey"}, "filler is 'grey'"),
        ({"patch": 8}, "one patch covers"),
        ({"oracle": torch.zeros(3, 8, 7)}, r"the oracle is \(3, 8, 7\)"),
        ({"target": 9}, "target is 9"),
    ],
)
def test_wrong_calls_say_what_to_do(options, message):
    with pytest.raises(InputError, match=message):
        additivity(linear(), images(), torch.zeros(3, 8, 8), **options)
