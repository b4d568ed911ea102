"""Grad-CAM: a hand computation, the layer and layout it finds, then errors and parity with captum."""

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import explain
from tests.explain.nets import ConvNet, images, linear


@pytest.mark.parametrize("last", [False, True])
def test_it_is_the_hand_computation_on_a_pooled_linear_head(last):
    model, x = ConvNet(last=last).eval().double(), images().double()
    found = explain(model, x, method="grad_cam", target=2)
    assert found.layer == "body"

    hidden = model.act(model.stem(x)).movedim(1, -1)
    body = (hidden @ model.body.weight.view(6, 5).mT + model.body.bias).movedim(-1, 1)  # (B, 6, 4, 4)
    to_logit = model.head.weight[2] * model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    slope = to_logit[:, None, None] * (body > 0) / 16
    cam = (slope.mean((2, 3), keepdim=True) * body).sum(1)
    assert_close(found.map, interpolate(cam[:, None], (8, 8), mode="bilinear")[:, 0].detach())


def test_a_map_on_a_patch_has_the_sign_of_its_evidence():
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.ones_(model[0].weight)
    x = torch.zeros(1, 3, 8, 8)
    x[..., :4], x[..., 4:] = 1.0, -1.0
    found = explain(model, x, method="grad_cam", target=0).map
    assert (found[..., :3] > 0).all()
    assert (found[..., 5:] < 0).all()


class Tail(nn.Module):
    """A stem of stride 4, one module, global pooling."""

    def __init__(self, module, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.module = module

    def forward(self, x):
        return self.module(self.stem(x)).flatten(2).mean(2)


class AttentionMaps(nn.Module):
    """Hands its maps on, after a softmax and a dropout whose outputs look like maps and are none."""

    def __init__(self):
        super().__init__()
        self.soft, self.drop = nn.Softmax(-1), nn.Dropout(0.1)

    def forward(self, x):
        tokens = x.flatten(2)
        mixed = self.drop(self.soft((tokens.mT @ tokens)[:, None]))[:, 0] @ tokens.mT
        return mixed.mT.unflatten(2, x.shape[2:]).flatten(2)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (nn.Conv2d(6, 7, 1), "module"),
        (nn.Sequential(nn.Conv2d(6, 7, 1), nn.AdaptiveAvgPool2d(1)), "module.0"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.1)), "module.0"),
        (AttentionMaps(), "stem"),
    ],
)
def test_the_last_map_before_pooling_is_found(module, layer):
    x = images(2, 3, 16, 20)
    assert explain(Tail(module, 6), x, method="grad_cam").layer in (layer, layer.removesuffix(".0"))


def test_a_named_layer_is_used_and_said():
    model, x = ConvNet(), images()
    found = explain(model, x, method="grad_cam", layer="stem")
    assert found.layer == "stem"
    assert not torch.allclose(found.map, explain(model, x, method="grad_cam").map)


def test_a_cube_is_read_as_told():
    model, x = Tail(nn.Identity(), 4), images(1, 3, 16, 16)  # the stem's output is 4 x 4 x 4
    first, told, other = (explain(model, x, method="grad_cam", layout=layout).map for layout in (None, "NCHW", "NHWC"))
    assert_close(first, told)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (linear(), {}, "no layer returns a map"),
        (ConvNet(), {"layer": "stm"}, "layer is 'stm': did you mean stem"),
        (ConvNet(), {"layer": "head"}, r"'head' does not return a map.*head: \(1, 4\)"),
        (ConvNet(), {"layout": "CHWN"}, "choose one of NCHW, NHWC|did you mean"),
    ],
)
def test_errors_name_the_layer(model, options, message):
    with pytest.raises(InputError, match=message):
        explain(model, images(), method="grad_cam", **options)


def test_a_layer_off_the_path_is_refused():
    class Aside(ConvNet):
        def forward(self, x):
            self.aside(x)
            return super().forward(x)

    model = Aside()
    model.aside = nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match="does not depend on its output"):
        explain(model, images(), method="grad_cam", layer="aside")


def test_it_equals_captum_where_channels_come_first():
    from captum.attr import LayerGradCam

    model, x = ConvNet().eval(), images()
    expected = LayerGradCam(model, model.stem).attribute(x, target=1)
    expected = interpolate(expected, (8, 8), mode="bilinear")[:, 0].detach()
    assert_close(explain(model, x, method="grad_cam", layer="stem", target=1).map, expected)
