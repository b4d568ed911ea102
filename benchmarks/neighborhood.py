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
from sparse import HEAD_DIM, HEADS, forward, make_inputs, take_turns, training
from torch import Tensor

from saccade.ops import Neighborhood, sparse_attention

WINDOW = 7


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
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"neighborhood attention, window {WINDOW}, {HEADS} heads x {HEAD_DIM}, {args.dtype}, {name}")

    pattern = Neighborhood(WINDOW)
    small, large = (make_inputs((side, side), args.device, dtype) for side in (56, 112))
    flat = [x.flatten(2, 3) for x in small]
    mask = pattern.mask((56, 56)).to(args.device)

    def ours(*inputs: Tensor) -> Tensor:
        return sparse_attention(*inputs, pattern)

    calls = {
        "forward": forward(ours, small),
        "training": training(ours, small),
        "112x112, forward": forward(ours, large),
        "112x112, training": training(ours, large),
        "dense SDPA": forward(lambda *inputs: F.scaled_dot_product_attention(*inputs, attn_mask=mask), flat),
    }
    try:
        with warnings.catch_warnings(action="ignore"):
            flex = compiled_flex(56, args.device)
            torch.testing.assert_close(flex(*flat), ours(*small).flatten(2, 3))
        calls["FlexAttention compiled"] = forward(flex, flat)
    except Exception as error:  # the peer is not ours to mend: say why it is missing
        print(f"FlexAttention compiled: not measured, {type(error).__name__}: {str(error).splitlines()[0]}")
    took = take_turns(calls, args.rounds)
    for name, size in (("", "56x56"), ("112x112, ", "112x112")):
        one, both = took[f"{name}forward"], took[f"{name}training"]
        print(f"{size}: forward {one:.2f} ms; forward + backward {both:.2f} ms = {both / one:.2f}x")
    print(f"112x112 takes {took['112x112, forward'] / took['forward']:.2f}x the time of 56x56 (4 times the tokens)")
    for name in ("dense SDPA", "FlexAttention compiled"):
        if name in took:
            print(f"{name}, 56x56, same mask: {took[name]:.1f} ms, {took[name] / took['forward']:.1f}x ours")


if __name__ == "__main__":
    main()
