"""RoutedAttention: samples that take different forms, what trains the router, what taps see."""

import torch
from torch.testing import assert_close

import saccade
from saccade.mixers import RoutedAttention


def make_mixer(**options):
    """A layer whose samples decide differently."""
    mixer = RoutedAttention(8, 2, start=0.0, **options).double()
    with torch.no_grad():
        for parameter in mixer.router.parameters():
            parameter.add_(torch.randn_like(parameter))
    return mixer


def run_both(mixer, x):
    """The outputs if all samples were full, and if all were sparse."""
    outs = []
    for start in (1e4, -1e4):
        twin = RoutedAttention(8, 2, start=start).double()
        twin.load_state_dict(
            mixer.state_dict() | {k: v for k, v in twin.state_dict().items() if k.startswith("router")}
        )
        outs.append(twin.eval()(x))
    return outs


def test_each_sample_takes_its_own_form():
    mixer, x = make_mixer().eval(), 2 * torch.randn(24, 7, 6, 8, dtype=torch.float64)
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    gate = seen["router"].gate
    assert 0 < gate.sum() < 24
    full, sparse = run_both(mixer, x)
    assert_close(out, torch.where(gate > 0.5, full, sparse))
    assert not torch.allclose(full, sparse)
    value = mixer.qkv(x).chunk(3, -1)[2].flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2)
    assert_close(mixer.proj((seen[""].attention @ value).transpose(1, 2).flatten(2)).view_as(x), out)
    seen_keys = (seen[""].attention > 0).sum(-1)
    assert (seen_keys[gate.flatten() > 0.5] == 42).all()
    assert (seen_keys[gate.flatten() < 0.5] < 42).any(-1).all()


def test_training_mixes_by_hard_decisions_and_trains_the_router():
    mixer, x = make_mixer().train(), 2 * torch.randn(24, 7, 6, 8, dtype=torch.float64)
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    full, sparse = run_both(mixer, x)
    assert_close(out, torch.where(seen["router"].gate > 0.5, full, sparse))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert all(parameter.grad.abs().max() > 1e-9 for parameter in mixer.parameters())


def test_only_the_chosen_form_is_computed(monkeypatch):
    mixer, x = RoutedAttention(8, 2, start=-1e4).eval(), torch.randn(2, 7, 6, 8)
    patterns, attend = [], RoutedAttention._attend

    def note(self, query, key, value, pattern):
        patterns.append(pattern)
        return attend(self, query, key, value, pattern)

    monkeypatch.setattr(RoutedAttention, "_attend", note)
    mixer(x)
    assert patterns == [mixer.sparse]


def test_sizes_are_rounded_up_to_blocks():
    mixer = RoutedAttention(8, 2, window=5, sinks=1, block_size=4, causal=True)
    mask = mixer.sparse.mask((20,))
    tokens = torch.arange(20)
    block = tokens // 4
    near = (block[:, None] - block < 2) | (tokens < 4)
    assert torch.equal(mask, near.tril())
