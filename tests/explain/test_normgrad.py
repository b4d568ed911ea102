"""normgrad: shares against real identity layers, fast against formed, combination, the step, then errors."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import explain
from saccade.explain.methods.attribution import enlarge
from saccade.explain.methods.normgrad import combine_maps, form_shares, share_identity_gradient, stretch
from tests.explain.nets import ConvNet, images

CELLS = [("bias", 1), ("scaling", 1), ("conv", 1), ("conv", 3), ("depthwise", 1), ("depthwise", 5)]
AGGREGATES = ["norm", "filter_norm", "sum", "max"]


def maps(seed=0, batch=2, channels=4, height=5, width=7):
    return images(batch, channels, height, width, seed).double()


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize(("virtual", "kernel_size"), CELLS)
def test_fast_is_the_formed_share(virtual, kernel_size, aggregate):
    for sign in (1, -1):  # of the largest product, both signs of each side
        given = (sign * maps(0).abs(), maps(1).abs(), virtual, kernel_size, aggregate)
        assert_close(share_identity_gradient(*given), share_identity_gradient(*given, impl="reference"))
    given = (maps(0), maps(1), virtual, kernel_size, aggregate)
    assert_close(share_identity_gradient(*given), share_identity_gradient(*given, impl="reference"))


@pytest.mark.parametrize(("virtual", "kernel_size"), CELLS)
def test_shares_add_up_to_the_gradient_of_the_layer_put_there_for_real(virtual, kernel_size):
    x, upstream = maps(0, batch=1), maps(1, batch=1)
    centre = torch.zeros(kernel_size, kernel_size).double()
    centre[kernel_size // 2, kernel_size // 2] = 1
    eye = torch.eye(4).double()
    parameter = {
        "bias": torch.zeros(4).double(),
        "scaling": torch.ones(4).double(),
        "conv": eye[:, :, None, None] * centre,
        "depthwise": centre.expand(4, 1, -1, -1).clone(),
    }[virtual].requires_grad_()
    out = {
        "bias": lambda: x + parameter[:, None, None],
        "scaling": lambda: x * parameter[:, None, None],
        "conv": lambda: conv2d(x, parameter, padding=kernel_size // 2),
        "depthwise": lambda: conv2d(x, parameter, padding=kernel_size // 2, groups=4),
    }[virtual]()
    assert_close(out.detach(), x)  # the identity
    (slope,) = torch.autograd.grad(out, parameter, upstream)
    assert_close(form_shares(x, upstream, virtual, kernel_size).sum((2, 3))[0], slope.flatten())


@pytest.mark.parametrize("last", [False, True])
def test_it_is_the_product_of_two_norms_on_the_last_map(last):
    model, x = ConvNet(last=last).eval().double(), images().double()
    found = explain(model, x, method="normgrad", target=2)
    assert found.layer == "body"
    hidden = model.act(model.stem(x)).movedim(1, -1)
    body = hidden @ model.body.weight.view(6, 5).mT + model.body.bias  # (B, 4, 4, 6)
    to_logit = model.head.weight[2] * model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    expected = body.norm(dim=-1) * (to_logit * (body > 0) / 16).norm(dim=-1)
    assert_close(found.map, enlarge(expected, (8, 8)).detach())


def test_layers_combine_as_a_weighted_product_or_sum():
    model, x = ConvNet(), images()
    single = torch.stack(
        [stretch(explain(model, x, method="normgrad", layer=name, target=1).map) for name in ("stem", "body")]
    )
    found = explain(model, x, method="normgrad", layer=("stem", "body"), target=1)
    assert found.layer == "stem, body"
    assert_close(found.map, single.prod(0))
    for weights, shares in (("uniform", (0.5, 0.5)), ("linear", (1 / 3, 2 / 3)), ((3, 1), (0.75, 0.25))):
        options = {"layer": ("stem", "body"), "target": 1, "weights": weights}
        product = explain(model, x, method="normgrad", **options).map
        assert_close(product, single[0] ** shares[0] * single[1] ** shares[1])
        total = explain(model, x, method="normgrad", combine="sum", **options).map
        assert_close(total, single[0] * shares[0] + single[1] * shares[1])


def test_scales_are_the_last_maps_of_each_resolution():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for scales, layers in ((1, "5"), (2, "4, 5"), (3, "1, 4, 5"), (9, "1, 4, 5")):
        assert explain(model, images(1, 3, 16, 16), method="normgrad", scales=scales).layer == layers


def test_a_flat_map_is_stretched_to_zero_and_not_to_noise():
    flat = torch.full((1, 5, 5), 0.1)
    assert_close(stretch(flat), torch.zeros(1, 5, 5))
    noisy = flat * (1 + torch.finfo(torch.float32).eps * (torch.arange(25).view(5, 5) % 2))
    assert_close(stretch(noisy), torch.zeros(1, 5, 5))
    assert stretch(images(3, 1, 5, 5)[:, 0]).amax((1, 2)).tolist() == [1, 1, 1]
    assert_close(combine_maps(images(2, 3, 5, 5)).shape, torch.Size([3, 5, 5]))


def test_the_step_is_one_of_gradient_descent_and_leaves_no_trace():
    model, x = ConvNet().train(), images()
    model.head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    target = torch.tensor([1, 0, 3])
    found = explain(model, x, method="normgrad", target=target, meta_rate=0.1)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.grad is None for parameter in model.parameters())
    for image in range(3):
        other = ConvNet().eval()
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        nn.functional.cross_entropy(other(x[image : image + 1]), target[image : image + 1]).backward()
        optimizer.step()
        expected = explain(other, x[image : image + 1], method="normgrad", target=int(target[image]))
        assert_close(found.map[image], expected.map[0])


def test_the_parameters_come_back_when_the_model_fails():
    model, x = ConvNet(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Exception, match="NaN"):
        explain(model, x, method="normgrad", target=1, meta_rate=1e30)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"virtual": "convolution"}, "virtual is 'convolution'"),
        ({"aggregate": "mean"}, "aggregate is 'mean'"),
        ({"combine": "mean"}, "combine is 'mean'"),
        ({"kernel_size": 2}, "kernel_size is 2: give an odd number"),
        ({"virtual": "bias", "kernel_size": 3}, "kernel_size is 3"),
        ({"scales": 0}, "scales is 0"),
        ({"scales": 2, "layer": "body"}, "scales is 2 and layers are named"),
        ({"layer": ()}, "empty sequence"),
        ({"layer": ("stem", "bodi")}, "did you mean body"),
        ({"layer": ("stem", "body"), "weights": (1,)}, r"weights are \(1,\) for 2 layer"),
        ({"weights": (-1.0,)}, "from 0 up"),
        ({"weights": "even"}, "weights is 'even'"),
        ({"meta_rate": float("nan")}, "meta_rate is nan"),
        ({"meta_rate": 0.1, "target": {0, 1}}, "meta_rate needs one class as target"),
    ],
)
def test_wrong_options_say_what_to_do(options, message):
    with pytest.raises(InputError, match=message):
        explain(ConvNet(), images(), method="normgrad", **options)
