"""`saccade study`: which attention to use on your images, what it costs, where it looks, and whether to believe it."""

import json
from typing import Any

from saccade.cli.shared import (
    DATA_HELP,
    ProgressLine,
    add_json,
    add_training,
    emit,
    emit_table,
    name_skipped,
    output_folder,
)

EXAMPLE = "saccade study digits --mixers window,attention --epochs 2 --seeds 1 --out study-of-digits"


def arguments(parser: Any) -> None:
    parser.add_argument("data", type=str, help=DATA_HELP)
    parser.add_argument(
        "--mixers",
        type=str | None,
        default=None,
        help="names with commas between, or all; by default the eight common ones",
    )
    parser.add_argument(
        "--backbone",
        type=str,
        default="study_xxs",
        help="study_xxs, study_xs or study_s takes each mixer in turn; other networks, with commas between, are "
        "compared as they are: `saccade models` lists all",
    )
    parser.add_argument("--seeds", type=int, default=2, help="times that each network is trained")
    parser.add_argument("--out", type=str | None, default=None, help="output folder; by default study-NAME")
    add_training(parser, learning_rate=3e-3)
    add_json(parser)


def run(args: Any) -> int:
    from saccade.study import StudySettings, parse_mixers, run_study

    settings = StudySettings(
        data=args.data,
        mixers=None if args.mixers is None else parse_mixers(args.mixers),
        backbone=args.backbone,
        epochs=args.epochs,
        image_size=args.image_size,
        seeds=args.seeds,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        augment=args.augment,
        accelerator=args.accelerator,
        devices=args.devices,
        nodes=args.nodes,
        strategy=args.strategy,
    )
    folder = output_folder(args.out, args.data, "study-{}")
    with ProgressLine().shown() as progress:
        results = run_study(settings, folder, command=args.command, progress=progress)
    if not results:  # another process of this study has them
        return 0
    name_skipped(results["data"]["skipped"])
    if args.json:
        emit(json.dumps(results, indent=1))
    else:
        _print_table(results)
        emit(f"\n{results['recommendation']['sentence']}\nReport: {folder / 'report.html'}")
    return 0 if any(row["status"] == "done" for row in results["mixers"]) else 1


def _print_table(results: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        if row["status"] != "done":
            return [row["name"], f"failed: {row['error']}"]
        accuracy = row["accuracy"]
        return [
            row["name"],
            f"{100 * accuracy['value']:.1f} ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})",
            f"{row['params']:,}",
            f"{row['flops'] / 1e6:.2f}",
            f"{row['latency_ms']['median']:.2f}",
            f"{row['peak_memory_mib']:.0f}",
            f"{row['train_seconds']:.1f}",
            row["faithfulness"]["verdict"],
        ]

    title = f"{results['data']['name']}: {results['data']['val']} held-out images"
    columns = (
        results["compares"],
        "accuracy %",
        "params",
        "MFLOPs",
        "ms an image",
        "memory MiB",
        "training s",
        "maps are",
    )
    emit_table(title, columns, map(cells, results["mixers"]))
