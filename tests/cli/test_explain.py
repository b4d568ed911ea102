"""`saccade explain`: any network by its name, one page, and Python that makes the same maps."""

import json
import re
import sys
from html import unescape

import pytest
import torch

import saccade
from saccade.cli import main
from saccade.errors import InputError
from saccade.explain import attribute
from saccade.training import save_checkpoint
from tests.data.pictures import noise, write

SIX = ("convit_test", "davit_test", "focalnet_test", "maxvit_test", "overlock_test", "sparsifiner_test")
FOUR = "relevance,normgrad,rollout,gradcam"


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(write(tmp_path / "photo.png", noise(40, 60)))


@pytest.fixture
def checkpoint(photo):
    torch.manual_seed(0)
    model = saccade.create_model("study_xxs", num_classes=3, mixer="window")
    config = {"model": "study_xxs", "options": {"mixer": "window"}, "classes": ["cat", "dog", "bird"]}
    about = {"image_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
    return str(save_checkpoint("net", model, {**config, **about}))


def test_python_of_the_page_makes_its_maps(photo, checkpoint, capsys):
    call = ["explain", photo, "--model", checkpoint, "--method", "lrp,gradcam", "--target", "dog", "--against", "bird"]
    assert main([*call, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["relevance", "grad_cam"]
    assert {row["explained"] for row in rows} == {"dog"}
    with open("explanations/explanations.html", encoding="utf-8") as file:
        page = file.read()
    assert "Why “dog” and not “bird”" in page
    assert f"<code>saccade {' '.join(call)} --json</code>" in page
    code = unescape(re.findall(r"<code>(import torch.*?)</code>", page, re.DOTALL)[0])
    exec(code, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in printed] == ["relevance", "grad_cam"]
    for line, row in zip(printed, rows):
        assert float(line[-1]) == pytest.approx(row["abpc"]["value"], abs=1e-6)


def test_networks_by_name_have_random_weights_and_say_so(photo, capsys):
    call = ["explain", photo, "--model", "dhvt_test", "--method", "gradient"]
    assert main(call) == 0
    printed = capsys.readouterr()
    assert "the weights of dhvt_test are random: it has learnt nothing" in printed.err
    assert "explanations/explanations.html" in printed.out
    with open("explanations/explanations.html", encoding="utf-8") as file:
        page = file.read()
    assert "The weights are random" in page
    assert "create_model(&#39;dhvt_test&#39;)" in page


def test_weights_and_class_names_from_files(photo, tmp_path, capsys):
    torch.manual_seed(1)
    weights = str(save_checkpoint("own", saccade.create_model("dhvt_test", num_classes=3), {"model": "dhvt_test"}))
    (tmp_path / "names.txt").write_text("cat\ndog\n\nbird\n")
    call = ["explain", photo, "--model", "dhvt_test", "--method", "gradient", "--json", "--weights", weights]
    assert main([*call, "--classes", "names.txt", "--target", "bird"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["explained"] == "bird"
    assert "random" not in printed.err


def test_a_method_that_was_asked_for_and_cannot_be_used_is_exit_1(photo, checkpoint, capsys, monkeypatch):
    def refuse(*_, **__):
        raise InputError("it has no layers")

    monkeypatch.setitem(attribute._METHODS, "normgrad", refuse)
    call = ["explain", photo, "--model", checkpoint, "--json"]
    assert main([*call, "--method", "gradient,normgrad"]) == 1
    printed = capsys.readouterr()
    assert "normgrad is left out: it has no layers\n" in printed.err
    assert [row["method"] for row in json.loads(printed.out)] == ["gradient"]
    monkeypatch.setattr(sys.modules["saccade.explain.pages.examine"], "DEFAULTS", ("gradient", "normgrad"))
    assert main(call) == 0
    assert "normgrad is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "overlok_xt"], "model is 'overlok_xt': there is no such file, and of networks did you mean overl"),
        (["--model", "net.safetensors", "--weights", "x.pt"], "--weights is given beside the checkpoint"),
        (["--model", "net.safetensors", "--classes", "nowhere.txt"], "--classes is nowhere.txt: it cannot be read"),
        (["--model", "net.safetensors", "--classes", "two.txt"], "two.txt names 2 classes but study_xxs"),
        (["--model", "dhvt_test", "--weights", "nowhere.pt"], "nowhere.pt is not there"),
        (["--model", "net.safetensors", "--against", "brid"], "against is 'brid': did you mean bird?"),
    ],
)
def test_models_weights_and_names_that_do_not_fit(options, message, photo, checkpoint, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    assert main(["explain", photo, *options]) == 2
    assert message in capsys.readouterr().err


def test_timm_that_is_not_there(photo, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["explain", photo, "--model", "timm/resnet18"]) == 2
    err = capsys.readouterr().err
    assert "model is 'timm/resnet18' and timm cannot be imported" in err
    assert "pip install 'saccade[timm]'" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_four_methods_on_networks_of_ours_without_a_layer_named(name, photo, capsys):
    assert main(["explain", photo, "--model", name, "--method", FOUR, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["relevance", "normgrad", "attention_rollout", "grad_cam"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "resnet18",
     "convnext_atto", "test_vit"],
)  # fmt: skip
def test_three_methods_on_networks_of_timm(name, photo, capsys):
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    assert main(["explain", photo, "--model", f"timm/{name}", "--method", "relevance,normgrad,gradcam", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_networks_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model, images = transformers.ViTForImageClassification(config), torch.randn(2, 3, 32, 32)
    for method in ("relevance", "normgrad", "grad_cam"):
        found = saccade.explain(model, images, method=method)
        assert found.map.shape == (2, 32, 32)
        for layer in found.detail.layers:
            assert (layer.grid, layer.prefix) == ((4, 4), 1)
