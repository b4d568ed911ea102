"""The page of explanations: what it must hold for any network, what may be missing, and that its figures are right."""

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from saccade.errors import InputError
from saccade.explain import explain, faithfulness, parameter_randomization
from saccade.explain.overlay import colour_scale, full_colour, overlay
from saccade.explain.pages import Effort, examine, write_page
from saccade.explain.pages.page import judge
from tests.explain.nets import ConvNet, images

CLASSES = ("cat {1}", "dog & <b>", "bird", "fish")
EFFORT = Effort(steps=3, repeats=20, options={"integrated_gradients": {"steps": 5}})
MODEL = {"name": "ConvNet", "weights": "from net.pt", "trained": True, "params": 99, "image_size": 8}


def make(folder, model=None, batch=1, model_row=MODEL, **options):
    pixels = [torch.full((3, 8, 8), 60 * i, dtype=torch.uint8) for i in range(batch)]
    names = [f"{i}/photo {i}.jpg" for i in range(batch)]
    found = examine(
        ConvNet() if model is None else model, pixels, images(batch), folder,
        names=names, classes=CLASSES, effort=EFFORT, **options
    )  # fmt: skip
    found |= {
        "model": model_row,
        "command": "saccade explain x",
        "code": "import saccade",
        "created": "today",
        "versions": {"torch": "2"},
    }
    return found, write_page(found, folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Text, pictures, and whether tags are closed."""

    VOID = ("meta", "img", "br", "wbr", "line", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.sources = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split()).replace("\u00a0", " ")


def test_the_page_holds_all_and_loads_nothing(tmp_path):
    found, html = make(tmp_path, batch=2, methods=("lrp", "ig", "normgrad"), target=1)
    page = Page(html)
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "http" not in re.sub("http-equiv", "", html)
    assert len(page.sources) == 2 * (1 + 2 * 3 + 2)  # input, maps with scales, contrast
    for words in (
        "dog & <b>", "Where ConvNet looks on 2 images", "photo 1.jpg", "relevance", "integrated_ gradients", "normgrad",
        "Why “dog & <b>” and not", "It marks above all", "Shuffled weights give", "Taken by", "biases",
        "the explained logit", "saccade explain x", "import saccade", "reads body, 4 × 4 NCHW",
    ):  # fmt: skip
        assert words in page.text, words
    assert "cat {1}" in page.text
    assert found["left_out"] == []


def test_figures_are_those_of_the_library(tmp_path):
    found, _ = make(tmp_path, batch=2, methods=("relevance", "integrated_gradients"), target=1)
    x = images(2)
    for method, options in (("relevance", {}), ("integrated_gradients", {"steps": 5})):
        each = explain(ConvNet(), x, method=method, target=1, **options)
        score = faithfulness(ConvNet(), x[1:], each.map[1:], target=1, steps=3, repeats=20)
        mine = found["images"][1]["maps"][method]
        assert mine["abpc"] == vars(score.abpc)
        assert mine["verdict"] == score.verdict
        shuffled = parameter_randomization(ConvNet(), x, method=method, target=1, **options)
        assert found["methods"][method]["sanity"]["value"] == shuffled.similarity[-1].value
    probability = ConvNet().eval()(x).softmax(1)
    for row, expected in zip(found["images"], probability):
        assert [each["label"] for each in row["top"]] == expected.argsort(descending=True).tolist()
        assert row["probability"] == pytest.approx(expected[1].item(), abs=1e-6)
        rivals = expected.clone()
        rivals[1] = 0
        assert row["contrast"]["label"] == rivals.argmax()


def test_the_ledger_adds_up(tmp_path):
    found, _ = make(tmp_path, batch=3, methods=("relevance",))
    account = found["methods"]["relevance"]["account"]
    assert account["pixels"] + sum(account["kinds"].values()) == pytest.approx(account["start"], rel=1e-4)
    logits = ConvNet().eval()(images(3))
    assert account["start"] == pytest.approx(logits.amax(1).sum().item(), rel=1e-5)


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path):
    found, html = make(tmp_path, methods=("attention_rollout", "gradient"))
    assert [each["method"] for each in found["left_out"]] == ["attention_rollout"]
    assert "attention_rollout could not be used. ConvNet shows no attention" in Page(html).text
    assert found["images"][0]["contrast"] is None  # no map with a sign
    with pytest.raises(InputError, match=r"no method serves this model\. attention_rollout: ConvNet shows no att"):
        make(tmp_path, methods=("rollout",))


def test_by_default_methods_name_themselves(tmp_path):
    found, _ = make(tmp_path)
    assert set(found["methods"]) == {"integrated_gradients", "relevance", "normgrad"}
    (row,) = found["images"]
    assert [row["label"], row["contrast"]["label"]] == [each["label"] for each in row["top"][:2]]


def test_random_weights_are_named(tmp_path):
    _, html = make(tmp_path, methods=("gradient",), model_row=MODEL | {"trained": False, "weights": "random"})
    assert "The weights are random. No weights were given" in Page(html).text
    _, html = make(tmp_path, methods=("gradient",))
    assert "The weights are random" not in Page(html).text


def test_wrong_calls(tmp_path):
    with pytest.raises(InputError, match="method is 'relevence': did you mean relevance"):
        make(tmp_path, methods=("relevence",))
    with pytest.raises(InputError, match="target is 4"):
        make(tmp_path, target=4)
    with pytest.raises(InputError, match="class 2 stands in target and in against"):
        make(tmp_path, methods=("relevance",), target=2, against=2)
    with pytest.raises(InputError, match="there are 4 class names but the model knows 5"):
        make(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), methods=("gradient",))


@pytest.mark.parametrize(
    ("order", "weights", "tag", "good"),
    [
        ("better than random", "follows the weights", "passes both tests", True),
        ("better than random", "undecided", "one test open", None),
        ("better than random", None, "one test open", None),
        ("better than random", "shuffled weights give the same map", "do not trust it", False),
        ("worse than random", "follows the weights", "worse than chance", False),
        ("not distinguishable from random", "follows the weights", "no better than chance", False),
    ],
)
def test_verdicts_in_plain_words(order, weights, tag, good):
    sanity = weights and {"verdict": weights, "value": 0.83}
    said = judge({"verdict": order, "abpc": {"difference": 0.2}}, {"sanity": sanity, "sanity_failed": "NaN"})
    assert (said["tag"], said["good"]) == (tag, good)
    if weights == "shuffled weights give the same map":
        assert said["weights"] == "Shuffled weights give the same map (similarity 0.83): do not trust it."


def test_a_gain_that_is_certain_and_tiny_is_none():
    about = {"sanity": {"verdict": "follows the weights", "value": 0.0}}
    for order in ("better than random", "worse than random"):
        said = judge({"verdict": order, "abpc": {"difference": 0.004}}, about)
        assert said["tag"] == "no better than chance"
        assert "by less than 0.01" in said["order"]


def test_scales_show_the_colours_of_overlays():
    for signed in (False, True):
        bar = colour_scale(signed=signed, width=5, height=2)
        ramp = torch.linspace(-1 if signed else 0, 1, 5).expand(2, 5)
        grey = torch.full((3, 2, 5), 128, dtype=torch.uint8)
        assert torch.equal(bar, overlay(grey, ramp, signed=signed, percentile=100))
    map = torch.tensor([[-4.0, 1.0], [2.0, 0.0]])
    assert full_colour(map) == 4.0
    assert full_colour(map, signed=False) == 2.0
