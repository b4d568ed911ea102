"""Efficient-DLM's claims file: no official code is published, so claims alone; and that they would find a leak."""

import numpy as np
import pytest

from saccade.claims import check, load_paper, verify
from saccade.ops import BlockDiffusion


class OwnCleanCopy(BlockDiffusion):
    """Noised tokens see the clean ones of their own block."""

    def sees(self, space, query, key):
        half = space[0] // 2
        return (key >= half) & (key % half // self.block_size <= query % half // self.block_size)


class OthersNoise(BlockDiffusion):
    """Noised tokens see the noised ones of blocks before theirs."""

    def sees(self, space, query, key):
        half = space[0] // 2
        return (key < half) & (key // self.block_size <= query % half // self.block_size)

    def reach(self, space, queries):
        return np.arange(space[0])


def test_fast_claims_hold():
    assert load_paper("efficient_dlm").replay is None
    assert [o.claim.name for o in verify("efficient_dlm", fast=True) if o.verdict == "fails"] == []


@pytest.mark.parametrize("leaky", [OwnCleanCopy, OthersNoise])
def test_a_leak_in_the_mask_is_found(monkeypatch, leaky):
    claims = {claim.name: claim for claim in load_paper("efficient_dlm").claims}
    for name in ("nothing leaks", "one pass is a pass for each block"):
        monkeypatch.setitem(claims[name].measure.__globals__, "BlockDiffusion", leaky)
        assert check(claims[name]).verdict == "fails"
