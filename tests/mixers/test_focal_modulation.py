"""FocalModulation: its steps, what taps see of them, options and errors; the contract has the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import FocalModulation


def make_layer(**options):
    layer = FocalModulation(8, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def make_map(*space):
    return torch.randn(2, *(space or (6, 7)), 8, dtype=torch.float64)


@pytest.mark.parametrize("post_norm", [False, True])
def test_steps_come_in_the_order_of_the_paper(post_norm):
    layer, x = make_layer(focal_levels=2, focal_window=5, normalize=True, post_norm=post_norm), make_map()
    query, level, gates = layer.f(x).split([8, 8, 3], -1)
    total = 0
    for number, size in enumerate((5, 7)):
        conv = layer.focal_layers[number]
        level = F.gelu(F.conv2d(level.permute(0, 3, 1, 2), conv.weight, padding=size // 2, groups=8)).permute(
            0, 2, 3, 1
        )
        total = total + gates[..., number, None] * level
    total = (total + gates[..., 2:] * F.gelu(level.mean((1, 2), keepdim=True))) / 3
    out = query * layer.h(total)
    out = F.layer_norm(out, (8,), layer.norm.weight, layer.norm.bias) if post_norm else out
    assert_close(layer(x), layer.proj(out))


def test_taps_see_gates_and_the_matrix_that_made_the_context():
    layer, x = make_layer(), make_map()
    with torch.no_grad():  # equal channels of context
        layer.f.weight[8:16], layer.f.bias[8:16] = layer.f.weight[8].clone(), layer.f.bias[8].clone()
    gathered = []
    layer.h.register_forward_pre_hook(lambda module, args: gathered.append(args[0]))
    with saccade.tap(layer) as seen:
        layer(x)
    _, context, gates = layer.f(x).split([8, 8, 4], -1)
    assert torch.equal(seen[""].gate, gates)
    assert seen[""].attention.shape == (2, 1, 42, 42)
    assert_close((seen[""].attention[:, 0] @ context[..., :1].flatten(1, 2))[..., 0], gathered[0].mean(-1).flatten(1))


def test_kernels_grow_by_the_factor():
    layer = make_layer(focal_window=1, focal_levels=3, focal_factor=4, bias=False)
    assert [conv.kernel_size for conv in layer.focal_layers] == [(1, 1), (5, 5), (9, 9)]
    assert (layer.f.bias, layer.h.bias) == (None, None)
    assert layer.proj.bias is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focal_window": 4}, r"kernels of \[4, 6, 8\] tokens would change the map's size"),
        ({"focal_factor": 1}, r"kernels of \[3, 4, 5\]"),
        ({"focal_levels": 0}, "focal_levels is 0"),
        ({"axes": 4}, "axes is 4: give 1, 2 or 3"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(InputError, match=message):
        make_layer(**options)
    with pytest.raises(InputError, match="Set axes=1"):
        make_layer()(make_map(5))
