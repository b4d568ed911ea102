"""read_attention: the weights that foreign models use, what is inferred of their tokens, then errors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.explain import explain, read_attention
from tests.explain.nets import FOREIGN, foreign_vit, images


def pixels(batch=2, height=12, width=20):
    return images(batch, 3, height, width).double()


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_of_foreign_models_are_those_that_they_used(kind, prefix):
    prefix, x = (0, pixels(width=12)) if kind == "convolution" else (prefix, pixels())
    model = foreign_vit(kind, prefix=prefix)
    layers = read_attention(model, x)
    joins = "mha.out_proj" if kind == "torch" else "out"
    for number, (layer, own) in enumerate(zip(layers, model.layers, strict=True)):
        assert layer.name == f"layers.{number}" + (".mha" if kind == "torch" else "")
        assert layer.projection == f"layers.{number}.{joins}"
        assert (layer.grid, layer.num_prefix) == ((3, x.shape[-1] // 4), prefix)
        assert layer.source == "operations"
        assert_close(layer.attention, own.weights)


@pytest.mark.parametrize("kind", FOREIGN)
def test_values_are_what_was_weighed(kind):
    x = pixels(width=12) if kind == "convolution" else pixels()
    model = foreign_vit(kind, prefix=int(kind != "convolution"), depth=1)
    (layer,) = read_attention(model, x)
    seen = {}
    model.layers[0].register_forward_hook(lambda _module, args, out: seen.update(out=out))
    model(x)
    joined = (layer.attention @ layer.value).transpose(1, 2).flatten(2)
    projection = model.get_submodule(layer.projection)
    weight = projection.weight.flatten(1)
    assert_close(joined @ weight.T + projection.bias, seen["out"])


def test_a_grid_without_a_convolution_has_the_proportions_of_the_images():
    (layer, *_) = read_attention(foreign_vit(linear_patches=True), pixels())
    assert (layer.grid, layer.num_prefix) == ((3, 5), 1)
    model = foreign_vit(linear_patches=True, prefix=5, depth=1)
    (found,) = read_attention(model, pixels(width=12), num_prefix=5)
    assert (found.grid, found.num_prefix) == ((3, 3), 5)


def test_taps_and_operations_see_the_same_in_our_attention():
    torch.manual_seed(0)
    model = saccade.create_model("study_xxs", num_classes=3, mixer="attention", dims=(16, 16), depths=(1, 2)).double()
    taps, operations = (read_attention(model, pixels(1, 32, 16), source=source) for source in ("taps", "operations"))
    for one, other in zip(taps, operations, strict=True):
        assert (one.name, one.grid, one.projection) == (other.name, other.grid, other.projection)
        assert_close((one.attention, one.value), (other.attention, other.value))


def test_prefix_tokens_of_our_networks_stand_first():
    model = saccade.create_model("convit_test", num_classes=3).eval()
    x = images(1, 3, 32, 32)
    layers = read_attention(model, x)
    assert [layer.num_prefix for layer in layers][-1] == 1
    assert layers[-1].grid == layers[0].grid
    with saccade.tap(model, kinds=("features",)) as seen:
        model(x)
    joined = (layers[-1].attention @ layers[-1].value).transpose(1, 2).flatten(2)
    out = model.get_submodule(layers[-1].projection)(joined)
    assert_close(out[:, 1:].unflatten(1, layers[-1].grid), seen[layers[-1].name].features)


@pytest.mark.parametrize("method", ["attention_rollout", "attention_flow"])
def test_foreign_models_are_explained_and_say_what_was_inferred(method):
    model = foreign_vit("fused")
    found = explain(model, pixels(), method=method)
    assert found.map.shape == (2, 12, 20)
    assert found.inferred == "3 layers read from operations: 1 prefix + 3 x 5 tokens"
    assert found.layer == "layers.0, layers.1, layers.2"
    each = [explain(model, pixels()[i : i + 1], method=method).map for i in range(2)]
    assert_close(found.map, torch.cat(each))


def test_the_model_is_left_as_it_was():
    model = foreign_vit().train()
    read_attention(model, pixels())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.stem(x).unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(0, 2)
        return self.attention(x, x, x)[0].mean(1).unflatten(0, (-1, 4)).mean(1)


class FewQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.query = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 2, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        return self.attention(self.query.expand(len(x), -1, -1), x, x)[0].mean(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (foreign_vit("channels").float(), "'layers.0.qkv' and all other layers weigh channels"),
        (Windows(), r"'attention' attends inside windows, 4 of 4 tokens an image"),
        (FewQueries(), r"'attention' maps 16 keys to 2 queries"),
        (nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten()), "Sequential shows no attention"),
        (foreign_vit(prefix=17).float(), r"over 33 tokens.*up to 16 prefix tokens.*Give num_prefix"),
    ],
    ids=["channels", "windows", "few queries", "none", "no grid"],
)
def test_models_without_a_matrix_of_all_tokens_are_refused(model, message):
    with pytest.raises(InputError, match=message):
        read_attention(model, images(1, 3, 16, 16))


def test_other_counts_of_prefix_tokens_can_be_given():
    layers = read_attention(foreign_vit(prefix=9).float(), images(1, 3, 16, 16), num_prefix=9)
    assert (layers[0].grid, layers[0].num_prefix) == ((4, 4), 9)
    with pytest.raises(InputError, match="behind 3 prefix tokens"):
        read_attention(foreign_vit(prefix=9).float(), images(1, 3, 16, 16), num_prefix=3)


def test_a_source_that_has_nothing_is_refused():
    with pytest.raises(InputError, match="shows no attention"):
        read_attention(foreign_vit(), pixels(), source="taps")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2), ("eva02_tiny_patch14_224", 1)],
)
def test_vision_transformers_of_timm(name, prefix):
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    layers = read_attention(timm.create_model(name, depth=2, num_classes=3), torch.zeros(1, 3, 224, 224))
    assert [layer.num_prefix for layer in layers] == [prefix] * 2
    assert [layer.projection for layer in layers] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
