"""VOLO: class attention, logits of patches, mixed tokens, positions at other sizes, learning from token labels."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.backbones import VOLO, DenseLogits
from saccade.backbones.positions import resize_positions
from saccade.backbones.weights import fit_weights, load_weights
from saccade.errors import InputError
from saccade.training import token_label_loss


def build(**options):
    options = {"image_size": 32, "patch_size": 4, "stem_dim": 8, "num_classes": 5} | options
    torch.manual_seed(0)
    model = VOLO((1, 2), (8, 12), (2, 3), **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_images(batch=3, size=(32, 32)):
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def test_the_class_token_alone_is_changed_by_class_attention():
    model, images = build(), make_images()
    x = model._run(model._embed(images))[-1]
    patches, token = x.flatten(1, 2), model.cls_token.expand(3, -1, -1)
    for block in model.post_network:
        tokens = block.norm1(torch.cat([token, patches], 1))
        key, value = block.attn.kv(tokens).view(3, 17, 2, 3, 4).permute(2, 0, 3, 1, 4)
        query = block.attn.q(tokens[:, :1]).view(3, 1, 3, 4).transpose(1, 2)
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        token = token + block.attn.proj(read)
        token = token + block.mlp(block.norm2(token))
    assert_close(model.forward_features(images), model.norm(torch.cat([token, patches], 1)))


def test_taps_see_what_the_class_token_reads():
    model, images = build(), make_images()
    with saccade.tap(model) as seen:
        model(images)
    weights = seen.attention["post_network.1.attn"]
    assert weights.shape == (3, 3, 17, 17)
    assert_close(weights[:, :, 0].sum(-1), torch.ones(3, 3, dtype=torch.float64))
    assert not weights[:, :, 1:].any()


def test_logits_are_those_of_the_class_token_and_half_the_best_patch():
    model, images = build(), make_images()
    logits, dense, box = model.forward_dense(images)
    assert dense.shape == (3, 4, 4, 5)
    assert box == (0, 0, 0, 0)
    assert_close(model(images), logits + 0.5 * dense.flatten(1, 2).max(1).values)
    alone = build(dense=False)
    assert alone.classifiers == ("head",)
    tokens = alone.forward_features(images)
    assert_close(alone(images), alone.head(tokens[:, 0]))
    averaged = build()
    averaged.global_pool = "all"
    assert_close(averaged(images), averaged.head(averaged.forward_features(images).mean(1)))


def test_tokens_are_mixed_and_the_logits_of_patches_unmixed():
    model, images = build(mix_tokens=True), make_images()
    assert not isinstance(model(images), DenseLogits)
    sizes = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        _, dense, box = model.forward_dense(images, mix=True, generator=generator)
        top, bottom, left, right = box
        assert 0 <= top <= bottom <= 4
        assert 0 <= left <= right <= 4
        sizes.add((bottom - top) * (right - left))
        x = model._embed(images)
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[2 * top : 2 * bottom, 2 * left : 2 * right] = True
        x = torch.where(inside[:, :, None], x.flip(0), x)
        found = model.aux_head(model._read(model._run(x)[-1])[:, 1:]).unflatten(1, (4, 4))
        small = inside[::2, ::2, None]
        assert_close(dense, torch.where(small, found.flip(0), found))
        again = model.forward_dense(images, mix=True, generator=torch.Generator().manual_seed(seed))
        assert again.box == box
        assert torch.equal(again.dense, dense)
    assert len(sizes) > 3
    assert isinstance(model.train()(images), DenseLogits)


def test_it_learns_from_token_labels():
    model, images = build(mix_tokens=True).train(), make_images(6)
    target = F.one_hot(torch.arange(6) % 5, 5).double()
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    torch.manual_seed(0)
    for _ in range(25):
        loss = token_label_loss(*model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_positions_fit_other_sizes():
    model, larger = build(), build(image_size=48)
    assert model.pos_embed.shape == (1, 4, 4, 12)
    load_weights(larger, model.state_dict(), "small")
    expected = resize_positions(model.pos_embed.flatten(1, 2), (6, 6), old=(4, 4)).unflatten(1, (6, 6))
    assert_close(larger.pos_embed, nn.Parameter(expected))
    images = make_images(size=(48, 48))
    assert_close(larger(images), model(images))
    assert model(make_images(size=(43, 35))).shape == (3, 5)
    with pytest.raises(InputError, match="give 8 x 8 pixels at least"):
        model(make_images(size=(7, 32)))


def test_without_class_attention_patches_are_averaged():
    model, images = build(class_layers=0, dense=False), make_images()
    assert (model.num_prefix_tokens, model.pools, model.cls_token) == (0, ("avg", "max"), None)
    assert_close(model(images), model.head(model.forward_features(images).mean(1)))
    with pytest.raises(InputError, match="no classifier of patches"):
        model.forward_dense(images)


def test_outlook_attention_is_never_left_out():
    model = build(drop_path_rate=0.3)
    assert [block.drop_path.probability for stage in model.stages for block in stage.blocks] == [0.0, 0.15, 0.3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"down": (True,)}, r"down is \(True,\) and depths is \(1, 2\): give one for each stage"),
        ({"down": (False, False)}, "channels change at a step down"),
        ({"class_layers": 0}, "dense is True and class_layers is 0"),
        ({"patch_size": 5}, "patch_size is 5"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_weights_saved_while_the_stem_was_of_blocks_are_read():
    model = saccade.create_model("volo_test")
    state = model.state_dict()
    kinds = ("conv", "bn")

    def before(name):
        layer = re.match(r"patch_embed\.conv\.(\d)\.", name)
        if layer is None:
            return name
        number, kind = divmod(int(layer[1]), 3)
        return f"patch_embed.conv.{number}.{kinds[kind]}.{name[layer.end() :]}"

    old = {before(name): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    assert fit_weights(model, old).keys() == state.keys()
