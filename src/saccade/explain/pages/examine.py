"""Photos explained by several methods, and each map tested: everything that the page shows, as plain values."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import InputError, WorkError
from saccade.explain.attribute import Explanation, explain, read_method
from saccade.explain.classifier import evaluating
from saccade.explain.faithfulness import compare_faithfulness
from saccade.explain.overlay import enlarge_pixels, full_colour, save_overlay, write_picture
from saccade.explain.pages.progress import Progress, Silent
from saccade.explain.sanity import parameter_randomization
from saccade.explain.verbalization import AREAS, Wording, verbalize_map

__all__ = ["Effort", "examine"]

DEFAULTS = ("integrated_gradients", "relevance", "attention_rollout", "normgrad")
"""Methods where none is named: two that share the logit out over pixels, two that read layers; none needs a name."""
_TOP = 5  # classes named
_BLIND = ("attention_flow", "attention_rollout", "random")  # know no class, so cannot tell one from another


@dataclass(frozen=True)
class Effort:
    """How much is computed.

    Attributes:
        steps, repeats: of `faithfulness`, which costs 2 (repeats + methods)(steps - 1) forward passes an image.
        options: of methods, by name.
    """

    steps: int = 20
    repeats: int = 32
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def for_size(cls, side: int) -> "Effort":
        """For images of `side` pixels: from 129 on a coarser curve, so that a full network ends in minutes on a CPU."""
        return cls() if side <= 128 else cls(steps=4, repeats=20, options={"integrated_gradients": {"steps": 10}})


def examine(
    model: nn.Module,
    pixels: Sequence[Tensor],
    images: Tensor,
    folder: Path,
    *,
    names: Sequence[str],
    classes: Sequence[str],
    methods: Sequence[str] | None = None,
    target: int | None = None,
    against: int | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Explain images by several methods, test each map, and leave the pictures in a folder.

    Args:
        model: as in `explain`.
        pixels: images (3, H, W) uint8, as they are shown.
        images: (B, 3, H, W), the same as the model takes them.
        folder: where the pictures go.
        names: of the images.
        classes: of the logits.
        methods: names; None takes those of `DEFAULTS` that the model can serve.
        target: class that is explained; None explains the predicted one of each image.
        against: class it is held against; None takes the one that comes next.
        effort: how much to compute; None takes what fits the images' size.
        progress: told what runs.

    Returns: plain values, with paths of pictures relative to `folder`; `write_page` shows them. A method that cannot
        serve the model, or whose map is NaN, stands in `left_out` with the reason.
    Raises: InputError for wrong images, target or methods, and where no method serves the model.
    """
    start = time.perf_counter()
    wanted = tuple(dict.fromkeys(read_method(name) for name in (DEFAULTS if methods is None else methods)))
    effort = effort or Effort.for_size(min(images.shape[-2:]))
    told = progress or Silent()
    told.start(len(wanted) * (2 + len(images)) + 1)
    question = explain(model, images, method="random", target=target)  # checks the call
    explained = question.target
    probability, others = _predict(model, images, explained)
    if probability.shape[1] != len(classes):
        raise InputError(f"there are {len(classes)} class names but the model knows {probability.shape[1]}: give all")

    found: dict[str, Explanation] = {}
    left_out = []
    for method in wanted:
        told.show(f"{method}: the map", "")
        try:
            options = effort.options.get(method, {})
            found[method] = explain(model, images, method=method, target=explained, batch_size=8, **options)
        except (InputError, WorkError) as error:
            left_out.append({"method": method, "reason": str(error)})
            told.advance(1 + len(images))
        told.advance(1)
    if not found:
        raise InputError(f"no method serves this model. {left_out[0]['method']}: {left_out[0]['reason']}")
    rows = []
    for i, name in enumerate(names):
        told.show(f"{name}: hiding what the maps mark", "")
        rows.append(_test_image(model, images, i, found, effort))
        told.advance(len(found))
    about = {}
    for method, each in found.items():
        told.show(f"{method}: with shuffled weights", "")
        about[method] = _describe(model, images, each, effort)
        told.advance(1)
    told.show("why this class and not that", "")
    contrasts = _contrast(model, images, explained, others, against, found, effort)
    told.advance(1)
    return {
        "settings": {"steps": effort.steps, "repeats": effort.repeats},
        "device": str(images.device),
        "methods": about,
        "left_out": left_out,
        "images": [
            _picture(
                folder, i, names[i], pixels[i], probability[i], int(explained[i]), classes, rows[i], found, contrasts
            )
            for i in range(len(images))
        ],
        "seconds": time.perf_counter() - start,
    }


def _predict(model: nn.Module, images: Tensor, explained: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (B, classes), and of each image the class that comes next to the explained one."""
    with evaluating(model, grad=False) as classify:
        logits = torch.cat([classify(part) for part in images.split(8)])
    rivals = logits.scatter(1, explained[:, None], -torch.inf)
    return logits.double().softmax(1).cpu(), rivals.argmax(1)


def _test_image(
    model: nn.Module, images: Tensor, i: int, found: Mapping[str, Explanation], effort: Effort
) -> dict[str, dict[str, Any]]:
    maps: dict[str, Explanation | Tensor] = {method: each.map[i : i + 1] for method, each in found.items()}
    target = int(next(iter(found.values())).target[i])
    tested = compare_faithfulness(
        model, images[i : i + 1], maps, target=target, steps=effort.steps, repeats=effort.repeats
    )
    return {
        method: {
            **{name: asdict(getattr(each, name)) for name in ("deletion", "insertion", "abpc")},
            "verdict": each.verdict,
            "patch": each.patch,
            "filler": each.filler,
        }
        for method, each in tested.items()
    }


def _describe(model: nn.Module, images: Tensor, found: Explanation, effort: Effort) -> dict[str, Any]:
    """What holds for a method on all images: what it read, its account, and how its maps fare with other weights."""
    options = dict(effort.options.get(found.method, {}))
    about: dict[str, Any] = {
        "seconds": found.seconds,
        "options": options,
        "layer": found.layer,
        "layers": [layer._asdict() for layer in found.detail.layers],
        "signed": bool((found.map < 0).any()),
        "account": _account(found),
        "sanity": None,
        "sanity_failed": None,
    }
    try:
        shuffled = parameter_randomization(
            model, images, method=found.method, target=found.target, explanation=found, batch_size=8, **options
        )
        about["sanity"] = {**asdict(shuffled.similarity[-1]), "verdict": shuffled.verdict, "same": shuffled.same}
    except (InputError, WorkError) as error:
        about["sanity_failed"] = str(error)
    return about


def _account(found: Explanation) -> dict[str, Any] | None:
    """Where the logits went, by kind of taker."""
    account = found.detail.account
    if account is None:
        return None
    kinds: dict[str, float] = {}
    for each in account.absorbed:
        kinds[each.kind] = kinds.get(each.kind, 0.0) + each.amount
    layers = {layer: sum(row.values()) for layer, row in account.by_layer().items()}
    largest = sorted(layers, key=lambda layer: -abs(layers[layer]))[:_TOP]
    return {
        "start": account.start.sum().item(),
        "pixels": account.map.sum().item(),
        "kinds": kinds,
        "largest": {layer: layers[layer] for layer in largest},
        "unknown": account.unknown,
        "conservation_error": account.conservation_error,
        "recipe": account.recipe,
        "operations": sum(each.count for each in account.served),
    }


def _contrast(
    model: nn.Module,
    images: Tensor,
    explained: Tensor,
    others: Tensor,
    against: int | None,
    found: Mapping[str, Explanation],
    effort: Effort,
) -> Explanation | None:
    """Why the explained class and not the other, by the first method that knows classes and has a sign."""
    able = [method for method in found if method not in _BLIND and bool((found[method].map < 0).any())]
    if not able or bool((others == explained).any()):  # of a single class
        return None
    method = "relevance" if "relevance" in able else able[0]
    rivals: Tensor | int = others if against is None else against
    options = effort.options.get(method, {})
    return explain(model, images, method=method, target=explained, against=rivals, batch_size=8, **options)


def _picture(
    folder: Path,
    i: int,
    name: str,
    pixels: Tensor,
    probability: Tensor,
    explained: int,
    classes: Sequence[str],
    tested: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Explanation],
    contrast: Explanation | None,
) -> dict[str, Any]:
    """One image's part of the page; its pictures are written."""
    place, shown = f"{i:02d}_{Path(name).stem}", enlarge_pixels(pixels)

    def draw(word: str, map: Tensor, signed: bool) -> dict[str, Any]:
        picture = f"{place}_{word}.png"
        save_overlay(folder / picture, shown, enlarge_pixels(map[None])[0], signed=signed)
        return {"overlay": picture, "full": full_colour(map, signed=signed), "signed": signed}

    write_picture(folder / f"{place}_input.png", shown)
    maps = {}
    for method, each in found.items():
        drawn = draw(method, each.map[i], bool((each.map < 0).any()))
        wording = _wording(classes[explained] if drawn["signed"] else None)
        maps[method] = {**drawn, **tested[method], "sentence": verbalize_map(each.map[i], wording=wording).text}
    top = probability.topk(min(_TOP, len(classes)))
    row: dict[str, Any] = {
        "image": name,
        "input": f"{place}_input.png",
        "top": [
            {"label": int(label), "class": classes[int(label)], "probability": float(value)}
            for value, label in zip(top.values, top.indices)
        ],
        "label": explained,
        "explained": classes[explained],
        "probability": float(probability[explained]),
        "maps": maps,
        "contrast": None,
    }
    if contrast is not None and contrast.against is not None:
        rival = int(contrast.against[i])
        both = {"for": contrast.map[i], "against": -contrast.map[i]}
        row["contrast"] = {
            **draw("contrast", contrast.map[i], True),
            "method": contrast.method,
            "label": rival,
            "class": classes[rival],
            "probability": float(probability[rival]),
            **{side: _where(map) for side, map in both.items()},
        }
    return row


def _where(map: Tensor) -> str:
    """Names of the parts that stand out, or ""."""
    spans = verbalize_map(map).spans
    return "; ".join(f"{', '.join(span.names)} ({span.percent:.0f} %)" for span in spans)


def _wording(spoken_for: str | None) -> Wording:
    """What a map says of itself; whether that is so is another sentence's matter."""
    whole = "of the map" if spoken_for is None else f"of what speaks for “{spoken_for}”"
    whole = whole.replace("{", "{{").replace("}", "}}")  # a class may have any name
    first, further = "It marks above all: {quote}, with {percent} % " + whole + ".", "Then: {quote}, with {percent} %."
    return AREAS._replace(first=first, further=further, nothing="It marks no area above others.", decimals=0)
