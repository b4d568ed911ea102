"""The report of a study: what the page must hold for any study, what may be missing, and its table as CSV."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from saccade.errors import WorkError
from saccade.study.plots import accuracy_against_cost, cost_against_side, mixer_styles, pareto_front
from saccade.study.report import write_csv, write_report
from saccade.study.verdict import accuracy_interval, recommend

SIDES = [32, 48, 64, 96, 128]
# accuracy, parameters, FLOPs, milliseconds, exponent of FLOPs and of time, ABPC
MIXERS = {
    "attention": (0.962, 402_000, 21.4e6, 3.9, 2.61, 2.92, 0.31),
    "window": (0.981, 402_000, 14.9e6, 3.1, 2.00, 2.05, 0.40),
    "grid": (0.974, 402_000, 14.9e6, 3.2, 2.00, 2.07, 0.33),
    "halo": (0.979, 402_000, 17.2e6, 4.4, 2.01, 2.12, 0.36),
    "neighborhood": (0.980, 402_000, 15.8e6, 5.2, 2.01, 2.20, 0.38),
    "agent": None,
    "depthwise_conv": (0.976, 231_000, 8.1e6, 1.9, 2.00, 1.93, 0.22),
    "pooling": (0.921, 212_000, 7.2e6, 1.4, 2.00, 1.88, 0.02),
}


def make_study(folder, classes=tuple("0123456789"), gallery=10, seeds=2, skipped=3, held_out=359):
    """A study as the command leaves it, with correctness drawn from MIXERS, and its gallery's pictures in `folder`."""
    rng = np.random.default_rng(7)
    hard = rng.random(held_out)
    correct = {
        name: [hard + rng.normal(0, 0.02, held_out) < figures[0] for _ in range(seeds)]
        for name, figures in MIXERS.items()
        if figures
    }
    results = {
        "schema": 1,
        "saccade": "0.1.0",
        "command": "saccade study digits",
        "created": "2026-11-21T09:00:00Z",
        "settings": {
            "backbone": "study_xxs", "epochs": 12, "image_size": 32, "seeds": seeds, "batch_size": 64,
            "learning_rate": 0.003, "weight_decay": 0.05, "label_smoothing": 0.1, "augment": "light",
        },
        "versions": {
            "saccade": "0.1.0", "torch": "2.13.0", "python": "3.12.4", "platform": "Linux-6.1-x86_64",
            "processor": "x86_64", "threads": 2, "device": "cpu",
        },
        "data": {
            "name": "digits", "classes": list(classes), "train": 1438, "val": held_out, "fingerprint": "ab12cd34ef56",
            "skipped": [
                {"path": f"three/scan {i}.jpg", "reason": "truncated JPEG: 1312 bytes missing"} for i in range(skipped)
            ],
        },
        "mixers": [make_mixer(name, correct.get(name), folder, classes, gallery) for name in MIXERS],
    }  # fmt: skip
    results["recommendation"] = recommend(results, correct)
    return json.loads(json.dumps(results))


def make_mixer(name, correct, folder, classes, gallery):
    summary = f"What {name} does, in one sentence."
    if correct is None:
        error = "loss became NaN in epoch 3 of seed 1: lower learning_rate (0.003) or raise clip_norm."
        return {"name": name, "summary": summary, "status": "failed", "error": error}
    _, params, flops, latency, flops_exponent, time_exponent, abpc = MIXERS[name]
    interval = accuracy_interval(correct)
    growth = [(side / 32) ** flops_exponent for side in SIDES]
    slower = [(side / 32) ** time_exponent for side in SIDES]
    return {
        "name": name, "summary": summary, "status": "done", "error": None, "accuracy": vars(interval),
        "seeds": [{"seed": i, "accuracy": float(row.mean()), "train_seconds": 9.1} for i, row in enumerate(correct)],
        "params": params, "flops": flops, "bytes": 1_234_567, "train_seconds": 4.5 * latency,
        "latency_ms": {"median": latency, "low": 0.97 * latency, "high": 1.1 * latency, "batch": 1},
        "throughput": 2500 / latency, "peak_memory_mib": 12 * latency,
        "scaling": {
            "sides": SIDES, "flops": [flops * x for x in growth], "milliseconds": [latency * x for x in slower],
            "flops_exponent": {"value": flops_exponent, "error": 0.01},
            "time_exponent": {"value": time_exponent, "error": 0.1},
        },
        "faithfulness": {
            "method": "integrated_gradients", "images": 32,
            "deletion": make_figure(0.5 - 0.8 * abpc, 0.5), "insertion": make_figure(0.5 + 0.7 * abpc, 0.5),
            "abpc": make_figure(abpc, 0.0),
            "verdict": "better than random" if abpc > 0.1 else "not distinguishable from random",
        },
        "gallery": [make_entry(name, i, folder, classes) for i in range(gallery)],
        "checkpoint": f"checkpoints/{name}.safetensors",
    }  # fmt: skip


def make_figure(value, random):
    ends = {"low": value - 0.05, "high": value + 0.06, "random_low": random - 0.04, "random_high": random + 0.04}
    return {"value": value, "random": random, **ends}


def make_entry(name, i, folder, classes):
    """One image (a bright ring on a dark ground) with two overlays that look at different places."""
    where = folder / "gallery" / name
    where.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:32, :32]
    ring = np.exp(-((np.hypot(x - 16, y - 16) - 4 - i % 8) ** 2) / 6)
    paths = {}
    for kind, shift in {"input": None, "attention_rollout": 3.0, "integrated_gradients": -4.0}.items():
        picture = np.repeat(ring[..., None], 3, axis=2)
        if shift is not None:
            heat = np.exp(-((x - 16 - shift) ** 2 + (y - 10 - i) ** 2) / (20 + 4 * len(name)))
            picture = 0.5 * picture + 0.5 * np.stack([heat, heat**2, 0.3 * (1 - heat)], axis=2)
        paths[kind] = f"gallery/{name}/{i:02}_{kind}.png"
        Image.fromarray((255 * picture).astype(np.uint8)).save(folder / paths[kind])
    label = classes[i % len(classes)]
    predicted = classes[(i + 1) % len(classes)] if (i + len(name)) % 9 == 0 else label
    image = paths.pop("input")
    return {"image": image, "overlays": paths, "label": label, "predicted": predicted, "probability": 0.97 - 0.03 * i}


class Page(HTMLParser):
    """Tags with their attributes, ids, headings, and the words that a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._hidden = [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag in ("style", "script")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data):
        self.words += "" if self._hidden else data.replace("\u00a0", " ")

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    results = make_study(folder)
    return results, write_report(results, folder).read_text(encoding="utf-8")


def test_page_loads_nothing(study):
    page = Page(study[1])
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "base", "object")]
    assert not [attrs for _, attrs in page.tags if any(name in attrs for name in ("srcset", "data", "background"))]
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name.endswith("href")]
    assert links, "the pictures point at their own marks"
    assert all(link.startswith("#") for link in links)
    assert not any("src" in script for script in page.all("script"))
    assert not re.findall(r"url\((?!#)|@import|@font-face", study[1])


def test_every_mixer_every_picture_and_the_sentence_are_there(study):
    results, text = study
    page = Page(text)
    assert results["recommendation"]["sentence"] in page.words
    assert all(reason in page.words for reason in results["recommendation"]["reasons"])
    assert results["recommendation"]["trust"] in page.words
    rows = re.findall(r'<th scope="row" data-sort="(\w+)"', text)
    assert sorted(rows) == sorted(MIXERS)
    assert rows[-1] == "agent"
    assert "loss became NaN in epoch 3" in page.words
    assert len(page.all("img")) == 2 * 10 * (1 + 7)  # two methods: the input and seven mixers
    for words in ("saccade study digits", "three/scan 0.jpg", "truncated JPEG", "2.13.0", "learning_rate"):
        assert words in page.words
    assert "attention rollout were not tested" in page.words


def test_page_can_be_read_aloud(study):
    page = Page(study[1])
    assert all(image["alt"] for image in page.all("img"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert len(page.all("h1")) == 1
    drawings = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(drawings) == 4
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "an id of one picture would be found in another"


def test_ids_that_are_used_exist(study):
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', study[1]))
    assert used <= set(re.findall(r' id="([^"]+)"', study[1]))


def test_a_tie_is_called_a_tie_and_no_mixer_is_called_most_accurate(study):
    results, text = study
    assert results["recommendation"]["winner"] is None
    words = Page(text).words
    assert "cannot be told apart" in words
    assert "tied for best" in words
    assert "tied for best, cheapest" in words
    assert "most accurate" not in words


def test_names_are_escaped(tmp_path):
    results = make_study(tmp_path, classes=("<b>bold</b>", '"><script>alert(1)</script>'), gallery=2)
    results["data"]["name"] = "<i>mine</i>"
    results["data"]["skipped"] = [{"path": "<img src=x>.png", "reason": "a & b"}]
    text = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert not re.findall(r"<b>bold|<i>mine|<img src=x|<script>alert", text)
    words = Page(text).words
    assert all(name in words for name in ("<b>bold</b>", "<i>mine</i>", "<img src=x>.png", "a & b"))


PARTS = ("Where each mixer looks", "What larger images cost", "What accuracy costs")
KEYS = ["gallery", "scaling", "faithfulness", "latency_ms", "accuracy", "flops", "summary"]


def test_any_key_of_a_mixer_may_be_missing(tmp_path):
    results = make_study(tmp_path, gallery=1)
    done = [mixer for mixer in results["mixers"] if mixer["status"] == "done"]
    for mixer, key in zip(done, KEYS):
        del mixer[key]
    words = Page(write_report(results, tmp_path).read_text(encoding="utf-8")).words
    assert all(name in words for name in MIXERS)
    assert all(part in words for part in PARTS)


def test_what_no_mixer_has_is_left_out(tmp_path):
    results = make_study(tmp_path, gallery=1)
    results["mixers"] = [{key: mixer.get(key) for key in ("name", "status")} for mixer in results["mixers"]]
    words = Page(write_report(results, tmp_path).read_text(encoding="utf-8")).words
    assert all(name in words for name in MIXERS)
    assert not any(part in words for part in PARTS)
    assert "Faithfulness was not measured" in words


def test_nearly_empty_studies_get_a_page(tmp_path):
    write_report({}, tmp_path)
    failed = {"mixers": [{"name": "window", "status": "failed", "error": "out of memory"}]}
    assert "out of memory" in write_report(failed, tmp_path).read_text(encoding="utf-8")


def test_large_pictures_shrink_and_lost_ones_are_named(tmp_path):
    results = make_study(tmp_path, gallery=2)
    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    entry = results["mixers"][1]["gallery"][0]
    Image.fromarray(noise).save(tmp_path / entry["overlays"]["attention_rollout"])
    (tmp_path / entry["overlays"]["integrated_gradients"]).unlink()
    path = write_report(results, tmp_path)
    assert path.stat().st_size < 600_000
    assert path.read_text(encoding="utf-8").count("no picture") == 1


def test_many_skipped_files_and_many_images_fold_away(tmp_path):
    text = write_report(make_study(tmp_path, gallery=13, skipped=40), tmp_path).read_text(encoding="utf-8")
    assert "<summary>40 images left out</summary>" in text
    assert text.count("<summary>3 more images</summary>") == 2


def test_same_results_same_page(study, tmp_path):
    results = make_study(tmp_path)
    assert write_report(results, tmp_path).read_text(encoding="utf-8") == study[1]


def test_nothing_is_left_behind_when_the_page_cannot_be_written(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(WorkError, match=r"report\.html could not be written"):
        write_report({}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_csv_has_a_row_a_mixer_and_no_words_for_what_is_unknown(study, tmp_path):
    results, _ = study
    with write_csv(results, tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["mixer"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(MIXERS)
    window = next(mixer for mixer in results["mixers"] if mixer["name"] == "window")
    assert float(rows["window"]["accuracy"]) == window["accuracy"]["value"]
    assert float(rows["window"]["latency_ms"]) == 3.1
    assert rows["window"]["faithfulness_verdict"] == "better than random"
    assert rows["agent"]["status"] == "failed"
    assert rows["agent"]["accuracy"] == rows["agent"]["abpc_random_high"] == ""


def test_front_holds_what_nothing_dominates():
    rng = np.random.default_rng(0)
    points = {str(i): (cost, accuracy) for i, (cost, accuracy) in enumerate(rng.integers(0, 12, (40, 2)).tolist())}
    front = pareto_front(points)
    for name, (cost, accuracy) in points.items():
        rivals = [p for p in points.values() if p[0] <= cost and p[1] >= accuracy and p != (cost, accuracy)]
        assert not rivals or name not in front
        assert rivals or any(points[kept] == (cost, accuracy) for kept in front)


@pytest.mark.parametrize("count", [1, 8, 20])
def test_labels_keep_apart(count):
    rng = np.random.default_rng(count)
    mixers = [
        {
            "name": f"mixer_{i}",
            "accuracy": {"value": value, "low": value - 0.02, "high": value + 0.01},
            "latency_ms": {"median": cost},
            "scaling": {"sides": SIDES, "milliseconds": [cost * side**2 for side in SIDES]},
        }
        for i, (value, cost) in enumerate(rng.uniform((0.8, 1), (0.98, 6), (count, 2)))
    ]
    styles = mixer_styles([mixer["name"] for mixer in mixers])
    assert len(set(styles.values())) == count
    for draw in (accuracy_against_cost, cost_against_side):
        svg = draw(mixers, styles, "latency")
        spots = [label_place(svg, mixer["name"]) for mixer in mixers]
        pairs = [(a, b) for i, a in enumerate(spots) for b in spots[:i]]
        assert not [pair for pair in pairs if all(abs(a - b) < size for a, b, size in zip(*pair, (40, 9)))]


def label_place(svg, name):
    """Left end and baseline of the text that begins with the name."""
    found = re.search(rf'<text [^>]*? x="([-\d.]+)" y="([-\d.]+)"[^>]*>{name}\b', svg)
    return float(found[1]), float(found[2])
