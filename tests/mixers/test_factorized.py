"""FactorizedAttention against its paper's steps, with both ways of fusion; widths, heads, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import FactorizedAttention

DIM, HEADS = 32, 2


def make_mixer(dim=DIM, heads=HEADS, **options):
    mixer = FactorizedAttention(dim, heads, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def make_input(*space):
    return torch.randn(2, *space, DIM, dtype=torch.float64)


def attend_as_published(mixer, x, sr):
    """Group by group and head by head, on a map whose windows of 7 reflection can fill in one go."""
    batch, height, width, _ = x.shape
    tokens = x.flatten(1, 2)
    query = mixer.q(tokens)
    c0, rest = DIM // 8, DIM * 7 // 8
    image = x.movedim(-1, 1)

    reduced = mixer.norm(mixer.sr(image[:, :c0]).flatten(2).mT)
    k, v = mixer.kv_g(reduced).chunk(2, -1)
    v = v + mixer.local_conv_g(v.mT.unflatten(-1, (height // sr, width // sr))).flatten(2).mT
    outs = [(query[..., :c0] @ k.mT * c0**-0.5).softmax(-1) @ v]

    source = mixer.point_conv(mixer.depth_conv(image[:, c0:]).movedim(1, -1)).movedim(-1, 1)
    dilations = [1] if sr == 1 else [1, sr]
    own = rest // len(dilations) // HEADS  # channels of a head in a group
    by_head = query[..., c0:].unflatten(-1, (HEADS, -1))
    for i, dilation in enumerate(dilations):
        part = source[:, i * HEADS * own : (i + 1) * HEADS * own]
        extent = 6 * dilation + 1
        part = F.pad(part, (0, -width % extent, 0, -height % extent), mode="reflect")
        columns = F.unfold(part, 7, dilation=dilation, stride=extent)
        windows = columns.unflatten(1, (HEADS, own, 49)).permute(0, 1, 3, 4, 2)  # (B, heads, 49, windows, own)
        if mixer.fusion == "mean":
            fused = windows.mean(3)
        else:
            fused = F.adaptive_avg_pool1d(windows.flatten(3).flatten(0, 2), own).view(batch, HEADS, 49, own)
        k, v = mixer.single_heads[i](mixer.fcs[i](fused)).chunk(2, -1)
        detail = mixer.local_convs[i](v.transpose(2, 3).reshape(batch, HEADS * own, 7, 7))
        v = v + detail.view(batch, HEADS, own, 49).transpose(2, 3)
        q = by_head[..., i * own : (i + 1) * own].transpose(1, 2)
        out = (q @ k.mT * own**-0.5).softmax(-1) @ v
        outs.append(out.transpose(1, 2).flatten(2))
    return mixer.proj(torch.cat(outs, -1)).view_as(x)


@pytest.mark.parametrize("fusion", ["mean", "runs"])
@pytest.mark.parametrize(("sr", "space"), [(1, (7, 7)), (1, (14, 9)), (2, (14, 16)), (2, (8, 12))], ids=str)
def test_it_is_the_published_attention(fusion, sr, space):
    mixer, x = make_mixer(sr_ratio=sr, fusion=fusion), make_input(*space)
    assert_close(mixer(x), attend_as_published(mixer, x, sr))


def test_with_one_window_both_fusions_are_the_same():
    mixer, x = make_mixer(sr_ratio=1), make_input(7, 7)
    official = make_mixer(sr_ratio=1, fusion="runs")
    official.load_state_dict(mixer.state_dict())
    assert_close(mixer(x), official(x))


def test_taps_show_the_coarse_head_and_then_those_of_the_groups():
    mixer, x = make_mixer(), make_input(14, 14)
    with saccade.tap(mixer) as seen:
        mixer(x)
    attention = seen[""].attention
    assert attention.shape == (2, 1 + 2 * HEADS, 196, 196)
    assert (torch.linalg.matrix_rank(attention) <= 49).all()
    cells = attention[:, 0].unflatten(-1, (7, 2, 7, 2))
    assert_close(cells, cells[..., :1, :, :1].expand_as(cells))  # the tokens of a cell share its weight


def test_widths_are_shared_and_heads_fit_them():
    assert FactorizedAttention(96).widths == [42, 42]
    assert FactorizedAttention(96).num_heads == 3
    assert FactorizedAttention(72, sr_ratio=4).widths == [31, 32]
    assert FactorizedAttention(72, sr_ratio=4).num_heads == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"num_heads is 3: the fine groups have \[14, 14\] channels. Take one of \[1, 2, 7, 14\]"),
        ({"coarse_dim": 31}, "1 channels are left to 2 groups: take a smaller coarse_dim or a larger dim"),
        ({"fusion": "max"}, "fusion is 'max': choose one of mean, runs|fusion is 'max': did you mean"),
        ({"sr_ratio": 0}, "sr_ratio is 0: give an integer of at least 1"),
    ],
)
def test_options_that_make_no_mixer(options, message):
    with pytest.raises(InputError, match=message):
        make_mixer(**options)
