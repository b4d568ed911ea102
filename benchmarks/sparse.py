"""The sparse engine beside its peers: dense SDPA under the same mask, and FlexAttention compiled.

    python benchmarks/sparse.py                       # three minutes on two CPU cores
    python benchmarks/sparse.py --only halo --rounds 31
    python benchmarks/sparse.py --device cuda --dtype bfloat16

Each row gives how much faster than dense SDPA the engine is, forward and forward + backward, beside the bound by
visited tiles of 64 x 64 tokens. All calls of a row take turns; quote the ratios.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import (
    AxialPattern,
    Grid,
    Halo,
    Neighborhood,
    Pattern,
    Selection,
    Window,
    select_top_k,
    sparse_attention,
    tile_bound,
)

HEADS, HEAD_DIM, SPACE, BLOCK = 4, 32, (64, 64), 8


def block_lists(device: str) -> Selection:
    """A tenth of the key blocks for each block of queries, another tenth for each head."""
    blocks = (SPACE[0] // BLOCK) ** 2
    scores = torch.randn(1, HEADS, blocks, blocks, generator=torch.Generator().manual_seed(0))
    return select_top_k(scores.to(device), blocks // 10, query_block=BLOCK, key_block=BLOCK)


def cases(device: str) -> dict[str, Pattern]:
    """About nine tenths of the keys hidden."""
    return {
        "window": Window((16, 32)),
        "grid": Grid((16, 32)),
        "halo": Halo(8, 6),
        "neighborhood": Neighborhood(20),
        "block lists": block_lists(device),
    }


def make_inputs(space: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value (1, heads, *space, D), laid out as a mixer lays them out: channels last."""
    packed = torch.randn(1, *space, 3 * HEADS * HEAD_DIM, device=device, dtype=dtype)
    return [x.unflatten(-1, (HEADS, -1)).movedim(-2, 1) for x in packed.chunk(3, -1)]


def take_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Lower quartile of each call's milliseconds: others on the machine can only add, and taking turns disturbs all
    calls alike. Each is timed right after a call of its own, which finds the caches as the peers left them."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-2, rounds):
        for name, call in calls.items():
            call()
            _wait()
            start = clock()
            call()
            _wait()
            if round_ >= 0:
                took[name].append(1e3 * (clock() - start))
    return {name: sorted(times)[len(times) // 4] for name, times in took.items()}


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def forward(attend: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """The call without gradients."""
    return torch.no_grad()(lambda: attend(*inputs))


def training(attend: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of the call."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream = torch.randn_like(attend(*inputs))
    return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)


def compiled_flex(mask: Tensor, inputs: list[Tensor], expected: Tensor) -> Callable[..., Tensor] | None:
    """FlexAttention with a block mask, compiled, or None where it cannot serve; on a CPU it serves the forward pass."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = mask.expand(HEADS, *mask.shape[-2:]) if mask.ndim == 2 else mask.reshape(-1, *mask.shape[-2:])
    heads = None if mask.stride(0) == 0 else HEADS

    def visible(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[head, query, key]

    try:
        with warnings.catch_warnings(action="ignore"):
            block_mask = create_block_mask(visible, None, heads, *mask.shape[-2:], device=str(mask.device))
            compiled = torch.compile(flex_attention, dynamic=False)
            torch.testing.assert_close(compiled(*inputs, block_mask=block_mask), expected, rtol=1e-2, atol=1e-2)
    except Exception as error:  # the peer is not ours to mend: say why it is missing
        print(f"  FlexAttention is not measured: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return lambda *inputs: compiled(*inputs, block_mask=block_mask)


def bound(pattern: Pattern) -> float:
    """Pairs of tiles over pairs of tiles that are visited."""
    if isinstance(pattern, Selection):
        pairs = pattern.pairs(SPACE)
        return pairs.numel() / int(pairs.sum())
    assert isinstance(pattern, AxialPattern)
    return tile_bound(pattern, SPACE, BLOCK, BLOCK).mean


def measure(pattern: Pattern, device: str, dtype: torch.dtype, rounds: int, flex: bool) -> None:
    """Print the row of a pattern."""
    inputs = make_inputs(SPACE, device, dtype)
    flat = [x.flatten(2, 3) for x in inputs]
    mask = pattern.mask(SPACE).to(device)

    def ours(*inputs: Tensor) -> Tensor:
        return sparse_attention(*inputs, pattern)

    def dense(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask)

    calls = {
        "ours": forward(ours, inputs),
        "dense": forward(dense, flat),
        "ours, training": training(ours, inputs),
        "dense, training": training(dense, flat),
    }
    peer = compiled_flex(mask, flat, ours(*inputs).flatten(2, 3)) if flex else None
    if peer is not None:
        calls["flex"] = forward(peer, flat)
    took = take_turns(calls, rounds)
    one, both, limit = took["dense"] / took["ours"], took["dense, training"] / took["ours, training"], bound(pattern)
    print(
        f"  hidden {1 - mask.float().mean().item():.1%}; {took['ours']:.2f} ms = {one:.1f}x dense; "
        f"forward + backward {took['ours, training']:.2f} ms = {both:.1f}x dense; visited tiles allow {limit:.1f}x"
        + (f"; {took['flex'] / took['ours']:.1f}x FlexAttention" if peer is not None else "")
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out, which takes long to compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{SPACE[0]}x{SPACE[1]} tokens, {HEADS} heads x {HEAD_DIM}, {args.dtype}, {name}")
    for row, pattern in cases(args.device).items():
        if args.only in row:
            print(row if isinstance(pattern, Selection) else f"{row}: {pattern}")
            measure(pattern, args.device, getattr(torch, args.dtype), args.rounds, not args.no_flex)


if __name__ == "__main__":
    main()
