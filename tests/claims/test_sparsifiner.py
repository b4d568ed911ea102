"""Sparsifiner: the recorded network, words of its configuration, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from saccade.backbones.sparsifiner import Sparsifiner
from saccade.claims import Case, load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "sparsifiner"


def test_the_recorded_network():
    matches = replay(read_case(RECORDED / "open.safetensors"), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 61


BASE = {"image_size": 16, "patch_size": 4, "dim": 12, "depth": 2, "num_heads": 2, "num_classes": 4}
WORDS = "img 16, patch 4 (17 tokens), embed 12, depth 2, heads 2, num_classes 4, "
MAPPING = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 4}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            "mlp_ratio 2, qkv_bias False; attn_keep_rate 0.4 each; reduce_n_factor 4, BASIS_COEF top-k 3",
            {
                "mlp_ratio": 2.0,
                "keep_rate": 0.4,
                "attention_options": {"qkv_bias": False, "reduce_n": 4, "topk": 3, "keep_prefix": False},
            },
        ),
        (
            "attn_keep_rate [1, 0.5], token_keep_rate [0.7, 0.49], token pruning in blocks 0 and 1; "
            "share_inout_proj True; BASIS_THRESHOLD 0.1, BASIS_COEF threshold 0.2, reduce_c_factor 3",
            {
                "keep_rate": (1.0, 0.5),
                "keep_tokens": {0: 0.7, 1: 0.49},
                "attention_options": {
                    "share_basis": True,
                    "basis_threshold": 0.1,
                    "coefficient_threshold": 0.2,
                    "reduce_c": 3,
                    "keep_prefix": False,
                },
            },
        ),
        (
            "ATTN_SCORE threshold 0.3, USE_ATTN_RECON True",
            {"attention_options": {"threshold": 0.3, "reconstruct": True, "keep_prefix": False}, "keep_rate": 1.0},
        ),
    ],
)
def test_words_of_the_configuration(words, options):
    net = Sparsifiner(**BASE, **options).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 16, 16)
    state = {f"state.{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    tensors = state | {"in.x": x, "out.x": net(x).detach(), "out.features": net.run(x).features.detach()}
    case = Case("sparsifiner", "made", "Sparsifiner", {}, {"args": WORDS + words}, tensors)
    results = load_paper("sparsifiner").replay(case)
    assert results.keys() == {"out.x", "out.features"}
    for name, result in results.items():
        assert_close(result, tensors[name])


def test_arguments_may_be_a_mapping():
    net = Sparsifiner(**BASE, keep_rate=(0.5, 0.2), attention_options={"keep_prefix": False}).eval()
    x = torch.randn(1, 3, 16, 16)
    tensors = {f"state.{name}": tensor for name, tensor in net.state_dict().items()} | {"in.x": x}
    args = MAPPING | {"attn_keep_rate": [0.5, 0.2], "qkv_bias": True}
    case = Case("sparsifiner", "made", "Sparsifiner", args, {"args": args}, tensors | {"out.x": net(x).detach()})
    assert_close(load_paper("sparsifiner").replay(case)["out.x"], case.tensors["out.x"])


def test_rows_of_pruned_tokens():
    """PRUNE_ATTN_MATRIX_ROW empties their rows of the mask, and changes nothing else."""
    case = read_case(RECORDED / "open.safetensors")
    record = case.record | {"args": case.record["args"].replace("MATRIX_ROW False", "MATRIX_ROW True")}
    plain, pruned = (load_paper("sparsifiner").replay(each) for each in (case, replace(case, record=record)))
    different = {name for name in plain if not torch.equal(plain[name], pruned[name])}
    assert different == {"out.attn_mask2", "out.attn_mask_sparsity"}
    alive = case.tensors["out.token_mask1"].bool()
    assert (pruned["out.attn_mask2"][:, :, 1:].sum(-1).movedim(1, -1)[~alive] == 0).all()


def test_cases_of_something_else():
    with pytest.raises(InputError, match="made is a case of DeiT: give one of Sparsifiner"):
        load_paper("sparsifiner").replay(Case("sparsifiner", "made", "DeiT", {}, {}, {}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("sparsifiner", fast=True) if o.verdict == "fails"] == []
