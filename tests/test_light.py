"""What somebody waits for who only asks for help: nothing heavy is imported before it is used."""

import subprocess
import sys
import time

import pytest

import saccade
from saccade.cli import COMMANDS

HEAVY = ("torch", "lightning", "numpy", "PIL", "jsonargparse", "rich", "matplotlib", "sklearn", "datasets", "captum")


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout


def heavy_after(code):
    found = run("-c", f"{code}\nimport sys\nprint('heavy:', *(name for name in {HEAVY} if name in sys.modules))")
    return set(found.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code", ["import saccade", "import saccade.cli", "from saccade.cli import main; main(['--help'])"]
)
def test_nothing_heavy_is_imported(code):
    assert heavy_after(code) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_its_parser_alone(command):
    assert heavy_after(f"from saccade.cli import main; main([{command!r}, '--help'])") == {"jsonargparse"}


def test_help_takes_under_three_tenths_of_a_second():
    def seconds():
        start = time.perf_counter()
        run("-m", "saccade.cli", "--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_every_name_on_the_front_door_is_there():
    assert all(hasattr(saccade, name) for name in saccade.__all__)
    assert dir(saccade) == saccade.__all__ == sorted(saccade.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'saccade' has no attribute 'nonsense'"):
        saccade.nonsense  # noqa: B018
