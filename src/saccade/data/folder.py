"""A folder of images with one subfolder a class, with or without train and val above the classes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from PIL import Image

from saccade.data.images import Collection, Entry, Skipped
from saccade.errors import InputError

__all__ = ["collect_folder"]

_TRAIN = "train"
_VAL = ("val", "valid", "validation", "test")  # the first that is there is used
_NOT_DATA = {"thumbs.db", "desktop.ini", "__macosx"}  # what file managers leave behind, like hidden files


def collect_folder(root: Path) -> Collection:
    """Every visible file below a class folder is taken for an image; whether it is one shows when it is read.

    A subfolder "train" holds the training classes if "val" (or "valid", "validation", "test") stands beside it or
    nothing else does; otherwise it is a class of that name.
    """
    folders = {folder.name.lower(): folder for folder in _list(root) if folder.is_dir()}
    val = next((folders[name] for name in _VAL if name in folders), None)
    parts: list[tuple[str | None, Path]] = [(None, root)]
    if _TRAIN in folders and val:
        parts = [("train", folders[_TRAIN]), ("val", val)]
    elif set(folders) == {_TRAIN}:
        parts = [(None, folders[_TRAIN])]

    found = [(part, folder) for part, top in parts for folder in _class_folders(top)]
    classes = sorted({_printable(folder.name) for _, folder in found})
    entries = [
        Entry(_name_within(root, path), classes.index(_printable(folder.name)), path, part)
        for part, folder in found
        for path in _files_below(folder)
    ]
    loose = [
        Skipped(_name_within(root, path), "it lies beside the class folders and so has no class")
        for _, top in parts
        for path in _list(top)
        if path.suffix.lower() in Image.registered_extensions() and not path.is_dir()
    ]
    return Collection(root.resolve().name or str(root), tuple(classes), entries, skipped=tuple(loose))


def _class_folders(top: Path) -> list[Path]:
    """The classes below `top`; InputError if there are none, or if they seem to lie one folder deeper."""
    inside = _list(top)
    folders = [path for path in inside if path.is_dir()]
    if not inside:
        raise InputError(f"the folder {top} is empty: give one that has a subfolder of images for each class")
    if not folders:
        raise InputError(
            f"the folder {top} has no classes: {inside[0].name!r} and {len(inside) - 1} more lie directly in it. Put "
            f"the images into one folder a class, such as {top / 'cats'} and {top / 'dogs'}"
        )
    deeper = [path for path in _list(folders[0]) if path.is_dir()]
    if len(folders) == 1 and len(deeper) > 1:
        raise InputError(
            f"the folder {top} has one class, {folders[0].name!r}, but that has {len(deeper)} subfolders: "
            f"did you mean {folders[0]}?"
        )
    return folders


def _files_below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if _visible(name))
        yield from (Path(place, name) for name in sorted(files) if _visible(name))


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _visible(path.name))
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"the folder {error.filename} cannot be listed ({error.strerror}): make it readable") from error


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _NOT_DATA


def _name_within(root: Path, path: Path) -> str:
    return _printable(path.relative_to(root).as_posix())


def _printable(name: str) -> str:
    """The name, with bytes that are not UTF-8 written as \\xe9: what is reported must be text."""
    return os.fsencode(name).decode(errors="backslashreplace")
