"""`saccade explain`: where a network looks on photos, and whether to believe it."""

import json
from typing import TYPE_CHECKING, Any

from saccade.cli.shared import ProgressLine, add_json, emit, emit_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from saccade.cli.subject import Subject
    from saccade.explain.pages import Effort

EXAMPLE = "saccade explain photo.jpg --model study-digits/checkpoints/window.safetensors"


def arguments(parser: Any) -> None:
    parser.add_argument("images", nargs="+", type=str, help="image files")
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="a checkpoint of `saccade study` or `train`, a network of `saccade models`, or timm/NAME",
    )
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="weights for a network that is named; without them they are random, and the page says so",
    )
    parser.add_argument(
        "--method",
        type=str | None,
        default=None,
        help="with commas between, such as lrp,normgrad,rollout; by default four that need no layer",
    )
    parser.add_argument(
        "--target",
        type=str | None,
        default=None,
        help="class to explain; by default the predicted one",
    )
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="class to hold it against: why this and not that; by default the next likely one",
    )
    parser.add_argument(
        "--classes",
        type=str | None,
        default=None,
        help="text file with the name of a class in each line; by default the checkpoint's names, or numbers",
    )
    parser.add_argument("--out", type=str, default="explanations", help="folder for the page and its pictures")
    add_json(parser)


def run(args: Any) -> int:
    import platform
    import sys
    from datetime import UTC, datetime
    from pathlib import Path

    import torch

    import saccade
    from saccade.cli.subject import open_subject
    from saccade.data import normalize, read_image
    from saccade.explain.attribute import read_method
    from saccade.explain.pages import Effort, examine, write_page
    from saccade.measure import count_parameters
    from saccade.training.checkpoint import make_folder

    methods = None if args.method is None else [read_method(name.strip()) for name in args.method.split(",")]
    subject = open_subject(args.model, args.weights, args.classes)
    target, against = (_read_class(name, getattr(args, name), subject.classes) for name in ("target", "against"))
    pixels = [read_image(path, size=subject.image_size) for path in args.images]
    folder = Path(args.out)
    make_folder(folder)
    if not subject.trained:
        print(
            f"the weights of {subject.name} are random: it has learnt nothing, and its maps show no more than how its "
            "layers pass pixels on. Give --weights FILE",
            file=sys.stderr,
        )
    images, effort = normalize(torch.stack(pixels), subject.mean, subject.std), Effort.for_size(subject.image_size)
    with ProgressLine().shown() as progress:
        results = examine(
            subject.model,
            pixels,
            images,
            folder,
            names=args.images,
            classes=subject.classes,
            methods=methods,
            target=target,
            against=against,
            effort=effort,
            progress=progress,
        )
    results |= {
        "command": args.command,
        "code": _code(subject, args.images, results, effort),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"saccade": saccade.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": {
            "name": subject.name,
            "weights": subject.weights,
            "trained": subject.trained,
            "params": count_parameters(subject.model),
            "image_size": subject.image_size,
        },
    }
    page = write_page(results, folder)
    for each in results["left_out"]:
        print(f"{each['method']} is left out: {each['reason']}", file=sys.stderr)
    rows = [_row(image, method, results, folder, page) for image in results["images"] for method in image["maps"]]
    if args.json:
        emit(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
        emit(f"\nPage: {page}, with the pictures beside it")
    return 1 if methods and results["left_out"] else 0


def _read_class(name: str, given: str | None, classes: "Sequence[str]") -> int | None:
    from saccade.errors import InputError, nearest

    if given is None:
        return None
    if given in classes:
        return list(classes).index(given)
    if given.isdecimal() and int(given) < len(classes):
        return int(given)
    shown = classes if len(classes) <= 20 else [*classes[:3], "..."]
    raise InputError(f"{name} is {given!r}: {nearest(given, shown)}, or a number below {len(classes)}")


def _code(subject: "Subject", paths: "Sequence[str]", results: "Mapping[str, Any]", effort: "Effort") -> str:
    """Python that makes the maps of the page again."""
    methods = {name: dict(effort.options.get(name, {})) for name in results["methods"]}
    labels = [image["label"] for image in results["images"]]
    mean, std = (tuple(round(float(each), 6) for each in values) for values in (subject.mean, subject.std))
    lines = [
        "import torch",
        "import saccade",
        "from saccade.data import normalize, read_image",
        *subject.code,
        f"pixels = [read_image(path, size={subject.image_size}) for path in {list(paths)!r}]",
        f"images = normalize(torch.stack(pixels), {mean}, {std})",
        f"target = torch.tensor({labels})",
        f"for method, options in {methods!r}.items():",
        "    found = saccade.explain(model, images, method=method, target=target, **options)",
        "    score = saccade.faithfulness(",
        f"        model, images[:1], found.map[:1], target=int(target[0]), steps={effort.steps}, "
        f"repeats={effort.repeats}",
        "    )",
        "    print(method, score.verdict, score.abpc.value)",
    ]
    return "\n".join(lines)


def _row(
    image: "Mapping[str, Any]", method: str, results: "Mapping[str, Any]", folder: "Path", page: "Path"
) -> dict[str, Any]:
    """What is printed of one map."""
    from saccade.explain.pages import judge

    found, about = image["maps"][method], results["methods"][method]
    return {
        "image": image["image"],
        "predicted": image["top"][0]["class"],
        "probability": image["top"][0]["probability"],
        "explained": image["explained"],
        "method": method,
        "layer": about["layer"],
        **{key: found[key] for key in ("deletion", "insertion", "abpc", "verdict", "sentence")},
        "sanity": about["sanity"],
        "judgement": judge(found, about)["tag"],
        "account": about["account"],
        "weights": results["model"]["weights"],
        "overlay": str(folder / found["overlay"]),
        "page": str(page),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        seen = f"{row['predicted']} {100 * row['probability']:.0f} %"
        if row["explained"] != row["predicted"]:
            seen += f", explained: {row['explained']}"
        abpc = f"{row['abpc']['value']:.2f} ({row['abpc']['random']:.2f})"
        return [row["image"], seen, row["method"], abpc, row["judgement"]]

    columns = ("image", "class", "method", "ABPC (random)", "the map")
    emit_table("Where the network looks", columns, map(cells, rows))
