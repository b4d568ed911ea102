"""StripAttention against its equations, cell by cell; its weights; errors."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import Attention, StripAttention

DIM, HEADS = 12, 3


def make_mixer(**options):
    mixer = StripAttention(DIM, HEADS, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def make_input(*space):
    return torch.randn(2, *space, DIM, dtype=torch.float64)


def reduce_as_published(mixer, x):
    """Each cell by itself: a product with the kernel, whose part beyond the map meets nothing, or a mean."""
    rows = []
    for strip in x.split(mixer.sr_ratio, 1):
        for cell in strip.split(mixer.sr_ratio, 2):
            if mixer.sr is None:
                rows.append(cell.mean((1, 2)))
                continue
            kernel = mixer.sr.weight[..., : cell.shape[1], : cell.shape[2]]
            rows.append(mixer.norm(torch.einsum("bijc,ocij->bo", cell, kernel) + mixer.sr.bias))
    return torch.stack(rows, 1)  # (B, M, C)


@pytest.mark.parametrize("reduction", ["conv", "mean"])
@pytest.mark.parametrize("qk_dim", [1, 2])
@pytest.mark.parametrize(("space", "ratio"), [((6, 8), 2), ((7, 5), 3), ((2, 3), 4), ((5, 5), 1)])
def test_heads_attend_as_published(space, ratio, qk_dim, reduction):
    mixer, x = make_mixer(qk_dim=qk_dim, sr_ratio=ratio, reduction=reduction), make_input(*space)
    reduced = x.flatten(1, 2) if ratio == 1 else reduce_as_published(mixer, x)
    key, value = mixer.kv(reduced)[..., : HEADS * qk_dim], mixer.kv(reduced)[..., HEADS * qk_dim :]
    query = mixer.q(x).flatten(1, 2)
    out = []
    for head in range(HEADS):
        strip, own = slice(head * qk_dim, (head + 1) * qk_dim), slice(head * 4, (head + 1) * 4)
        logits = query[..., strip] @ key[..., strip].mT / qk_dim**0.5  # not the width of the values
        out.append(logits.softmax(-1) @ value[..., own])
    assert_close(mixer(x), mixer.proj(torch.cat(out, -1)).view_as(x))


def test_full_width_without_reduction_is_attention_with_the_same_weights():
    mixer, dense, x = make_mixer(qk_dim=4, sr_ratio=1), Attention(DIM, HEADS).double(), make_input(3, 4)
    with torch.no_grad():
        dense.qkv.weight.copy_(torch.cat([mixer.q.weight, mixer.kv.weight]))
        dense.qkv.bias.copy_(torch.cat([mixer.q.bias, mixer.kv.bias]))
    dense.proj.load_state_dict(mixer.proj.state_dict())
    assert_close(mixer(x), dense(x))


def test_the_token_matrix_shares_a_cell_evenly_among_its_tokens():
    mixer = make_mixer(sr_ratio=2)
    with saccade.tap(mixer) as seen:
        mixer(make_input(3, 5))
    shares = seen[""].attention.unflatten(-1, (3, 5))
    assert_close(shares[..., 0, 0], shares[..., 1, 1])  # one cell
    assert (shares[..., 0, 0] != shares[..., 0, 2]).all()
    assert_close(shares.sum((-2, -1)), torch.ones_like(shares[..., 0, 0]))


def test_the_mean_reduction_has_no_parameters():
    names = {name for name, _ in make_mixer(reduction="mean").named_parameters()}
    assert names == {f"{layer}.{kind}" for layer in ("q", "kv", "proj") for kind in ("weight", "bias")}


def test_errors_say_what_to_do():
    for options in ({"qk_dim": 0}, {"sr_ratio": 0}):
        with pytest.raises(InputError, match="give an integer of at least 1"):
            make_mixer(**options)
    with pytest.raises(InputError, match="reduction is 'pool': "):
        make_mixer(reduction="pool")
    with pytest.raises(InputError, match="axes is 4: give 1, 2 or 3"):
        make_mixer(axes=4)
    with pytest.raises(InputError, match=r"built for 1 axes\. Set axes=2"):
        make_mixer(axes=1)(make_input(4, 4))
