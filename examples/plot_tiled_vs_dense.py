"""
What does sparse attention save?
================================

Dense attention forms a score for every pair of query and key; the tiled engine forms those that lie in the region of
one tile. This example counts both, as the map grows. It counts FLOPs and bytes, not seconds: counts are the same on
every machine. For seconds on yours, run ``saccade bench``.
"""

# %%
# Neighborhood attention with a window of 7 x 7, one head of 32 channels, on square maps of 24 to 56 tokens a side.
# ``impl="reference"`` is the definition: all N x M scores under a mask. ``impl="tiled"`` gathers, for each tile of
# neighbouring queries, the region of keys that they see together.

import matplotlib.pyplot as plt
import torch

from saccade.measure import count_flops, fit_exponent, measure_peak_memory
from saccade.ops import Neighborhood, sparse_attention

DIM, SIDES = 32, (24, 32, 40, 48, 56)
pattern = Neighborhood(7)


def make_inputs(side):
    """Query, key and value, (1, 1, side, side, DIM)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, side, side, DIM, generator=generator) for _ in range(3)]


flops = {"dense": [], "tiled": [], "visible pairs": []}
memory = {"dense": [], "tiled": []}
for side in SIDES:
    inputs = make_inputs(side)
    for name, impl in (("dense", "reference"), ("tiled", "tiled")):

        def attend(impl=impl, inputs=inputs):
            return sparse_attention(*inputs, pattern, impl=impl)

        attend()  # the pattern's plan is made once and kept, so it is no part of the cost
        flops[name].append(count_flops(attend).total)
        memory[name].append(measure_peak_memory(attend).bytes)
    pairs = pattern.num_visible((side, side))
    flops["visible pairs"].append(4 * DIM * pairs)  # two products of DIM multiply-adds, two FLOPs each

# %%
# The slopes are the powers of the side with which cost grows: 2 is in step with the number of tokens, 4 with its
# square. The lowest line is what no engine can go below: the pairs that may attend.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for ax, title, costs in zip(axes, ("FLOPs", "peak memory, bytes"), (flops, memory)):
    for (name, values), marker in zip(costs.items(), "os^"):
        exponent = fit_exponent(SIDES, values)
        ax.loglog(SIDES, values, marker=marker, label=f"{name}: side^{exponent.value:.1f}")
        growth = f"{values[0]:12,} to {values[-1]:14,}  side^{exponent.value:.2f}"
        print(f"{title:18} {name:14} {growth}")
    ax.set_xticks(SIDES, [str(side) for side in SIDES])
    ax.minorticks_off()
    ax.set(title=title, xlabel="tokens along a side")
    ax.legend(frameon=False)

# %%
# The region of a tile holds keys that only some of its queries see, which is why the tiled line lies above the lowest.
# The smaller the map, the more of it a region covers, and the less is saved.

for side, dense, tiled, pairs in zip(SIDES, *flops.values()):
    print(f"{side} x {side}: dense / tiled = {dense / tiled:4.1f}", end=", ")
    print(f"tiled / visible pairs = {tiled / pairs:.1f}")

# %%
# What this shows, as an assertion: both compute the same, the tiled engine in step with the number of tokens, dense
# attention with its square.

query, key, value = make_inputs(28)
torch.testing.assert_close(
    sparse_attention(query, key, value, pattern, impl="tiled"),
    sparse_attention(query, key, value, pattern, impl="reference"),
)
assert fit_exponent(SIDES, flops["dense"]).value > 3.95
assert fit_exponent(SIDES, flops["tiled"]).value < 2.2
assert flops["visible pairs"] == [4 * DIM * side**2 * 49 for side in SIDES]
assert flops["dense"][-1] > 10 * flops["tiled"][-1]
