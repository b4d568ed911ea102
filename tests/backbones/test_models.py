"""Every network of `list_models`: timm's habits, any image size, gradients, names; then published sizes and errors.

Families are tried in their small version, `*_test`; published ones are counted without being built in memory.
"""

import json
import re
import time
from collections import defaultdict
from itertools import accumulate, chain
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.backbones import Backbone, FeatureInfo, describe_model
from saccade.backbones.residual import DropPath, drop_path_rates
from saccade.backbones.weights import fit_weights
from saccade.data import load_images
from saccade.errors import InputError
from saccade.mixers import NeighborhoodAttention
from saccade.training import TrainSettings, fit
from tests.contract.exceptions import TAUGHT_APART
from tests.recorded.networks import recorded_networks

STUDY_NETS = saccade.list_models("study_*")
SMALL = [*saccade.list_models("*_test"), "study_xxs"]
PUBLISHED = [name for name in saccade.list_models() if name not in (*SMALL, *STUDY_NETS)]
STUDIED = ("agent", "attention", "depthwise_conv", "grid", "halo", "neighborhood", "pooling", "window")
RECORDED = Path(__file__).parents[1] / "recorded"
GREY_DIFFERS = {"dhvt_test": "each colour has a scale and a shift before a convolution whose borders see zeros"}
"""Networks that no weights for grey images make the same as for images of three equal channels."""
SIDES = [(33, 1), (7, 5), (50, 70)]


def build(name="study_xxs", **options):
    torch.manual_seed(0)
    mixer = {"mixer": "window"} if name.startswith("study_") else {}
    return saccade.create_model(name, **{"num_classes": 5, **mixer, **options})


def make_images(name, batch=2, channels=3):
    side = min(describe_model(name).image_size, 64)
    return torch.randn(batch, channels, side, side)


def randomise(model):
    """Move every parameter away from 0 and 1, where a path could hide, and running means from where they start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand_like(buffer))
    return model


def trunk(model):
    return {name for name, _ in model.named_parameters() if name.split(".")[0] not in model.classifiers}


def grouped(model, coarse):
    """Names of parameters by group, in the groups' order, as timm's group_with_matcher reads the matcher."""
    patterns = []
    for ordinal, entry in enumerate(model.group_matcher(coarse).values()):
        rows = [(entry, None)] if isinstance(entry, str) else entry
        patterns += [(re.compile(pattern), ordinal, suffix) for pattern, suffix in rows]
    groups = defaultdict(list)
    for name, _ in model.named_parameters():
        found = next(((p.match(name), o, s) for p, o, s in patterns if p.match(name)), None)
        key = (float("inf"),) if found is None else (found[1], *map(float, chain(found[0].groups(), found[2] or ())))
        groups[key].append(name)
    ordered = []
    for key in sorted(groups):
        if ordered and key[-1] == 99999:
            ordered[-1] += groups[key]
        else:
            ordered.append(groups[key])
    return ordered


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_head_of_features_and_stages_have_the_stated_maps(name):
    model, images = randomise(build(name)).eval(), make_images(name)
    features = model.forward_features(images)
    assert features.shape[2 if model.num_prefix_tokens else 1] == model.num_features
    assert_close(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    maps = build(name, features_only=True).eval()(images)
    info, side = model.feature_info, images.shape[-1]
    for stage, (channels, reduction) in zip(maps, zip(info.channels(), info.reduction()), strict=True):
        assert stage.shape == (2, channels, -(-side // reduction), -(-side // reduction))
    assert set(info.module_name()) <= dict(model.named_modules()).keys()
    if model.num_prefix_tokens:
        assert features.shape[1] == model.num_prefix_tokens + maps[-1].shape[2:].numel()
    else:
        assert features.shape == maps[-1].shape


@pytest.mark.parametrize("name", SMALL)
def test_each_image_has_its_own_logits(name):
    model, images = randomise(build(name)).eval(), make_images(name, batch=3)
    assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("name", SMALL)
def test_any_other_size_is_served_or_refused_with_a_reason(name, size):
    model = randomise(build(name)).eval()
    images = torch.randn(3, 3, *size)
    try:
        out = model(images)
    except InputError:
        assert name not in STUDY_NETS
        return
    assert out.shape == (3, 5)
    assert out.isfinite().all()
    assert_close(out[1:2], model(images[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_the_head_comes_off_and_changes_as_in_timm(name):
    model, images = build(name, drop_rate=0.5).eval(), make_images(name)
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    if not hasattr(model, "pre_logits"):
        assert_close(pooled, model.pool(features))
    if model.classifiers == ("head",):
        assert_close(model.get_classifier()(pooled), model(images))
    model.reset_classifier(0)
    assert (model.num_classes, model.get_classifier()(pooled).shape) == (0, pooled.shape)
    assert_close(model(images), pooled)
    model.reset_classifier(7)
    assert (model.num_classes, model(images).shape) == (7, (2, 7))
    assert not torch.equal(model.train()(images), model(images))  # dropout before the classifier
    assert saccade.create_model(name).get_classifier().out_features == 1000


@pytest.mark.parametrize("name", SMALL)
def test_pooling_is_chosen_and_left_out(name):
    model, images = build(name).eval(), make_images(name)
    features = model.forward_features(images)
    patches = features[:, model.num_prefix_tokens :].mT if model.num_prefix_tokens else features.flatten(2)
    for pool, expected in {"avg": patches.mean(2), "max": patches.amax(2), "": features}.items():
        if pool and pool not in model.pools:
            continue
        model.reset_classifier(0, pool)
        assert model.global_pool == pool
        assert_close(model(images), model.pre_logits(expected) if pool and hasattr(model, "pre_logits") else expected)
    with pytest.raises(InputError, match="global_pool is ''"):
        model.reset_classifier(3, "")
    assert build(name, global_pool=model.pools[-1]).global_pool == model.pools[-1]


@pytest.mark.parametrize("chosen", [(0,), (-1, 0), [1], 1])
@pytest.mark.parametrize("name", SMALL)
def test_features_of_the_chosen_stages(name, chosen):
    images = make_images(name)
    maps = build(name).eval().forward_stages(images)
    extractor = build(name, features_only=True, out_indices=chosen).eval()
    chosen = [-1] if chosen == 1 else chosen
    for found, stage in zip(extractor(images), chosen, strict=True):
        assert torch.equal(found, maps[stage])
    assert extractor.feature_info.channels() == [maps[stage].shape[1] for stage in chosen]
    assert [each["num_chs"] for each in extractor.feature_info.get_dicts(["num_chs"])] == [
        maps[stage].shape[1] for stage in chosen
    ]
    assert not [key for key in extractor.state_dict() if "head" in key.split(".")]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_other_channels_and_no_classifier(name, channels):
    model = build(name, in_chans=channels, num_classes=0)
    images = make_images(name, channels=channels)
    assert model.in_chans == channels
    assert model(images).shape == (2, model.head_hidden_size)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    with pytest.raises(InputError, match=rf"give a batch \(B, {channels}, H, W\)"):
        model(images[:, :0])


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    model = randomise(build(name)).train()
    torch.manual_seed(1)
    model(make_images(name)).square().sum().backward()
    dead = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert dead <= taught_apart(model)


def taught_apart(model):
    """Names of the parameters of mixers that no gradient of the output reaches."""
    apart = {type(saccade.create_mixer(name, 8)): prefix for name, (prefix, _) in TAUGHT_APART.items()}
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if type(module) in apart
        for name, _ in module.named_parameters()
        if name.startswith(apart[type(module)])
    }


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_runs_blocks_twice_and_gives_the_same_gradients(name):
    images, grads, calls = make_images(name), [], []
    for enable in (False, True):
        model = randomise(build(name, drop_path_rate=0.3)).train()
        model.set_grad_checkpointing(enable)
        for module in model.modules():
            if isinstance(module, DropPath):  # it stands in every block
                module.register_forward_pre_hook(lambda *_, enable=enable: calls.append(enable))
        torch.manual_seed(1)  # which branches are left out
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert calls.count(True) > 1.4 * calls.count(False) > 0  # torch stops when it has what the gradients need


@pytest.mark.parametrize("name", SMALL)
def test_drop_path_grows_from_block_to_block(name):
    model = build(name, drop_path_rate=0.3)
    rates = [m.probability for m in model.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates)
    assert 0 < rates[-1] <= 0.3
    assert any(m.probability for m in build(name, drop_path_rate=0.3).modules() if isinstance(m, DropPath))
    assert not any(m.probability for m in build(name).modules() if isinstance(m, DropPath))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_groups_for_layer_wise_rates_cover_the_trunk_in_its_order(name, coarse):
    model = build(name)
    groups = grouped(model, coarse)
    assert set(groups[-1]) == {name for name, _ in model.named_parameters()} - trunk(model)
    number = {name: index for index, group in enumerate(groups) for name in group}
    order = [number[key] for key, _ in model.named_parameters() if key in trunk(model)]
    assert order[0] == 0
    assert order == sorted(order)
    depth = max(2, len(model.feature_info)) if coarse else len([m for m in model.modules() if isinstance(m, DropPath)])
    assert len(groups) >= depth


class Stemless(Backbone):
    """Two stages and nothing before them."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 2, 2)) for _ in range(2))
        self.num_features, self.first_conv = 3, "stages.0.0"
        self.feature_info = FeatureInfo.of_stages((3, 3), reduction=2)
        self.reset_classifier(5)

    def run_stages(self, images):
        return list(accumulate(self.stages, lambda x, stage: stage(x), initial=images))[1:]


def test_groups_of_a_network_without_a_stem_are_its_blocks_and_the_head():
    model = Stemless()
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert [{name.rpartition(".")[0] for name in group} for group in grouped(model, coarse=False)] == [
        {"stages.0.0"},
        {"stages.0.1"},
        {"stages.1.0"},
        {"stages.1.1"},
        {"head"},
    ]
    assert [{name.rpartition(".")[0] for name in group} for group in grouped(model, coarse=True)] == [
        {"stages.0.0", "stages.0.1"},
        {"stages.1.0", "stages.1.1"},
        {"head"},
    ]


@pytest.mark.parametrize("name", SMALL)
def test_parameters_without_weight_decay_exist(name):
    model = build(name, **({"mixer": "agent"} if name in STUDY_NETS else {}))
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert model.no_weight_decay() or name not in STUDY_NETS


@pytest.mark.parametrize("name", SMALL)
def test_weights_come_back_and_fit_other_channels_and_classes(name, tmp_path):
    model, images = randomise(build(name)).eval(), make_images(name)
    path = tmp_path / "net.pth"
    torch.save(model.state_dict(), path)
    assert_close(saccade.create_model(name, path, **mixer_of(name)).eval()(images), model(images))  # classes too
    assert build(name, pretrained=path, num_classes=3).num_classes == 3
    features = model.forward_features(images)
    grey = build(name, pretrained=path, in_chans=1).eval()
    same = images[:, :1].expand(-1, 3, -1, -1)
    if name not in GREY_DIFFERS:
        assert_close(grey.forward_features(same[:, :1]), model.forward_features(same), rtol=1e-3, atol=1e-3)
    six = build(name, pretrained=path, in_chans=6).eval()
    assert_close(six.forward_features(images.repeat(1, 2, 1, 1)), features, rtol=1e-3, atol=1e-3)
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    assert_close(build(name, pretrained=path).eval()(images), model(images))


def mixer_of(name):
    return {"mixer": "window"} if name.startswith("study_") else {}


@pytest.mark.parametrize("name", SMALL)
def test_timm_finds_what_it_looks_for(name):
    model = build(name)
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg
    assert cfg["architecture"] == name
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert all(isinstance(model.get_submodule(layer), nn.Linear) for layer in model.classifiers)
    assert cfg["input_size"] == (3, describe_model(name).image_size, describe_model(name).image_size)
    assert len(cfg["mean"]) == len(cfg["std"]) == 3


@pytest.mark.parametrize("name", [name for name in SMALL if name not in STUDY_NETS])
def test_small_versions_are_small_and_show_where_they_look(name):
    assert describe_model(name).params < 1_000_000
    model = build(name).eval()
    with saccade.tap(model) as seen, torch.no_grad():
        model(make_images(name))
    assert len(seen) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_compiles_and_exports_unless_it_says_why_not(name):
    model, images = randomise(build(name)).eval(), make_images(name)

    def compiled():
        return torch.compile(model, fullgraph=True, backend="aot_eager")(images)

    def exported():
        return torch.export.export(model, (images,)).module()(images)

    torch.compiler.reset()  # all networks share the code of a few methods, which torch compiles eight times at most
    expected = model(images)
    for what, run in {"compile": compiled, "export": exported}.items():
        if what in model.refuses:
            with pytest.raises(Exception):  # noqa: B017 - of whatever kind: the reason is still true
                run()
        else:
            assert_close(run(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's own exporter
@pytest.mark.parametrize("name", SMALL)
def test_onnx_gives_the_same_unless_it_says_why_not(name, tmp_path):
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    model, images = randomise(build(name)).eval(), make_images(name)
    path = tmp_path / "net.onnx"

    def run():
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False, external_data=False)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])

    if "onnx" in model.refuses:
        with pytest.raises(Exception):  # noqa: B017
            run()
    else:
        assert_close(run(), model(images).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_network_learns_digits_through_the_code_that_trains(tmp_path):
    data, options = load_images("digits", image_size=32), {"model": "biformer_test", "options": {}}
    model = build("biformer_test", num_classes=10)
    settings = TrainSettings(epochs=12, batch_size=64, learning_rate=3e-3, accelerator="cpu", augment="light", seed=0)
    start = time.process_time()  # 90 s on two cores, whoever else is on them
    assert fit(model, data, settings, tmp_path, config=options).accuracy > 0.97
    assert time.process_time() - start < 180


NETWORKS = recorded_networks()


@pytest.mark.parametrize("record", [record for _, record in NETWORKS], ids=[name for name, _ in NETWORKS])
def test_official_state_fits_to_the_last_name_and_shape(record):
    with torch.device("meta"):
        model = saccade.create_model(record["model"], **record["options"])
        official = {name: torch.empty(shape) for name, shape in record["state"].items()}
        renamed = {name: tuple(tensor.shape) for name, tensor in fit_weights(model, official).items()}
    assert renamed == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == record["params"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_describe_themselves(name):
    found = describe_model(name)
    assert found.params > 1_000_000
    assert len(found.channels) == len(found.reductions)
    assert found.default_cfg["hf_hub_id"] == found.weights


# What concerns the study's networks and the parts


@pytest.mark.parametrize("mixer", saccade.list_mixers())
@pytest.mark.parametrize("size", [(32, 32), (50, 70), (4, 9)])
def test_any_mixer_serves_any_image_size(mixer, size):
    out = build(mixer=mixer).eval()(torch.randn(2, 3, *size))
    assert out.shape == (2, 5)
    assert out.isfinite().all()


def test_drop_path_leaves_images_out_and_keeps_the_mean():
    x = torch.ones(4000, 2, 2)
    out = DropPath(0.25)(x)
    kept = out.amax((1, 2)) > 0
    assert (out[kept] == 1 / 0.75).all()
    assert abs(kept.float().mean() - 0.75) < 0.04  # 5.8 standard deviations
    assert torch.equal(DropPath(0.25).eval()(x), x)
    assert drop_path_rates(0.3, (1, 1, 1)) == [[0.0], [0.15], [0.3]]
    assert drop_path_rates(0.3, (1,)) == [[0.0]]


def test_options_reach_every_mixer():
    model = build("study_s", mixer="neighborhood", mixer_options={"window_size": 3, "num_heads": 4})
    mixers = [module for module in model.modules() if isinstance(module, NeighborhoodAttention)]
    assert len(mixers) == 12
    assert all((mixer.window_size, mixer.num_heads) == (3, 4) for mixer in mixers)


def test_keys_of_the_state_dict_are_as_recorded():
    """They are part of the interface: a change needs a note for whoever upgrades, and a new recording."""
    found = {name: {k: list(v.shape) for k, v in build(name).state_dict().items()} for name in STUDY_NETS}
    for mixer in STUDIED:
        found[f"{mixer} in study_xxs"] = {k: list(v.shape) for k, v in build(mixer=mixer).state_dict().items()}
    assert found == json.loads((RECORDED / "study_keys.json").read_text())


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
        (lambda: build(global_pool="mean"), "global_pool is 'mean': did you mean max|choose one of avg, max"),
        (lambda: build("halonet_test", shortcut="max"), "shortcut is 'max': choose one of"),
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
