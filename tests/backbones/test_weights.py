"""Weights of networks: back from a file or a hub, with another head, and refused where they do not fit."""

import shutil
import sys

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.backbones import load_model
from saccade.backbones.weights import read_weights
from saccade.errors import InputError
from saccade.training import save_checkpoint
from tests.recorded.networks import recorded_networks

OPTIONS = {"mixer": "neighborhood", "mixer_options": {"window_size": 3}, "drop_path_rate": 0.1}
CONFIG = {"model": "study_xxs", "options": OPTIONS, "classes": list("abcde"), "image_size": 32}


def build(**options):
    torch.manual_seed(7)
    return saccade.create_model("study_xxs", **{"num_classes": 5, **options}).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def saved(tmp_path):
    """A network with options, and its checkpoint."""
    model = build(**OPTIONS)
    with torch.no_grad():
        for parameter in model.parameters():  # away from 0 and 1, where norms and biases start
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, save_checkpoint(tmp_path / "net", model, CONFIG)


def unlabelled(path):
    """The same weights without the JSON that says what they are."""
    return shutil.copy(path, path.with_name("bare.safetensors"))


def load(path, **options):
    torch.manual_seed(8)
    return saccade.create_model("study_xxs", pretrained=path, **options).eval()


def test_a_checkpoint_brings_options_and_classes(saved, images):
    model, path = saved
    for source in (path, str(path)):
        assert torch.equal(load(source)(images), model(images))
    loaded = load_model(path)
    assert not loaded.model.training
    assert torch.equal(loaded.model(images), model(images))
    assert loaded.config == CONFIG


def test_options_that_are_given_go_before_those_of_the_checkpoint(saved):
    blocks = load(saved[1], drop_path_rate=0.5).stages[1].blocks
    assert blocks[-1].drop_path.probability == pytest.approx(0.5)


def test_another_head_starts_anew_on_the_same_trunk(saved, images):
    model, path = saved
    features = model.forward_features(images)
    other = load(path, num_classes=3)
    assert other(images).shape == (2, 3)
    assert torch.equal(other.forward_features(images), features)
    assert_close(load(path, num_classes=0)(images), features.mean((2, 3)))
    assert torch.equal(load(path, features_only=True)(images)[-1], features)


def test_a_trunk_without_head_and_a_head_without_bias_give_the_trunk(saved, tmp_path, images):
    model, _ = saved
    state = model.state_dict()
    for lacking in ({"head.weight", "head.bias"}, {"head.bias"}):
        part = {key: value for key, value in state.items() if key not in lacking}
        path = save_checkpoint(tmp_path / "part", part, CONFIG)
        found = load(path)
        assert torch.equal(found.forward_features(images), model.forward_features(images))
        assert not torch.equal(found.head.weight, model.head.weight)


def test_weights_of_somebody_else_need_no_json(saved, tmp_path, images):
    model, _ = saved
    torch.save({"state_dict": model.state_dict()}, tmp_path / "plain.pth")
    assert torch.equal(load(tmp_path / "plain.pth", num_classes=5, **OPTIONS)(images), model(images))
    with pytest.raises(InputError, match=r"plain.pth does not say which network it holds.*create_model\(name, pretr"):
        load_model(tmp_path / "plain.pth")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: saccade.create_model("study_xs", pretrained=path), "weights of study_xxs, not of study_xs. Call"),
        (lambda path: load(path, mixer="pooling", mixer_options={}), r"; unexpected: .*qkv.* and \d+ more. Build the"),
        (lambda path: load(path, mixer="agent", mixer_options={}), "; missing: stages.0.blocks.0.mixer.an_bias, "),
        (
            lambda path: load(path, dims=(16, 64)),
            "; of another shape: .*Build the network with the options that it",
        ),
        (
            lambda path: saccade.create_model("halonet26t", pretrained=unlabelled(path)),
            "missing: stem.conv1.conv.weight, .* more; unexpected: .*. The closest network is study_xxs: saccade.",
        ),
        (lambda path: load(f"{path}.pt"), "is not there: give a"),
        (lambda path: load("nowhere/net.safetensors"), "is not there: give a"),
        (lambda path: load("./nowhere/net"), "is not there: give a"),
        (lambda path: load(True), "study_xxs has no published weights. Give a path or a hub id"),
    ],
)
def test_what_does_not_fit_is_named(saved, call, message):
    with pytest.raises(InputError, match=message):
        call(saved[1])


def official(name, **state):
    """A state dict of random numbers with the names and shapes that the authors' code has."""
    record = next(record for _, record in recorded_networks() if record["model"] == name)
    return {key: torch.rand(shape) for key, shape in record["state"].items()} | state


def test_official_weights_are_recognised_and_another_variant_is_named(tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"state_dict": official("halonet26t")}, path)
    model = saccade.create_model("halonet26t", path)
    assert torch.equal(model.head.weight, torch.load(path)["state_dict"]["head.fc.weight"])
    with pytest.raises(
        InputError,
        match=r"unexpected: stem.conv2.conv.weight.*of another shape: stem.conv1.conv.weight is \(24, 3, 3, 3\), not "
        r"\(64, 3, 7, 7\).*The closest network is halonet26t: saccade.create_model\('halonet26t'",
    ):
        saccade.create_model("halonet_h1", path)


def test_the_number_of_classes_comes_from_official_weights(tmp_path):
    path = tmp_path / "official.pth"
    state = official("halonet26t", **{"head.fc.weight": torch.rand(3, 2048), "head.fc.bias": torch.rand(3)})
    torch.save(state, path)
    assert saccade.create_model("halonet26t", path).num_classes == 3
    assert saccade.create_model("halonet26t", path, num_classes=4).num_classes == 4


def test_pretrained_true_asks_the_hub_for_the_published_weights(hub, tmp_path):
    asked = []
    state = official("halonet26t")
    save_checkpoint(tmp_path / "model", state, {})
    (tmp_path / "model.json").unlink()

    def download(repo, name):
        asked.append((repo, name))
        return str(tmp_path / name)

    hub(download)
    model = saccade.create_model("halonet26t", pretrained=True)
    assert asked == [("timm/halonet26t.a1h_in1k", "model.safetensors")]
    assert torch.equal(model.stem[0].conv.weight, state["stem.conv1.conv.weight"])


@pytest.fixture
def hub(monkeypatch):
    """A hub of one's own: downloads become calls of a function."""
    module = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")

    def answer(download):
        monkeypatch.setattr(module, "hf_hub_download", download)
        return module

    return answer


def test_hub_ids_are_asked_for_where_no_such_path_is(saved, hub, tmp_path, monkeypatch, images):
    model, path = saved
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return str(path)

    hub(download)
    assert torch.equal(load("somebody/some-net")(images), model(images))
    assert asked == [("somebody/some-net", "model.safetensors")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody").mkdir()
    shutil.copy(path, tmp_path / "somebody" / "net.safetensors")
    assert read_weights("somebody/net.safetensors").config == {}
    assert len(asked) == 1


def test_older_pickled_weights_of_the_hub_are_taken_where_there_are_no_others(saved, hub, tmp_path):
    torch.save(saved[0].state_dict(), tmp_path / "pytorch_model.bin")

    def download(repo, name):
        if name == "model.safetensors":
            raise module.errors.EntryNotFoundError(name)
        return str(tmp_path / name)

    module = hub(download)
    assert read_weights("somebody/net").state.keys() == saved[0].state_dict().keys()


def test_a_hub_without_weights_and_one_that_does_not_answer_are_told_apart(hub):
    def download(repo, name):
        raise (module.errors.EntryNotFoundError if repo == "a/empty" else ConnectionError)(name)

    module = hub(download)
    with pytest.raises(InputError, match=r"a/empty is no file here, and on the hub it has none of model.safeten"):
        load("a/empty")
    with pytest.raises(InputError, match=r"a/silent is no file here, and the hub did not answer: .* Give a path"):
        load("a/silent")


def test_without_the_extra_the_hub_is_offered(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"install the extra: pip install 'saccade\[hub\]'"):
        load("somebody/net")
