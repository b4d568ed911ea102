"""The processes of a study: how it ends when one of them fails, or Ctrl-C reaches all, and a study under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saccade.cli import main
from tests.study.jpegs import write_photos

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core trains in one process"),
]

FEW = ("--mixers", "pooling,depthwise_conv", "--seeds", "1", "--image-size", "16", "--batch-size", "2")
LONG = ("--epochs", "1000")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("processes") / "photos", count=10)


@pytest.fixture
def long_study(photos, tmp_path):
    """A study that trains, as a process and the folder that it writes to."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "saccade.cli", "study", photos, "--out", tmp_path / "out", *FEW, *LONG]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while len([*tmp_path.glob("out/runs/*/*/last.ckpt")]) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
        process.kill()


def workers_of(process):
    """The children that train: not the one that cleans up after them."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_run_that_fails_ends_the_others_and_is_told(photos, tmp_path, capsys):
    lasting, failing = (tmp_path / "out" / "runs" / mixer / "seed0" for mixer in ("pooling", "depthwise_conv"))
    failing.mkdir(parents=True)
    (failing / "last.ckpt").write_text("of something else")
    assert main(["study", str(photos), "--out", str(tmp_path / "out"), *FEW, "--epochs", "100"]) == 2
    printed = capsys.readouterr()
    assert f"{failing} holds a last.ckpt of something else: choose another folder" in printed.err
    before = [path.stat().st_mtime_ns for path in lasting.glob("last.ckpt")]
    time.sleep(1)
    assert [path.stat().st_mtime_ns for path in lasting.glob("last.ckpt")] == before


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told(long_study):
    one, other = workers_of(long_study)
    os.kill(one, signal.SIGKILL)
    _, message = long_study.communicate(timeout=60)
    assert long_study.returncode == 1
    assert "a training process ended before its work did: memory ran out, or" in message
    assert "Traceback" not in message
    assert not Path(f"/proc/{other}").exists()


@pytest.mark.slow
def test_ctrl_c_ends_all_with_one_line(long_study):
    workers = workers_of(long_study)
    os.killpg(long_study.pid, signal.SIGINT)
    _, message = long_study.communicate(timeout=60)
    assert long_study.returncode == 130
    told = "saccade study: stopped; the same command goes on where it was, where the command can"
    assert message.splitlines()[-1] == told
    assert "Traceback" not in message
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("outside", [True, False])
def test_two_devices_share_each_run(photos, tmp_path, outside):
    """Started by torchrun, or by the study itself; started again it redoes nothing."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if outside else []
    call = ["study", photos, "--out", tmp_path / "out", *FEW, "--epochs", "1", "--devices", "2", "--json"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(2):
        command = [sys.executable, *torchrun, "-m", "saccade.cli", *call]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        found.append(json.loads(done.stdout))
        assert [row["status"] for row in found[-1]["mixers"]] == ["done", "done"]
    assert found[0]["mixers"] == found[1]["mixers"]
