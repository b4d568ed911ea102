"""A study of photographs from end to end: what it leaves, what it redoes, and what it says when something fails."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image

import saccade
from saccade.cli import main
from saccade.data import load_images
from saccade.errors import DivergedError, InputError
from saccade.measure import count_parameters
from saccade.study import StudySettings
from saccade.study.parts import measure_part, scaling_sides
from saccade.study.runs import Run
from saccade.training import evaluate
from tests.study.jpegs import BROKEN, PHOTOS, write_photos
from tests.study.tables import without_timings

MIXERS = ("pooling", "neighborhood(window_size=(1, 2), stride=1)")
FOLDERS = ("pooling", "neighborhood_window_size_1_2_stride_1")
OPTIONS = ("--epochs", "2", "--image-size", "16", "--batch-size", "8")


@dataclass
class Finished:
    photos: Path
    folder: Path
    out: str
    err: str

    @property
    def results(self):
        return json.loads((self.folder / "results.json").read_text())


def study(photos, folder, *more, mixers=MIXERS, seeds=1):
    given = ["study", str(photos), "--mixers", ",".join(mixers), "--seeds", str(seeds), "--out", str(folder)]
    return main([*given, *OPTIONS, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that trained in processes of its own, as many as there are cores."""
    place = tmp_path_factory.mktemp("main job")
    photos = write_photos(place / "Fotos März")
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert study(photos, place / "Bericht ü") == 0, err.getvalue()
    return Finished(photos, place / "Bericht ü", out.getvalue(), err.getvalue())


@pytest.fixture
def copied(finished, tmp_path):
    """A copy to go on with, and no processes beside this one."""
    shutil.copytree(finished.folder, tmp_path / "study")
    return Finished(finished.photos, tmp_path / "study", finished.out, finished.err)


@pytest.fixture
def one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


def files_of(folder):
    """Every file with the time it was written at, but for the results, which are written anew."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in RESULTS)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def size_of(picture):
    with Image.open(picture) as image:
        return image.size


PLACES = ("runs", "gallery", "checkpoints")  # of a mixer's files
RESULTS = ("results.json", "results.csv", "report.html", ".study.lock")


def test_everything_is_there_and_fits_together(finished):
    folder, results = finished.folder, finished.results
    assert [row["name"] for row in results["mixers"]] == list(MIXERS)
    assert {row["status"] for row in results["mixers"]} == {"done"}
    with (folder / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    page = (folder / "report.html").read_text()
    for row, line, name in zip(results["mixers"], table, FOLDERS, strict=True):
        assert row["checkpoint"] == line["checkpoint"] == f"checkpoints/{name}.safetensors"
        assert line["mixer"] == row["name"]
        assert row["name"] in page
        assert row["name"].partition("(")[0] in finished.out
        assert f"{100 * row['accuracy']['value']:.1f}" in finished.out
        assert [len(seed["history"]) for seed in row["seeds"]] == [2]
        assert row["accuracy"]["value"] == row["seeds"][0]["accuracy"] == row["seeds"][0]["history"][-1]["val_accuracy"]
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
        assert row["scaling"]["sides"] == [16, 24, 32, 48, 64]
        assert len(row["gallery"]) == results["data"]["val"] == 4
        assert row["faithfulness"]["others"].keys() == {"attention_rollout", "relevance"}
        assert row["faithfulness"]["others"]["relevance"]["verdict"] in page
        for entry in row["gallery"]:
            assert entry["label"] in PHOTOS
            for picture in (entry["image"], *entry["overlays"].values()):
                assert size_of(folder / picture) == (128, 128)
    assert {entry["image"].rpartition("/")[2] for row in results["mixers"] for entry in row["gallery"]} == {
        f"{i:02d}_input.png" for i in range(4)
    }
    assert results["recommendation"]["sentence"] in finished.out
    assert str(folder / "report.html") in finished.out.replace("\n", "")
    assert results["settings"]["image_size"] == 16
    assert not list(folder.rglob("*.part*"))


@pytest.mark.parametrize("size", [1, 16, 20, 72, 96, 100, 224])
def test_cost_is_measured_at_sides_that_every_mixer_of_the_study_serves(size):
    sides = scaling_sides(size)
    assert sides[0] >= size  # a window that fits the study's images might not fit smaller ones
    assert sides == tuple(sorted(set(sides)))
    assert sides[-1] >= 2 * sides[0]


def test_progress_goes_to_stderr_and_tells_what_runs(finished):
    assert "training 2 networks, 2 epochs each" in finished.err
    assert "epoch" not in finished.out


def test_unreadable_files_are_named_and_counted(finished):
    skipped = {each["path"]: each["reason"] for each in finished.results["data"]["skipped"]}
    assert skipped.keys() == BROKEN.keys()
    page = (finished.folder / "report.html").read_text()
    assert "2 images could not be used" in finished.err
    assert any("2 images could not be used" in reason for reason in finished.results["recommendation"]["reasons"])
    for path, reason in BROKEN.items():
        assert reason in skipped[path]
        assert f"  {path}: {skipped[path]}" in finished.err
        assert path in page


@pytest.mark.parametrize("number", [0, 1])
def test_checkpoint_is_the_network_that_was_measured(finished, number):
    row = finished.results["mixers"][number]
    model = saccade.create_model("study_xxs", pretrained=str(finished.folder / row["checkpoint"])).eval()
    data = load_images(str(finished.photos), image_size=16)
    found = evaluate(model, data.val, mean=data.mean, std=data.std)
    assert found.correct.double().mean().item() == row["accuracy"]["value"]
    assert count_parameters(model) == row["params"]


@pytest.mark.usefixtures("one_core")
def test_networks_with_mixers_of_their_own_are_compared(finished, tmp_path, capsys):
    networks, folder = ["convit_test", "halonet_test"], tmp_path / "networks"
    call = ["study", str(finished.photos), "--seeds", "1", "--out", str(folder), *OPTIONS]
    assert main([*call, "--backbone", "convit_test,halonet_test"]) == 0
    printed = capsys.readouterr().out
    assert "network" in printed
    assert all(name in printed for name in networks)
    assert main([*call, "--backbone", "convit_test,study_xxs,halonet_test", "--mixers", "pooling"]) == 2
    assert "backbone was None and is 'study_xxs'" in capsys.readouterr().err
    results = json.loads((folder / "results.json").read_text())
    assert (results["compares"], results["settings"]["mixers"]) == ("network", [])
    assert [row["backbone"] for row in results["mixers"]] == [row["name"] for row in results["mixers"]] == networks
    for row in results["mixers"]:
        built = saccade.create_model(row["name"], pretrained=str(folder / row["checkpoint"])).eval()
        assert count_parameters(built) == row["params"]
        assert built(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    page = (folder / "report.html").read_text()
    assert "Each network was trained in turn" in page
    assert "halonet_test has no pictures of attention rollout: &#39;stages." in page
    assert "Residual network of halo attention." in page


def test_a_mixer_beside_networks_of_their_own():
    settings = StudySettings("digits", ("pooling", "window"), backbone="convit_test, study_xs,moat_test")
    assert [choice.label for choice in settings.choices] == ["convit_test", "pooling", "window", "moat_test"]
    assert [choice.backbone for choice in settings.choices] == ["convit_test", "study_xs", "study_xs", "moat_test"]
    assert settings.choices[0].options(32) == {"image_size": 32}
    assert settings.choices[1].options(32) == {"mixer": "pooling", "mixer_options": {}}
    assert settings.choices[3].options(32) == {}
    assert len(StudySettings("digits").choices) == 8


def test_cost_at_sizes_that_a_network_refuses_is_left_out_with_the_reason():
    class OneSize(torch.nn.Linear):
        def forward(self, images):
            if images.shape[-1] != 16:
                raise InputError("images of 16 pixels, please")
            return super().forward(images.mean((2, 3)))

    found = measure_part(OneSize(3, 2), 16, 2)
    assert found["unscaled"] == "images of 16 pixels, please"
    assert "scaling" not in found


def test_explain_takes_the_checkpoint(finished, tmp_path, capsys):
    image = next((finished.photos / "草").glob("*.jpg"))
    checkpoint = finished.folder / "checkpoints" / f"{FOLDERS[1]}.safetensors"
    call = ["explain", str(image), "--model", str(checkpoint), "--out", str(tmp_path / "Karten"), "--target", "草"]
    assert main([*call, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["integrated_gradients", "relevance", "attention_rollout", "normgrad"]
    for row in rows:
        assert row["explained"] == "草"
        assert row["predicted"] in PHOTOS
        assert size_of(row["overlay"]) == (128, 128)  # pixels enlarged, to be seen
        assert row["abpc"]["low"] <= row["abpc"]["value"] <= row["abpc"]["high"]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert "attention_rollout" in printed
    assert rows[0]["verdict"].split()[0] in printed


def test_finished_study_started_again_redoes_nothing(copied, monkeypatch, capsys):
    def forbid(*_, **__):
        raise AssertionError("done again")

    for place in ("training.launch.run", "study.run.measure_part", "study.run.explain_part", "study.runs._prepare"):
        monkeypatch.setattr(f"saccade.{place}", forbid)
    before = files_of(copied.folder)
    assert study(copied.photos, copied.folder) == 0
    assert files_of(copied.folder) == before
    table = copied.out.partition("\n\n")[0]
    assert capsys.readouterr().out.startswith(table)


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(
    ("mixers", "seeds", "new"),
    [
        ((*MIXERS, "depthwise_conv"), 1, tuple(f"{place}/depthwise_conv" for place in PLACES)),
        (MIXERS, 2, tuple(f"runs/{name}/seed1" for name in FOLDERS)),
    ],
)
def test_finished_study_takes_more_mixers_and_seeds(copied, mixers, seeds, new):
    before, old = files_of(copied.folder), copied.results
    assert study(copied.photos, copied.folder, mixers=mixers, seeds=seeds) == 0
    after, results = files_of(copied.folder), copied.results
    assert {path: after[path] for path in before} == before
    assert after.keys() > before.keys()
    assert all(path.startswith(new) for path in after.keys() - before.keys())
    assert [row["name"] for row in results["mixers"]] == list(mixers)
    for row, was in zip(results["mixers"], old["mixers"]):
        assert [each["seed"] for each in row["seeds"]] == list(range(seeds))
        assert row["seeds"][0] == was["seeds"][0]
        assert row["latency_ms"] == was["latency_ms"]


@pytest.mark.parametrize(
    "change",
    [
        ("--epochs", "3"),
        ("--image-size", "20"),
        ("--batch-size", "4"),
        ("--learning-rate", "0.1"),
        ("--augment", "none"),
        ("--backbone", "study_xs"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(finished, capsys, change):
    before = files_of(finished.folder)
    assert study(finished.photos, finished.folder, *change, mixers=("pooling",)) == 2
    message = capsys.readouterr().err
    name, value = change[0].strip("-").replace("-", "_"), change[1]
    assert re.search(rf"Bericht ü holds another study: .*{name} was .* and is '?{value}'?", message)
    assert "Give another folder with --out" in message
    assert files_of(finished.folder) == before


def test_other_images_in_the_same_folder_are_refused(finished, tmp_path, capsys):
    photos = write_photos(tmp_path / "others", count=6)
    assert study(photos, finished.folder) == 2
    assert "fingerprint of the data was" in capsys.readouterr().err


def test_moved_images_are_the_same_images(copied, tmp_path):
    shutil.copytree(copied.photos, tmp_path / "moved" / copied.photos.name)
    assert study(tmp_path / "moved" / copied.photos.name, copied.folder) == 0


HOLD_LOCK = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    input()
"""


def test_folder_in_which_a_study_runs_is_refused(finished, capsys):
    call = [sys.executable, "-c", HOLD_LOCK, finished.folder / ".study.lock"]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert study(finished.photos, finished.folder) == 2
        other.communicate("\n")
    assert "another study is running" in capsys.readouterr().err
    assert study(finished.photos, finished.folder) == 0


def test_folder_with_something_else_in_it_is_refused(finished, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert study(finished.photos, tmp_path) == 2
    assert "is not empty and holds no study: give a new folder with --out" in capsys.readouterr().err
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "study.json").write_text("[1")
    assert study(finished.photos, tmp_path) == 2
    assert "study.json is damaged: give another folder with --out" in capsys.readouterr().err


def test_a_wrong_call_leaves_no_folder(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for wrong in (["--backbone", "study_xxxs"], ["--learning-rate", "-1"], ["--devices", "0"], ["--augment", "hard"]):
        assert study(finished.photos, "new", *wrong) == 2
    for mixer in ("neighborhood(window_size=99)", "window(window_siz=3)", "agent(num_agents=5)"):
        assert study(finished.photos, "new", mixers=(mixer,)) == 2
        assert f"{mixer} at 16 pixels: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_core")
def test_a_diverging_mixer_fails_and_the_others_go_on(copied, monkeypatch, capsys):
    train = Run.train

    def diverge(run, *rest):
        if run.label == "depthwise_conv" and run.settings.seed == 1:
            raise DivergedError("the training loss became NaN")
        return train(run, *rest)

    monkeypatch.setattr(Run, "train", diverge)
    mixers = (*MIXERS, "depthwise_conv")
    assert study(copied.photos, copied.folder, mixers=mixers, seeds=2) == 0
    *done, failed = copied.results["mixers"]
    assert [row["status"] for row in done] == ["done", "done"]
    assert failed["status"] == "failed"
    assert failed["error"] == "seed 1: the training loss became NaN"
    assert "failed: seed 1" in " ".join(capsys.readouterr().out.split())
    assert failed["error"] in (copied.folder / "report.html").read_text()

    monkeypatch.undo()
    assert study(copied.photos, copied.folder, mixers=mixers, seeds=2) == 0
    assert [row["status"] for row in copied.results["mixers"]] == ["done"] * 3


@pytest.mark.usefixtures("one_core")
def test_all_diverging_is_failed_work(finished, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".study.json.part").write_text("{")  # of a study that was killed at once
    assert study(finished.photos, tmp_path / "out", "--learning-rate", "1e30") == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for row in results["mixers"]:
        assert row["status"] == "failed"
        assert "loss became NaN or infinite in epoch" in row["error"]
    printed = capsys.readouterr().out
    assert "No mixer finished, so there is nothing to recommend." in printed
    assert "report.html" in printed


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(
    ("lost", "full"),
    [
        ("runs/pooling/seed0", "last.ckpt"),
        ("checkpoints", "pooling.json"),
        ("runs/pooling/costs.json", "costs.json"),
        ("runs/pooling/looks.json", "00_input.png"),
        ("results.json", "results.json"),
        ("results.csv", "results.csv"),
        ("report.html", "report.html"),
    ],
)
def test_full_disk_is_told_and_the_study_goes_on_when_there_is_room(copied, monkeypatch, capsys, lost, full):
    before, replace = copied.results, os.replace
    path = copied.folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def no_room(source, target):
        if Path(target).name == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_room)
    assert study(copied.photos, copied.folder) == 1
    message = capsys.readouterr().err
    assert str(copied.folder) in message
    assert f"{full}" in message
    assert "disk" in message
    monkeypatch.setattr(os, "replace", replace)
    assert study(copied.photos, copied.folder) == 0
    assert without_timings(copied.results) == without_timings(before)


def test_full_disk_under_an_overlay_is_told(copied, monkeypatch, capsys):
    (copied.folder / "runs" / "pooling" / "looks.json").unlink()
    save = Image.Image.save

    def no_room(self, place, *rest):
        if str(place).endswith("_rollout.png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, place, *rest)

    monkeypatch.setattr(Image.Image, "save", no_room)
    assert study(copied.photos, copied.folder) == 1
    message = capsys.readouterr().err
    assert "00_attention_rollout.png" in message
    assert "No space left" in message


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_output_that_cannot_be_written_is_a_wrong_call(finished, tmp_path, capsys, place):
    (tmp_path / "file").touch()
    assert study(finished.photos, tmp_path / place) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "file") in message
    assert "cannot be written" in message
    assert "Choose a folder in which you may write" in message


def test_output_among_the_images_is_a_wrong_call(finished, monkeypatch, capsys):
    assert study(finished.photos, finished.photos / "report") == 2
    assert "lies inside the folder of the images: give one outside it with --out" in capsys.readouterr().err
    monkeypatch.chdir(finished.photos)
    assert main(["study", ".", *OPTIONS]) == 2
    assert "study-Fotos März lies inside" in capsys.readouterr().err


def test_json_holds_the_results(finished, capsys):
    assert study(finished.photos, finished.folder, "--json") == 0
    assert json.loads(capsys.readouterr().out) == finished.results


@pytest.mark.usefixtures("one_core")
def test_too_little_shared_memory_means_one_after_the_other(copied, monkeypatch):
    def refuse(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    shutil.rmtree(copied.folder / "runs" / "pooling")
    shutil.rmtree(copied.folder / "runs" / FOLDERS[1])
    monkeypatch.setattr("saccade.study.runs._processes", lambda _: 2)
    monkeypatch.setattr("saccade.study.runs._train_at_once", refuse)
    with pytest.warns(UserWarning, match="trained one after the other"):
        assert study(copied.photos, copied.folder) == 0
    assert torch.get_num_threads() >= 1
