"""
Where does a token look?
========================

`saccade.tap` records the attention maps of every mixer that runs inside a ``with``, without editing the model and
without turning fused kernels off. This example watches one network before and after a short training on photos of
brick, grass and gravel, on a picture that is brick on the left and grass on the right.
"""

# %%
# The textures are patches of scikit-image's photos; training and validation patches share no pixel.

import tempfile

import matplotlib.pyplot as plt
import torch

import saccade
from saccade.data import load_images, normalize
from saccade.training import TrainSettings, fit

data = load_images("textures", image_size=48)


def strongest(label):
    """The held-out patch of a class that has the most contrast."""
    patches = [data.val[int(i)][0] for i in (data.val.labels == label).nonzero()]
    return max(patches, key=lambda patch: patch.float().std())


brick, grass = strongest(0), strongest(1)
picture = torch.cat([brick[:, :, :24], grass[:, :, 24:]], dim=2)
image = normalize(picture[None], data.mean, data.std)

# %%
# One network, watched before and after. Rows of a map are queries, columns are keys: entry (n, m) is the share of token
# m in what token n takes over. The last mixer works on 6 x 6 tokens.


def watch(model):
    """Module name -> (heads, N, M) for the picture."""
    with torch.no_grad(), saccade.tap(model.eval(), kinds=("attention",)) as seen:
        model(image)
    return {name: attention[0] for name, attention in seen.attention.items()}


torch.manual_seed(0)
model = saccade.create_model("study_xxs", num_classes=len(data.classes), mixer="attention")
before = watch(model)
settings = TrainSettings(epochs=3, learning_rate=3e-3, warmup_epochs=1, augment="none")
with tempfile.TemporaryDirectory() as folder:
    result = fit(model, data, settings, folder)
after = watch(model)
print(f"{100 * result.accuracy:.0f} % of {len(data.val)} held-out patches are right")
for name, attention in after.items():
    print(name, tuple(attention.shape))

# %%
# What one brick token and one grass token look at, in the last mixer, averaged over its heads. The colour says how much
# more than the average token one gets; the query is framed. Before training every token gets about the same: a map of
# an untrained network shows its mechanism and nothing of the picture.

last = "stages.1.blocks.1.mixer"
side = 6


def draw(ax, attention, query, title):
    """One row of a map, as colour over the picture."""
    row = attention.mean(0)[query[0] * side + query[1]].view(side, side)
    edges = (-0.5, side - 0.5, side - 0.5, -0.5)
    ax.imshow(picture.permute(1, 2, 0).numpy(), extent=edges)
    colours = ax.imshow(row.numpy() * side**2, cmap="viridis", vmin=0, vmax=4, alpha=0.6)
    corner = query[1] - 0.5, query[0] - 0.5
    ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="white", linewidth=2))
    ax.set_title(title, fontsize=9)
    return colours


figure, axes = plt.subplots(1, 5, figsize=(11, 2.4), layout="constrained")
axes[0].imshow(picture.permute(1, 2, 0).numpy())
axes[0].set_title("brick | grass", fontsize=9)
draw(axes[1], before[last], (2, 1), "a brick token, untrained")
draw(axes[2], after[last], (2, 1), "a brick token, trained")
draw(axes[3], before[last], (2, 4), "a grass token, untrained")
colours = draw(axes[4], after[last], (2, 4), "a grass token, trained")
figure.colorbar(colours, ax=axes, label="times the average", extend="max")
for ax in axes:
    ax.axis("off")

# %%
# In figures: the number of tokens that a query looks at in effect, the exponential of the entropy of its row. It is the
# number of all tokens where attention is even, and 1 where a single token gets all.


def tokens_in_effect(attention):
    """Mean over queries and heads of exp(entropy), for maps (heads, N, M)."""
    return (-attention.xlogy(attention).sum(-1)).exp().mean().item()


for name in after:
    early, late = tokens_in_effect(before[name]), tokens_in_effect(after[name])
    print(f"{name}: {early:.1f} of {after[name].shape[-1]} before, {late:.1f} after training")

# %%
# What this shows, as an assertion: watching leaves the result as it is, rows of a map sum to 1, and only training made
# attention choose. Whether the network's *answer* rests on the chosen tokens is another question: see
# :doc:`plot_explain_and_faithfulness`.

with torch.no_grad():
    plain = model(image)
    with saccade.tap(model) as seen:
        watched = model(image)
assert torch.equal(plain, watched)
for attention in after.values():
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
assert tokens_in_effect(before[last]) > 0.95 * side**2
assert tokens_in_effect(after[last]) < 0.85 * side**2
