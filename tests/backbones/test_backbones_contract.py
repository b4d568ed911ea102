"""What every network of `list_models()` keeps: timm's shape, any image size, gradients everywhere, weights that come back."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.backbones import create_model, list_models
from saccade.errors import InputError
from saccade.mixers import list_mixers
from saccade.training import save_checkpoint

RECORDED = Path(__file__).parents[1] / "recorded" / "study_keys.json"
MODELS = list_models()
SMALLEST = "study_xxs"


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(name, **options):
    torch.manual_seed(1)
    return create_model(name, **options).eval()


def gradients(model, images):
    model.zero_grad()
    torch.manual_seed(2)
    logits = model(images)
    (logits * image(*logits.shape, seed=3)).sum().backward()
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 32), (50, 70), (33, 1), (7, 5)])
def test_any_image_size_gives_logits_and_maps_of_the_sizes_that_are_announced(name, size):
    model, images = build(name, num_classes=3), image(2, 3, *size)
    assert model(images).shape == (2, 3)
    maps = model.forward_stages(images)
    info = model.feature_info
    assert len(maps) == len(info) == len(info.module_name())
    for x, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert x.shape == (2, channels, -(-size[0] // reduction), -(-size[1] // reduction))
    assert model.num_features == info.channels()[-1]
    assert all(isinstance(model.get_submodule(place), nn.Module) for place in info.module_name())


@pytest.mark.parametrize("name", MODELS)
def test_each_image_has_its_own_logits(name):
    model, images = build(name, num_classes=5), image(3, 3, 32, 32)
    assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(name, channels):
    assert build(name, in_chans=channels, num_classes=2)(image(1, channels, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_head_can_be_taken_off_and_changed_as_in_timm(name):
    model, images = build(name, num_classes=5), image(2, 3, 32, 32)
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    assert_close(pooled, features.mean((2, 3)))
    assert_close(model.get_classifier()(pooled), model(images))
    assert_close(model.forward_head(features), model(images))
    assert (model.num_classes, model.get_classifier().out_features) == (5, 5)

    model.reset_classifier(7)
    assert (model.num_classes, model(images).shape) == (7, (2, 7))
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert_close(model(images), pooled)
    assert_close(build(name, num_classes=0)(images).shape, pooled.shape)
    assert create_model(name).num_classes == 1000


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chosen", [None, (0,), (-1, 0)])
def test_features_only_returns_the_maps_of_the_chosen_stages(name, chosen):
    whole, images = build(name), image(2, 3, 50, 70)
    options = {} if chosen is None else {"out_indices": chosen}
    extractor = build(name, features_only=True, **options)
    expected = whole.forward_stages(images)
    stages = range(len(expected)) if chosen is None else chosen
    maps = extractor(images)
    for x, stage in zip(maps, stages, strict=True):
        assert torch.equal(x, expected[stage])
    assert extractor.feature_info.channels() == [x.shape[1] for x in maps]
    assert not any(name.startswith("model.head") for name in extractor.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = build(name, num_classes=3).train()
    for key, grad in gradients(model, image(2, 3, 64, 64)).items():
        assert grad is not None, key
        assert grad.abs().max() > 0, key


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_blocks_changes_memory_and_no_gradient(name):
    model, images = build(name, num_classes=3, drop_path_rate=0.3).train(), image(2, 3, 32, 32)
    kept = gradients(model, images)
    model.set_grad_checkpointing()
    calls = []
    block = model.stages[0].blocks[0]
    block.register_forward_hook(lambda *_: calls.append(1))
    for key, grad in gradients(model, images).items():
        assert_close(grad, kept[key], msg=lambda message, key=key: f"{key}: {message}")
    assert len(calls) == 2
    model.set_grad_checkpointing(False)
    gradients(model, images)
    assert len(calls) == 3


@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_spares_biases_of_position(name):
    model = build(name, mixer="window")
    spared = model.no_weight_decay()
    assert spared <= dict(model.named_parameters()).keys()
    tables = {key for key, value in model.named_parameters() if "position_bias" in key}
    assert tables
    assert tables <= spared


@pytest.mark.parametrize("name", MODELS)
def test_layer_wise_groups_cover_the_trunk(name):
    model = build(name)
    for coarse in (False, True):
        matcher = model.group_matcher(coarse)
        patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
        import re

        for key, _ in model.named_parameters():
            found = [pattern for pattern in patterns if re.match(pattern, key)]
            assert len(found) == (not key.startswith("head")) or "downsample" in key


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_from_a_file(name, tmp_path):
    model, images = build(name, num_classes=4, mixer="window"), image(2, 3, 32, 32)
    config = {"model": name, "options": {"mixer": "window"}, "classes": list("abcd")}
    path = save_checkpoint(tmp_path / "weights", model, config)
    for again in (create_model(name, pretrained=str(path)), create_model(name, pretrained=path)):
        assert torch.equal(again.eval()(images), model(images))
    other = create_model(name, pretrained=str(path), num_classes=9).eval()
    assert other(images).shape == (2, 9)
    assert torch.equal(other.forward_features(images), model.forward_features(images))
    bare = create_model(name, pretrained=str(path), num_classes=0).eval()
    assert torch.equal(bare(images), model.forward_head(model.forward_features(images), pre_logits=True))
    maps = create_model(name, pretrained=str(path), features_only=True).eval()(images)
    assert torch.equal(maps[-1], model.forward_features(images))


def test_state_dict_keys_are_the_recorded_ones():
    """Whoever changes them makes old checkpoints unreadable: record them anew only with a note on how to upgrade.

    Here: `python -c "from tests.backbones.test_backbones_contract import record; record()"`.
    """
    assert describe_keys() == json.loads(RECORDED.read_text())


def describe_keys():
    found = {}
    for name in MODELS:
        found[name] = {key: list(value.shape) for key, value in create_model(name).state_dict().items()}
    for mixer in STUDIED:
        state = create_model(SMALLEST, mixer=mixer).stages[0].blocks[0].mixer.state_dict()
        found[f"mixer {mixer}"] = {key: list(value.shape) for key, value in state.items()}
    return found


STUDIED = ("agent", "attention", "depthwise_conv", "grid", "halo", "neighborhood", "pooling", "window")


def record():
    RECORDED.write_text(json.dumps(describe_keys(), indent=1) + "\n")


@pytest.mark.parametrize("mixer", list_mixers())
@pytest.mark.parametrize("size", [(32, 32), (50, 70)])
def test_every_mixer_works_inside(mixer, size):
    model = build(SMALLEST, mixer=mixer, num_classes=3).train()
    for key, grad in gradients(model, image(2, 3, *size)).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
    model.eval()
    images = image(2, 3, *size)
    assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


def test_mixer_options_reach_every_mixer():
    model = build("study_s", mixer="neighborhood", mixer_options={"window_size": 3, "num_heads": 4})
    mixers = [module for module in model.modules() if type(module).__name__ == "NeighborhoodAttention"]
    assert len(mixers) == 12
    assert all((mixer.window_size, mixer.num_heads) == (3, 4) for mixer in mixers)


def test_compiled_network_equals_itself():
    model, images = build(SMALLEST, num_classes=3, mixer="window"), image(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(images), model(images))


def test_exported_network_equals_itself():
    model, images = build(SMALLEST, num_classes=3, mixer="window"), image(2, 3, 32, 32)
    exported = torch.export.export(model, (images,)).module()
    assert_close(exported(images), model(images))


def test_names_are_found_by_pattern():
    assert list_models("study_x*") == ["study_xs", "study_xxs"]
    assert list_models("nothing*") == []
    assert saccade.list_models() == sorted(saccade.list_models()) == MODELS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("study_xx"), "model is 'study_xx': did you mean study_xxs"),
        (lambda: create_model(SMALLEST, mixr="window"), "study_xxs has no option 'mixr': did you mean mixer"),
        (lambda: create_model(SMALLEST, mixer="windw"), "mixer is 'windw': did you mean window"),
        (lambda: create_model(SMALLEST, pretrained=True), "study_xxs has no published weights. Give a path or a hub"),
        (lambda: create_model(SMALLEST, dims=(8,)), r"dims is \(8,\) and depths is \(1, 2\): give one of each"),
        (lambda: create_model(SMALLEST, patch_size=3), "patch_size is 3: .* Take 2, 4, 8 or 16"),
        (lambda: create_model(SMALLEST, patch_size=0), "patch_size is 0"),
        (lambda: create_model(SMALLEST, features_only=True, out_indices=(2,)), r"out_indices is \(2,\): .* 0 to 1"),
        (lambda: create_model(SMALLEST)(torch.zeros(3, 32, 32)), r"images is \(3, 32, 32\): give a batch \(B, 3, H, W"),
    ],
)
def test_wrong_calls_say_what_to_give(call, message):
    with pytest.raises(InputError, match=message):
        call()
