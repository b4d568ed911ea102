"""Folders of images: layouts that are understood, what is skipped, and mistakes that are explained."""

import os
import shutil

import numpy as np
import pytest
import torch

from saccade.data import load_images
from saccade.errors import InputError
from tests.data.pictures import noise, write, write_class


def names_and_labels(part):
    return dict(zip(part.names, part.labels.tolist()))


@pytest.fixture
def animals(tmp_path):
    for name in ("cats", "dogs"):
        write_class(tmp_path / name, 5)
    return tmp_path


def test_items_are_the_images_with_their_labels(animals):
    data = load_images(animals, image_size=9)
    assert (data.name, data.classes, data.image_size) == (animals.name, ("cats", "dogs"), 9)
    assert (len(data.train), len(data.val)) == (8, 2)
    for part in (data.train, data.val):
        for index, name in enumerate(part.names):
            image, label = part[index]
            expected = noise(seed=int(name[5]))[:, 1:-1]  # (9, 11) to its centre
            assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))
            assert data.classes[label] == name[:4]
            assert type(label) is int


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Val"])
def test_given_parts_are_kept(tmp_path, val):
    for name, count in (("cats", 1), ("dogs", 3)):
        write_class(tmp_path / "train" / name, count)
        write_class(tmp_path / val / name, 2)
    write_class(tmp_path / "notes", 1)
    data = load_images(tmp_path)
    assert (len(data.train), len(data.val)) == (4, 4)
    assert names_and_labels(data.val)[f"{val}/dogs/1.png"] == 1


def test_validation_goes_before_test(tmp_path):
    for part, count in (("train", 3), ("test", 2), ("validation", 1)):
        for name in ("cats", "dogs"):
            write_class(tmp_path / part / name, count)
    assert len(load_images(tmp_path).val) == 2


def test_train_alone_is_split(tmp_path):
    for name in ("cats", "dogs"):
        write_class(tmp_path / "train" / name, 5)
    data = load_images(tmp_path)
    assert data.classes == ("cats", "dogs")
    assert (len(data.train), len(data.val)) == (8, 2)


def test_train_among_other_classes_is_a_class(tmp_path):
    for name in ("bus", "car", "train"):
        write_class(tmp_path / name, 2)
    assert load_images(tmp_path).classes == ("bus", "car", "train")


def test_files_count_wherever_they_lie_in_a_class_folder_unless_hidden(animals):
    write(animals / "cats" / "köter & kätzchen" / "nr 1 ü.png")
    write(animals / "cats" / "without_suffix.png").rename(animals / "cats" / "without_suffix")
    for hidden in (".hidden.png", ".cache/a.png", "Thumbs.db", "__MACOSX/a.png"):
        write(animals / "cats" / "a.png").rename(animals / "cats" / "moved")
        (animals / "cats" / hidden).parent.mkdir(exist_ok=True)
        (animals / "cats" / "moved").rename(animals / "cats" / hidden)
    (animals / ".git").mkdir()
    data = load_images(animals)
    names = names_and_labels(data.train) | names_and_labels(data.val)
    assert len(names) == 12
    assert names["cats/köter & kätzchen/nr 1 ü.png"] == names["cats/without_suffix"] == 0
    assert data.skipped == ()


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="names must be Unicode there")
def test_names_that_are_no_unicode_are_reported_as_text(animals):
    shutil.copy(animals / "cats" / "0.png", os.fsencode(animals) + b"/cats/caf\xe9.png")
    data = load_images(animals)
    assert "cats/caf\\xe9.png" in data.train.names + data.val.names


def test_split_has_every_class_and_follows_names_and_seed_only(tmp_path):
    sizes = {"few": 2, "some": 10, "many": 33}
    for name, count in sizes.items():
        write_class(tmp_path / "one" / name, count)
    for name, count in reversed(sizes.items()):  # another order on the disk
        for index in reversed(range(count)):
            write(tmp_path / "two" / name / f"{index}.png", noise(seed=index))
    one, two = (load_images(tmp_path / name) for name in ("one", "two"))
    assert (one.val.names, one.fingerprint) == (two.val.names, two.fingerprint)
    assert torch.bincount(one.val.labels).tolist() == [1, 7, 2]  # few, many, some
    assert not set(one.val.names) & set(one.train.names)
    other = load_images(tmp_path / "one", seed=1)
    assert other.val.names != one.val.names
    assert other.fingerprint != one.fingerprint


def test_an_added_file_moves_at_most_one_other(tmp_path):
    for name in ("cats", "dogs"):
        write_class(tmp_path / name, 20)
    before = set(load_images(tmp_path).val.names)
    write(tmp_path / "cats" / "new.png")
    assert len(before - set(load_images(tmp_path).val.names)) <= 1


def test_fingerprint_follows_the_data_not_their_place(animals, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "animals"
    shutil.copytree(animals, moved)
    first = load_images(animals).fingerprint
    assert load_images(moved).fingerprint == first
    assert load_images(moved, image_size=64).fingerprint != first
    write(moved / "dogs" / "0.png", np.zeros((9, 11, 3), np.uint8))  # fewer bytes
    assert load_images(moved).fingerprint != first


def test_default_size_is_the_median_shorter_side_in_steps_of_32(tmp_path):
    for side, name in ((40, "a"), (70, "b"), (75, "c"), (500, "d")):
        write(tmp_path / name / "1.png", noise(side, 2 * side))
        write(tmp_path / name / "2.png", noise(2 * side, side))
    assert load_images(tmp_path).image_size == 64  # of 72.5
    for name in "abc":
        shutil.rmtree(tmp_path / name)
    write_class(tmp_path / "a", 2, 300, 300)
    assert load_images(tmp_path).image_size == 224
    shutil.rmtree(tmp_path / "d")
    write_class(tmp_path / "d", 9, 7, 7)
    assert load_images(tmp_path).image_size == 32


def test_unreadable_images_are_skipped_and_named(animals):
    (animals / "cats" / "text.png").write_text("no image")
    (animals / "cats" / "zero.jpg").touch()
    (animals / "cats" / "link.png").symlink_to("nowhere.png")
    cut = write(animals / "dogs" / "cut.jpg", noise(64, 64))
    cut.write_bytes(cut.read_bytes()[:-800])
    write(animals / "loose.png")
    (animals / "README.txt").touch()
    data = load_images(animals)
    assert (len(data.train), len(data.val)) == (8, 2)
    reasons = {skipped.path: skipped.reason for skipped in data.skipped}
    assert set(reasons) == {"cats/text.png", "cats/zero.jpg", "cats/link.png", "dogs/cut.jpg", "loose.png"}
    assert "truncated" in reasons["dogs/cut.jpg"]
    assert "no class" in reasons["loose.png"]
    assert not {*data.train.names, *data.val.names} & set(reasons)


MISTAKES = {
    "nothing in it": ((), "the folder .* is empty: give one that has a subfolder"),
    "no classes": (
        ("a.png", "b.png", "c.png"),
        "has no classes: 'a.png' and 2 more lie directly in it. Put",
    ),
    "no classes in train": (("train/a.png", "val/b.png"), r"train has no classes: 'a.png' and 0 more"),
    "one class": (("cats/a.png", "cats/b.png"), "has one class, 'cats': there is nothing to tell apart. Give two"),
    "one folder too high": (("all/cats/a.png", "all/dogs/a.png"), "has one class, 'all', .* did you mean .*/all?"),
    "empty class": (("cats/a.png", "cats/b.png", "dogs/"), "the class 'dogs' of .* has no readable image: add"),
    "class without a readable image": (
        ("cats/a.png", "cats/b.png", "dogs/text.png", "dogs/more.png.txt"),
        "the class 'dogs' of .* has no readable image: add",
    ),
    "too few for a split": (
        ("cats/a.png", "cats/b.png", "dogs/a.png", "dogs/text.png"),
        "the class 'dogs' of .* has one readable image, too few for a split: add",
    ),
    "class only in val": (
        ("train/cats/a.png", "train/dogs/a.png", "val/catz/a.png"),
        "has the class 'catz', of which the training part has no readable image: did you mean cats?",
    ),
    "nothing in val": (("train/cats/a.png", "train/dogs/a.png", "val/dogs/"), "validation part .* has no readable"),
    "nothing readable": (
        ("cats/text1.png", "cats/text2.png", "dogs/text1.png", "dogs/text2.png"),
        "none of the 4 files .* The first is cats/text1.png: it is no",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(tmp_path, name):
    paths, message = MISTAKES[name]
    for path in paths:
        if path.endswith("/"):
            (tmp_path / path).mkdir(parents=True)
        elif "text" in path or path.endswith("txt"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("no image")
        else:
            write(tmp_path / path)
    with pytest.raises(InputError, match=message):
        load_images(tmp_path)


@pytest.mark.parametrize("name", ["one class", "empty class", "class only in val", "nothing in val"])
def test_mistakes_show_before_the_images_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr("saccade.data.assemble._read", None)
    test_mistakes_are_explained(tmp_path, name)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_may_not_be_listed_is_named(animals):
    (animals / "cats").chmod(0)
    with pytest.raises(InputError, match="cats cannot be listed"):
        load_images(animals)
