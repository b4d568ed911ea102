"""
Can I trust the picture?
========================

A heatmap always looks like an answer. This example trains a small network on handwritten digits for a few seconds,
explains its answers, and holds the maps against the only judge at hand: if the marked pixels are hidden first, the
answer must fall faster than when pixels are hidden in random order.
"""

# %%
# The digits are scikit-learn's: 1797 of 8 x 8 pixels, enlarged. `fit` trains as ``saccade train`` does.

import tempfile

import matplotlib.pyplot as plt
import torch

import saccade
from saccade.data import load_images, normalize
from saccade.explain import overlay
from saccade.training import TrainSettings, fit

data = load_images("digits")
torch.manual_seed(0)
model = saccade.create_model("study_xxs", num_classes=len(data.classes), mixer="window")
settings = TrainSettings(epochs=5, learning_rate=3e-3, warmup_epochs=1, augment="none")
with tempfile.TemporaryDirectory() as folder:
    result = fit(model, data, settings, folder)
print(f"{100 * result.accuracy:.1f} % of {len(data.val)} held-out digits are right")

# %%
# One held-out image of each digit. Three methods say which pixels the predicted class rests on; the fourth draws random
# maps, as a control that every measurement should see through.

first = [int((data.val.labels == digit).nonzero()[0]) for digit in range(10)]
pixels = torch.stack([data.val[index][0] for index in first])
images = normalize(pixels, data.mean, data.std)
methods = ("integrated_gradients", "occlusion", "attention_rollout", "random")
found = {method: saccade.explain(model, images, method=method) for method in methods}

figure, axes = plt.subplots(len(methods) + 1, 10, figsize=(10, 5.4), layout="constrained")
for digit in range(10):
    axes[0, digit].imshow(pixels[digit].permute(1, 2, 0).numpy())
    for row, method in enumerate(methods, 1):
        picture = overlay(pixels[digit], found[method].map[digit])
        axes[row, digit].imshow(picture.permute(1, 2, 0).numpy())
for ax, label in zip(axes[:, 0], ("image", *methods)):
    ax.set_ylabel(label.replace("_", "\n"), fontsize=8)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])

# %%
# `faithfulness` hides the image step by step, the most relevant squares first, and watches the probability of the
# explained class; then the least relevant first; then in random order. The area between the first two curves (ABPC) is
# 0 for a map that knows nothing. Intervals are over images.

scores = {method: saccade.faithfulness(model, images, found[method]) for method in methods}
for method, score in scores.items():
    interval = f"({score.abpc.low:5.2f} to {score.abpc.high:5.2f})"
    print(f"{method:21} ABPC {score.abpc.value:5.2f} {interval}  {score.verdict}")

figure, axes = plt.subplots(1, len(methods), figsize=(10, 2.8), layout="constrained", sharey=True)
for ax, (method, score) in zip(axes, scores.items()):
    hidden = score.fractions.numpy()
    ax.plot(hidden, score.deletion_curves.mean(0).numpy(), label="the map's order")
    ax.plot(hidden, score.random_curves.mean(0).numpy(), "--", label="random order")
    ax.set(title=method.replace("_", " "), xlabel="share of the image hidden")
axes[0].set_ylabel("probability of the class")
axes[0].legend(frameon=False)

# %%
# The verdict holds for this network, these images and this way of hiding; another network may use other pixels. That
# is why ``saccade study`` measures it again for each network that it trains.
#
# What this shows, as an assertion: the map of integrated gradients finds what the network uses, a random map does not.

assert scores["integrated_gradients"].verdict == "better than random"
assert abs(scores["random"].abpc.value) < 0.1
assert scores["integrated_gradients"].abpc.low > scores["random"].abpc.high
