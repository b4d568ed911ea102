"""MaxViT: partitions that follow the image, tables of another image size, fixed windows; what cannot be built."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.backbones import MaxViT
from saccade.backbones.residual import DropPath
from saccade.backbones.weights import load_weights
from saccade.errors import InputError
from saccade.mixers import GridAttention, WindowAttention

DIMS, DEPTHS = (16, 16, 24), (1, 1, 1)


def make_net(**options):
    torch.manual_seed(0)
    model = MaxViT(DIMS, DEPTHS, **{"stem_dims": 8, "dim_head": 8, "num_classes": 3, "image_size": 64, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def partitions(model):
    return [m for m in model.modules() if isinstance(m, WindowAttention | GridAttention)]


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (224, 160)])
def test_windows_and_grids_have_the_32nd_part_of_the_image_on_every_map(size):
    model = make_net()
    found = {m.window((size[0] // s, size[1] // s)) for m, s in zip(partitions(model), (4, 4, 8, 8, 16, 16))}
    assert found == {(size[0] // 32, size[1] // 32)}
    assert model(torch.randn(1, 3, *size)).shape == (1, 3)


def test_another_image_is_as_if_built_for_it_with_interpolated_tables():
    model, larger, images = make_net(), make_net(image_size=96), torch.randn(2, 3, 96, 96)
    load_weights(larger, model.state_dict(), "smaller")
    for small, large in zip(partitions(model), partitions(larger)):
        expected = F.interpolate(small.position_bias_table[None], (5, 5), mode="bilinear")[0]
        assert_close(large.position_bias_table, expected)
    assert_close(larger(images), model(images))


def test_fixed_windows_are_size_free_and_need_a_map_of_their_size():
    fixed, following = make_net(window_size=2), make_net()
    fixed.load_state_dict(following.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert_close(fixed(images), following(images))
    assert fixed(torch.randn(1, 3, 128, 90)).shape == (1, 3)
    with pytest.raises(InputError, match=r"window_size is \(5, 5\) and the map is \(4, 4\)"):
        make_net(window_size=5)(images)
    both = make_net(window_size=(2, 4), grid_size=(4, 2))
    assert [m.position_bias_table.shape[1:] for m in partitions(both)[:2]] == [(3, 7), (7, 3)]


def test_a_block_leaves_all_its_branches_out_with_one_probability():
    model = make_net(drop_path_rate=0.4)
    assert [m.probability for m in model.modules() if isinstance(m, DropPath)] == [0.0, 0.2, 0.4]
    block = model.stages[2][0]
    assert block.conv.drop_path is block.attn_block.drop_path is block.attn_grid.drop_path
    block.conv.drop_path.probability = 1 - 1e-9
    x = torch.randn(2, 16, 6, 6)
    shortcut = block.conv.shortcut(F.avg_pool2d(x, 2).movedim(1, -1)).movedim(-1, 1)
    assert_close(block.train()(x), shortcut)


@pytest.mark.parametrize("head_dim", [0, 10, None])
def test_the_layer_before_the_classifier(head_dim):
    model = make_net(head_dim=head_dim)
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    means = features.mean((2, 3))
    hidden = means if head_dim == 0 else model.pre_logits.fc(model.pre_logits.norm(means)).tanh()
    assert model.head_hidden_size == hidden.shape[1] == (24 if head_dim in (0, None) else head_dim)
    assert_close(model.forward_head(features, pre_logits=True), hidden)


def test_without_that_layer_the_map_has_the_norm():
    model, images = make_net(head_dim=0), torch.randn(2, 3, 64, 64)
    with_layer = make_net()
    with_layer.load_state_dict(model.state_dict(), strict=False)
    last = with_layer.forward_features(images).permute(0, 2, 3, 1)
    assert_close(model.forward_features(images), model.norm(last).permute(0, 3, 1, 2))
    assert not hasattr(model, "pre_logits")


def test_maps_stay_channels_last_from_the_stem_on():
    model, images = make_net(), torch.randn(2, 3, 64, 64)
    for each in (model.stem(images), *model.forward_stages(images)):
        assert each.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim_head": 32}, r"dim_head is 32 and dims is \(16, 16, 24\)"),
        ({"image_size": 31}, "image_size is 31: a window has the 32nd part of its side. Give 32 or more"),
        ({"image_size": (64, 64, 64)}, "image_size"),
    ],
)
def test_what_cannot_be_built(options, message):
    with pytest.raises(InputError, match=message):
        make_net(**options)
    with pytest.raises(InputError, match="give one of each for every stage"):
        MaxViT((8,), (1, 1))


def test_official_weights_of_another_image_size_fit():
    """The recorded names of T for 384 x 384 fill the network for 224 x 224, tables interpolated."""
    with torch.device("meta"):
        model, other = (saccade.create_model("maxvit_tiny", image_size=size) for size in (224, 384))
        load_weights(model, {name: tensor for name, tensor in other.state_dict().items()}, "384")
