"""Deletion and insertion of 64 images at 224 px beside Quantus, on the same model, maps, patches and filler.

    python benchmarks/faithfulness.py             # minutes: Quantus is what takes long
    python benchmarks/faithfulness.py --images 8 --size 64

Both sides remove the same patches one by one, most and least relevant first, and read the same probability after each.
Quantus draws no random orders: ours are timed without them, and apart from that as users meet them, with random orders
and intervals at 20 steps. Quote the ratios: seconds differ from machine to machine.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from saccade.explain import faithfulness
from saccade.explain.removal import FILLERS, patch_relevance, rank, removal_curves


def make_model() -> nn.Module:
    """A small convolutional network of stride 16: with a large one both sides would time its forward passes."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def areas(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, patch: int, batch_size: int) -> Tensor:
    """(B, 2): deletion and insertion in the maps' orders, a patch a step."""
    ranks = rank(patch_relevance(maps, patch), torch.Generator().manual_seed(0))[:, None]
    both = torch.cat([ranks, ranks.shape[-1] - 1 - ranks], 1)
    steps = torch.arange(ranks.shape[-1] + 1)
    with torch.inference_mode():
        curves = removal_curves(
            lambda part, owner: model(part).softmax(1).gather(1, target[owner, None])[:, 0],
            images,
            FILLERS["zero"](images),
            both,
            steps,
            patch=patch,
            batch_size=batch_size,
        )
    return torch.trapezoid(curves, (steps / steps[-1]).to(curves))


def quantus_areas(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, patch: int, batch_size: int) -> None:
    """Region perturbation by Quantus, most and least relevant first, over all patches."""
    import quantus

    for order in ("morf", "lerf"):
        metric = quantus.RegionPerturbation(
            patch_size=patch,
            order=order,
            regions_evaluation=(images.shape[-1] // patch) ** 2,
            perturb_baseline=0.0,
            normalise=False,
            disable_warnings=True,
            display_progressbar=False,
        )
        metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=target.numpy(),
            a_batch=maps[:, None].numpy(),
            device="cpu",
            softmax=True,
            batch_size=batch_size,
        )


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = perf_counter()
    run()
    return perf_counter() - start


def main() -> None:
    """Print both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    if args.size % args.patch:
        parser.error(f"--size {args.size} is no multiple of --patch {args.patch}: Quantus cuts no patch at the border")
    torch.manual_seed(0)
    model, side = make_model(), args.size
    images, maps = torch.randn(args.images, 3, side, side), torch.randn(args.images, side, side)
    patches = (side // args.patch) ** 2
    with torch.inference_mode():
        target = torch.cat([model(part).argmax(1) for part in images.split(args.batch_size)])
    areas(model, images[:1], maps[:1], target[:1], args.patch, args.batch_size)  # warm-up

    print(f"{args.images} images of {side} px, {patches} patches, {torch.get_num_threads()} CPU threads")
    ours = seconds(lambda: areas(model, images, maps, target, args.patch, args.batch_size))
    removals = args.images * 2 * (patches - 1)
    with torch.inference_mode():
        part = images[: args.batch_size]
        forward = min(seconds(lambda: model(part)) for _ in range(5)) / len(part)
    print(f"saccade, deletion and insertion: {ours:.1f} s, {1e3 * ours / removals:.2f} ms a removal")
    print(f"the model alone, on the same batch again and again: {1e3 * forward:.2f} ms an image")
    options = {"target": target, "filler": "zero", "patch": args.patch, "batch_size": args.batch_size}
    whole = seconds(lambda: faithfulness(model, images, maps, **options))
    print(f"saccade.faithfulness as it comes, with random orders and intervals: {whole:.1f} s")
    try:
        import quantus
    except ImportError:
        print("Quantus: not installed, not measured (pip install 'saccade[peers]')")
        return
    theirs = seconds(lambda: quantus_areas(model, images, maps, target, args.patch, args.batch_size))
    print(f"Quantus {quantus.__version__}, RegionPerturbation: {theirs:.1f} s, {theirs / ours:.1f}x ours")


if __name__ == "__main__":
    main()
