"""Every network of `list_models`: timm's habits, any image size, gradients, weights; then errors."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.backbones import load_model
from saccade.backbones.backbone import DropPath
from saccade.backbones.weights import read_weights
from saccade.errors import InputError
from saccade.training import save_checkpoint

NAMES = saccade.list_models()
RECORDED = Path(__file__).parents[1] / "recorded" / "study_keys.json"


def build(name="study_xxs", **options):
    torch.manual_seed(0)
    return saccade.create_model(name, **{"num_classes": 5, "mixer": "window", **options})


def randomise(model):
    """Move every parameter away from 0 and 1, where a path could hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_head_of_features_and_stages_have_the_stated_maps(name):
    model = build(name).eval()
    images = torch.randn(2, 3, 64, 48)
    features = model.forward_features(images)
    assert features.shape[1] == model.num_features
    assert_close(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    maps = build(name, features_only=True).eval()(images)
    info = model.feature_info
    for stage, (channels, reduction) in zip(maps, zip(info.channels(), info.reduction()), strict=True):
        assert stage.shape == (2, channels, -(-64 // reduction), -(-48 // reduction))
    assert set(info.module_name()) <= dict(model.named_modules()).keys()


@pytest.mark.parametrize("mixer", saccade.list_mixers())
@pytest.mark.parametrize("size", [(32, 32), (50, 70), (4, 9)])
def test_any_mixer_serves_any_image_size(mixer, size):
    out = build(mixer=mixer).eval()(torch.randn(2, 3, *size))
    assert out.shape == (2, 5)
    assert out.isfinite().all()


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels_and_no_classifier(in_chans):
    model = build(in_chans=in_chans, num_classes=0)
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == 7
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = randomise(build(name))
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_checkpointing_gives_the_same_gradients():
    images = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model = randomise(build()).train()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(*grads)


def test_drop_path_leaves_images_out_and_keeps_the_mean():
    x = torch.ones(4000, 2, 2)
    out = DropPath(0.25)(x)
    kept = out.amax((1, 2)) > 0
    assert (out[kept] == 1 / 0.75).all()
    assert abs(kept.float().mean() - 0.75) < 0.04  # 5.8 standard deviations
    assert torch.equal(DropPath(0.25).eval()(x), x)
    rates = [m.probability for m in build("study_xs", drop_path_rate=0.3).modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.3)


def test_parameters_without_weight_decay_exist():
    model = build(mixer="agent")
    names = model.no_weight_decay()
    assert names
    assert names <= dict(model.named_parameters()).keys()


def test_keys_of_the_state_dict_are_as_recorded():
    """They are part of the interface: a change needs a note for whoever upgrades, and a new recording."""
    found = {name: {k: list(v.shape) for k, v in build(name).state_dict().items()} for name in NAMES}
    assert found == json.loads(RECORDED.read_text())


def test_weights_survive_saving_and_bring_their_options(tmp_path):
    model = randomise(build(mixer="neighborhood", mixer_options={"window_size": 3})).eval()
    config = {"model": "study_xxs", "options": {"mixer": "neighborhood", "mixer_options": {"window_size": 3}}}
    path = str(save_checkpoint(tmp_path / "net", model, {**config, "classes": list("abcde")}))
    images = torch.randn(2, 3, 32, 32)
    assert_close(saccade.create_model("study_xxs", pretrained=path).eval()(images), model(images))
    loaded = load_model(path)
    assert_close(loaded.model(images), model(images))
    assert loaded.config["classes"] == list("abcde")
    other = saccade.create_model("study_xxs", pretrained=path, num_classes=3)
    assert_close(other.eval().forward_features(images), model.forward_features(images))
    assert other(images).shape == (2, 3)
    maps = saccade.create_model("study_xxs", pretrained=path, features_only=True, out_indices=(-1,)).eval()(images)
    assert_close(maps[0], model.forward_features(images))


def test_weights_of_another_architecture_name_the_tensors(tmp_path):
    config = {"model": "study_xxs", "options": {}}
    path = str(save_checkpoint(tmp_path / "net", build(mixer="pooling"), config))
    with pytest.raises(InputError, match=r"another architecture; missing: .*mixer\.qkv.* Build the network with"):
        saccade.create_model("study_xxs", pretrained=path, num_classes=5, mixer="attention")
    with pytest.raises(InputError, match=r"holds weights of study_xxs, not of study_xs\. Call create_model"):
        saccade.create_model("study_xs", pretrained=path)


def test_hub_ids_are_asked_for_where_no_such_path_is(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    path = save_checkpoint(tmp_path / "model", build(), {})
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert read_weights("somebody/some-net").state.keys() == build().state_dict().keys()
    assert asked == [("somebody/some-net", "model.safetensors")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: saccade.create_model("study_xxl"), "did you mean study_x"),
        (lambda: build(mixr="window"), "no option 'mixr': did you mean mixer"),
        (lambda: build(patch_size=3), "Take 2, 4, 8 or 16"),
        (lambda: build(features_only=True, out_indices=(5,)), "stages 0 to 1"),
        (lambda: build(pretrained=True), "has no published weights"),
        (lambda: build(pretrained="nowhere.safetensors"), "nowhere.safetensors"),
        (lambda: build()(torch.randn(3, 32, 32)), r"give a batch \(B, 3, H, W\)"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("mixer", ["window", "neighborhood", "agent"])
def test_exports_and_compiles(mixer):
    model = build(mixer=mixer).eval()
    images = torch.randn(2, 3, 32, 32)
    assert_close(torch.export.export(model, (images,)).module()(images), model(images))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images), model(images))
