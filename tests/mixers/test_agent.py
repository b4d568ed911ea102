"""AgentAttention against its paper's equations, with and without class token and reduced keys; errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.mixers import AgentAttention

DIM, HEADS = 8, 2


def make_mixer(**options):
    mixer = AgentAttention(DIM, HEADS, num_agents=9, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def make_input(*space):
    return torch.randn(2, *space, DIM, dtype=torch.float64)


def heads_of(tokens):
    return tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend_as_published(mixer, x, classes=None):
    """Steps 1 to 5 of the paper's module, with the class token of its DeiT version and the reduction of its PVT one."""
    height, width = x.shape[1:-1]
    tokens = x.flatten(1, 2)
    if mixer.sr_ratio == 1:
        everything = tokens if classes is None else torch.cat([classes, tokens], 1)
        q, k, v = mixer.qkv(everything).chunk(3, -1)
        reduced = height, width
    else:
        small = mixer.sr(x.movedim(-1, 1))
        reduced = tuple(small.shape[2:])
        k, v = mixer.kv(mixer.norm(small.flatten(2).mT)).chunk(2, -1)
        q = mixer.q(tokens)
    skip = 0 if classes is None else classes.shape[1]
    pooled = F.adaptive_avg_pool2d(q[:, skip:].mT.unflatten(-1, (height, width)), 3)
    agents = heads_of(pooled.flatten(2).mT)

    bias1 = F.interpolate(mixer.an_bias, reduced, mode="bilinear").flatten(2) + (mixer.ah_bias + mixer.aw_bias)[
        0
    ].flatten(2)
    bias2 = F.interpolate(mixer.na_bias, (height, width), mode="bilinear").flatten(2).mT
    bias2 = bias2 + (mixer.ha_bias + mixer.wa_bias)[0].flatten(1, 2)
    if skip:
        bias1, bias2 = torch.cat([mixer.ac_bias[0], bias1], -1), torch.cat([mixer.ca_bias[0], bias2], 1)
    scale = (DIM // HEADS) ** -0.5
    gathered = (scale * agents @ heads_of(k).mT + bias1).softmax(-1) @ heads_of(v)
    out = (scale * heads_of(q) @ agents.mT + bias2).softmax(-1) @ gathered
    out = out.transpose(1, 2).flatten(2)
    detail = F.interpolate(v[:, skip:].mT.unflatten(-1, reduced), (height, width), mode="bilinear")
    out = torch.cat([out[:, :skip], out[:, skip:] + mixer.dwc(detail).flatten(2).mT], 1)
    return mixer.proj(out)


@pytest.mark.parametrize("options", [{}, {"sr_ratio": 2}, {"qkv_bias": False}], ids=str)
def test_it_is_the_published_attention(options):
    mixer, x = make_mixer(size=(6, 8), **options), make_input(6, 8)
    assert_close(mixer(x).flatten(1, 2), attend_as_published(mixer, x))


@pytest.mark.parametrize("classes", [1, 3])
def test_class_tokens_are_those_of_the_published_attention(classes):
    mixer, x, prefix = make_mixer(size=6, num_prefix=classes), make_input(6, 6), make_input(classes)
    out, out_prefix = mixer(x, prefix)
    assert_close(torch.cat([out_prefix, out.flatten(1, 2)], 1), attend_as_published(mixer, x, prefix))


def test_biases_are_resized_to_another_map():
    mixer, x = make_mixer(size=(6, 8)), make_input(12, 4)
    resized = make_mixer(size=(12, 4))
    state = mixer.state_dict()
    for name, axis, length in [("ah_bias", 3, 12), ("aw_bias", 4, 4), ("ha_bias", 2, 12), ("wa_bias", 3, 4)]:
        rows = state[name].movedim(axis, -1)
        flat = F.interpolate(rows.reshape(1, -1, rows.shape[-1]), length, mode="linear")
        state[name] = flat.view(*rows.shape[:-1], length).movedim(-1, axis)
    resized.load_state_dict(state)
    assert_close(mixer(x), resized(x))


def test_the_convolution_raises_the_rank_above_the_agents():
    mixer = AgentAttention(32, 1, num_agents=4, size=8).double()
    x = torch.randn(1, 8, 8, 32, dtype=torch.float64)
    with_detail = torch.linalg.matrix_rank(mixer(x).flatten(1, 2) - mixer.proj.bias)
    torch.nn.init.zeros_(mixer.dwc.weight)
    torch.nn.init.zeros_(mixer.dwc.bias)
    without = torch.linalg.matrix_rank(mixer(x).flatten(1, 2) - mixer.proj.bias)
    assert without <= 4 < with_detail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_agents": 8}, "num_agents is 8: agents are pooled to a square. Take 1, 4, 9"),
        ({"num_agents": 0}, "num_agents is 0: agents are pooled to a square"),
        ({"num_prefix": 1, "sr_ratio": 2}, "sr_ratio is 2 and num_prefix is 1: the reduced map has no prefix tokens"),
    ],
)
def test_options_that_make_no_mixer(options, message):
    with pytest.raises(InputError, match=message):
        AgentAttention(DIM, **options)


def test_another_number_of_prefix_tokens():
    with pytest.raises(InputError, match="prefix has 2 tokens: num_prefix is 0"):
        make_mixer()(make_input(6, 6), make_input(2))
    with pytest.raises(InputError, match=r"num_prefix is 1 and no prefix was given: pass mixer\(x, prefix\)"):
        make_mixer(num_prefix=1)(make_input(6, 6))
