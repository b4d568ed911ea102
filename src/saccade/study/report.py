"""The report of a study: one page that holds everything it shows, and the table as CSV.

`write_report` turns results.json into plain values and words; how they look stands in `templates/`. Keys that are
missing leave out what they would show, so that a study of which a part failed still gets its page.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from saccade.explain.pages.html import embed_picture, place_on_track, render, write_text
from saccade.study.plots import Style, accuracy_against_cost, cost_against_side, mixer_styles, number_at, short

__all__ = ["write_csv", "write_report"]

# a measured interval, and the random order's beside it
_ENDS = ("low", "value", "high", "random_low", "random", "random_high")
_ROWS_SHOWN = 10  # of the gallery, before the others fold away


@dataclass(frozen=True)
class _Column:
    title: str
    note: str
    key: str
    show: Callable[[float], str]
    better: Callable[..., float] | None = min
    detail: Callable[[Mapping[str, Any]], str] = lambda mixer: ""


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html, a page that needs no other file and no network, from what results.json holds.

    Args:
        results: as in results.json. Any key of a mixer but its name may be missing.
        folder: the study's output folder: the page goes there, and the gallery's paths are relative to it. Pictures
            over 24 kB are shown at most 224 pixels wide and high; one that is missing is named as missing.

    Returns: the path of the page.
    Raises: WorkError if the page cannot be written.
    """
    page = render("saccade.study", "report.html.j2", _page(results, Path(folder)))
    return write_text(Path(folder) / "report.html", page)


def write_csv(results: Mapping[str, Any], path: Path) -> Path:
    """Write the table, one row a mixer, units in the names of the columns; what is not known stays empty.

    Raises: WorkError if the file cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_CSV)
    for mixer in results.get("mixers", ()):
        words = {key: mixer.get(key) for key in ("name", "status", "error", "checkpoint")}
        for key in ("method", "verdict"):
            words[f"faithfulness.{key}"] = (mixer.get("faithfulness") or {}).get(key)
        writer.writerow([words[key] if key in words else number_at(mixer, key) for key in _CSV.values()])
    return write_text(Path(path), table.getvalue())


def _page(results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    data, settings, versions = (results.get(key) or {} for key in ("data", "settings", "versions"))
    mixers = list(results.get("mixers") or ())
    styles = mixer_styles([mixer["name"] for mixer in mixers])
    done = sorted(
        (mixer for mixer in mixers if mixer.get("status") == "done"),
        key=lambda mixer: -(number_at(mixer, "accuracy.value") or 0),
    )
    verdict = {"sentence": "", "reasons": [], "trust": "", "leads": {}} | (results.get("recommendation") or {})
    done = [mixer | {"lead": verdict["leads"].get(mixer["name"])} for mixer in done]
    failed = [
        {"name": mixer["name"], "status": mixer.get("status") or "not run", "error": mixer.get("error") or "no figures"}
        for mixer in mixers
        if mixer.get("status") != "done"
    ]
    gallery = _gallery(done, folder)
    tested = sorted({method for mixer in done for method in _verdicts(mixer)})
    return {
        "data": {"name": "", "classes": [], "skipped": []} | data,
        "kind": results.get("compares", "mixer"),
        "verdict": verdict,
        "facts": _facts(results, data, settings, versions, done, mixers),
        "styles": styles,
        "columns": _COLUMNS,
        "rows": [_row(mixer, done, verdict) for mixer in done],
        "failed": failed,
        "summaries": [(mixer["name"], mixer["summary"]) for mixer in mixers if mixer.get("summary")],
        "cost_plots": _plots(accuracy_against_cost, done, styles),
        "side_plots": _plots(cost_against_side, done, styles),
        "gallery": gallery,
        "tested": tested,
        "untested": [method["name"] for method in gallery if method["name"] not in tested],
        "measures": _MEASURES,
        "faith": _faith(done),
        "settings": {name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in settings.items()},
        "versions": versions,
        "command": results.get("command", ""),
        "created": results.get("created", ""),
        "fingerprint": data.get("fingerprint", ""),
    }


def _plots(draw: Callable[..., str], mixers: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]) -> list[str]:
    return [svg for svg in (draw(mixers, styles, cost) for cost in ("latency", "flops")) if svg]


def _facts(
    results: Mapping[str, Any],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    versions: Mapping[str, Any],
    done: Sequence[Any],
    mixers: Sequence[Any],
) -> list[tuple[str, str]]:
    """The study in a few lines: name and value of each."""
    seeds = settings.get("seeds", "?")
    facts = {
        "Images": f"{data['train']} to learn from, {data['val']} held out" if {"train", "val"} <= set(data) else "",
        "Classes": str(len(data.get("classes") or ())),
        f"{str(results.get('compares', 'mixer')).capitalize()}s": f"{len(done)} of {len(mixers)} finished",
        "Network": _network(results, settings),
        "Training": f"{settings.get('epochs', '?')} epochs, {'one seed' if seeds == 1 else f'{seeds} seeds'}",
        "Device": str(versions.get("device", "")),
        "Made": str(results.get("created", ""))[:10],
    }
    return [(name, value) for name, value in facts.items() if value]


def _network(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Into which network each mixer was put, and the size of the images."""
    size = f"{settings.get('image_size', '?')} pixels"
    return f"{settings.get('backbone', '')} at {size}" if results.get("compares", "mixer") == "mixer" else f"at {size}"


def _row(mixer: Mapping[str, Any], done: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A mixer's line in the table: its standing, its accuracy drawn on the scale of all, a cell for each column."""
    name, tied = mixer["name"], verdict.get("tied") or ()
    tag = "most accurate" if name == verdict.get("winner") else "tied for best" if name in tied else ""
    if name in tied and name == verdict.get("suggested"):
        tag += ", cheapest"
    cells = []
    for column in _COLUMNS:
        value, every = number_at(mixer, column.key), [number_at(other, column.key) for other in done]
        known = [other for other in every if other is not None]
        text = "–" if value is None else column.show(value)
        best = column.better is not None and len(known) > 1 and text == column.show(column.better(known))
        cells.append({"text": text, "detail": column.detail(mixer) if known else "", "sort": value, "best": best})
    return {"name": name, "tag": tag, "cells": cells, "track": _track(mixer, "accuracy", done)}


def _track(
    mixer: Mapping[str, Any], key: str, mixers: Sequence[Mapping[str, Any]], ends: Sequence[str] = _ENDS[:3]
) -> list[float] | None:
    """Low, value and high as per cent of the way from the least to the greatest figure under `key` in all `mixers`."""
    every = [number_at(each, f"{key}.{end}") for each in mixers for end in _ENDS]
    known = [value for value in every if value is not None]
    own = [value for value in (number_at(mixer, f"{key}.{end}") for end in ends) if value is not None]
    if len(own) < len(ends):
        return None
    return place_on_track(own, known)


def _faith(done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each mixer whose pictures were tested: the verdict in words, and each figure beside a random order's."""
    rows = []
    for mixer in done:
        figures = mixer.get("faithfulness")
        if not figures:
            continue
        cells = []
        for key in _MEASURES:
            path = f"faithfulness.{key}"
            own, random = number_at(mixer, f"{path}.value"), number_at(mixer, f"{path}.random")
            tracks = [_track(mixer, path, done, names) for names in (_ENDS[:3], _ENDS[3:])]
            known = own is not None and random is not None
            text = f"{own:.2f}, random {random:.2f}".replace("-", "−") if known else "–"
            cells.append({"text": text, "tracks": tracks if known else []})
        rows.append({"name": mixer["name"], "verdict": figures.get("verdict", "–"), "cells": cells})
    return rows


def _verdicts(mixer: Mapping[str, Any]) -> dict[str, str]:
    """Whether the mixer's pictures are better than random order, for each method that was tested."""
    figures = mixer.get("faithfulness") or {}
    own = {figures["method"]: figures.get("verdict", "")} if "method" in figures else {}
    return own | {method: each["verdict"] for method, each in figures.get("others", {}).items()}


def _gallery(done: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """For each method the pictures as rows of images by columns of mixers."""
    shown = [mixer for mixer in done if mixer.get("gallery")]
    entries = [entry for mixer in shown for entry in mixer["gallery"]]
    methods = list(dict.fromkeys(method for entry in entries for method in entry.get("overlays", {})))
    inputs = [next(filter(None, row)) for row in zip_longest(*(mixer["gallery"] for mixer in shown))]
    first = [_picture(folder, entry.get("image")) for entry in inputs]
    galleries = []
    for method in methods:
        rows = []
        for i, entry in enumerate(inputs):
            cells = [_look(mixer["gallery"][i : i + 1], method, folder) for mixer in shown]
            rows.append({"picture": first[i], "label": entry.get("label", "?"), "cells": cells})
        parts = [part for part in (rows[:_ROWS_SHOWN], rows[_ROWS_SHOWN:]) if part]
        verdicts = [_verdicts(mixer).get(method, "") for mixer in shown]
        names = [mixer["name"] for mixer in shown]
        galleries.append({"name": method, "mixers": names, "verdicts": verdicts, "parts": parts})
    return galleries


def _look(entry: Sequence[Mapping[str, Any]], method: str, folder: Path) -> dict[str, Any]:
    """One overlay with what the mixer took the image for."""
    if not entry:
        return {"picture": None, "predicted": None}
    (seen,) = entry
    predicted, probability = seen.get("predicted"), number_at(seen, "probability")
    return {
        "picture": _picture(folder, seen.get("overlays", {}).get(method)),
        "predicted": predicted,
        "right": predicted == seen.get("label"),
        "sure": "" if probability is None else f"{100 * probability:.0f} %",
    }


def _picture(folder: Path, path: str | None) -> dict[str, Any] | None:
    """The file as a data URI, made smaller if it is large; None if it cannot be read."""
    try:
        return embed_picture((folder / str(path)).read_bytes())
    except OSError:
        return None


def _range(key: str, show: Callable[[float], str], joint: str = " to ") -> Callable[[Mapping[str, Any]], str]:
    """Words for the low and the high figure under `key`, or none."""

    def words(mixer: Mapping[str, Any]) -> str:
        ends = [number_at(mixer, f"{key}.{end}") for end in ("low", "high")]
        return joint.join(show(end) for end in ends if end is not None)

    return words


def _error(key: str) -> Callable[[Mapping[str, Any]], str]:
    def words(mixer: Mapping[str, Any]) -> str:
        error = number_at(mixer, f"{key}.error")
        return "" if error is None else f"± {error:.2f}"

    return words


def _faithful(mixer: Mapping[str, Any]) -> str:
    return str((mixer.get("faithfulness") or {}).get("verdict") or "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".replace("-", "−")


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _three(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}".replace(",", "\u202f")


def _growth(title: str, key: str) -> _Column:
    return _Column(title, "power of side", f"scaling.{key}.value", "{:.2f}".format, min, _error(f"scaling.{key}"))


_MEASURES = {
    "deletion": ("Deletion", "lower", "the probability that is left while what is marked is hidden first"),
    "insertion": ("Insertion", "higher", "the probability that is reached while what is marked is shown first"),
    "abpc": (
        "ABPC",
        "higher",
        "the probability while what is marked is hidden last, less that of deletion",
    ),
}
_COLUMNS = (
    _Column("Accuracy", "%, held out", "accuracy.value", _percent, max, _range("accuracy", _percent)),
    _Column("Behind best", "points", "lead.value", _percent, None, _range("lead", _percent)),
    _Column("Params", "", "params", short),
    _Column("FLOPs", "one image", "flops", short),
    _Column("Latency", "ms", "latency_ms.median", _three, min, _range("latency_ms", _three)),
    _Column("Speed", "images/s", "throughput", _three, max),
    _Column("Memory", "peak MiB", "peak_memory_mib", _three),
    _Column("Training", "a seed", "train_seconds", _seconds),
    _growth("FLOPs growth", "flops_exponent"),
    _growth("Time growth", "time_exponent"),
    _Column("Faithful", "ABPC", "faithfulness.abpc.value", "{:.2f}".format, max, _faithful),
)
_CSV = {
    "mixer": "name",
    "status": "status",
    "accuracy": "accuracy.value",
    "accuracy_low": "accuracy.low",
    "accuracy_high": "accuracy.high",
    "params": "params",
    "flops": "flops",
    "bytes": "bytes",
    "train_seconds": "train_seconds",
    "latency_ms": "latency_ms.median",
    "latency_low_ms": "latency_ms.low",
    "latency_high_ms": "latency_ms.high",
    "latency_batch": "latency_ms.batch",
    "throughput_images_per_second": "throughput",
    "peak_memory_mib": "peak_memory_mib",
    "flops_exponent": "scaling.flops_exponent.value",
    "flops_exponent_error": "scaling.flops_exponent.error",
    "time_exponent": "scaling.time_exponent.value",
    "time_exponent_error": "scaling.time_exponent.error",
    "faithfulness_method": "faithfulness.method",
    "faithfulness_verdict": "faithfulness.verdict",
    **{
        f"{measure}{'' if end == 'value' else f'_{end}'}": f"faithfulness.{measure}.{end}"
        for measure in _MEASURES
        for end in _ENDS
    },
    "checkpoint": "checkpoint",
    "error": "error",
}
