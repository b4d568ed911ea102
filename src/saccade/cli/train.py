"""`saccade train`: train one network on your images."""

import json
from typing import Any

from saccade.cli.shared import DATA_HELP, ProgressLine, add_json, add_training, emit, name_skipped, output_folder

EXAMPLE = "saccade train digits --mixer window --epochs 2 --out digits-window"


def arguments(parser: Any) -> None:
    parser.add_argument("data", type=str, help=DATA_HELP)
    parser.add_argument("--model", type=str, default="study_xxs", help="a network of `saccade models`")
    parser.add_argument(
        "--mixer",
        type=str | None,
        default=None,
        help="its mixer: a name, or name(option=value); by default attention, or what the network has of its own",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of images, augmentation")
    parser.add_argument(
        "--out", type=str | None, default=None, help="output folder; by default train-NAME-MIXER or train-NAME-MODEL"
    )
    add_training(parser, learning_rate=3e-3)
    add_json(parser)


def run(args: Any) -> int:
    import torch

    from saccade.backbones import create_model
    from saccade.data import load_images
    from saccade.study import NetworkChoice, default_epochs
    from saccade.training import TrainSettings, fit
    from saccade.training.launch import is_first_process

    choice = NetworkChoice.of(args.model, args.mixer)
    folder = output_folder(args.out, args.data, f"train-{{}}-{choice.folder}")
    data = load_images(args.data, image_size=args.image_size)
    epochs = default_epochs(len(data.train), args.batch_size) if args.epochs is None else args.epochs
    options = choice.options(data.image_size)
    torch.manual_seed(args.seed)
    model = create_model(args.model, num_classes=len(data.classes), **options).eval()
    with torch.no_grad():  # what cannot work fails before the folder is made
        model(torch.zeros(1, 3, data.image_size, data.image_size))
    settings = TrainSettings(
        epochs=epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_epochs=max(1, epochs // 10),
        augment=args.augment,
        seed=args.seed,
        accelerator=args.accelerator,
        devices=args.devices,
        nodes=args.nodes,
        strategy=args.strategy,
    )
    progress = ProgressLine()
    progress.start(epochs)

    def on_epoch(row: dict[str, Any]) -> None:
        progress.show(f"{choice.label}, epoch {row['epoch'] + 1} of {epochs}", f"{100 * row['val_accuracy']:.1f} %")
        progress.advance(1)

    with progress.shown():
        result = fit(model, data, settings, folder, on_epoch=on_epoch, config={"model": args.model, "options": options})
    if not is_first_process():  # another process of this run prints
        return 0
    name_skipped([vars(each) for each in data.skipped])
    if args.json:
        found = {"accuracy": result.accuracy, "seconds": result.seconds, "checkpoint": str(result.checkpoint)}
        emit(json.dumps({**found, "history": result.history}, indent=1))
    else:
        emit(f"{100 * result.accuracy:.1f} % of {len(data.val)} held-out images right after {result.seconds:.0f} s")
        emit(f"Checkpoint: {result.checkpoint}")
    return 0
