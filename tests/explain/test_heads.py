"""Heads: pruning and its metrics, rings by hand, maps around the query, clusters of known patterns, pictures."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.explain.heads import (
    divergence,
    draw_importance,
    draw_patterns,
    draw_strength,
    head_importance,
    head_patterns,
    head_strength,
    recentre_maps,
    ring_masses,
    ring_numbers,
)
from tests.explain.nets import FOREIGN, ShowsAttention, Stages, foreign_vit, images, softmax_attention

# Importance


def pixels(batch=4, side=12):
    return images(batch, 3, side, side).double()


@pytest.mark.parametrize("kind", FOREIGN)
def test_pruning_takes_a_heads_output_away_and_keeps_the_bias(kind):
    """Against the head's own weighted sum, found again in a model whose values are zeros for that head."""
    model, x = foreign_vit(kind, prefix=int(kind != "convolution")), pixels()
    found = head_importance(model, x, target=2)
    before = model(x).softmax(1)
    layer, head, dim = 1, 2, 4
    rows = slice(head * dim, (head + 1) * dim)
    attention = model.layers[layer]
    value, start = (attention.value, 0) if kind == "apart" else (getattr(attention, "qkv", None), 24)
    weight, bias = (
        (attention.mha.in_proj_weight, attention.mha.in_proj_bias) if kind == "torch" else (value.weight, value.bias)
    )
    with torch.no_grad():
        weight[start:][rows] = 0
        bias[start:][rows] = 0
    after = model(x).softmax(1)
    assert_close(found.by_image["probability"][layer, head], (before - after)[:, 2])
    assert_close(found.by_image["loss"][layer, head], (before.log() - after.log())[:, 2])
    assert_close(found.by_image["divergence"][layer, head], divergence(before, after))
    assert_close(found.by_image["flip"][layer, head], (before.argmax(1) != after.argmax(1)).double())


def test_the_embedding_is_what_the_classifier_reads():
    model, x = foreign_vit(), pixels()
    found = head_importance(model, x)
    assert found.embedding == "head"
    read = []
    model.head.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    model(x)
    with torch.no_grad():
        model.layers[0].out.weight[:, 4:8] = 0
    model(x)
    assert_close(found.by_image["distance"][0, 1], (read[0] - read[1]).norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(*read)
    assert_close(found.by_image["angle"][0, 1], 1 - cosine)


def test_a_head_that_the_projection_ignores_changes_nothing():
    model, x = foreign_vit(), pixels()
    with torch.no_grad():
        model.layers[1].out.weight[:, :4] = 0
    for metric, values in head_importance(model, x).by_image.items():
        assert_close(values[1, 0], torch.zeros(4).double(), msg=metric)
        assert metric == "flip" or (values[1, 1] != 0).all(), metric


def test_the_model_is_left_as_it_was_and_batches_change_nothing():
    model, x = foreign_vit().train(), pixels(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole, parts = (head_importance(model, x, batch_size=size).by_image for size in (5, 2))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_close(whole, parts)


def test_layers_with_fewer_heads_have_no_values_there():
    torch.manual_seed(0)
    model = saccade.create_model("study_xxs", num_classes=3, mixer="window", dims=(32, 64), depths=(1, 1))
    found = head_importance(model, images(2, 3, 32, 32))
    assert found.projections == ("stages.0.blocks.0.mixer.proj", "stages.1.blocks.0.mixer.proj")
    assert found.matrix("loss").isnan().tolist() == [[False, True], [False, False]]
    assert found.agreement().isfinite().all()


def test_given_projections_equal_inferred_ones():
    model, x = foreign_vit(), pixels()
    inferred = head_importance(model, x)
    for options in ({"projections": "layers.*.out"}, {"projections": "layers.*.out", "num_heads": 3}):
        assert_close(head_importance(model, x, **options).by_image, inferred.by_image)


@given(st.integers(0, 2**32 - 1), st.integers(2, 7))
def test_divergence_is_symmetric_and_from_0_to_ln_2(seed, classes):
    rng = torch.Generator().manual_seed(seed)
    p, q = (5 * torch.randn(2, classes, generator=rng, dtype=torch.double)).softmax(-1)
    assert_close(divergence(p, q), divergence(q, p))
    assert 0 < divergence(p, q) <= math.log(2)
    assert divergence(p, p) == 0
    kl = [(each * (each / ((p + q) / 2)).log()).sum() for each in (p, q)]
    assert_close(divergence(p, q), sum(kl) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projections": "blocks.*.proj"}, r"projections is 'blocks.\*.proj': no module of ForeignViT"),
        ({"projections": "head", "num_heads": 5}, r"weight of 'head' is \(5, 12\), for 5 heads"),
        ({"projections": "layers.0"}, r"weight of 'layers.0' is no parameter"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"embedding": "heat"}, "embedding is 'heat': did you mean head"),
        ({"target": 5}, "target is 5 but the model knows 5 classes"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        head_importance(foreign_vit(), pixels(1), **options)


def test_heads_that_cannot_be_pruned_ask_for_the_projections():
    model = Stages((2, [softmax_attention(16)]))
    with pytest.raises(InputError, match=r"heads of 'stages.0.0' cannot be inferred: give projections, a pattern"):
        head_importance(model, images())


def test_without_a_linear_layer_the_embedding_is_asked_for():
    model = foreign_vit()
    model.head = torch.nn.Sequential(model.head, torch.nn.Unflatten(1, (1, 5)), torch.nn.Flatten())
    assert head_importance(model, pixels(1)).embedding == "head.0"
    model.head = torch.nn.Sequential(torch.nn.Unflatten(1, (12, 1)), torch.nn.Conv1d(12, 5, 1), torch.nn.Flatten())
    with pytest.raises(InputError, match="no linear layer gives the logits: give embedding"):
        head_importance(model.double(), pixels(1))


# Strength


def test_ring_masses_by_hand():
    weights = torch.arange(36.0).view(6, 6).double()
    grid = (2, 3)
    totals, counts = torch.zeros(6, 3).double(), torch.zeros(6, 3).double()
    for query in range(6):
        for key in range(6):
            ring = max(abs(query // 3 - key // 3), abs(query % 3 - key % 3))
            totals[query, ring] += weights[query, key]
            counts[query, ring] += 1
            assert ring_numbers(grid)[query, key] == ring
    assert_close(ring_masses(weights, grid), totals.mean(0))
    means = torch.where(counts > 0, totals / counts, torch.nan)
    assert_close(ring_masses(weights, grid, per_token=True), means.nanmean(0))


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_rings_and_prefix_tokens_share_all_attention(prefix):
    model, x = foreign_vit(prefix=prefix), images(3, 3, 12, 20).double()
    found = head_strength(model, x)
    assert_close(found.rings.sum(-1), 1 - found.to_prefix)
    assert_close((found.rings * torch.arange(5)).sum(-1), found.distance)
    assert found.from_prefix.isnan().all() == (prefix == 0)
    alone = head_strength(model, x, patches_only=True)
    assert_close(alone.rings.sum(-1), torch.ones(3, 3).double())
    assert_close(alone.to_prefix, found.to_prefix)


def test_values_of_one_length_weigh_like_attention():
    model, x = foreign_vit("apart"), pixels()
    with torch.no_grad():
        for layer in model.layers:
            layer.value.weight.zero_()
            layer.value.bias.fill_(0.5)  # 4 channels a head: length 1
    found = head_strength(model, x)
    assert_close(found.value_rings, found.rings)
    assert_close(found.value_to_prefix, found.to_prefix)
    assert_close(found.value_distance, found.distance / (1 - found.to_prefix), rtol=0.02, atol=0)


def test_what_a_long_value_brings_is_not_attention():
    attention = torch.full((1, 1, 4, 4), 0.25).double()
    from saccade.explain.attention import AttentionLayer
    from saccade.explain.heads.strength import _measure

    value = torch.tensor([8.0, 1, 1, 1]).double().view(1, 1, 4, 1)
    found = _measure(AttentionLayer("", attention, (1, 4), 0, "taps", value=value), False)
    assert_close(found["rings"], torch.tensor([[4.0, 6, 4, 2]]).double() / 16)
    # the values that the four tokens of a row find at distance 0 (8 1 1 1), 1 (1, 9, 2, 1), 2 (1 1 8 1), 3 (1 and 8)
    assert_close(found["value_rings"], torch.tensor([[11.0, 13, 11, 9]]).double() / 16)
    assert_close(found["value_rings"].sum(), torch.tensor(11 / 4).double())


def test_even_attention_has_the_sizes_of_the_rings_and_the_mean_distance():
    attention = torch.full((1, 1, 12, 12), 1 / 12).expand(1, 2, -1, -1)
    found = head_strength(Stages((2, [attention])), images(2, 3, 6, 8))
    numbers = ring_numbers((3, 4)).double()
    sizes = torch.stack([(numbers == ring).double().sum(-1).mean() for ring in range(4)])
    assert_close(found.rings[0, 0], sizes / 12)
    assert_close(found.per_token[0, 0], torch.full((4,), 1 / 12).double())
    assert_close(found.distance[0, 0], numbers.mean())
    assert_close(found.entropy[0, 0], torch.tensor(12.0).double().log())
    assert found.value_rings.isnan().all()


def test_stages_of_other_grids_have_no_values_beyond_theirs():
    model = saccade.create_model("study_xxs", num_classes=3, mixer="attention", dims=(16, 16), depths=(1, 1))
    found = head_strength(model, images(2, 3, 32, 16))
    assert found.grids == ((8, 4), (4, 2))
    assert found.rings.isnan().sum(-1).flatten().tolist() == [0, 4]
    assert_close(found.rings.nansum(-1), torch.ones(2, 1).double())


# Patterns


def test_maps_around_the_query_keep_each_keys_place():
    grid = (2, 3)
    attention = torch.rand(2, 6, 6)
    maps, inside = recentre_maps(attention, grid)
    assert maps.shape == (2, 6, 3, 5)
    for query in range(6):
        for key in range(6):
            row, column = key // 3 - query // 3 + 1, key % 3 - query % 3 + 2
            assert_close(maps[:, query, row, column], attention[:, query, key])
            assert inside[query, row, column]
    assert inside.sum((1, 2)).tolist() == [6] * 6
    assert_close(maps.sum((-1, -2)), attention.sum(-1))


def known_heads(batch, side=5):
    """Attention of a head to itself, to all evenly, and to the right neighbour (itself at the border), with noise."""
    tokens = side * side
    to_self = torch.eye(tokens)
    right = torch.stack([to_self[token if token % side == side - 1 else token + 1] for token in range(tokens)])
    heads = torch.stack([to_self, torch.full((tokens, tokens), 1 / tokens), right])
    noise = 0.05 * torch.rand(batch, 3, tokens, tokens, generator=torch.Generator().manual_seed(0))
    attention = heads * (1 + noise)
    return attention / attention.sum(-1, keepdim=True)


class ShowsEach(ShowsAttention):
    """Shows known heads, the same for every image."""

    def __init__(self):
        super().__init__(known_heads(1))

    def forward(self, x):
        return super().forward(torch.nn.functional.avg_pool2d(x, 2).movedim(1, -1)).mean((1, 2))


def test_known_patterns_are_clusters_of_their_own():
    found = head_patterns(ShowsEach(), images(4, 3, 10, 10), clusters=3, max_maps=300, steps=150)
    assert found.shares.shape == (1, 3, 3)
    assert sorted(found.shares[0].argmax(-1).tolist()) == [0, 1, 2]
    assert (found.shares[0, :2].amax(-1) > 0.95).all()  # a fifth of the third lies at the border
    assert found.explained > 0.5
    for head, shares in enumerate(found.shares[0]):
        cluster = int(shares.argmax())
        assert found.origin[found.representatives[cluster], 1] == head
    middle = found.means[:, 4, 4]
    assert middle[found.shares[0, 0].argmax()] > 0.9
    assert middle[found.shares[0, 2].argmax()] < 0.2


def test_summaries_are_repeated_by_their_seed_and_say_where_maps_are_from():
    model, x = ShowsEach(), images(4, 3, 10, 10)
    one, two = (head_patterns(model, x, clusters=2, max_maps=40, steps=5, seed=3) for _ in range(2))
    for name in ("maps", "codes", "cluster", "means", "shares"):
        assert_close(getattr(one, name), getattr(two, name), equal_nan=True)
    assert len(one.maps) == 40
    attention = known_heads(1)
    for number in (0, 7, 39):
        _, head, _, query = one.origin[number].tolist()
        maps, inside = recentre_maps(attention[0, head], (5, 5))
        assert_close(one.maps[number][inside[query]], (maps[query] / maps[query].max())[inside[query]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "blocks.*"}, r"layers is 'blocks.\*': choose from stages.0.0, stages.1.0"),
        ({}, r"several grids \(stages.0.0: \(4, 4\), stages.1.0: \(2, 2\)\): choose those of one"),
        ({"layers": "stages.1.*", "clusters": 90}, "clusters is 90 and there are 24 maps"),
        ({"outside": "nan"}, "outside is 'nan'"),
        ({"latent": 0}, "latent is 0"),
    ],
)
def test_what_cannot_be_summarised_is_refused(options, message):
    model = Stages((2, [softmax_attention(16)]), (2, [softmax_attention(4)]))
    with pytest.raises(InputError, match=message):
        head_patterns(model, images(), **options)


# Pictures


def test_pictures_are_drawn(tmp_path):
    model, x = foreign_vit(), pixels(2)
    figures = [
        draw_importance(head_importance(model, x)),
        draw_strength(head_strength(model, x)),
        draw_patterns(head_patterns(model, x, clusters=3, max_maps=60, steps=5)),
    ]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 10_000
    titles = [axis.get_title() for axis in figures[0].axes]
    assert "rise of the loss, nats" in titles
    assert [axis.get_title() for axis in figures[1].axes][:3] == ["layers.0", "layers.1", "layers.2"]
