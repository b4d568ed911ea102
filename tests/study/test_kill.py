"""A study that SIGKILL ends at any moment and that goes on: table, pictures and weights of an unkilled one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saccade.cli import main
from tests.study.jpegs import write_photos
from tests.study.tables import without_timings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FEW = ("--mixers", "pooling,depthwise_conv", "--epochs", "6", "--seeds", "2", "--image-size", "16", "--batch-size", "4")
SOON = 2.0  # seconds, in which nothing may write any more
PATIENCE = 120.0  # seconds, on a busy machine


def call(photos, folder):
    return ["study", str(photos), "--out", str(folder), *FEW]


def start(photos, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "saccade.cli", *call(photos, folder)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid):
    """Whether the process is there, and no zombie that nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(true, process):
    """Wait until `true()`, or the process ends."""
    deadline = time.monotonic() + PATIENCE
    while not true() and process.poll() is None:
        assert time.monotonic() < deadline, "the study makes no progress"
        time.sleep(0.01)


def kill(process):
    """Kill the study alone, see that its workers write nothing more and end, and count them."""
    folder = Path(process.args[process.args.index("--out") + 1])
    workers = children_of(process.pid)
    process.kill()
    process.wait()
    time.sleep(SOON)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    deadline = time.monotonic() + PATIENCE  # one that was still importing looks for its parent when it is done
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "a worker outlives the study"
        time.sleep(0.1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
    return len(workers)


def what_is_left(folder):
    """Table, weights and pictures."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".png")]
    binary = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    table = without_timings(json.loads((folder / "results.json").read_text()))
    return table, binary


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("kill") / "photos", count=10)


@pytest.fixture(scope="module")
def unkilled(photos):
    folder = photos.parent / "unkilled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        assert main(call(photos, folder)) == 0
    return what_is_left(folder)


def test_killed_in_training_it_ends_as_if_it_had_not_been(photos, unkilled, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    with start(photos, folder) as process:
        wait_until((folder / "study.json").exists, process)
        assert main(call(photos, folder)) == 2  # one study in a folder at a time
        wait_until(lambda: any(folder.glob("runs/*/*/last.ckpt")), process)
        workers = kill(process)
    assert workers >= min(2, len(os.sched_getaffinity(0)))
    assert len([*folder.glob("runs/*/*/result.json")]) < 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert main(call(photos, folder)) == 0
    assert what_is_left(folder) == unkilled


@pytest.mark.slow
@pytest.mark.parametrize(
    "moments",
    [
        ("runs/*/*/last.ckpt", "runs/*/*/result.json"),
        ("study.json", "runs/*/costs.json"),
        ("checkpoints/*.safetensors", "gallery/*/03_input.png"),
        ("runs/*/looks.json", "results.json"),
    ],
)
def test_killed_twice_it_ends_as_if_it_had_not_been(photos, unkilled, tmp_path, moments):
    folder = tmp_path / "study"
    for moment in moments:
        with start(photos, folder) as process:
            wait_until(lambda moment=moment: any(folder.glob(moment)), process)
            if process.poll() is None:
                kill(process)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/**/*.json")}
    with start(photos, folder) as process:
        assert process.wait() == 0
    assert what_is_left(folder) == unkilled
    assert {path: path.stat().st_mtime_ns for path in done} == done
