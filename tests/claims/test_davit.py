"""DaViT's claims file: official outputs replayed, single blocks, windows that pad the map, what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.claims import read_case, replay
from saccade.claims.davit import _channel, _PaddedWindowAttention, _spatial
from saccade.claims.davit import replay as run
from saccade.errors import InputError

CASE = Path(__file__).parents[1] / "recorded" / "davit" / "open.safetensors"


def test_official_outputs_and_gradients_are_ours():
    matches = replay(read_case(CASE))
    assert len(matches) == 34
    assert all(match.holds for match in matches), matches


def test_the_blocks_one_by_one_give_what_both_give():
    case, x = read_case(CASE), None
    for number, cls in enumerate(["SpatialBlock", "ChannelBlock"]):
        tensors = {
            name.replace(f"state.{number}.", "state."): tensor
            for name, tensor in case.tensors.items()
            if name.startswith(f"state.{number}.")
        }
        tensors["in.x"] = case.tensors["in.x"] if x is None else x
        args = {name: value for name, value in case.args.items() if number == 0 or name != "window"}
        x = run(replace(case, cls=cls, args=args, tensors=tensors))["out.y"]
    assert_close(x, case.tensors["out.y"], atol=1e-4, rtol=1e-4)


def test_a_map_is_padded_with_tokens_that_are_seen_as_keys():
    attention = _PaddedWindowAttention(8, 2, window_size=4, position_bias=False).double()
    x = torch.randn(2, 8, 6, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 2))
    windows = padded.view(2, 2, 4, 2, 4, 8).transpose(2, 3).reshape(8, 16, 8)
    query, key, value = attention.qkv(windows).view(8, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = attention.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
    assert_close(attention(x), out.view(2, 2, 2, 4, 4, 8).transpose(2, 3).reshape(2, 8, 8, 8)[:, :, :6])


def test_every_argument_of_the_official_blocks_reaches_ours():
    spatial = _spatial(12, 3, 5, mlp_ratio=1.5, qkv_bias=False, cpe_act=True)
    assert spatial.attn.window_size == 5
    assert spatial.attn.qkv.bias is None
    assert spatial.mlp.fc1.out_features == 18
    assert isinstance(spatial.cpe[0].activation, torch.nn.GELU)
    channel = _channel(12, 3, ffn=False)
    assert channel.attn.qkv.bias is None
    assert channel.mlp is None
    assert not any(name.startswith("norm2") for name in channel.state_dict())


def test_whole_networks_and_maps_without_a_size_are_refused():
    case = read_case(CASE)
    with pytest.raises(InputError, match="whole networks come with the backbones"):
        replay(replace(case, cls="DaViT"))
    with pytest.raises(InputError, match="does not say the size of the map"):
        replay(replace(case, args={"dim": 24}))
