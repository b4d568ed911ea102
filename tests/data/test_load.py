"""load_images: what holds for every source, large sets, and calls that name no source."""

import pickle
import struct
import warnings

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from saccade.data import assemble, load_images, read_image
from saccade.data.decode import decode
from saccade.errors import InputError, WorkError
from tests.data.pictures import noise, write, write_class


@pytest.fixture
def folder(tmp_path):
    for name in ("cats", "dogs"):
        write_class(tmp_path / name, 6, 20, 30)
    (tmp_path / "dogs" / "text.png").write_text("no image")
    return tmp_path


def all_of(part):
    return torch.stack([part[index][0] for index in range(len(part))])


def test_mean_and_std_are_those_of_the_training_pixels(folder):
    data = load_images(folder, val_fraction=0.3)
    pixels = all_of(data.train).double() / 255
    assert_close(torch.tensor(data.mean).double(), pixels.mean((0, 2, 3)), atol=1e-7, rtol=0)
    assert_close(torch.tensor(data.std).double(), pixels.std((0, 2, 3), correction=0), atol=1e-7, rtol=0)


def test_constant_images_have_a_std_to_divide_by(tmp_path):
    for name in ("a", "b"):
        for index in range(2):
            write(tmp_path / name / f"{index}.png", noise() * 0)
    assert load_images(tmp_path).std == pytest.approx([1 / 255] * 3)


def test_beyond_the_memory_limit_items_are_the_same_and_read_when_asked_for(folder, monkeypatch):
    kept = load_images(folder)
    monkeypatch.setattr(assemble, "MEMORY_LIMIT", 1000)
    lazy = load_images(folder)
    for attribute in ("mean", "std", "skipped", "fingerprint"):
        assert getattr(lazy, attribute) == getattr(kept, attribute)
    for one, other in ((lazy.train, kept.train), (pickle.loads(pickle.dumps(lazy.val)), kept.val)):
        assert one.names == other.names
        assert_close(all_of(one), all_of(other))
    (folder / lazy.val.names[0]).unlink()
    with pytest.raises(WorkError, match=r"could be read before and cannot now: it cannot be opened"):
        lazy.val[0]


def test_a_data_loader_makes_batches(folder):
    images, labels = next(iter(DataLoader(load_images(folder).train, batch_size=4)))
    assert (images.shape, images.dtype, labels.dtype) == ((4, 3, 32, 32), torch.uint8, torch.long)


def test_a_long_pass_shows_its_progress_on_stderr_only(folder, monkeypatch, capfd):
    load_images(folder)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(assemble, "_PROGRESS_AFTER", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich shows nothing where no terminal is
    load_images(folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Reading images" in err


def test_pillow_warnings_do_not_leak_and_filters_stay(folder):
    path = write(folder / "dogs" / "odd.tiff", tiffinfo={33432: "a copyright, which is kept apart"})
    entry = struct.pack("<HHI", 33432, 2, 33)  # tag, type, length; then its place
    before, after = path.read_bytes().split(entry)
    path.write_bytes(before + entry + struct.pack("<I", 10**6) + after[4:])
    with pytest.warns(UserWarning, match="Truncated File Read"):
        decode(path)
    filters = list(warnings.filters)
    assert "dogs/odd.tiff" in load_images(folder).train.names
    assert read_image(path).shape == (3, 9, 11)
    assert warnings.filters == filters


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digitz", {}, "no folder 'digitz' and no bundled set of that name: did you mean digits?"),
        ("no/such/folder", {}, "no folder 'no/such/folder'.*choose one of digits, textures, or give a folder"),
        ("digits", {"image_size": 0}, "image_size is 0: give"),
        ("digits", {"val_fraction": 1.0}, r"val_fraction is 1\.0: give a share between 0 and 1"),
    ],
)
def test_wrong_calls_say_what_to_give(source, options, message):
    with pytest.raises(InputError, match=message):
        load_images(source, **options)


def test_a_file_is_no_source(tmp_path):
    path = write(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png is a file: give a folder"):
        load_images(path)


def test_a_missing_folder_inside_one_that_is_there_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no folder 'images/cats'"):
        load_images("images/cats")
