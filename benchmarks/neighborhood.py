"""Neighborhood attention beside its peers: dense SDPA under the same mask, and FlexAttention compiled.

    python benchmarks/neighborhood.py            # a minute on two CPU cores
    python benchmarks/neighborhood.py --device cuda --dtype bfloat16

Quote the ratios: seconds differ from machine to machine, and between runs of the same machine.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.measure import measure_time
from saccade.ops import Neighborhood, sparse_attention

HEADS, HEAD_DIM, WINDOW = 4, 32, 7


def make_inputs(side: int, device: str, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """Query, key and value (1, heads, side, side, D), laid out as a mixer lays them out: channels last."""
    packed = torch.randn(1, side, side, 3 * HEADS * HEAD_DIM, device=device, dtype=dtype)
    return [x.unflatten(-1, (HEADS, -1)).movedim(-2, 1).requires_grad_(grad) for x in packed.chunk(3, -1)]


def milliseconds(run: Callable[[], object]) -> float:
    """Median of a call."""
    return 1e3 * measure_time(run, warmup=3, repeats=15, min_seconds=0.3).median


def backward(attend: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of the same call."""

    def run() -> object:
        out = attend()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def compiled_flex(side: int, device: str) -> Callable[..., Tensor]:
    """FlexAttention with the neighborhood's block mask, compiled; its forward is all that a CPU serves."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        def near(q: Tensor, k: Tensor) -> Tensor:
            start = (q - WINDOW // 2).clamp(0, side - WINDOW)
            return (k >= start) & (k < start + WINDOW)

        return near(query // side, key // side) & near(query % side, key % side)

    block_mask = create_block_mask(visible, None, None, side**2, side**2, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda *inputs: compiled(*inputs, block_mask=block_mask)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"neighborhood attention, window {WINDOW}, {HEADS} heads x {HEAD_DIM}, {args.dtype}, {name}")

    pattern, times = Neighborhood(WINDOW), {}
    for side in (56, 112):
        inputs = make_inputs(side, args.device, dtype, grad=True)
        plain = [x.detach() for x in inputs]
        times[side] = milliseconds(lambda plain=plain: sparse_attention(*plain, pattern))
        both = milliseconds(backward(lambda inputs=inputs: sparse_attention(*inputs, pattern), inputs))
        print(
            f"{side}x{side}: forward {times[side]:.2f} ms; forward + backward {both:.2f} ms = {both / times[side]:.2f}x"
        )
    print(f"112x112 takes {times[112] / times[56]:.2f}x the time of 56x56 (4 times the tokens)")

    flat = [x.flatten(2, 3) for x in make_inputs(56, args.device, dtype, grad=False)]
    mask = pattern.mask((56, 56)).to(args.device)
    dense = milliseconds(lambda: F.scaled_dot_product_attention(*flat, attn_mask=mask))
    print(f"dense SDPA under the same mask, 56x56: {dense:.1f} ms, {dense / times[56]:.1f}x ours")
    try:
        with warnings.catch_warnings(action="ignore"):
            flex = compiled_flex(56, args.device)
            ours = sparse_attention(*(x.unflatten(2, (56, 56)) for x in flat), pattern)
            torch.testing.assert_close(flex(*flat), ours.flatten(2, 3))
            took = milliseconds(lambda: flex(*flat))
        print(f"FlexAttention compiled, 56x56: {took:.1f} ms, {took / times[56]:.1f}x ours")
    except Exception as error:  # the peer is not ours to mend: say why it is missing
        print(f"FlexAttention compiled: not measured, {type(error).__name__}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
