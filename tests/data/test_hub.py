"""Hugging Face datasets: saved folders, parquet, image folders, and what cannot be served. Nothing uses the network."""

import datasets
import huggingface_hub
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from saccade.data import load_images
from saccade.errors import InputError
from tests.data.pictures import noise, write_class


@pytest.fixture(autouse=True)
def _offline_and_quiet(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def make(labels, label_type=None, image="image", label="label", **features):
    columns = {
        image: [Pillow.fromarray(noise(seed=row)) for row in range(len(labels))],
        label: labels,
        **{name: [None] * len(labels) for name in features},
    }
    kinds = {image: Image(), label: label_type or ClassLabel(names=["dog", "cat", "emu"]), **features}
    return Dataset.from_dict(columns, features=Features(kinds))


def test_a_saved_dataset_with_splits(tmp_path):
    DatasetDict({"train": make([0, 1, 1]), "test": make([0, 1]), "validation": make([1, 0, 0, 1])}).save_to_disk(
        tmp_path
    )
    data = load_images(tmp_path, image_size=9)
    assert data.classes == ("dog", "cat")  # in the dataset's order, without the class that does not occur
    assert (len(data.train), len(data.val)) == (3, 4)
    assert data.val.labels.tolist() == [1, 0, 0, 1]
    assert data.val.names[1] == "validation[1]"
    assert torch.equal(data.train[2][0], torch.from_numpy(noise(seed=2)[:, 1:-1]).permute(2, 0, 1))
    assert load_images(f"hf:{tmp_path}", image_size=9).train.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "label_type", "column", "classes"),
    [
        ([7, -1] * 3, Value("int64"), "label", ("-1", "7")),
        (["dog", "cat"] * 3, Value("string"), "category", ("cat", "dog")),
        ([2, 0] * 3, None, "species", ("dog", "emu")),
    ],
)
def test_labels_may_be_numbers_words_or_class_labels(tmp_path, labels, label_type, column, classes):
    make(labels, label_type, image="img", label=column).save_to_disk(tmp_path)
    data = load_images(tmp_path)
    assert data.classes == classes
    assert (len(data.train), len(data.val)) == (4, 2)


def test_rows_without_label_or_image_are_skipped(tmp_path):
    dataset = make([0, 1, -1, None, 0, 1, 0])
    rows = dataset.to_dict()
    rows["image"][6] = None
    Dataset.from_dict(rows, features=dataset.features).save_to_disk(tmp_path)
    data = load_images(tmp_path)
    reasons = {skipped.path: skipped.reason for skipped in data.skipped}
    assert list(reasons.values()) == ["it has no label", "it has no label", "the row has no image"]
    assert len(data.train) + len(data.val) == 4


def test_a_folder_of_parquet_files(tmp_path):
    make([0, 1] * 4).to_parquet(tmp_path / "train-0.parquet")
    make([0, 1]).to_parquet(tmp_path / "test-0.parquet")
    data = load_images(tmp_path)
    assert (len(data.train), len(data.val)) == (8, 2)


def test_an_image_folder_read_by_datasets(tmp_path):
    for part, count in (("train", 3), ("validation", 2)):
        for name in ("cats", "dogs"):
            write_class(tmp_path / part / name, count)
    data = load_images(f"hf:{tmp_path}")
    assert (data.classes, len(data.train), len(data.val)) == (("cats", "dogs"), 6, 4)
    assert torch.equal(data.train[0][0], load_images(tmp_path).train[0][0])


def test_a_large_dataset_is_read_row_by_row(tmp_path, monkeypatch):
    make([0, 1] * 4).save_to_disk(tmp_path)
    kept = load_images(tmp_path)
    monkeypatch.setattr("saccade.data.assemble.MEMORY_LIMIT", 1)
    lazy = load_images(tmp_path)
    assert all(torch.equal(kept.train[row][0], lazy.train[row][0]) for row in range(len(kept.train)))
    assert lazy.fingerprint == kept.fingerprint


@pytest.mark.parametrize("source", ["nobody/nothing", "hf:nothing"])
def test_a_hub_that_cannot_be_reached_is_a_wrong_call(source):
    with pytest.raises(
        InputError, match=r"dataset '.*nothing' cannot be loaded \(ConnectionError: .*already in the cache"
    ):
        load_images(source)


def test_splits_and_columns_that_cannot_be_served_are_listed(tmp_path):
    cases = {
        "splits": DatasetDict({"a": make([0, 1]), "b": make([0, 1])}),
        "images": make([0, 1], mask=Image(), image="left"),
        "labels": make([0.5, 1.5], Value("float64")),
    }
    for name, dataset in cases.items():
        dataset.save_to_disk(tmp_path / name)
    with pytest.raises(InputError, match="has the splits a, b: give a dataset with a split called train"):
        load_images(tmp_path / "splits")
    with pytest.raises(InputError, match=r"has the columns left .*mask .*: one must be of the type Image"):
        load_images(tmp_path / "images")
    with pytest.raises(InputError, match=r"has the columns .*label \(float64\): one must hold the labels"):
        load_images(tmp_path / "labels")
