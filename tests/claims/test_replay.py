"""replay of every paper over recorded outputs of its official code, and what it refuses."""

from dataclasses import replace as changed
from pathlib import Path

import pytest
import torch

from saccade.claims import claimed_keys, load_paper, read_case, replay
from saccade.errors import InputError, WorkError

RECORDED = Path(__file__).parents[1] / "recorded"
TOLERANCE = 1e-5
# recorded in float32 behind a LayerNorm over one or two channels, which magnifies rounding: float64 is as far from it
LOOSER = {"favit/open_block": 1e-4, "favit/open_sr1": 1e-4}
FILES = [path for key in claimed_keys() for path in sorted((RECORDED / key).glob("*.safetensors"))]


def case_of(name):
    return read_case(RECORDED / f"{name}.safetensors")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_official_outputs_and_gradients(path):
    tolerance = LOOSER.get(f"{path.parent.name}/{path.stem}", TOLERANCE)
    matches = replay(read_case(path), tolerance)
    assert matches
    assert not [match for match in matches if not match.holds]


@pytest.mark.parametrize("key", ["agent", "fna", "gna", "halonet"])
def test_recorded_cases_are_here(key):
    assert [path for path in FILES if path.parent.name == key]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("halonet/timm_avg_down", {"scale_pos_embed": False}),
        ("halonet/timm_avg_down", {"avg_down": False}),
        ("halonet/open", {"block_size": 2, "halo_size": 3}),
        ("gna/open_module", {"stride": (2, 2)}),
        ("gna/natten_module_1d", {"is_causal": False}),
        ("fna/open_module", {"dilation": (1, 1)}),
    ],
)
def test_other_arguments_give_other_outputs(name, wrong):
    case = case_of(name)
    matches = replay(changed(case, args=case.args | wrong))
    assert not any(match.holds for match in matches if match.name == "out.y")


def test_arguments_that_do_not_fit_the_state_are_refused():
    case = case_of("halonet/open")
    with pytest.raises(WorkError, match="HaloAttention cannot take the official state"):
        replay(changed(case, args=case.args | {"halo_size": 3}))
    with pytest.raises(InputError, match=r"does not fit the signature of HaloAttn: .*'heads'"):
        replay(changed(case, args=case.args | {"heads": 3}))


@pytest.mark.parametrize(("key", "cls"), [("agent", "agent_deit.VisionTransformer")])
def test_whole_networks_are_refused(key, cls):
    with pytest.raises(InputError, match=f"is a case of {cls}: replay serves AgentAttention of agent_swin"):
        replay(changed(case_of(f"{key}/open"), cls=cls))


def test_a_paper_without_official_code_has_no_replay(monkeypatch):
    monkeypatch.setattr("saccade.claims.framework.index.load_paper", lambda key: changed(load_paper(key), replay=None))
    with pytest.raises(InputError, match="halonet has no replay"):
        replay(case_of("halonet/open"))


def test_pvt_without_reduction_is_the_window_form_with_two_projections():
    swin = case_of("agent/open")
    tensors = swin.tensors
    for kind in ("weight", "bias"):
        for group in ("state", "grad.state"):
            query, rest = tensors[f"{group}.qkv.{kind}"].split([24, 48])
            tensors = tensors | {f"{group}.q.{kind}": query, f"{group}.kv.{kind}": rest}
            del tensors[f"{group}.qkv.{kind}"]
    args = {"dim": 24, "num_patches": 36, "num_heads": 3, "qkv_bias": True, "agent_num": 9, "H": 6, "W": 6}
    matches = replay(changed(swin, cls="agent_pvt.AgentAttention", args=args, tensors=tensors), 1e-5)
    assert "grad.state.kv.weight" in [match.name for match in matches]
    assert all(match.holds for match in matches)


def test_cswin_on_the_whole_map_is_the_window_form_between_its_projections():
    swin = case_of("agent/open")
    state = {name: tensor for name, tensor in swin.tensors.items() if name.startswith("state.")}
    weight, bias, proj, proj_bias = (
        state.pop(f"state.{name}") for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    )
    qkv = torch.stack((swin.tensors["in.x"] @ weight.T + bias).chunk(3, -1))  # (3, B, 36, 24)
    tensors = {name.replace("dwc.", "get_v."): tensor for name, tensor in state.items()} | {"in.qkv": qkv}
    args = {"dim": 24, "resolution": 6, "idx": -1, "num_heads": 3, "agent_num": 9}
    case = changed(swin, cls="agent_cswin.AgentAttention", args=args, tensors=tensors)
    out = load_paper("agent").replay(case)["out.y"] @ proj.T + proj_bias
    torch.testing.assert_close(out, swin.tensors["out.y"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("idx", [0, 1])
def test_cswin_attends_inside_stripes(idx):
    size = ((6, 2), (2, 6))[idx]
    shapes = {"an_bias": (2, 4, 7, 7), "na_bias": (2, 4, 7, 7), "get_v.weight": (8, 1, 3, 3), "get_v.bias": (8,)}
    shapes |= {"ah_bias": (1, 2, 4, size[0], 1), "aw_bias": (1, 2, 4, 1, size[1])}
    shapes |= {"ha_bias": (1, 2, size[0], 1, 4), "wa_bias": (1, 2, 1, size[1], 4)}
    tensors = {f"state.{name}": torch.randn(shape) for name, shape in shapes.items()}
    args = {"dim": 8, "resolution": 6, "idx": idx, "split_size": 2, "num_heads": 2, "agent_num": 4}
    qkv = torch.randn(3, 1, 36, 8)
    stripe = (slice(2, 4), slice(None)) if idx else (slice(None), slice(2, 4))
    other = qkv.unflatten(2, (6, 6)).clone()
    other[:, :, *stripe] += 1
    outs = []
    for given in (qkv, other.flatten(2, 3)):
        case = changed(case_of("agent/open"), cls="agent_cswin.AgentAttention", args=args)
        case = changed(case, tensors=tensors | {"in.qkv": given})
        outs.append(load_paper("agent").replay(case)["out.y"].unflatten(1, (6, 6)))
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[stripe] = True
    assert torch.equal((outs[0] != outs[1]).any(-1)[0], expected)


def test_natten_with_additional_keys():
    """Attention over the map's own keys and additional ones is the dense one over all, if the window is the map."""
    query, key, value = torch.randn(3, 2, 4, 5, 2, 8)
    more_key, more_value = torch.randn(2, 2, 3, 2, 8)
    everything = [torch.cat([own.flatten(1, 2), more], 1) for own, more in ((key, more_key), (value, more_value))]
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.flatten(1, 2).transpose(1, 2), *(each.transpose(1, 2) for each in everything)
    )
    tensors = {"in.q": query, "in.k": key, "in.v": value, "in.additional_keys": more_key}
    tensors |= {"in.additional_values": more_value, "out.out": dense.transpose(1, 2).reshape(2, 4, 5, 2, 8)}
    case = changed(case_of("gna/open"), cls="natten.na2d", args={"kernel_size": (4, 5)}, record={}, tensors=tensors)
    assert [match.holds for match in replay(case, 1e-5)] == [True]
