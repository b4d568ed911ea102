"""
Every pattern, drawn
====================

What a query may see is a small object that can be drawn, costed and combined. This page draws each one that saccade
has: first its mask, queries down and keys across, then what three queries of the map see; each query is framed.
"""

# %%
# All of them on a map of 12 x 12 tokens. ``pattern.draw(space)`` is all that is called; the title is the call that
# makes the pattern.

import inspect

import matplotlib.pyplot as plt
import torch

from saccade import ops
from saccade.ops import (
    BlockDiffusion,
    Causal,
    Complement,
    Documents,
    ElasticSpan,
    Global,
    GlobalTokens,
    Grid,
    Halo,
    Intersection,
    Neighborhood,
    PerHead,
    SelectionUnion,
    Sinks,
    SlidingWindow,
    Union,
    Window,
    select_top_k,
)

space = (12, 12)


def draw(pattern):
    """Draw a pattern on a figure of its own, and remember its kind."""
    pattern.draw(space, figure=plt.figure())
    drawn.add(type(pattern))


drawn = set()
plt.rcParams["figure.max_open_warning"] = 0

# %%
# Blocks
# ------
# Queries of a block see alike: windows (Swin), windows that are shifted, grids (MaxViT), blocks with a halo (HaloNet).

for pattern in (Global(), Window(4), Window(4, shift=2), Window((3, 12)), Grid(4), Halo(4, 2)):
    draw(pattern)

# %%
# Sliding
# -------
# A window around every query: shifted inwards at the border (NAT), with a stride (GNA), with holes, with causal axes;
# or cut off at the border, also in blocks whose number grows with the map (MoA).

for pattern in (
    Neighborhood(5),
    Neighborhood(6, stride=3),
    Neighborhood(5, dilation=2),
    Neighborhood(5, causal=(True, False)),
    SlidingWindow(2, 2),
    ElasticSpan(0, 0.25, 2),
):
    draw(pattern)

# %%
# Sequences
# ---------
# In row-major order: causal, causal blocks, noised and clean halves of block diffusion, documents, global tokens,
# sinks. They are meant to be combined.

for pattern in (Causal(), Causal(24), BlockDiffusion(24), Documents((50, 64, 30)), GlobalTokens((0, 77)), Sinks(3)):
    draw(pattern)

# %%
# Combined
# --------
# ``|`` is what one of two sees, ``&`` what both see, ``~`` what is hidden.

drawn |= {Union, Intersection, Complement}
for pattern in (
    Window(4) | GlobalTokens((0,)),
    (SlidingWindow(2, 2) | Sinks(2)) & Causal(),
    Neighborhood(7) & ~Neighborhood(3),
):
    draw(pattern)

# %%
# A pattern for each head
# -----------------------
# Three heads of one call.

draw(PerHead([Window(4), Grid(4), Window(4)]))

# %%
# Made from data
# --------------
# A selector chooses blocks of keys for each block of queries, here at random; a selection can be cut by a pattern or
# joined with one.

chosen = select_top_k(torch.randn(1, 1, 9, 9, generator=torch.manual_seed(0)), 2, query_block=4, key_block=4)
for pattern in (chosen, chosen & Causal(), chosen | Window(4)):
    draw(pattern)

# %%
# What they cost
# --------------
# ``pattern.cost`` counts without running: pairs, FLOPs, and how many times faster than dense attention a kernel of
# 8 x 8 tiles can be at most. A large stride makes a neighborhood as cheap for tiles as its pairs are.

for pattern in (Window(8), Neighborhood(24), Neighborhood(24, stride=8), (SlidingWindow(512) | Sinks(64)) & Causal()):
    cost = pattern.cost((64, 64), heads=4, head_dim=32)
    print(f"{pattern!s:40} {cost.flops / 1e6:6.0f} MFLOPs, at most {cost.bound.mean:5.2f} times dense attention")

# %%
# Nothing is missing:

kinds = [each for each in vars(ops).values() if inspect.isclass(each) and issubclass(each, ops.Pattern)]
assert {kind for kind in kinds if not inspect.isabstract(kind)} == drawn | {SelectionUnion}
