"""The main job: compare mixers, or whole networks, on somebody's own images, and report."""

from saccade.explain.pages.progress import Progress
from saccade.study.report import write_csv, write_report
from saccade.study.run import run_study
from saccade.study.settings import (
    MixerChoice,
    NetworkChoice,
    StudySettings,
    default_epochs,
    parse_mixer,
    parse_mixers,
)
from saccade.study.verdict import accuracy_interval, compare, recommend

__all__ = [
    "MixerChoice",
    "NetworkChoice",
    "Progress",
    "StudySettings",
    "accuracy_interval",
    "compare",
    "default_epochs",
    "parse_mixer",
    "parse_mixers",
    "recommend",
    "run_study",
    "write_csv",
    "write_report",
]
