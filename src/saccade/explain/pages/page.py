"""The page of `saccade explain`, in words: what `examine` found, and what follows from it for whoever looks at it."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from saccade.explain.overlay import colour_scale
from saccade.explain.pages.html import embed_picture, place_on_track, render, write_text

__all__ = ["judge", "write_page"]

_MEASURES = {
    "deletion": ("Deletion", "lower is better", "the probability left while what is marked is hidden first"),
    "insertion": (
        "Insertion",
        "higher is better",
        "the probability reached while what is marked is shown first",
    ),
    "abpc": ("ABPC", "higher is better", "insertion less deletion: 0 is a map that knows nothing"),
}
_ENDS = ("low", "value", "high")
_TAKERS = {
    "bias": "biases",
    "norm": "scales and shifts of norms",
    "weight": "other parameters, such as tokens and positions",
    "buffer": "buffers",
    "constant": "constants",
    "rule": "held back by rules (an epsilon, what a softmax cannot share)",
    "unknown": "operations without a rule",
}
_LEAST = 0.01  # of probability: a smaller gain on random order helps nobody
_LOSS = 0.05  # share of a logit that may go missing without a warning


def write_page(results: Mapping[str, Any], folder: Path) -> Path:
    """Write explanations.html, a page that needs no other file and no network.

    Args:
        results: what `examine` returned, with `command`, `code` (Python that makes the maps again), `created`,
            `versions`, and `model`: name, weights (in words), trained, params, image_size.
        folder: that of the pictures.

    Returns: the path of the page.
    Raises: WorkError if the page cannot be written.
    """
    folder = Path(folder)
    scales = {signed: embed_picture(_png(colour_scale(signed=signed))) for signed in (False, True)}
    page = render("saccade.explain.pages", "page.html.j2", _page(results, folder) | {"scales": scales})
    return write_text(folder / "explanations.html", page)


def judge(tested: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Both tests of a map in plain words: a tag, whether it is good, and a sentence for each test.

    Args:
        tested: a map's entry in what `examine` returned.
        about: its method's entry.
    """
    follows, order = (about["sanity"] or {}).get("verdict"), tested["verdict"]
    if follows == "shuffled weights give the same map":
        tag, good = "do not trust it", False
    elif order == "worse than random" and not _is_tiny(tested):
        tag, good = "worse than chance", False
    elif order != "better than random" or _is_tiny(tested):
        tag, good = "no better than chance", False
    elif follows != "follows the weights":
        tag, good = "one test open", None
    else:
        tag, good = "passes both tests", True
    return {"tag": tag, "good": good, "order": _say_order(tested), "weights": _say_weights(about)}


def _is_tiny(tested: Mapping[str, Any]) -> bool:
    """Told from chance, and of no use: many orders make small differences certain."""
    return abs(tested["abpc"]["difference"]) < _LEAST


def _say_order(tested: Mapping[str, Any]) -> str:
    if _is_tiny(tested):
        return f"Hiding what it marks changes the probability by less than {_LEAST} more than hiding at random."
    return {
        "better than random": "Hiding what it marks lowers the probability sooner than hiding at random: the network "
        "uses these places.",
        "worse than random": "Hiding what it marks lowers the probability later than hiding at random: the network "
        "uses other places.",
    }.get(
        tested["verdict"],
        "Hiding what it marks changes the answer no more than hiding at random: it does not show what the network "
        "uses.",
    )


def _say_weights(about: Mapping[str, Any]) -> str:
    sanity = about["sanity"]
    if sanity is None:
        return f"The test with shuffled weights failed: {about['sanity_failed']}"
    likeness = f"similarity {_number(sanity['value'])}"
    return {
        "shuffled weights give the same map": f"Shuffled weights give the same map ({likeness}): do not trust it.",
        "follows the weights": f"Shuffled weights give another map ({likeness}): it depends on what was learnt.",
    }.get(sanity["verdict"], f"Shuffled weights give a map of which it is open whether it is the same ({likeness}).")


def _page(results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    model, methods = results["model"], results["methods"]
    images = [_image(each, methods, folder) for each in results["images"]]
    return {
        "title": _title(results),
        "model": model,
        "summary": _summary(images, results["left_out"]),
        "facts": _facts(results),
        "images": images,
        "measures": _MEASURES,
        "tests": _tests(results["images"], methods),
        "weights": [(name, _say_weights(about)) for name, about in methods.items()],
        "accounts": [(name, _account(about["account"])) for name, about in methods.items() if about["account"]],
        "reads": [(name, _say_reads(about)) for name, about in methods.items()],
        "left_out": results["left_out"],
        "settings": results["settings"],
        "patch": next(iter(results["images"][0]["maps"].values())),
        "command": results.get("command", ""),
        "code": results.get("code", ""),
        "created": results.get("created", ""),
        "versions": results["versions"],
    }


def _title(results: Mapping[str, Any]) -> str:
    name, images = results["model"]["name"], results["images"]
    if len(images) > 1:
        return f"Where {name} looks on {len(images)} images"
    seen = images[0]["top"][0]
    return f"{name} takes {Path(images[0]['image']).name} for “{seen['class']}” ({_percent(seen['probability'])})"


def _summary(images: Sequence[Mapping[str, Any]], left_out: Sequence[Mapping[str, str]]) -> list[str]:
    """Which maps to believe, over all images."""
    by_tag: dict[str, list[str]] = {}
    for image in images:
        for each in image["maps"]:
            by_tag.setdefault(each["tag"], []).append(each["method"])
    lines = []
    for tag, words in {
        "passes both tests": "Believe {}: hiding what is marked lowers the probability sooner than hiding at random, "
        "and with other weights the map is another.",
        "one test open": "{}: better than chance, but the test with shuffled weights did not decide.",
        "no better than chance": "{}: hiding what is marked tells no more than hiding at random, so it does not show "
        "what the network uses.",
        "worse than chance": "{}: points away from what the network uses.",
        "do not trust it": "Do not trust {}: shuffled weights give the same map.",
    }.items():
        if tag in by_tag:
            lines.append(words.format(_counted(by_tag[tag], len(images))))
    return lines + [f"{each['method']} could not be used. {each['reason']}" for each in left_out]


def _counted(methods: Sequence[str], images: int) -> str:
    counts = {method: methods.count(method) for method in methods}
    return ", ".join(
        method if count == images else f"{method} (on {count} of {images} images)" for method, count in counts.items()
    )


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = results["model"]
    return [
        ("Network", model["name"]),
        ("Weights", model["weights"]),
        ("Parameters", f"{model['params']:,}".replace(",", "\u202f")),
        ("Images", f"{model['image_size']} pixels a side"),
        ("Device", results["device"]),
        ("Took", f"{results['seconds']:.0f} s"),
    ]


def _image(image: Mapping[str, Any], methods: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    maps = [
        {
            "method": name,
            "picture": _picture(folder, each["overlay"]),
            "signed": each["signed"],
            "full": f"{each['full']:.2g}",
            "sentence": each["sentence"],
            **judge(each, methods[name]),
        }
        for name, each in image["maps"].items()
    ]
    contrast = image["contrast"]
    return {
        "name": Path(image["image"]).name,
        "input": _picture(folder, image["input"]),
        "top": [
            {**each, "percent": _percent(each["probability"]), "width": round(100 * each["probability"], 1)}
            for each in image["top"]
        ],
        "explained": image["explained"],
        "probability": _percent(image["probability"]),
        "is_top": image["label"] == image["top"][0]["label"],
        "maps": maps,
        "contrast": contrast
        and {
            **contrast,
            "picture": _picture(folder, contrast["overlay"]),
            "full": f"{contrast['full']:.2g}",
            "percent": _percent(contrast["probability"]),
        },
    }


def _tests(images: Sequence[Mapping[str, Any]], methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each image and method: own figure and random order's, each as words and on a scale of all rows."""
    rows = []
    every = {
        key: [
            each[key][f"{side}{end}"]
            for image in images
            for each in image["maps"].values()
            for side, ends in (("", _ENDS), ("random_", ("low", "high")))
            for end in ends
        ]
        for key in _MEASURES
    }
    for image in images:
        for name, each in image["maps"].items():
            cells = []
            for key in _MEASURES:
                score = each[key]
                own = [score[end] for end in _ENDS]
                chance = [score["random_low"], score["random"], score["random_high"]]
                cells.append(
                    {
                        "tracks": [place_on_track(own, every[key]), place_on_track(chance, every[key])],
                        "text": f"{_number(score['value'])}, random {_number(score['random'])}",
                        "range": f"difference {_number(score['difference_low'])} to "
                        f"{_number(score['difference_high'])}",
                    }
                )
            rows.append(
                {"image": Path(image["image"]).name, "method": name, "cells": cells, **judge(each, methods[name])}
            )
    return rows


def _account(account: Mapping[str, Any]) -> dict[str, Any]:
    """Where a logit went, as a table that adds up."""
    start = account["start"]

    def row(words: str, amount: float) -> tuple[str, str, str]:
        return words, f"{amount:.3g}".replace("-", "−"), _percent(amount / start) if start else "–"

    kinds = sorted(account["kinds"].items(), key=lambda each: -abs(each[1]))
    warnings = []
    if account["conservation_error"] > _LOSS:
        warnings.append(
            f"{_percent(account['conservation_error'])} of the logit was lost on the way: take the order of the places "
            "from this map, not its amounts."
        )
    unknown = [f"{op} ({_percent(share)} of the relevance went through)" for op, share in account["unknown"].items()]
    if unknown:
        warnings.append(f"Without a rule of their own: {', '.join(unknown)}.")
    return {
        "rows": [
            row("the pixels, which is the map", account["pixels"]),
            *(row(_TAKERS.get(kind, kind), amount) for kind, amount in kinds),
        ],
        "total": row("the explained logit", start),
        "largest": [(layer or "the model itself", row("", amount)[1]) for layer, amount in account["largest"].items()],
        "warnings": warnings,
        "recipe": account["recipe"],
        "operations": account["operations"],
        "covered": not unknown,
    }


def _say_reads(about: Mapping[str, Any]) -> str:
    """Which layers were read, and what of that nobody had said."""
    layers = about["layers"]
    if not layers:
        return "reads no layer: it goes from the logit to the pixels"
    first, last = layers[0], layers[-1]
    rest = sorted({part for layer in layers for part in layer["inferred"]})
    found = f" ({', '.join(rest)} inferred)" if rest else ""
    if len(layers) == 1:
        return f"reads {_say_layer(first)}{found}"
    return f"reads {len(layers)} layers, from {_say_layer(first)} to {_say_layer(last)}{found}"


def _say_layer(layer: Mapping[str, Any]) -> str:
    prefix, (rows, columns) = layer["prefix"], layer["grid"]
    before = f" after {prefix} prefix token{'s' * (prefix > 1)}" if prefix else ""
    return f"{layer['name']}, {rows} × {columns} {layer['layout']}{before}"


def _picture(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        return embed_picture((folder / name).read_bytes())
    except OSError:
        return None


def _png(pixels: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %".replace("-", "−") if abs(value) >= 0.01 or value == 0 else f"{100 * value:.1g} %"
