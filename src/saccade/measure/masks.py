"""Time attention under the masks of the catalogue beside dense attention under the same mask and torch's FlexAttention
(Long-Context Attention Benchmark, 2025, arXiv:2510.17896).

Its rules: speed counts the pairs that may attend, 4 D FLOPs each forward and 2.5 times that backward, so that a sparse
mask does not flatter whoever computes hidden pairs; and the making of masks and tiles is told apart from the work.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.measure.timing import measure_time
from saccade.ops import (
    MASKS,
    Causal,
    Cost,
    Pattern,
    Selection,
    StaticPattern,
    build_mask,
    pattern_cost,
    sparse_attention,
)
from saccade.ops.check import per_axis

__all__ = ["PEERS", "MaskTiming", "PeerTiming", "bench_masks"]

PEERS = ("dense", "flex_attention", "flex", "triton")
"""Torch's dense attention and FlexAttention, and the other forms of our own engine."""

LARGEST_DENSE = 8192  # tokens; beyond, a dense mask takes gigabytes
BACKWARD = 2.5  # FLOPs of the backward pass over those of the forward pass: five products for two

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PeerTiming:
    """One implementation on one mask.

    Attributes:
        forward, backward: milliseconds of a call; None where it was not measured.
        prepare: milliseconds once, before the first call: tiles, masks, compiling.
        error: largest difference of its output from the tiled one, over the largest output.
        note: why something was not measured.
    """

    forward: float | None = None
    backward: float | None = None
    prepare: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class MaskTiming:
    """One mask at one length.

    Attributes:
        mask: its name in `saccade.ops.MASKS`.
        length: tokens.
        repeats: heads of all sequences.
        cost: of all of them, counted: pairs, those that the tiled engine computes, FLOPs, and the bound of a kernel
            that visits whole tiles.
        tiled: our engine.
        peers: others by their names.
    """

    mask: str
    length: int
    repeats: int
    cost: Cost
    tiled: PeerTiming
    peers: dict[str, PeerTiming]

    @property
    def density(self) -> float:
        """Share of all pairs that may attend."""
        return self.cost.pairs / (self.repeats * self.length**2)

    @property
    def computed(self) -> float:
        """Share of all pairs that the tiled engine computes."""
        return self.cost.computed / (self.repeats * self.length**2)

    @property
    def visited(self) -> float:
        """Share of all tiles in which some pair may attend."""
        return 1 / self.cost.bound.mean

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        return {
            **asdict(self),
            "cost": {**self.cost._asdict(), "bound": self.cost.bound._asdict()},
            **{name: getattr(self, name) for name in ("density", "computed", "visited")},
            "tflops": self.tflops(self.tiled),
            "speedups": {peer: self.speedups(peer) for peer in self.peers},
        }

    def tflops(self, timing: PeerTiming) -> tuple[float | None, float | None]:
        """TFLOP/s forward and backward, of the pairs that may attend."""
        return tuple(  # type: ignore[return-value]
            None if ms is None else factor * self.cost.flops / (1e9 * ms)
            for ms, factor in ((timing.forward, 1.0), (timing.backward, BACKWARD))
        )

    def speedups(self, peer: str) -> tuple[float | None, float | None]:
        """The time of a peer over ours, forward and backward."""
        theirs, ours = self.peers[peer], self.tiled
        pairs = ((theirs.forward, ours.forward), (theirs.backward, ours.backward))
        return tuple(None if a is None or b is None else a / b for a, b in pairs)  # type: ignore[return-value]


def bench_masks(
    masks: Sequence[str],
    lengths: Sequence[int],
    *,
    batch: int = 1,
    heads: int = 4,
    head_dim: int = 64,
    backward: bool = True,
    peers: Sequence[str] | None = None,
    tile: int = 128,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[MaskTiming]:
    """Time our engine and its peers on masks of the catalogue.

    Args:
        masks: names of `saccade.ops.MASKS`.
        lengths: tokens of the sequences.
        batch, heads, head_dim: of queries, keys and values.
        backward: time the backward pass too, by itself.
        peers: of `PEERS`: "dense" is torch's scaled_dot_product_attention under the mask, up to 8192 tokens, and
            "flex_attention" its FlexAttention as its guide has it, compiled for each mask and length, which takes half
            a minute and has no backward pass on CPUs; "flex" and "triton" are our engine with that `impl`. None takes
            the first two on CPUs, and all on others.
        tile: tokens of a side of the tiles that are counted; of a mask that is drawn, its own blocks.
        device, dtype: where and in what to compute.
        seed: of the inputs and of the masks that are drawn.
        progress: told what is measured next.

    Raises: InputError for an unknown mask or peer, or a size below 1.
    """
    for name in masks:
        check_choice("mask", name, MASKS)
    peers = (PEERS[:2] if device == "cpu" else PEERS) if peers is None else peers
    for name in peers:
        check_choice("peer", name, PEERS)
    sizes = (("length", min(lengths)), ("batch", batch), ("heads", heads), ("head_dim", head_dim), ("tile", tile))
    for what, least in sizes:
        if least < 1:
            raise InputError(f"{what} is {least}: give a whole number of at least 1")
    found = []
    for name in masks:
        for length in lengths:
            progress(f"{name}, {length} tokens")
            rng = torch.Generator().manual_seed(seed)
            pattern = _to(build_mask(name, length, generator=rng), device)
            inputs = [
                torch.randn(batch, heads, length, head_dim, generator=rng).to(device, dtype).requires_grad_(backward)
                for _ in range(3)
            ]
            start = time.perf_counter()
            with torch.no_grad():
                expected = _tiled(pattern, *inputs)
            prepare = 1e3 * (time.perf_counter() - start)
            ours = _time(partial(_tiled, pattern), inputs, backward, prepare, expected)
            timings = {peer: _time_peer(peer, pattern, length, inputs, backward, expected) for peer in peers}
            cost = pattern_cost(
                pattern, (length,), batch=batch, heads=heads, head_dim=head_dim, query_tile=tile, key_tile=tile
            )
            found.append(MaskTiming(name, length, batch * heads, cost, ours, timings))
    return found


def _choice(pattern: Pattern, space: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """The pairs of blocks of a selection, and the blocks' sizes."""
    if not isinstance(pattern, Selection) or len(pairs := pattern.pairs(space).flatten(0, 1)) != 1:
        raise InputError(f"{type(pattern).__name__} differs for each head or sequence: its tiles are not counted here")
    (query_block,) = per_axis("query_block", pattern.query_block, 1)
    (key_block,) = per_axis("key_block", pattern.key_block, 1)
    return pairs[0], query_block, key_block


def _to(pattern: Pattern, device: str) -> Pattern:
    if not isinstance(pattern, Selection):
        return pattern
    return replace(pattern, blocks=pattern.blocks.to(device), used=pattern.used.to(device))


def _tiled(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sparse_attention(query, key, value, pattern)


def _time_peer(
    peer: str, pattern: Pattern, length: int, inputs: list[Tensor], backward: bool, expected: Tensor
) -> PeerTiming:
    if peer == "dense" and length > LARGEST_DENSE:
        return PeerTiming(note=f"a dense mask of {length} tokens is too large")
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(action="ignore"):
            call = _peer(peer, pattern, length, inputs)
            plain = [x.detach() for x in inputs]
            call(*plain)  # compiles
            prepare = 1e3 * (time.perf_counter() - start)
            trains = backward and not ("flex" in peer and inputs[0].device.type == "cpu")
            timing = _time(call, inputs if trains else plain, trains, prepare, expected)
    except Exception as error:  # a peer is not ours to mend: say why it is missing
        lines = str(error).splitlines() or [""]
        return PeerTiming(note=f"{type(error).__name__}: {lines[0]}")
    if backward and not trains:
        return PeerTiming(timing.forward, None, prepare, timing.error, "no backward pass on this device")
    return timing


def _time(call: Call, inputs: list[Tensor], backward: bool, prepare: float, expected: Tensor) -> PeerTiming:
    def milliseconds(run: Callable[[], object]) -> float:
        return 1e3 * measure_time(run, warmup=2, repeats=7, min_seconds=0.05).median

    with torch.no_grad():
        out = call(*inputs)
        error = ((out - expected).abs().max() / expected.abs().max()).item()
        forward = milliseconds(lambda: call(*inputs))
    if not backward:
        return PeerTiming(forward, None, prepare, error)
    out = call(*inputs)
    upstream = torch.randn_like(out)
    behind = milliseconds(lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True))
    return PeerTiming(forward, behind, prepare, error)


def _peer(peer: str, pattern: Pattern, length: int, inputs: list[Tensor]) -> Call:
    if peer == "dense":
        return _dense(pattern, length, inputs)
    if peer == "flex_attention":
        return _flex(pattern, length, inputs)
    return lambda query, key, value: sparse_attention(query, key, value, pattern, impl=peer)


def _dense(pattern: Pattern, length: int, inputs: list[Tensor]) -> Call:
    if pattern == Causal():
        return partial(F.scaled_dot_product_attention, is_causal=True)
    if pattern.sees_all((length,)):
        return F.scaled_dot_product_attention
    mask = pattern.mask((length,)).to(inputs[0].device)
    added = torch.zeros(mask.shape, dtype=inputs[0].dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return partial(F.scaled_dot_product_attention, attn_mask=added)


def _flex(pattern: Pattern, length: int, inputs: list[Tensor]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, space = inputs[0].device, (length,)
    if isinstance(pattern, StaticPattern):

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return pattern.sees(space, query, key)
    else:
        chosen, query_block, key_block = _choice(pattern, space)

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return chosen[query // query_block, key // key_block]

    block_mask = create_block_mask(visible, None, None, length, length, device=str(device))
    torch.compiler.reset()  # masks are many, and a compiler keeps a few of one function
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=block_mask)
