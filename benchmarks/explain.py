"""Relevance beside a gradient pass, and beside zennit where it is installed.

    python benchmarks/explain.py                 # three minutes on two CPU cores
    python benchmarks/explain.py --only resnet18

A gradient pass is forward and the gradient with respect to the images. Quote the ratios: seconds differ from machine to
machine, and between runs of the same machine. Networks have random weights and the published sizes. Zennit runs without
canonizers: it gives each branch of a residual sum the whole relevance, so that maps agree on chains of layers only.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from peers import without_torchvision
from torch import Tensor, nn

from saccade.explain.relevance import relevance

GOALS = {"vgg16": 1.5, "resnet18": 2.0, "vit_s": 2.5}


def vgg16() -> nn.Module:
    """Simonyan and Zisserman's network of 16 layers."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(512 * 49, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *head, nn.Linear(4096, 1000))


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.down = nn.Sequential()
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return F.relu(y, inplace=True)


def resnet18() -> nn.Module:
    """He and others' network of 18 layers."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks, channels = [], 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Residual(channels, width, stride), Residual(width, width, 1)]
        channels = width
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Block(nn.Module):
    """Attention with torch's fused kernel, and an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """ViT-S/16: patches, a class token, 12 blocks of 6 heads x 64."""

    def __init__(self, dim: int = 384, depth: int = 12, heads: int = 6) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 197, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        out: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return out


NETWORKS: dict[str, Callable[[], nn.Module]] = {"vgg16": vgg16, "resnet18": resnet18, "vit_s": VisionTransformer}


def gradient_pass(model: nn.Module, images: Tensor) -> Tensor:
    """Gradient of the largest logits with respect to the images."""
    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x * 1).amax(1).sum(), x)  # a leaf may not change in place
    return slope


def zennit_pass(model: nn.Module, images: Tensor) -> Tensor:
    """EpsilonPlus of zennit; batch norms are passed, as our recipe of that name does."""
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus

    with Gradient(model=model, composite=EpsilonPlus()) as attribute:
        _, found = attribute(images.clone(), lambda out: out * F.one_hot(out.argmax(1), out.shape[1]))
    return found


def stopwatch(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of activations that autograd saves for a gradient pass, parameters left out."""
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images.clone().requires_grad_() * 1)
    total = sum(kept.values())
    del out
    return total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument("--recipes", nargs="*", default=["epsilon", "epsilon_plus"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    without_torchvision()
    print(f"batch 2 at 224 px, float32, {torch.get_num_threads()} CPU threads; goals are of recipe epsilon")
    if not (peer := find_spec("zennit") is not None):
        print("zennit's EpsilonPlus is not measured: it is not installed (pip install saccade[peers])")
    for name in [args.only] if args.only else NETWORKS:
        compare(name, args.recipes, args.repeats, peer)


def compare(name: str, recipes: list[str], repeats: int, peer: bool) -> None:
    """Print the rows of one network."""
    torch.manual_seed(0)
    model, images = NETWORKS[name]().eval(), torch.randn(2, 3, 224, 224)
    gradient_pass(model, images)
    runs: dict[str, Callable[[], object]] = {"gradient": partial(gradient_pass, model, images)}
    runs |= {recipe: partial(relevance, model, images, recipe=recipe) for recipe in recipes}
    if peer:
        runs["zennit EpsilonPlus"] = partial(zennit_pass, model, images)
    seconds: dict[str, list[float]] = {each: [] for each in runs}
    for _ in range(repeats):  # in turn, so that a busy machine hurts all alike
        for each, run in runs.items():
            seconds[each].append(stopwatch(run))
    best = {each: min(found) for each, found in seconds.items()}
    kept = relevance(model, images, recipe="epsilon").bytes / saved_bytes(model, images)
    print(f"{name}: gradient pass {1e3 * best['gradient']:.0f} ms; the tape keeps {kept:.2f}x its activations")
    for each in list(runs)[1:]:
        goal = f" (goal {GOALS[name]}x)" if each == "epsilon" else ""
        print(f"  {each}: {best[each] / best['gradient']:.2f}x{goal}")
    if peer:
        theirs, ours = zennit_pass(model, images), relevance(model, images, recipe="epsilon_plus").map
        apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        print(f"  its map differs from ours of recipe epsilon_plus by {apart:.1e} of its largest value")
        sums = ", ".join(f"{each.sum():.3g}" for each in (model(images).amax(1), ours, theirs))
        print(f"  sum of the explained logits, of our maps, of its maps: {sums}")


if __name__ == "__main__":
    main()
