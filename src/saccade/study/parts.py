"""The parts of a study that follow training: what a network costs, where it looks, and how far to believe that."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.data import ImageData, normalize
from saccade.errors import InputError
from saccade.explain import explain, save_overlay
from saccade.explain.faithfulness import compare_faithfulness
from saccade.explain.overlay import enlarge_pixels
from saccade.measure import (
    count_bytes,
    count_flops,
    count_parameters,
    measure_peak_memory,
    measure_scaling,
    measure_time,
)
from saccade.study.settings import StudySettings
from saccade.training.checkpoint import make_folder, write_whole

__all__ = ["explain_part", "measure_part", "scaling_sides"]

FAITHFUL = "integrated_gradients"  # the method by which mixers are compared: it needs no layer, and states its error
PICTURES = ("attention_rollout", FAITHFUL, "relevance")


def measure_part(model: nn.Module, image_size: int, batch_size: int) -> dict[str, Any]:
    """What a network costs on the device on which it is.

    Returns: params; flops, bytes and latency of one image; throughput and the peak memory of a training step for a
        batch; and how FLOPs and time grow with the side of the image, or `unscaled`, the reason why not.
    """
    image = torch.randn(1, 3, image_size, image_size)
    batch = torch.randn(batch_size, 3, image_size, image_size)
    with torch.no_grad():
        latency = measure_time(lambda: model(image), repeats=30)
        whole = measure_time(lambda: model(batch), repeats=5, warmup=1, min_seconds=0.05)

    def step() -> None:
        torch.autograd.grad(model(batch).float().logsumexp(-1).sum(), list(model.parameters()), allow_unused=True)

    return {
        "params": count_parameters(model),
        "flops": count_flops(model, image).total,
        "bytes": count_bytes(model, image),
        "latency_ms": {name: 1e3 * getattr(latency, name) for name in ("median", "low", "high")} | {"batch": 1},
        "throughput": whole.throughput(batch_size),
        "peak_memory_mib": measure_peak_memory(step).bytes / 2**20,
        **_growth(model, scaling_sides(image_size)),
    }


def _growth(model: nn.Module, sides: tuple[int, ...]) -> dict[str, Any]:
    try:
        scaling = measure_scaling(model, sides)
    except InputError as error:  # a network may refuse images of other sizes than the study's
        return {"unscaled": str(error)}
    return {
        "scaling": {
            "sides": list(sides),
            "flops": list(scaling.flops),
            "milliseconds": [1e3 * seconds for seconds in scaling.seconds],
            "flops_exponent": vars(scaling.flops_exponent),
            "time_exponent": vars(scaling.time_exponent),
        }
    }


def explain_part(model: nn.Module, data: ImageData, folder: Path, name: str, settings: StudySettings) -> dict[str, Any]:
    """Where a network looks: pictures of a few held-out images, and the faithfulness of the maps on more of them.

    Returns: gallery and faithfulness, as in results.json, and `unpictured`: the reason for each method that cannot
        serve the network. Pictures go to gallery/NAME in `folder`.
    """
    chosen = spread_over_classes(data.val.labels, settings.pictured)
    pixels = torch.stack([data.val[i][0] for i in chosen])
    images = normalize(pixels, data.mean, data.std)
    with torch.no_grad():
        probability, predicted = model(images).softmax(-1).max(-1)
    maps, unpictured = {}, {}
    for method in PICTURES:
        try:
            maps[method] = explain(model, images, method=method, batch_size=8).map
        except InputError as error:
            unpictured[method] = str(error)
    gallery = []
    for row, index in enumerate(chosen):
        place = f"gallery/{name}/{row:02d}"
        shown = enlarge_pixels(pixels[row])
        save_picture(folder / f"{place}_input.png", shown)
        overlays = {}
        for method in maps:
            overlays[method] = f"{place}_{method}.png"
            save_overlay(folder / overlays[method], shown, enlarge_pixels(maps[method][row : row + 1])[0])
        gallery.append(
            {
                "image": f"{place}_input.png",
                "overlays": overlays,
                "label": data.classes[int(data.val.labels[index])],
                "predicted": data.classes[int(predicted[row])],
                "probability": float(probability[row]),
            }
        )
    tested = [method for method in PICTURES if method not in unpictured]
    found = {"gallery": gallery, "faithfulness": _faithfulness(model, data, settings.explained, tested)}
    return {**found, "unpictured": unpictured} if unpictured else found


def spread_over_classes(labels: Tensor, count: int) -> list[int]:
    """Choose images in turn from each class, first ones first, so that few images show many classes.

    >>> spread_over_classes(torch.tensor([0, 0, 0, 1, 1, 2]), 4)
    [0, 1, 3, 5]
    """
    places = [torch.nonzero(labels == label).flatten().tolist() for label in labels.unique()]
    turns = [place for turn in range(max(map(len, places))) for places_ in places for place in places_[turn : turn + 1]]
    return sorted(turns[:count])


def save_picture(path: Path, pixels: Tensor) -> None:
    """Write (3, H, W) uint8 as a picture."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(encoded, path.suffix.removeprefix("."))
    make_folder(path.parent)
    write_whole(path, encoded.getvalue())


def _faithfulness(model: nn.Module, data: ImageData, count: int, methods: Sequence[str]) -> dict[str, Any]:
    chosen = spread_over_classes(data.val.labels, count)
    images = normalize(torch.stack([data.val[i][0] for i in chosen]), data.mean, data.std)
    options: dict[str, dict[str, Any]] = {FAITHFUL: {"steps": 20}}
    maps = {method: explain(model, images, method=method, **options.get(method, {})) for method in methods}
    found = compare_faithfulness(model, images, maps, steps=10)
    scores = {name: vars(getattr(found[FAITHFUL], name)) for name in ("deletion", "insertion", "abpc")}
    others = {
        method: {"abpc": vars(found[method].abpc), "verdict": found[method].verdict}
        for method in methods
        if method != FAITHFUL
    }
    return {"method": FAITHFUL, "images": len(chosen), **scores, "verdict": found[FAITHFUL].verdict, "others": others}


def scaling_sides(image_size: int) -> tuple[int, ...]:
    """Image sides for the growth of cost: from the study's own, below which a window may not fit the map, up to where a
    global mixer still ends soon.

    >>> scaling_sides(32)
    (32, 48, 64, 96, 128)
    """
    factors = (1, 1.5, 2, 3, 4) if image_size <= 96 else (1, 1.25, 1.5, 1.75, 2)
    least = 16 * -(-image_size // 16)
    return tuple(int(least * factor) for factor in factors)
