"""
What may a query see?
=====================

In sparse attention a *pattern* decides which keys each query may attend to. This example draws what one query sees of a
photo under each pattern, and finds where the patterns differ: at the borders of blocks, and at the border of the map.
"""

# %%
# A pattern is a small object without parameters. Its mask, (N, M) booleans with True = may attend, follows for any map;
# tokens are numbered row by row. The photo is cut into 14 x 14 tokens.

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage.data import chelsea

from saccade.ops import Global, Grid, Halo, Neighborhood, Window

SIDE, PIXELS = 14, 24  # tokens along each side of the map, pixels along each side of a token
face = Image.fromarray(chelsea()[:, 75:375])
photo = np.asarray(face.resize((SIDE * PIXELS, SIDE * PIXELS)))
patterns = {
    "Global()": Global(),
    "Window(7)": Window(7),
    "Window(7, shift=3)": Window(7, shift=3),
    "Grid(7)": Grid(7),
    "Halo(2, 2)": Halo(2, 2),
    "Neighborhood(7)": Neighborhood(7),
    "Neighborhood(5, dilation=2)": Neighborhood(5, dilation=2),
    "Neighborhood(7, causal=True)": Neighborhood(7, causal=True),
}

# %%
# One query stands in the last row of the upper left window, near the left border of the map. Its row of each mask,
# folded back into the map, shows what it sees. Hidden tokens are dark, the query is framed.

query = (6, 2)


def visible(pattern, query):
    """(SIDE, SIDE) booleans: which tokens a query sees."""
    return pattern.mask((SIDE, SIDE)).view(SIDE, SIDE, SIDE, SIDE)[query]


figure, axes = plt.subplots(2, 4, figsize=(10, 5.6), layout="constrained")
for ax, (name, pattern) in zip(axes.flat, patterns.items()):
    seen = visible(pattern, query)
    light = np.kron(seen.numpy(), np.ones((PIXELS, PIXELS)))[..., None]
    ax.imshow((photo * (0.2 + 0.8 * light)).astype(np.uint8))
    corner = query[1] * PIXELS - 0.5, query[0] * PIXELS - 0.5
    frame = plt.Rectangle(corner, PIXELS, PIXELS, fill=False, edgecolor="white", linewidth=2)
    ax.add_patch(frame)
    ax.set_title(f"{name}\n{int(seen.sum())} of {SIDE**2} keys", fontsize=9)
    ax.axis("off")

# %%
# The token just below the query belongs to another window. Window attention hides it, whatever it shows; the shifted
# partition, the halo and the neighborhood do not, and causal attention does, since it comes later in the row-wise
# order of each axis.

below = (query[0] + 1, query[1])
for name, pattern in patterns.items():
    print(f"{name:30} sees the token below: {bool(visible(pattern, query)[below])}")

# %%
# The number of keys that a query sees is its cost. A neighborhood is shifted inwards at the border of the map, so every
# query sees as many; a halo and a shifted partition are cut off there.

for name, pattern in patterns.items():
    counts = pattern.mask((SIDE, SIDE)).sum(1)
    print(f"{name:30} {int(counts.min()):3d} to {int(counts.max()):3d} keys a query")

# %%
# What this shows, as an assertion:

shows_below = {name for name, pattern in patterns.items() if visible(pattern, query)[below]}
assert shows_below == {"Global()", "Window(7, shift=3)", "Halo(2, 2)", "Neighborhood(7)"}
assert (Neighborhood(7).mask((SIDE, SIDE)).sum(1) == 49).all()
assert Halo(2, 2).mask((SIDE, SIDE)).sum(1).unique().tolist() == [16, 24, 36]
