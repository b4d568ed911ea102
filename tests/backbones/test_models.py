"""Every network of `list_models`: timm's habits, any image size, gradients, names; then errors."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.backbones.backbone import DropPath
from saccade.errors import InputError
from saccade.mixers import NeighborhoodAttention

NAMES = saccade.list_models()
STUDIED = ("agent", "attention", "depthwise_conv", "grid", "halo", "neighborhood", "pooling", "window")
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(33, 1), (7, 5), (50, 70)])
def test_each_image_of_any_size_has_its_own_logits(name, size):
    model, images = randomise(build(name)).eval(), torch.randn(3, 3, *size)
    assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_the_head_comes_off_and_changes_as_in_timm(name):
    model, images = build(name).eval(), torch.randn(2, 3, 32, 32)
    pooled = model.forward_features(images).mean((2, 3))
    assert_close(model.forward_head(model.forward_features(images), pre_logits=True), pooled)
    assert_close(model.get_classifier()(pooled), model(images))
    model.reset_classifier(0)
    assert (model.num_classes, model.get_classifier()(pooled).shape) == (0, pooled.shape)
    assert_close(model(images), pooled)
    model.reset_classifier(7)
    assert (model.num_classes, model(images).shape) == (7, (2, 7))
    assert saccade.create_model(name).get_classifier().out_features == 1000


@pytest.mark.parametrize("chosen", [(0,), (-1, 0), [1]])
def test_features_of_the_chosen_stages(chosen):
    images = torch.randn(2, 3, 32, 48)
    maps = build().eval().forward_stages(images)
    extractor = build(features_only=True, out_indices=chosen).eval()
    for found, stage in zip(extractor(images), chosen, strict=True):
        assert torch.equal(found, maps[stage])
    assert extractor.feature_info.channels() == [maps[stage].shape[1] for stage in chosen]
    assert not [key for key in extractor.state_dict() if "head" in key]


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


def test_checkpointing_runs_blocks_twice_and_gives_the_same_gradients():
    images = torch.randn(2, 3, 32, 32)
    grads, calls = [], []
    for enable in (False, True):
        model = randomise(build(drop_path_rate=0.3)).train()
        model.set_grad_checkpointing(enable)
        model.stages[1].blocks[0].register_forward_pre_hook(lambda *_, enable=enable: calls.append(enable))
        torch.manual_seed(1)  # which branches are left out
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(*grads)
    assert calls == [False, True, True]


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


def test_groups_for_layer_wise_rates_cover_the_trunk():
    model = build("study_xs")
    for coarse in (False, True):
        matcher = model.group_matcher(coarse)
        patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
        keys = [key for key, _ in model.named_parameters() if "downsample" not in key]
        groups = {key: [pattern for pattern in patterns if re.match(pattern, key)] for key in keys}
        assert {key for key, found in groups.items() if len(found) != 1} == {"head.weight", "head.bias"}


def test_options_reach_every_mixer():
    model = build("study_s", mixer="neighborhood", mixer_options={"window_size": 3, "num_heads": 4})
    mixers = [module for module in model.modules() if isinstance(module, NeighborhoodAttention)]
    assert len(mixers) == 12
    assert all((mixer.window_size, mixer.num_heads) == (3, 4) for mixer in mixers)


def test_parameters_without_weight_decay_exist():
    model = build(mixer="agent")
    names = model.no_weight_decay()
    assert names
    assert names <= dict(model.named_parameters()).keys()


def test_keys_of_the_state_dict_are_as_recorded():
    """They are part of the interface: a change needs a note for whoever upgrades, and a new recording."""
    found = {name: {k: list(v.shape) for k, v in build(name).state_dict().items()} for name in NAMES}
    for mixer in STUDIED:
        found[f"{mixer} in study_xxs"] = {k: list(v.shape) for k, v in build(mixer=mixer).state_dict().items()}
    assert found == json.loads(RECORDED.read_text())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: saccade.create_model("study_xxl"), "did you mean study_x"),
        (lambda: build(mixr="window"), "no option 'mixr': did you mean mixer"),
        (lambda: build(patch_size=3), "Take 2, 4, 8 or 16"),
        (lambda: build(features_only=True, out_indices=(5,)), "stages 0 to 1"),
        (lambda: build(mixer="windw"), "mixer is 'windw': did you mean window"),
        (lambda: build(dims=(8,)), r"dims is \(8,\) and depths is \(1, 2\): give one of each"),
        (lambda: build(patch_size=0), "patch_size is 0"),
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
