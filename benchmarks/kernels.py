"""The sparse engine on a GPU beside its peers: dense SDPA (FlashAttention) and FlexAttention with the same mask.

    python benchmarks/kernels.py                      # three minutes on an H100 or H200
    python benchmarks/kernels.py --csv kernels.csv

Each row gives the speed-up over dense SDPA of every implementation, forward and forward + backward, beside the bound by
visited tiles; FlexAttention runs with its own block mask over tokens in row-major order, as its users write it.
"""

import argparse
import csv
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import (
    Causal,
    Documents,
    Global,
    Neighborhood,
    Pattern,
    Sinks,
    SlidingWindow,
    Window,
    sparse_attention,
    tile_bound,
)
from saccade.ops.block_lists import kernel_lists, tile_shape

HEADS, HEAD_DIM = 16, 64
CASES: list[tuple[Pattern, tuple[int, ...]]] = [
    (Global(), (64, 64)),
    (Causal(), (4096,)),
    (Neighborhood(16), (64, 64)),
    (Neighborhood(16, stride=8), (64, 64)),
    (Window(8), (64, 64)),
    (Neighborhood(32), (128, 128)),
    (Neighborhood(32, stride=8), (128, 128)),
    (Neighborhood(16, dilation=2), (128, 128)),
    (Neighborhood((8, 12, 12)), (16, 32, 32)),
    (Neighborhood((8, 12, 12), stride=4), (16, 32, 32)),
    ((SlidingWindow(1024) | Sinks(64)) & Causal(), (16384,)),
    (Causal() & Documents((1000, 5000, 3000, 7384)), (16384,)),
]


def milliseconds(run: Callable[[], object]) -> float:
    """Median of a call, by device events."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=150, return_mode="median"))


def both_ways(attend: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float]:
    """Forward, and forward with backward."""
    with torch.no_grad():
        forward = milliseconds(lambda: attend(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream = torch.randn_like(attend(*leaves))

    def train() -> None:
        torch.autograd.grad(attend(*leaves), leaves, upstream)

    return forward, milliseconds(train)


def row_major_flex(pattern: Pattern, space: tuple[int, ...]) -> Callable[..., Tensor]:
    """FlexAttention with a block mask made from the pattern, pair by pair."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = torch.Size(space).numel()

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pattern.sees(space, query, key)  # type: ignore[attr-defined]

    block_mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q.flatten(2, -2), k.flatten(2, -2), v.flatten(2, -2), block_mask=block_mask)


def measure(pattern: Pattern, space: tuple[int, ...], batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """One row."""
    inputs = [torch.randn(batch, HEADS, *space, HEAD_DIM, device="cuda", dtype=dtype) for _ in range(3)]
    flat = [x.flatten(2, -2) for x in inputs]
    query_tile = kernel_lists(pattern, space).query.shape[1]  # type: ignore[arg-type]
    bound = tile_bound(pattern, space, tile_shape(query_tile, len(space)), tile_shape(64, len(space)))  # type: ignore[arg-type]
    row: dict[str, Any] = {
        "pattern": str(pattern),
        "map": "x".join(map(str, space)),
        "queries a tile": query_tile,
        "bound": bound.mean,
        "bound by FLOPs": bound.flops,
    }
    dense = both_ways(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), flat)
    row |= {"SDPA ms": dense[0], "SDPA ms, both": dense[1]}
    calls: dict[str, Callable[..., Tensor]] = {
        impl: lambda q, k, v, impl=impl: sparse_attention(q, k, v, pattern, impl=impl)
        for impl in ("triton", "flex", "tiled")
    }
    calls["FlexAttention"] = row_major_flex(pattern, space)
    expected = sparse_attention(*inputs, pattern, impl="triton").flatten(2, -2)
    for name, attend in calls.items():
        torch.compiler.reset()  # each with the whole of the compiler's limit of variants
        try:
            with warnings.catch_warnings(action="ignore"):
                got = attend(*inputs).reshape(expected.shape)
                error = (got - expected).float().norm() / expected.float().norm()
                assert error < 1e-2, f"differs from triton by {error:.1e}"
                forward, both = both_ways(attend, inputs)
            row |= {name: dense[0] / forward, f"{name}, both": dense[1] / both}
        except Exception as error:  # one that fails is reported, and the others go on
            row |= {name: f"{type(error).__name__}: {str(error).splitlines()[0][:80]}", f"{name}, both": ""}
        torch.cuda.empty_cache()
    return row


def show(row: dict[str, Any], name: str) -> str:
    """Both speed-ups, or why there are none."""
    return f"{row[name]:.2f} / {row[f'{name}, both']:.2f}" if isinstance(row[name], float) else f"({row[name]})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a batch")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the rows to run")
    parser.add_argument("--csv", help="write the table here too")
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}, {args.dtype}, {HEADS} heads x {HEAD_DIM}, {args.tokens} tokens a batch"
    )
    print("speed-up over dense SDPA without a mask, forward / forward + backward")
    rows = []
    for number, (pattern, space) in enumerate(CASES):
        if args.only and number not in args.only:
            continue
        batch = max(1, args.tokens // torch.Size(space).numel())
        row = measure(pattern, space, batch, getattr(torch, args.dtype))
        rows.append({"device": device, "dtype": args.dtype, **row})
        names = ("triton", "flex", "tiled", "FlexAttention")
        shown = " | ".join(f"{name} {show(row, name)}" for name in names)
        bound = f"bound {row['bound']:.2f} at {row['queries a tile']} (FLOPs {row['bound by FLOPs']:.2f})"
        print(f"{row['pattern']} on {row['map']}: {bound} | {shown}", flush=True)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
