"""Attention that processes share: two of them give what one gives, as torch's context_parallel shares tokens out."""

import os
import subprocess
import sys

import pytest
import torch

from saccade.errors import InputError
from saccade.ops import Causal, parallel_attention

WORK = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.testing import assert_close
from saccade.errors import InputError
from saccade.ops import MASKS, PerHead, SlidingWindow, Causal, build_mask, parallel_attention, softmax_attention

rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
mesh = init_device_mesh("cpu", (ranks,))
LENGTH = 48

def check(pattern, scheme, seed, shared_by_torch):
    torch.manual_seed(seed)
    inputs = [x.requires_grad_() for x in torch.randn(3, 2, 4, LENGTH, 6, dtype=torch.float64)]
    whole = softmax_attention(*inputs, mask=pattern.mask((LENGTH,)), impl="reference")
    upstream = torch.randn_like(whole)
    grads = torch.autograd.grad(whole, inputs, upstream)
    buffers = [x.detach().clone() for x in (*inputs, whole, upstream, *grads)]
    if not shared_by_torch:
        mine = [x.chunk(ranks, 2)[rank] for x in buffers]
        return compare(pattern, scheme, mine, None)
    places = torch.arange(LENGTH)
    with context_parallel(mesh, buffers=[*buffers, places], buffer_seq_dims=[2] * len(buffers) + [0]):
        assert len(places) == LENGTH // ranks
        assert places.tolist() != list(range(rank * len(places), (rank + 1) * len(places)))  # head and tail
        return compare(pattern, scheme, buffers, places)

def compare(pattern, scheme, buffers, places):
    query, key, value, whole, upstream, *grads = buffers
    mine = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = parallel_attention(*mine, pattern, places=places, group=mesh, scheme=scheme)
    assert_close(out, whole)
    assert_close(list(torch.autograd.grad(out, mine, upstream)), grads)
    return 1

done = 0
for seed, name in enumerate(MASKS):
    torch.manual_seed(seed)
    pattern = build_mask(name, LENGTH, block_size=8)
    for scheme in ("gather", "ring", "heads"):
        try:
            done += check(pattern, scheme, seed, shared_by_torch=True)
        except InputError as error:
            assert "is no static pattern: take scheme='heads'" in str(error)
            assert scheme != "heads" and "sparse" in name
for scheme in ("gather", "ring", "heads"):
    done += check(Causal(), scheme, 0, shared_by_torch=False)
done += check(PerHead([Causal(), SlidingWindow(3), SlidingWindow(1, 5), Causal(7)]), "heads", 0, shared_by_torch=True)
try:
    x = torch.randn(1, 3, 4, 2)
    parallel_attention(x, x, x, Causal(), scheme="heads")
    assert ranks == 1
except InputError as error:
    assert f"query has 3 heads and {ranks} processes share them" in str(error)
dist.barrier()
dist.destroy_process_group()
print(done)
"""


def test_two_processes_give_what_one_gives_on_every_mask(tmp_path):
    call = [sys.executable, "-c", WORK]
    processes = [
        subprocess.Popen(
            [*call, str(rank), "2", str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.split() == [str(12 * 3 + 2 + 3 + 1)]


def test_without_processes_it_says_how_to_start_them():
    x = torch.randn(1, 2, 4, 3)
    with pytest.raises(InputError, match="no processes share the sequence: start them with torchrun"):
        parallel_attention(x, x, x, Causal())
    with pytest.raises(InputError, match="scheme is 'rings': did you mean ring"):
        parallel_attention(x, x, x, Causal(), scheme="rings")
