"""Pictures of units: laws of denoising and of a step, facets of known kinds, errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain.visualization import (
    CENTRE_BIAS,
    MEAN_IMAGE,
    Octave,
    denoise_total_variation,
    draw_noise,
    excitation,
    find_facets,
    save_sheet,
    sheet,
    total_variation,
    visualize,
)
from tests.explain.nets import ConvNet, images, linear

SHORT = (Octave(4, (20, 10), (50, 90)), Octave(9, (20, 20), (90, 90), scale=1.5, margin=0.2))


def pixels(height=7, width=9, seed=0):
    return 255 * torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Denoising


@settings(max_examples=8, deadline=None)
@given(weight=st.floats(0.003, 3), seed=st.integers(0, 2**31))
def test_denoising_lowers_variation_and_keeps_the_mean_and_the_range(weight, seed):
    x = pixels(seed=seed)
    found = denoise_total_variation(x, weight)
    assert (total_variation(found) < total_variation(x)).all()
    assert_close(found.mean((-2, -1)), x.mean((-2, -1)))
    assert_close(found[1, 2], denoise_total_variation(x[1, 2], weight))
    assert_close(denoise_total_variation(x / 255, 255 * weight) * 255, found)


def test_constants_stay_and_weights_have_limits():
    flat = torch.full((2, 5, 6), 71.0, dtype=torch.float64)
    assert_close(denoise_total_variation(flat, 0.01), flat, rtol=0, atol=0)
    x = pixels()
    assert_close(denoise_total_variation(x, 1e9), x)
    assert_close(denoise_total_variation(x, 1e-4, iterations=2000), x.mean((-2, -1), keepdim=True).expand_as(x))


def test_it_is_the_minimum_that_scikit_image_finds():
    restoration = pytest.importorskip("skimage.restoration")
    x, weight = pixels()[0, 0], 0.02
    other = restoration.denoise_tv_chambolle(x.numpy(), weight=1 / weight, eps=1e-14, max_num_iter=5000)
    assert_close(denoise_total_variation(x, weight, iterations=1000), torch.from_numpy(other), rtol=0, atol=0.02)
    bregman = restoration.denoise_tv_bregman(x.numpy(), weight=5.0, eps=1e-12, max_num_iter=5000)
    ours = denoise_total_variation(x, 5.0, iterations=500)
    assert_close(ours[2:-2, 2:-2], torch.from_numpy(bregman)[2:-2, 2:-2], rtol=0, atol=0.02)


def test_denoising_has_gradients():
    x = pixels(4, 5)[0, :1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: denoise_total_variation(x, 0.02, iterations=6), x)


def test_variation_by_hand():
    x = pixels(3, 2)[0, 0]
    expected = 0.0
    for i in range(3):
        for j in range(2):
            below = x[i + 1, j] - x[i, j] if i < 2 else 0
            right = x[i, j + 1] - x[i, j] if j < 1 else 0
            expected += (below**2 + right**2) ** 0.5
    assert_close(total_variation(x), expected)


# Units


def test_a_unit_is_a_logit_a_probability_or_a_channels_mean():
    net, x = ConvNet(), images().double()
    net = net.double().eval()
    logits = net(x).detach()
    assert_close(excitation(net, x, target=2), logits[:, 2])
    assert_close(excitation(net, x, target=2, reading="probability", batch_size=1), logits.softmax(1)[:, 2])
    assert_close(excitation(net, x, target=3, layer="stem"), net.stem(x)[:, 3].mean((1, 2)).detach())
    last = ConvNet(last=True).double().eval()
    body = last.body(last.stem(x).relu().movedim(1, -1)).detach()
    assert_close(excitation(last, x, target=3, layer="body", axis=-1), body[..., 3].mean((1, 2)))
    assert_close(
        excitation(net, x, target=3, layer="norm"),
        net.norm(net.body(net.stem(x).relu()).relu().mean((2, 3)))[:, 3].detach(),
    )


# The ascent


def test_a_step_on_a_linear_model_is_its_weight():
    model, start = linear(height=7, width=9).double(), torch.full((1, 3, 7, 9), 0.1, dtype=torch.float64)
    found = visualize(model, start, target=1, bounds=((0, -1, 0), (2, 1, 1)), schedule=[Octave(1, (3, 9), (1e9, 1e9))])
    weight = model.weight[1].detach() * torch.tensor([2.0, 2.0, 1.0]).double().view(3, 1, 1) / 255
    grey = torch.tensor([0.1 / 2, 1.1 / 2, 0.1]).double().view(3, 1, 1) * 255 + 3 * weight / weight.abs().mean()
    low, high = torch.tensor([[0, -1, 0], [2, 1, 1]]).double().view(2, 3, 1, 1)
    assert_close(found.images[0], low + grey.clamp(0, 255) / 255 * (high - low))
    assert_close(found.activations, model(found.images)[:, 1].detach())
    again = visualize(model, start, target=1, bounds=((0, -1, 0), (2, 1, 1)), schedule=[Octave(2, (3, 9), (1e9, 1e9))])
    assert_close(
        again.images[0],
        low + (grey.clamp(0, 255) + 6 * weight / weight.abs().mean()).clamp(0, 255) / 255 * (high - low),
    )


@pytest.mark.parametrize("layer", [None, "stem"])
def test_activations_grow_and_images_stay_alone_and_in_bounds(layer):
    net, starts = ConvNet().double(), images().double().clamp(-1, 1)
    before = excitation(net, starts, target=1, layer=layer)

    def grow(part, **options):
        generator = torch.Generator().manual_seed(0)
        return visualize(
            net, part, target=1, layer=layer, bounds=(-1, 1), schedule=SHORT, generator=generator, **options
        )

    found = grow(starts)
    assert (found.activations > before).all()
    assert found.images.abs().max() <= 1
    assert found.canvas.shape == (3, 3, 12, 12)
    assert_close(found.images, found.canvas[..., 2:10, 2:10])
    assert_close(grow(starts[1:2]).images, found.images[1:2])
    assert_close(grow(starts, batch_size=2).images, found.images)
    assert_close(found.starts, starts)
    assert all(each.grad is None for each in net.parameters())
    assert net.training
    with torch.inference_mode():
        assert_close(grow(starts.clone()).images, found.images)


def test_a_margin_keeps_the_border_and_the_scale_of_the_answer_does_not_matter():
    model, start = linear(height=10, width=12).double(), torch.full((1, 3, 10, 12), 0.5, dtype=torch.float64)
    schedule = [Octave(1, (3, 3), (1e9, 1e9), margin=0.2)]
    found = visualize(model, start, target=0, bounds=(0, 1), schedule=schedule).images
    changed = (found - start).abs() > 1e-6
    assert changed[..., 2:-2, 2:-2].all()
    assert changed.sum() == 3 * 6 * 8
    with torch.no_grad():
        model.weight.mul_(1e3)
    assert_close(visualize(model, start, target=0, bounds=(0, 1), schedule=schedule).images, found)


def test_a_unit_that_nothing_moves_leaves_the_start():
    model, start = linear(), images().clamp(0, 1)
    nn.init.zeros_(model.weight)
    found = visualize(model, start, target=0, bounds=(0, 1), schedule=[Octave(3, (3, 3), (1e9, 1e9))])
    assert_close(found.images, start)


@pytest.mark.parametrize("schedule", [MEAN_IMAGE, CENTRE_BIAS], ids=["mean", "centre"])
def test_published_schedules_run_on_small_images(schedule):
    short = [replace(octave, iterations=2) for octave in schedule]
    starts = draw_noise(2, (3, 8, 8), (-2, 2), generator=torch.Generator().manual_seed(0))
    assert_close((starts.mean() + 2) / 4 * 255, torch.tensor(175.0), rtol=0, atol=3)
    found = visualize(linear(height=6, width=7), starts, target=0, bounds=(-2, 2), schedule=short, crop=(6, 7))
    assert found.images.shape == (2, 3, 6, 7)
    assert found.canvas.shape[-1] == (9 if schedule is MEAN_IMAGE else 10)


# Facets


def test_facets_are_the_kinds_and_their_means():
    kinds = torch.eye(3).repeat_interleave(torch.tensor([9, 5, 7]), 0)  # one bright channel
    x = kinds[:, :, None, None] + 0.01 * images(21)
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 2))
    found = find_facets(net, x, layer="0", num_facets=3, per_facet=4, batch_size=4)
    assert found.labels.tolist() == [0] * 9 + [2] * 5 + [1] * 7  # the largest first
    assert [sorted(each.tolist()) for each in found.members] == [
        list(range(9)),
        list(range(14, 21)),
        list(range(9, 14)),
    ]
    assert_close(found.starts[0], x[found.members[0][:4]].mean(0))
    codes = net[0](x).flatten(1)
    far = (codes[:9] - codes[:9].mean(0)).norm(dim=1)
    assert found.members[0].tolist() == far.argsort().tolist()
    assert find_facets(net, x, layer="0", num_facets=3, tsne=True).labels.tolist() == found.labels.tolist()


# Pictures


def test_a_sheet_shows_starts_above_results(tmp_path):
    starts = torch.full((2, 1, 6, 8), 0.25)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 2))
    found = visualize(model, starts, target=0, bounds=(0, 1), schedule=SHORT, crop=(4, 5))
    picture = sheet(found)
    assert picture.shape == (3, 6 + 4 + 8, 2 * (8 + 4))
    assert picture.dtype == torch.uint8
    assert_close(picture[:, 2:8, 2:10], torch.full((3, 6, 8), 64, dtype=torch.uint8))
    assert (picture[:, :2] == 255).all()
    path = save_sheet(tmp_path / "new" / "sheet.png", found)
    with Image.open(path) as written:
        assert written.size == (24, 18)
    with pytest.raises(InputError, match="names no picture format"):
        save_sheet(tmp_path / "sheet.xyz", found)


# Errors


def test_errors_say_what_to_do():
    net, x = ConvNet(), images().clamp(0, 1)
    with pytest.raises(InputError, match="target is 4 but there are 4 classes"):
        visualize(net, x, target=4, bounds=(0, 1))
    with pytest.raises(InputError, match="target is 5 but there are 5 units in layer 'stem'"):
        excitation(net, x, target=5, layer="stem")
    with pytest.raises(InputError, match="layer is 'stam': did you mean stem"):
        find_facets(net, x, layer="stam", num_facets=2)
    with pytest.raises(InputError, match="num_facets is 4 of 3 images"):
        find_facets(net, x, layer="stem", num_facets=4)
    with pytest.raises(InputError, match=r"out of the bounds \(0.5, 1\)"):
        visualize(net, x, target=0, bounds=(0.5, 1))
    with pytest.raises(InputError, match="one for each of 3 channels"):
        visualize(net, x, target=0, bounds=((0, 0), 1))
    with pytest.raises(InputError, match="below the second"):
        visualize(net, x, target=0, bounds=(1, 0))
    with pytest.raises(InputError, match=r"crop is \(9, 8\)"):
        visualize(net, x, target=0, bounds=(0, 1), crop=(9, 8))
    with pytest.raises(InputError, match="schedule is empty"):
        visualize(net, x, target=0, bounds=(0, 1), schedule=[])
    with pytest.raises(InputError, match="weight is 0"):
        denoise_total_variation(x, 0)
    with pytest.raises(InputError, match=r"a margin below 0\.5"):
        Octave(1, (1, 1), (1, 1), margin=0.5)
    with pytest.raises(InputError, match="reading is 'loggit': did you mean logit"):
        Octave(1, (1, 1), (1, 1), reading="loggit")
    with pytest.raises(InputError, match=r"scale is 0\.5"):
        Octave(1, (1, 1), (1, 1), scale=0.5)
