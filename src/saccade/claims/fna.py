"""Faster neighborhood attention: fused kernels, causal axes, parameters for each axis."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from saccade.claims.framework import Paper, at_most, claim, equal, relative_difference, rounding
from saccade.claims.framework.natten import replay
from saccade.claims.framework.oracles import dense_attention, random_inputs
from saccade.ops import Neighborhood, merge_attention, softmax_attention, sparse_attention

__all__ = ["PAPER", "replay"]

PAPER = Paper(
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    arxiv="2403.04690",
    published="2024-03-07",
    summary="Neighborhood attention is written so that kernels for matrix products can do it: as batched products with "
    "a gather and a scatter, then fused, with tiles of the data's rank and an online softmax. Causal axes and "
    "parameters for each axis get their meaning here.",
    home=("saccade.ops.Neighborhood", "saccade.mixers.NeighborhoodAttention", "saccade.ops.sparse_attention"),
    differences=(
        "The recorded cases come from NATTEN's FlexAttention back end, which computes the same as its kernels.",
        "Relative position biases, which NATTEN's fused kernels drop, are served by our tiled engine.",
    ),
)

DEFINITION = "the operator's definition"


@claim(
    "speed",
    "895 % (1-D) and 272 % (2-D) by products, 1607 % and 581 % fused, in half precision",
    source="abstract",
    needs="an NVIDIA GPU with NATTEN's kernels, the naive ones and the new",
)
def kernels_are_faster_than_naive_ones() -> None:
    """The new kernels are faster than naive CUDA kernels by so much on average."""


@claim("complexity", 4 * 56 * 56 * 49 * 128, source="complexity of the operator")
def products_of_visible_pairs() -> int:
    """The two products take 4 N W C FLOPs: 56 x 56 tokens, a window of 7 x 7, 4 heads of 32 channels."""
    return 4 * 128 * Neighborhood(7).num_visible((56, 56))


@claim(
    "complexity",
    121 / 9,
    equal("all that is saved grows alike", relative=0.02),
    source="memory of unfused kernels",
)
def unfused_attention_stores_its_weights() -> float:
    """A naive gather stores all N W weights of a head: what it saves for its backward pass, w = 11 over w = 3."""
    return _saved(_naive, 11) / _saved(_naive, 3)


@claim(
    "complexity",
    1.0,
    at_most(1.1, "alignment and masks"),
    source="memory of fused kernels",
)
def fused_attention_stores_no_weights() -> float:
    """Fused attention saves outputs and log-sum-exps alone, whatever the window: w = 11 over w = 3, tiled engine."""
    return _saved(_tiled, 11) / _saved(_tiled, 3)


@claim("equivalence", "equal", rounding, source="spectrum from projection to self-attention")
def spectrum_from_projection_to_self_attention() -> dict[str, float]:
    """w = 1 returns v, w = L is dense attention, and causal with w = L is causal attention."""
    inputs = random_inputs(12)
    expected = {
        "w = 1": (Neighborhood(1), inputs[2]),
        "w = L": (Neighborhood(12), dense_attention(*inputs)),
        "causal": (Neighborhood(12, causal=True), dense_attention(*inputs, causal=True)),
    }
    return {
        name: relative_difference(sparse_attention(*inputs, pattern), out) for name, (pattern, out) in expected.items()
    }


@claim(
    "property",
    {"of a query": (7,), "of a key": (4, 5, 6, 7, 8, 9, 10, 7, 7, 7, 7, 7, 7, 10, 9, 8, 7, 6, 5, 4)},
    source=DEFINITION + ", computed",
)
def keys_are_seen_by_a_varying_number_of_queries() -> dict[str, tuple[int, ...]]:
    """Every query has w keys, but key j < w is seen by (w + 1) / 2 + j queries, mirrored at the other end, and the rest
    by w: the neighbours of all queries, and of each key, for L = 20, w = 7."""
    mask = Neighborhood(7).mask((20,))
    return {"of a query": tuple(set(mask.sum(1).tolist())), "of a key": tuple(mask.sum(0).tolist())}


@claim("equivalence", "equal", rounding, source="online softmax")
def online_softmax_gives_the_dense_result() -> float:
    """Attention over tiles of keys, of any shape, merged through the log-sum-exp, is dense masked attention, forward
    and backward."""
    query, key, value = inputs = random_inputs(42, grad=True)
    mask = Neighborhood((3, 5)).mask((7, 6))
    dense = dense_attention(*inputs, mask=mask)
    upstream = torch.randn_like(dense)
    expected = dense, *torch.autograd.grad(dense, inputs, upstream)
    worst = 0.0
    for tile in (1, 5, 16, 42):
        parts = [
            softmax_attention(query, k, v, mask=visible, return_lse=True)
            for k, v, visible in zip(key.split(tile, 2), value.split(tile, 2), mask.split(tile, 1))
        ]
        merged = merge_attention(parts).out
        ours = merged, *torch.autograd.grad(merged, inputs, upstream)
        worst = max(worst, *map(relative_difference, ours, expected))
    return worst


@claim("equivalence", "equal", rounding, source="backward pass of the fused kernel")
def backward_from_the_log_sum_exp() -> float:
    """With P = exp(scale q.k - lse) formed again and D = dO.O, the gradients are dS = P (dO V^T - D), dQ = scale dS K,
    dK = scale dS^T Q, dV = P^T dO."""
    query, key, value = inputs = random_inputs(42, grad=True)
    pattern, scale = Neighborhood(5), 8**-0.5
    out, lse = sparse_attention(*inputs, pattern, return_lse=True)
    upstream = torch.randn_like(out)
    by_autograd = torch.autograd.grad(out, inputs, upstream)
    weights = (scale * query @ key.mT - lse.unsqueeze(-1)).exp() * pattern.mask((42,))
    d_logits = weights * (upstream @ value.mT - (upstream * out).sum(-1, keepdim=True))
    by_formula = scale * d_logits @ key, scale * d_logits.mT @ query, weights.mT @ upstream
    return max(map(relative_difference, by_autograd, by_formula))


@claim("property", {"later frames": 0, "own frame": (9,)}, source="causal neighborhood attention")
def causality_on_one_axis() -> dict[str, Any]:
    """In a video with is_causal = (True, False, False), w = 3 x 3 x 3, no output depends on a later frame, and each on
    all nine neighbours in its own: tokens of which the gradient is not zero."""
    inputs = random_inputs(3, 4, 4, grad=True)
    out = sparse_attention(*inputs, Neighborhood(3, causal=(True, False, False))).sum((0, 1, -1))
    later, own = 0, set()
    for frame, row, column in product(range(3), range(4), range(4)):
        grads = torch.autograd.grad(out[frame, row, column], inputs, retain_graph=True)
        depends = torch.stack(grads).abs().sum((0, 1, 2, -1)) > 0  # (frames, rows, columns)
        later += int(depends[frame + 1 :].sum())
        own.add(int(depends[frame].sum()))
    return {"later frames": later, "own frame": tuple(own)}


@claim("theory", {"1-D": 0.5, "2-D": 0.25}, source="useful part of a tile, w / (T + w - 1) an axis")
def half_of_a_tile_is_useful() -> dict[str, float]:
    """Of the product of T = 8 queries an axis and their T + w - 1 keys, w = 7, this share are neighbours; it explains
    why 2-D gains less than 1-D. Counted in the mask of a tile in the middle."""
    shares = {}
    for axes in (1, 2):
        space = (32,) * axes
        mask = Neighborhood(7).mask(space).view(*space, -1)[(slice(8, 16),) * axes].flatten(0, -2)
        shares[f"{axes}-D"] = mask.sum().item() / (len(mask) * mask.any(0).sum().item())
    return shares


@claim("equivalence", "equal", rounding, source=DEFINITION)
def dilation_is_attention_on_interleaved_sequences() -> float:
    """With dilation d each of the d interleaved sequences attends by itself, causal ones too."""
    query, key, value = random_inputs(14)
    dilated = sparse_attention(query, key, value, Neighborhood(3, dilation=4, causal=True))
    apart = torch.empty_like(dilated)
    for first in range(4):
        part = (..., slice(first, None, 4), slice(None))
        apart[part] = sparse_attention(query[part], key[part], value[part], Neighborhood(3, causal=True))
    return relative_difference(dilated, apart)


def _tiled(query: Tensor, key: Tensor, value: Tensor, pattern: Neighborhood) -> Tensor:
    return sparse_attention(query, key, value, pattern, impl="tiled")


def _naive(query: Tensor, key: Tensor, value: Tensor, pattern: Neighborhood) -> Tensor:
    """Gather the window of every query, then attend."""
    space = query.shape[2:-1]
    query, key, value = (t.flatten(2, -2) for t in (query, key, value))
    neighbours = pattern.mask(space).nonzero()[:, 1].view(len(query[0, 0]), -1)  # (N, W)
    weights = (query.unsqueeze(-2) @ key[:, :, neighbours].mT * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value[:, :, neighbours]).squeeze(-2).unflatten(2, space)


def _saved(attend: Callable[..., Tensor], window: int) -> int:
    """Bytes that attention saves for its backward pass, besides its inputs: 32 x 32 tokens, 4 heads of 16."""
    inputs = [torch.randn(1, 4, 32, 32, 16, requires_grad=True) for _ in range(3)]
    own = {t.untyped_storage().data_ptr() for t in inputs}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(*inputs, Neighborhood(window))
    return sum(saved.values())
