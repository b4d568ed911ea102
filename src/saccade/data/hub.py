"""A Hugging Face dataset: a name on the hub, a folder written by `save_to_disk`, or files that `load_dataset` reads."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.data.decode import Unreadable
from saccade.data.images import Collection, Entry, Skipped
from saccade.errors import InputError

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset, Features, Value

__all__ = ["collect_hub", "is_dataset_folder"]

_TRAIN = ("train", "training")
_VAL = ("validation", "valid", "val", "dev", "test")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "fine_label")


def is_dataset_folder(folder: Path) -> bool:
    """Whether `datasets` saved this folder, or parquet files lie in it or one folder deeper."""
    return _is_saved(folder) or any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))


def collect_hub(name: str) -> Collection:
    """The image column and the label column of a dataset's splits.

    Splits: "train" against "validation", or "test" where there is no validation; a dataset with one split is split.
    Images: the only column of images, or the one called "image" or "img". Labels: the first ClassLabel column, or else
    a column of integers or strings called "label", "labels", "class", "category", "target" or "fine_label".
    Rows without a label (None; in a ClassLabel -1 also, as hidden test labels are) are skipped.
    """
    parts = _choose_parts(name, _load(name))
    features = parts[0][2].features
    image_column, label_column = _image_column(name, features), _label_column(name, features)

    labels = [list(split.select_columns([label_column])[label_column]) for _, _, split in parts]
    order = _class_order(features[label_column], {value for column in labels for value in column})
    index = {value: position for position, value in enumerate(order)}
    entries, skipped = [], []
    for (part, key, split), values in zip(parts, labels):
        images = _encoded(split, image_column)
        for row, value in enumerate(values):
            place = f"{key}[{row}]"
            if value in index:
                entries.append(Entry(place, index[value], partial(_fetch, images, image_column, row), part))
            else:
                skipped.append(Skipped(place, "it has no label"))
    return Collection(name, tuple(order.values()), entries, skipped=tuple(skipped))


def _load(name: str) -> "dict[str, Dataset]":
    import datasets

    try:
        loaded = datasets.load_from_disk(name) if _is_saved(Path(name)) else datasets.load_dataset(name)
    except Exception as error:  # of the network, of files and of formats: it has no common base
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"the Hugging Face dataset {name!r} cannot be loaded ({type(error).__name__}: {reason}). Give the "
            "name of a dataset that can be reached from here (hf:owner/name), one already in the cache, or a folder"
        ) from error
    return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _choose_parts(name: str, splits: "dict[str, Dataset]") -> "list[tuple[str | None, str, Dataset]]":
    """Part, the split's own name, and the split."""
    train, val = (next((key for key in keys if key in splits), None) for keys in (_TRAIN, _VAL))
    if len(splits) == 1:
        train, val = next(iter(splits)), None
    if train is None:
        raise InputError(f"{name} has the splits {', '.join(splits)}: give a dataset with a split called train")
    if val is None:
        return [(None, train, splits[train])]
    return [("train", train, splits[train]), ("val", val, splits[val])]


def _image_column(name: str, features: "Features") -> str:
    from datasets import Image

    columns = [column for column, feature in features.items() if isinstance(feature, Image)]
    if len(columns) > 1:
        columns = [column for column in ("image", "img") if column in columns]
    if not columns:
        raise InputError(
            f"{name} has the columns {_describe(features)}: one must be of the type Image, and of several one must be "
            "called 'image'. Cast or rename it with datasets, save_to_disk, and give that folder"
        )
    return columns[0]


def _label_column(name: str, features: "Features") -> str:
    from datasets import ClassLabel, Value

    for column, feature in features.items():
        if isinstance(feature, ClassLabel):
            return column
    for column in _LABEL_NAMES:
        feature = features.get(column)
        if isinstance(feature, Value) and ("int" in feature.dtype or "string" in feature.dtype):
            return column
    raise InputError(
        f"{name} has the columns {_describe(features)}: one must hold the labels, as a ClassLabel, or as integers or "
        f"strings under one of the names {', '.join(_LABEL_NAMES)}. Rename it with datasets, save_to_disk, and give "
        "that folder"
    )


def _describe(features: "Features") -> str:
    return ", ".join(
        f"{column} ({getattr(feature, 'dtype', type(feature).__name__)})" for column, feature in features.items()
    )


def _class_order(feature: "ClassLabel | Value", values: set[Any]) -> dict[Any, str]:
    """Label -> class name, of the labels that occur, in the dataset's own order or sorted."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return {value: feature.int2str(value) for value in sorted(values - {None, -1})}
    return {value: str(value) for value in sorted(values - {None})}


def _encoded(split: "Dataset", column: str) -> "Dataset":
    """The column alone, as the files' bytes or paths: decoding is ours, so that the same rules hold for all sources."""
    from datasets import Image

    return split.select_columns([column]).cast_column(column, Image(decode=False))


def _fetch(images: "Dataset", column: str, row: int) -> Path | bytes:
    image = images[row][column]
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise Unreadable("the row has no image")
    return Path(image["path"]) if image["bytes"] is None else image["bytes"]
