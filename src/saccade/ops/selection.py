"""Patterns made from data: each block of queries sees the blocks of keys that a selector chose for it.

A selector turns scores of (query block, key block) pairs into a `Selection`, the pattern with which `sparse_attention`
computes. With blocks of one token a selection is a list of keys for each query. Selecting is not differentiable;
gradients flow to the queries, keys and values that meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_positive, per_axis
from saccade.ops.pattern import Pattern, StaticPattern
from saccade.ops.softmax_attention import is_exporting

__all__ = ["Selection", "block_means", "select_mask", "select_mass", "select_similarity_mass", "select_top_k"]

SCOPES = ("query", "head", "all")
SMALLEST_SPREAD = 1e-6  # of scores that differ at all, as in VMoBA


@dataclass(frozen=True, eq=False)
class Selection(Pattern):
    """For each image, head and block of queries a list of key blocks; an entry may be unused.

    Args:
        blocks: (B, heads | 1, T, K) numbers of key blocks, in row-major order of the blocks. No block twice in a row.
        used: (B, heads | 1, T, K) booleans, which entries count; a row without any sees nothing and gives 0.
        query_block: tokens of a query block, one number or one for each axis, which divides the map.
        key_block: the same for the keys.
        key_size: the axes of the keys' map; None where it is that of the queries.
        ragged: allow an axis that the block does not divide; the last block along it is then smaller.
        within: a static pattern that hides pairs of tokens inside the chosen blocks; `selection & pattern` sets it.
    """

    blocks: Tensor
    used: Tensor
    query_block: int | tuple[int, ...] = 1
    key_block: int | tuple[int, ...] = 1
    key_size: tuple[int, ...] | None = None
    ragged: bool = False
    within: StaticPattern | None = None

    def __post_init__(self) -> None:
        check_positive(query_block=self.query_block, key_block=self.key_block)
        if self.blocks.ndim != 4 or self.used.shape != self.blocks.shape:
            raise InputError(
                f"blocks is {tuple(self.blocks.shape)} and used is {tuple(self.used.shape)}: "
                "both take (B, heads or 1, query blocks, entries)"
            )

    def key_space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        keys = space if self.key_size is None else self.key_size
        for name, block, axes in (("query_block", self.query_block, space), ("key_block", self.key_block, keys)):
            for length, size in zip(axes, per_axis(name, block, len(axes))):
                if length % size and not self.ragged:
                    raise InputError(
                        f"{name} is {block} and the map is {axes}: blocks must divide it. "
                        "Pad the map, or set ragged=True"
                    )
        if self.blocks.shape[2] != num_blocks(space, self.query_block):
            raise InputError(
                f"blocks is {tuple(self.blocks.shape)}, for {self.blocks.shape[2]} query blocks: a map {space} "
                f"in blocks of {self.query_block} has {num_blocks(space, self.query_block)}"
            )
        if self.within is not None and self.within.key_space(space) != keys:
            raise InputError(f"{self.within} on {space} does not take keys on {keys}, as the selection does")
        return keys

    def for_heads(self, heads: Sequence[int]) -> "Selection":
        if self.blocks.shape[1] == 1:
            return self
        return replace(self, blocks=self.blocks[:, heads], used=self.used[:, heads])

    def sees_all(self, space: tuple[int, ...]) -> bool:
        return False  # it may, but to know that would wait for the device

    def block_shapes(self, space: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(T, Q) and (blocks, c) numbers of the tokens in the blocks of queries and of keys, -1 past the map's end."""
        device = self.blocks.device
        return (
            block_order(space, self.query_block, device),
            block_order(self.key_space(space), self.key_block, device),
        )

    def pairs(self, space: tuple[int, ...]) -> Tensor:
        """(B, heads | 1, T, M) booleans: which blocks of keys each block of queries sees."""
        return self._pairs(num_blocks(self.key_space(space), self.key_block))

    def listed_pairs(self) -> Tensor:
        """The same without knowing the map: key blocks end with the last one that is listed."""
        return self._pairs(int(self.blocks.max()) + 1 if self.blocks.numel() else 0)

    def _pairs(self, count: int) -> Tensor:
        none = self.blocks.new_zeros(*self.blocks.shape[:3], count, dtype=torch.uint8)
        # scatter_reduce, not scatter: an unused entry may repeat the number of a used one
        return none.scatter_reduce(-1, self.blocks, self.used.byte(), "amax").bool()

    def mask(self, space: tuple[int, ...]) -> Tensor:
        """The truth: (B, heads | 1, N, M) booleans."""
        keys, pairs = self.key_space(space), self.pairs(space)
        rows, columns = self.block_shapes(space)
        tokens = pairs.repeat_interleave(rows.shape[1], 2).repeat_interleave(columns.shape[1], 3)
        found = tokens[:, :, token_slots(rows, space)][..., token_slots(columns, keys)]
        return found if self.within is None else found & self.within.mask(space).to(found.device)


def block_order(space: tuple[int, ...], block: int | tuple[int, ...], device: torch.device) -> Tensor:
    """(T, Q) numbers of the tokens in each block, blocks and tokens in row-major order; -1 past the end of the map."""
    sizes = per_axis("block", block, len(space))
    tokens = torch.arange(torch.Size(space).numel(), device=device).view(space)
    margin = [over for length, size in zip(space, sizes) for over in (-length % size, 0)]
    if any(margin):
        tokens = F.pad(tokens, margin[::-1], value=-1)
    for axis, size in reversed(list(enumerate(sizes))):
        tokens = tokens.unflatten(axis, (-1, size))
    axes = len(space)
    return tokens.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)).flatten(axes).flatten(0, axes - 1)


def token_slots(order: Tensor, space: tuple[int, ...]) -> Tensor:
    """(N,) where each token stands in the flattened `block_order`."""
    return order.flatten().argsort()[-torch.Size(space).numel() :]  # behind what is past the end


def num_blocks(space: tuple[int, ...], block: int | tuple[int, ...]) -> int:
    """How many blocks cover a map."""
    return torch.Size([-(-n // size) for n, size in zip(space, per_axis("block", block, len(space)))]).numel()


def block_means(x: Tensor, block: int | tuple[int, ...]) -> Tensor:
    """Mean of the tokens of each block: (B, heads, *space, D) to (B, heads, T, D), for scores of blocks.

    Along an axis that the block does not divide, the last block is smaller.
    """
    space, sizes = tuple(x.shape[2:-1]), per_axis("block", block, x.ndim - 3)
    if not any(length % size for length, size in zip(space, sizes)):
        for axis, size in reversed(list(enumerate(sizes, start=2))):
            x = x.unflatten(axis, (-1, size))
        for axis in reversed(range(3, 3 + 2 * len(sizes), 2)):  # one by one is twice as fast
            x = x.mean(axis)
        return x.flatten(2, -2)
    rows = block_order(space, block, x.device)
    tokens = x.flatten(2, -2)[:, :, rows.flatten()].unflatten(2, tuple(rows.shape))
    inside = (rows >= 0).unsqueeze(-1)
    return (tokens * inside).sum(3) / inside.sum(1)


def select_top_k(scores: Tensor, count: int, *, scope: str = "query", **blocks: int | tuple[int, ...]) -> Selection:
    """Select the highest scores.

    Args:
        scores: (B, heads | 1, T, M) of query block and key block; -inf is never selected.
        count: pairs for each query block on average; with scope "query" exactly, with "head" they compete within a
            head, with "all" within an image.
        blocks: query_block, key_block, key_size and ragged of the `Selection`.

    Returns: Selection. Where fewer finite scores are left than `count`, it has fewer; equal scores go to the lower
        block.

    >>> select_top_k(torch.tensor([[[[1.0, 3.0, 2.0]]]]), 2).blocks.flatten().sort().values
    tensor([1, 2])
    """
    _check_scores(scores, scope)
    if scope == "query":
        kept = min(count, scores.shape[-1])
        if is_exporting():
            indices = highest(scores.detach(), kept)
            values = scores.detach().gather(-1, indices)
        else:  # a stable sort, so that ties do not depend on the device
            values, indices = torch.sort(scores.detach(), dim=-1, descending=True, stable=True)
        return Selection(indices[..., :kept], values[..., :kept] != -torch.inf, **blocks)  # type: ignore[arg-type]
    pool = _pool(scores, scope)
    order = torch.sort(pool, dim=-1, descending=True, stable=True)
    kept = min(count * pool.shape[-1] // scores.shape[-1], pool.shape[-1])
    chosen = torch.zeros_like(pool, dtype=torch.bool).scatter(-1, order.indices[..., :kept], True)
    return select_mask((chosen & (pool != -torch.inf)).view_as(scores), **blocks)


def highest(scores: Tensor, count: int) -> Tensor:
    """Numbers of the highest scores, the best first, the lower of equals where one must go: ONNX sorts none stably."""
    least = scores.topk(max(count, 1)).values[..., -1:]
    above, equal = scores > least, scores == least
    chosen = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    places = torch.arange(scores.shape[-1], 0, -1, dtype=torch.float64, device=scores.device)
    found = torch.where(chosen, places, 0.0).topk(count).indices
    return found.gather(-1, scores.gather(-1, found).topk(count).indices)


def select_mass(scores: Tensor, mass: float, *, scope: str = "query", **blocks: int | tuple[int, ...]) -> Selection:
    """Select the highest scores until their softmax weights add up to `mass`, at least one.

    Args:
        scores: (B, heads | 1, T, M); -inf is never selected.
        mass: above 0, at most 1.
        scope: the softmax and the sum run over the key blocks of a query block ("query"), over all pairs of a head, or
            of an image ("all").
        blocks: as in `select_top_k`.

    >>> select_mass(torch.tensor([[[[0.0, 5.0, 0.0]]]]), 0.9).used.sum().item()  # one block has nearly everything
    1
    """
    _check_scores(scores, scope)
    _check_mass(mass)
    pool = _pool(scores, scope)
    weights = pool.double().softmax(-1).nan_to_num(0.0)  # a row of -inf alone selects nothing
    order = torch.sort(weights, dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    chosen = torch.zeros_like(pool, dtype=torch.bool).scatter(-1, order.indices, (before < mass) & (order.values > 0))
    return select_mask(chosen.view_as(scores), **blocks)


def select_similarity_mass(
    scores: Tensor, mass: float, *, own: Tensor | None = None, scope: str = "query", **blocks: int | tuple[int, ...]
) -> Selection:
    """Select the highest scores until their similarities add up to `mass` of all, and at least one beyond `own`.

    A similarity is a score that is scaled linearly, so that the lowest score of its scope has 0 and the highest 1:
    unlike softmax weights it does not depend on the scale of the scores (VMoBA, 2025, arXiv:2506.23858).

    Args:
        scores: (B, heads | 1, T, M); -inf is never selected.
        mass: above 0, at most 1.
        own: booleans, broadcastable to scores: pairs that are selected in any case, and count first.
        scope: as in `select_mass`, or "block": each key block by itself, over all heads and query blocks.
        blocks: as in `select_top_k`.

    >>> select_similarity_mass(torch.tensor([[[[0.0, 5.0, 4.0, 1.0]]]]), 0.6).used.sum().item()  # 0, 1, 0.8 and 0.2
    2
    """
    _check_scores(scores, scope, (*SCOPES, "block"))
    _check_mass(mass)
    given = torch.zeros_like(scores, dtype=torch.bool) if own is None else own.expand_as(scores)
    pool, first = (_pool(x, scope) for x in (scores.double(), given))
    visible = pool != -torch.inf
    pool = pool.where(visible, pool.amax(-1, keepdim=True))
    low, high = pool.aminmax(dim=-1, keepdim=True)
    spread = (high - low).where(high - low > SMALLEST_SPREAD, 1.0)
    similarity = ((pool - low) / spread).where(visible, 0.0)
    total = similarity.sum(-1, keepdim=True) + SMALLEST_SPREAD
    left = (mass - (similarity * first).sum(-1, keepdim=True) / total).clamp(min=0)
    order = torch.sort(similarity.masked_fill(first, -1), dim=-1, descending=True, stable=True)
    values = order.values.clamp(min=0)
    enough = (values.cumsum(-1) - values) / total >= left
    enough[..., 0] = False
    chosen = torch.zeros_like(visible).scatter(-1, order.indices, ~enough) & visible | first
    if scope == "block":
        chosen = chosen.unflatten(-1, scores.shape[1:3]).movedim(1, -1)
    return select_mask(chosen.reshape(scores.shape), **blocks)


def select_mask(mask: Tensor, **blocks: int | tuple[int, ...]) -> Selection:
    """Select the pairs of query block and key block for which `mask` (B, heads | 1, T, M) is True.

    Every row takes as many entries as the fullest one.
    """
    if mask.dtype != torch.bool or mask.ndim != 4:
        raise InputError(
            f"mask is {mask.dtype} {tuple(mask.shape)}: give booleans (B, heads or 1, query blocks, key blocks)"
        )
    # the sizes of a graph cannot depend on values
    entries = (
        mask.shape[-1] if torch.compiler.is_compiling() else int(F.pad(mask.sum(-1).flatten(), (0, 1), value=1).max())
    )
    order = torch.sort(mask.byte(), dim=-1, descending=True, stable=True)
    return Selection(order.indices[..., :entries], order.values[..., :entries].bool(), **blocks)  # type: ignore[arg-type]


def _pool(scores: Tensor, scope: str) -> Tensor:
    """The scores that compete with one another, along the last axis."""
    if scope == "block":
        return scores.detach().movedim(-1, 1).flatten(2)
    return scores.detach().flatten({"query": 3, "head": 2, "all": 1}[scope])


def _check_mass(mass: float) -> None:
    if not 0 < mass <= 1:
        raise InputError(f"mass is {mass}: give a share above 0 and at most 1")


def _check_scores(scores: Tensor, scope: str, scopes: tuple[str, ...] = SCOPES) -> None:
    check_choice("scope", scope, scopes)
    if scores.ndim != 4:
        raise InputError(f"scores is {tuple(scores.shape)}: give (B, heads or 1, query blocks, key blocks)")
    blind = torch.compiler.is_compiling() or scores.is_meta  # where there are no values to look at
    if not blind and scores.isnan().any():
        raise InputError("scores hold NaN, which cannot be ranked: look for them in the queries and keys")
