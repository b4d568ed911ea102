"""HybridPerceptionBlock: its four steps in their order, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.backbones import HybridPerceptionBlock
from saccade.errors import InputError
from saccade.mixers import StripAttention, WindowAttention


def make_block(**options):
    block = HybridPerceptionBlock(8, lambda dim: StripAttention(dim, 2, sr_ratio=2), **options).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.normal_(block.interaction.norm.running_mean)
    torch.nn.init.uniform_(block.interaction.norm.running_var, 0.5, 2)
    return block.eval()


def test_steps_come_in_the_order_of_the_paper():
    block, x = make_block(), torch.randn(2, 5, 7, 8, dtype=torch.float64)

    def convolve(layer, y):
        return layer(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def norm(layer, y):
        return (y - y.mean(-1, True)) / (
            y.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt() * layer.weight + layer.bias

    f_conv = convolve(block.conv, x) + x
    f_ssa = block.mixer(norm(block.norm1, f_conv)) + f_conv
    lim = block.interaction
    inner = F.gelu(convolve(lim.conv1, norm(block.norm2, f_ssa)))
    inner = (inner - lim.norm.running_mean) / (lim.norm.running_var + 1e-5).sqrt() * lim.norm.weight + lim.norm.bias
    f_lim = convolve(lim.conv2, inner) + f_ssa
    f_mlp = block.mlp.fc2(F.gelu(block.mlp.fc1(norm(block.norm3, f_lim)))) + f_lim
    assert_close(block(x), f_mlp)


def test_every_parameter_gets_a_gradient_and_any_mixer_fits():
    block = HybridPerceptionBlock(8, WindowAttention, mlp_ratio=2, kernel_size=5, drop_path=0.1).double().train()
    x = torch.randn(4, 6, 5, 8, dtype=torch.float64, requires_grad=True)
    block(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters())
    assert block.mlp.fc1.out_features == 16
    assert block.conv.kernel_size == (5, 5)


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="kernel_size is 4: give an odd number"):
        make_block(kernel_size=4)
    with pytest.raises(InputError, match=r"x is \(2, 6, 8\): .* Give \(B, H, W, C\)"):
        make_block()(torch.zeros(2, 6, 8, dtype=torch.float64))
