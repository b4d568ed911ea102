"""Checkpoints: what is saved comes back, nothing half-written stays, and no file runs code."""

import argparse
import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from saccade.errors import InputError, WorkError
from saccade.training import read_checkpoint, save_checkpoint
from tests.training.nets import Net, assert_same_bits

CONFIG = {"model": "study_xxs", "options": {"mixer": "window", "depths": [1, 2]}, "classes": ["ä", "b"]}


def test_weights_and_config_come_back(tmp_path):
    model = Net()
    path = save_checkpoint(tmp_path / "new folder" / "net.v1.5", model, CONFIG)
    assert path == tmp_path / "new folder" / "net.v1.5.safetensors"
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == CONFIG
    assert_same_bits(checkpoint.state, model.state_dict())
    Net(seed=1).load_state_dict(checkpoint.state)
    assert sorted(os.listdir(path.parent)) == ["net.v1.5.json", "net.v1.5.safetensors"]
    assert save_checkpoint(path, model, CONFIG) == path


def test_shared_strided_and_odd_tensors_are_saved_right(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {
        "base": base,
        "again": base,
        "transposed": base.T,
        "view": base[:, 1:3],
        "half": base.bfloat16(),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    path = save_checkpoint(tmp_path / "x", state, {})
    assert_same_bits(read_checkpoint(path).state, state)
    assert_same_bits(load_file(path), state)


def test_tied_weights_load_into_tied_weights(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    other.load_state_dict(read_checkpoint(save_checkpoint(tmp_path / "tied", model, {})).state)
    assert_same_bits(model.state_dict(), other.state_dict())


def test_weights_of_somebody_else_need_no_json(tmp_path):
    path = save_checkpoint(tmp_path / "x", Net(), CONFIG)
    path.with_suffix(".json").unlink()
    assert read_checkpoint(path).config == {}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model_ema": state, "model": {"other": torch.zeros(1)}},
    ],
)
def test_pickled_weights_are_taken_out_of_their_wrapping(tmp_path, suffix, wrap):
    state = dict(Net().state_dict())
    torch.save(wrap(state), tmp_path / f"x{suffix}")
    checkpoint = read_checkpoint(tmp_path / f"x{suffix}")
    assert_same_bits(checkpoint.state, state)
    assert checkpoint.config == {}


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": Net().state_dict(), "hook": Harmful()}
    torch.save(content, "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"x\.pth is refused.*mkdir.*convert it once: torch\.save"):
        read_checkpoint("x.pth")
    assert not (tmp_path / "harm").exists()


def test_pickled_module_is_refused(tmp_path):
    torch.save(Net(), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"refused: it is pickled with code in it \(tests\.training\.nets\.Net\)"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", bytes(range(256)) * 9, b"PK\x03\x04 not a zip file"])
def test_file_of_another_kind_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged or not a checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
def test_cut_files_are_refused(tmp_path, keep):
    path = save_checkpoint(tmp_path / "x", Net(), {})
    torch.save(Net().state_dict(), tmp_path / "x.pt")
    for file in (path, tmp_path / "x.pt"):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match="do not belong together"):
        read_checkpoint(path)
    path.with_suffix(".json").unlink()
    for file in (path, tmp_path / "x.pt"):
        with pytest.raises(InputError, match="is damaged or not a checkpoint"):
            read_checkpoint(file)


def test_json_of_other_weights_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path / "x", Net(), {})
    other = save_checkpoint(tmp_path / "y", Net(seed=1), {})
    os.replace(other, path)
    with pytest.raises(InputError, match=r"x\.safetensors and x\.json do not belong together"):
        read_checkpoint(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "sha256": "", "config": 3}'])
def test_damaged_json_is_named(tmp_path, text):
    path = save_checkpoint(tmp_path / "x", Net(), {})
    path.with_suffix(".json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json is damaged"):
        read_checkpoint(path)


def test_newer_format_asks_for_an_update(tmp_path):
    path = save_checkpoint(tmp_path / "x", Net(), {})
    about = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(InputError, match=r"format 2, this saccade reads 1"):
        read_checkpoint(path)


def test_wrong_paths_and_contents_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.safetensors is not there"):
        read_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        read_checkpoint(tmp_path)
    (tmp_path / "x.zip").touch()
    with pytest.raises(InputError, match=r"suffix '\.zip': expected \.safetensors, \.pt, \.pth, \.bin or \.ckpt"):
        read_checkpoint(tmp_path / "x.zip")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds the keys epoch, optimizer, but no tensors by name"):
        read_checkpoint(tmp_path / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "x.pt")
    with pytest.raises(InputError, match="config cannot be written as JSON"):
        save_checkpoint(tmp_path / "x", Net(), {"classes": {1, 2}})


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENOSPC, WorkError, "the disk is full.*saved before is intact.*Make room"),
        (errno.EDQUOT, WorkError, "the disk is full"),
        (errno.EIO, WorkError, "Check the disk"),
        (errno.EACCES, InputError, "Choose a folder in which you may write"),
        (errno.EROFS, InputError, "Choose a folder in which you may write"),
    ],
)
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_failed_writing_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch, code, kind, message, place):
    path = save_checkpoint(tmp_path / "x", Net(), CONFIG)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, place, fail)
    with pytest.raises(kind, match=f"x.safetensors.*{message}"):
        save_checkpoint(path, Net(seed=1), {})
    monkeypatch.undo()
    assert_same_bits(read_checkpoint(path).state, Net().state_dict())
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file/x", "file/deeper/x"):
        with pytest.raises(InputError, match=r"file.* cannot be written.*Choose a folder"):
            save_checkpoint(tmp_path / place, Net(), {})
