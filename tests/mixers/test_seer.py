"""SeerAttention: what is chosen, what the gate learns, causal sequences."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.mixers import Attention, SeerAttention
from saccade.ops import block_map


def make_mixer(**options):
    return SeerAttention(8, 2, **options).double()


def make_map(*space):
    return torch.randn(2, *space, 8, dtype=torch.float64)


@pytest.mark.parametrize("options", [{"share": None}, {"share": 1.0}, {"threshold": 0.0}])
def test_with_all_blocks_it_is_dense_attention(options):
    mixer, dense, x = make_mixer(**options), Attention(8, 2).double(), make_map(9, 11)
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "gate" not in name})
    assert_close(mixer(x), dense(x))


@pytest.mark.parametrize(
    ("space", "block"), [((64,), (8,)), ((56, 14), (7, 2)), ((1, 1), (1, 1)), ((4, 9, 17), (1, 2, 3))]
)
def test_axes_are_cut_in_eight(space, block):
    assert make_mixer().blocks(space) == block
    assert make_mixer(block_size=3).blocks(space) == (3,) * len(space)


def test_the_gate_learns_what_attention_looks_at_and_nothing_else_does():
    mixer, x = make_mixer(block_size=4), make_map(16, 16) * 3
    query, key, _ = mixer.project(x)
    target = block_map(query, key, 4, 4)

    def recall():
        best = target.topk(4, -1).indices
        found = mixer.scores(query, key).topk(4, -1).indices
        return (best.unsqueeze(-1) == found.unsqueeze(-2)).any(-1).double().mean()

    loss, before = mixer.distill(x), recall()
    loss.backward()
    assert {name for name, parameter in mixer.named_parameters() if parameter.grad is not None} == {
        "gate.mask_linear_k.weight"
    }
    optimizer = torch.optim.Adam(mixer.gate.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        mixer.distill(x).backward()
        optimizer.step()
    assert mixer.distill(x) < 0.9 * loss.item()
    assert recall() > before + 0.1


@pytest.mark.parametrize("rotary", [None, 100.0])
def test_causal_sequences_and_what_taps_see_of_them(rotary):
    mixer, x = make_mixer(causal=True, block_size=5, share=0.3, rotary=rotary), make_map(43)
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    attention = seen[""].attention
    assert not attention.triu(1).any()
    assert (attention[:, :, -8:].tril(35) > 0).sum() == 2 * 2 * sum(range(36, 44))  # the last two blocks see all
    assert (attention[:, :, 25:35] > 0).sum(-1).max() <= 10  # two blocks of nine cover three tenths of the triangle
    changed = x.clone()
    changed[:, 30:] += 1
    assert_close(mixer(changed)[:, :25], out[:, :25])  # earlier blocks
    mixer.distill(x).backward()
    assert mixer.gate.mask_linear_k.weight.grad.isfinite().all()


def test_a_rotary_embedding_turns_tokens_and_blocks_by_their_places():
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 6, 8, 8)
    plain, turned = make_mixer(share=None), make_mixer(share=None, rotary=10.0)
    turned.load_state_dict(plain.state_dict())
    for mixer, equal in ((plain, True), (turned, False)):
        with saccade.tap(mixer) as seen:
            mixer(x)
        row, gate = seen[""].attention[0, 0, 0], seen["gate"].gate[0, 0, 0]
        assert ((row - row[0]).abs().max() < 1e-9) == equal
        assert ((gate - gate[0]).abs().max() < 1e-9) == equal
