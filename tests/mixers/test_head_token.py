"""HeadTokenAttention: its steps, class tokens, what taps see; the contract has the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.mixers import HeadTokenAttention


def make_layer(**options):
    layer = HeadTokenAttention(8, **{"num_heads": 4, **options}).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def steps(layer, tokens):
    """Tokens (B, N, C) and head tokens behind them, as the paper's steps give them, and the N + heads weights."""
    batch, size, dim = tokens.shape
    heads, width = layer.num_heads, dim // layer.num_heads
    means = tokens.view(batch, size, heads, width).mean(1)
    made = layer.ht_proj(means).view(batch, heads, heads, width)
    made = F.layer_norm(made, (width,), layer.ht_norm.weight, layer.ht_norm.bias)
    both = torch.cat([tokens, F.gelu(made).reshape(batch, heads, dim) + layer.pos_embed], 1)
    qkv = layer.qkv(both).view(batch, size + heads, 3, heads, width).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] @ qkv[1].mT * layer.scale).softmax(-1)
    return layer.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, size + heads, dim)), weights


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "qkv_bias": False}, {"num_heads": 1}], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_steps_come_in_the_order_of_the_paper(options, count):
    layer, x = make_layer(**options), torch.randn(2, 5, 3, 8, dtype=torch.float64)
    prefix = torch.randn(2, count, 8, dtype=torch.float64)
    tokens = torch.cat([prefix, x.flatten(1, 2)], 1)
    out, weights = steps(layer, tokens)
    with saccade.tap(layer) as seen:
        found = layer(x, prefix) if count else layer(x)
    found, found_prefix = found if count else (found, prefix)
    assert_close(found, out[:, count : 15 + count].view_as(x))
    assert_close(seen[""].attention, weights[:, :, : 15 + count, : 15 + count])
    if count:
        assert_close(found_prefix, out[:, :count] + out[:, 15 + count :].mean(1, keepdim=True))
