"""`saccade explain`: where a trained network looks on photos, and whether to believe it."""

import json
from typing import Any

from saccade.cli.shared import add_json, emit, emit_table

EXAMPLE = "saccade explain photo.jpg --model study-digits/checkpoints/window.safetensors"


def arguments(parser: Any) -> None:
    parser.add_argument("images", nargs="+", type=str, help="image files")
    parser.add_argument("--model", type=str, required=True, help="a checkpoint of `saccade study` or `train`")
    parser.add_argument(
        "--method", type=str, default="integrated_gradients,attention_rollout", help="with commas between"
    )
    parser.add_argument(
        "--target",
        type=str | None,
        default=None,
        help="class to explain; by default the predicted one",
    )
    parser.add_argument("--out", type=str, default="explanations", help="folder for the overlay pictures")
    add_json(parser)


def run(args: Any) -> int:
    from pathlib import Path

    import torch

    from saccade.backbones import load_model
    from saccade.data import normalize, read_image
    from saccade.errors import check_choice
    from saccade.explain import explain, faithfulness, list_methods, save_overlay
    from saccade.training.checkpoint import make_folder

    methods = [method.strip() for method in args.method.split(",")]
    for method in methods:
        check_choice("method", method, list_methods())
    model, config = load_model(args.model)
    target = _read_target(args.target, config["classes"])
    pixels = [read_image(path, size=config["image_size"]) for path in args.images]
    make_folder(Path(args.out))
    images = normalize(torch.stack(pixels), config["mean"], config["std"])
    with torch.no_grad():
        probability, predicted = model(images).softmax(-1).max(-1)
    rows = []
    for method in methods:
        found = explain(model, images, method=method, target=target)
        for i, path in enumerate(args.images):
            picture = Path(args.out) / f"{i:02d}_{Path(path).stem}_{method}.png"
            save_overlay(picture, pixels[i], found.map[i])
            score = faithfulness(model, images[i : i + 1], found.map[i : i + 1], target=int(found.target[i]))
            rows.append(
                {
                    "image": path,
                    "predicted": config["classes"][int(predicted[i])],
                    "probability": float(probability[i]),
                    "explained": config["classes"][int(found.target[i])],
                    "method": method,
                    "deletion": vars(score.deletion),
                    "insertion": vars(score.insertion),
                    "abpc": vars(score.abpc),
                    "verdict": score.verdict,
                    "overlay": str(picture),
                }
            )
    if args.json:
        emit(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
    return 0


def _read_target(target: str | None, classes: list[str]) -> int | None:
    from saccade.errors import InputError, nearest

    if target is None:
        return None
    if target in classes:
        return classes.index(target)
    if target.isdecimal() and int(target) < len(classes):
        return int(target)
    raise InputError(f"target is {target!r}: {nearest(target, classes)}, or a number below {len(classes)}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        seen = f"{row['predicted']} {100 * row['probability']:.0f} %"
        if row["explained"] != row["predicted"]:
            seen += f", explained: {row['explained']}"
        abpc = f"{row['abpc']['value']:.2f} ({row['abpc']['random']:.2f})"
        return [row["image"], seen, row["method"], abpc, row["verdict"], row["overlay"]]

    columns = ("image", "class", "method", "ABPC (random)", "the map is", "picture")
    emit_table("Where the network looks", columns, map(cells, rows))
