"""Help of every command: it ends with an example, and the example runs in an empty folder with what it names."""

import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import saccade
from saccade.cli import COMMANDS, build_parser, main
from saccade.data import load_images
from saccade.training import save_checkpoint
from tests.data.pictures import noise, write

RECORDED = Path(__file__).parents[1] / "recorded"
SLOW = {"study"}  # its example takes over ten seconds


def example_of(name):
    return import_module(f"saccade.cli.{name}").EXAMPLE


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_on_one_line(name, capsys):
    assert main([name, "--help"]) == 0
    *_, last = capsys.readouterr().out.rstrip().splitlines()
    assert last == f"example: {example_of(name)}"
    assert example_of(name).startswith(f"saccade {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for(name):
    for action in build_parser(name)._actions:
        assert action.help, action.dest


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The files that examples name."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photo.jpg", noise(40, 60))
    torch.manual_seed(0)
    model = saccade.create_model("study_xxs", num_classes=10, mixer="window")
    data = load_images("digits")
    config = {"model": "study_xxs", "options": {"mixer": "window"}, "classes": list(data.classes)}
    about = {"image_size": data.image_size, "mean": data.mean, "std": data.std}
    save_checkpoint("study-digits/checkpoints/window", model, {**config, **about})
    shutil.copytree(RECORDED / "halonet", tmp_path / "tests" / "recorded" / "halonet")
    return tmp_path


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS])
def test_example_runs_and_names_what_it_leaves(name, workplace, capsys):
    before = {path.name for path in workplace.iterdir()}
    assert main(shlex.split(example_of(name))[1:]) == 0
    printed = capsys.readouterr().out
    assert printed
    for path in workplace.iterdir():
        if path.name not in before:
            assert path.name in printed or path.name in example_of(name)


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 2
    listed = capsys.readouterr().out
    assert main(["--help"]) == main(["-h"]) == 0
    assert capsys.readouterr().out == 2 * listed
    assert listed.rstrip().endswith("example: saccade study digits")
    for name, summary in COMMANDS.items():
        assert f"  {name} " in listed
        assert summary in listed


def test_python_runs_it_as_a_module():
    call = [sys.executable, "-m", "saccade.cli"]
    assert subprocess.run([*call, "--version"], capture_output=True, text=True).stdout == (
        f"saccade {saccade.__version__}\n"
    )
    wrong = subprocess.run([*call, "studdy"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "saccade: there is no command 'studdy': did you mean study?\n"
