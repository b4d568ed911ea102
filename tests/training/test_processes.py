"""Several processes give what one gives, and a killed process loses nothing but its last epoch."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.errors import InputError, WorkError
from saccade.training import fit
from tests.training.nets import SETTINGS, Net, assert_same_bits, exact_net, make_data, weights_of

ROOT = Path(__file__).parents[2]

RUN = """
import sys
from dataclasses import replace
import torch
from tests.training.nets import SETTINGS, Net, make_data
from saccade.training import fit
torch.set_num_threads(1)
settings = replace(SETTINGS, epochs=int(sys.argv[2]), devices=int(sys.argv[3]), augment="light")
if __name__ == "__main__":
    fit(Net(), make_data(), settings, sys.argv[1], on_epoch=lambda row: print(row["epoch"], flush=True))
"""

TWO_RUNS = """
import sys
from dataclasses import replace
from tests.training.nets import SETTINGS, exact_net, make_data
from saccade.training import fit
for part in "ab":
    print(fit(exact_net(), make_data(), replace(SETTINGS, devices=2), sys.argv[1] + part).accuracy)
"""


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_give_the_weights_of_one_with_the_same_total_batch(tmp_path, strategy):
    rows = []
    one = fit(exact_net(), make_data(), SETTINGS, tmp_path / "one")
    settings = replace(SETTINGS, devices=2, strategy=strategy)
    two = fit(exact_net(), make_data(), settings, tmp_path / "two", on_epoch=rows.append)  # batches of 13: 7 and 6
    for name, value in weights_of(one).items():
        torch.testing.assert_close(weights_of(two)[name], value, rtol=1e-9, atol=1e-12)
    assert torch.equal(two.predicted, one.predicted)
    assert torch.equal(two.correct, one.correct)
    assert [{**row, "epochs": 3} for row in two.history] == rows
    for ours, theirs in zip(one.history, two.history, strict=True):
        assert {**ours, "seconds": 0} == pytest.approx({**theirs, "seconds": 0}, rel=1e-6)


def run_and_kill(folder, epochs, devices):
    """Start the run `RUN` in a process of its own, kill it after three epochs and tell which the last was."""
    command = [sys.executable, "-c", RUN, str(folder), str(epochs), str(devices)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for _ in range(3):
            epoch = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    return epoch


def test_killed_twice_ends_with_the_same_bits(tmp_path):
    assert run_and_kill(tmp_path / "killed", 40, 1) == 2
    epoch = run_and_kill(tmp_path / "killed", 40, 1)
    rows, settings = [], replace(SETTINGS, epochs=40, devices=1, augment="light")
    killed = fit(Net(), make_data(), settings, tmp_path / "killed", on_epoch=rows.append)
    assert rows[0]["epoch"] > epoch >= 5
    whole = fit(Net(), make_data(), settings, tmp_path / "whole")
    assert_same_bits(weights_of(killed), weights_of(whole))
    assert torch.equal(killed.predicted, whole.predicted)


@pytest.mark.slow
def test_killed_program_takes_its_processes_along(tmp_path):
    run_and_kill(tmp_path, 10_000, 2)
    time.sleep(2)
    before = (tmp_path / "last.ckpt").stat().st_mtime
    time.sleep(2)
    assert (tmp_path / "last.ckpt").stat().st_mtime == before


def test_model_that_cannot_be_sent_to_processes_says_what_to_do(tmp_path):
    model = Net()
    model.hook = lambda x: x
    with pytest.raises(InputError, match=r"cannot be sent to other processes.*top of a module.*torchrun"):
        fit(model, make_data(), replace(SETTINGS, devices=2), tmp_path)


@pytest.mark.slow
def test_error_of_a_process_reaches_the_caller(tmp_path):
    settings = replace(SETTINGS, devices=2, learning_rate=1e30, clip_norm=0)
    with pytest.raises(WorkError, match="training loss became NaN or infinite in epoch 1"):
        fit(Net(), make_data(), settings, tmp_path)
    with pytest.raises(InputError, match="2 images in batches of 16 cannot be shared out to 3 devices"):
        fit(Net(), make_data(val=2), replace(SETTINGS, devices=3), tmp_path / "few")


@pytest.mark.slow
def test_torchrun_gives_the_weights_of_one_process(tmp_path):
    (tmp_path / "script.py").write_text(TWO_RUNS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, tmp_path / "script.py", tmp_path / "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "1.0\n" * 4, done.stderr  # two runs in two processes
    one = fit(exact_net(), make_data(), SETTINGS, tmp_path / "one")
    for part in "ab":
        two = fit(exact_net(), make_data(), replace(SETTINGS, devices=2), tmp_path / f"run{part}")
        for name, value in weights_of(one).items():
            torch.testing.assert_close(weights_of(two)[name], value, rtol=1e-9, atol=1e-12)
