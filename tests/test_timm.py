"""`import saccade.timm`: timm builds our networks by name, and its training habits find what they look for.

timm imports torchvision, whose only build here is for CUDA; where it cannot be imported, these tests are skipped.
"""

import pytest
import torch
from torch.testing import assert_close

import saccade

try:
    import timm
    import timm.data
    import timm.optim
    import timm.utils
except (ImportError, RuntimeError) as error:
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)
import saccade.timm

SMALL = saccade.list_models("*_test")


def test_every_network_is_registered_and_none_of_timms_own_is_replaced():
    assert {name.removeprefix("saccade_") for name in timm.list_models("saccade_*")} == set(saccade.list_models())
    assert timm.create_model("halonet26t").__class__.__module__.startswith("timm.")


@pytest.mark.parametrize("name", SMALL)
def test_timm_builds_describes_and_trains_them(name):
    model = timm.create_model(f"saccade_{name}", num_classes=7, drop_rate=0.1, drop_path_rate=0.1, in_chans=3)
    size = timm.data.resolve_data_config({}, model=model)["input_size"]
    assert model(torch.randn(2, *size)).shape == (2, 7)
    groups = timm.optim.param_groups_layer_decay(model, 0.05, layer_decay=0.7)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales.keys() == {id(p) for p in model.parameters()}
    assert min(scales.values()) < 0.5
    assert {scales[id(p)] for p in model.get_classifier().parameters()} == {1.0}
    timm.utils.ModelEmaV3(model).update(model)
    features = timm.create_model(f"saccade_{name}", features_only=True, out_indices=(-1,))
    assert features(torch.randn(1, *size))[0].shape[1] == features.feature_info.channels()[0]


TIMMS = {"maxvit_tiny": "maxvit_tiny_tf_224"}  # what timm calls networks that have another name here


@pytest.mark.parametrize(
    "name",
    [
        "convit_tiny",
        "eca_halonext26ts",
        "focalnet_tiny_srf",
        "halonet26t",
        "halonet50ts",
        "halonet_h1",
        "haloregnetz_b",
        "maxvit_tiny",
        "sehalonet33ts",
    ],
)
@pytest.mark.slow
def test_outputs_are_those_of_timms_network_with_its_weights(name, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(TIMMS.get(name, name), num_classes=10).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = saccade.create_model(name, tmp_path / "timm.pth").eval()
    images = torch.randn(1, *ours.default_cfg["input_size"])
    with torch.no_grad():
        expected = theirs(images)
        assert_close(ours(images) / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)
