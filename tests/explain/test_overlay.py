"""Overlays: where colour goes, what grey print keeps, then errors."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from saccade.errors import InputError, WorkError
from saccade.explain import overlay, save_overlay


def photo():
    return (torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


def spots(*values):
    maps = torch.zeros(12, 20)
    for i, value in enumerate(values):
        maps[2:10, 3 + 8 * i : 8 + 8 * i] = value
    return maps


def lightness(picture):
    return torch.einsum("chw,c->hw", picture.double(), torch.tensor([0.299, 0.587, 0.114]).double())


def test_no_relevance_leaves_a_grey_picture():
    picture = overlay(photo(), torch.zeros(12, 20))
    assert picture.shape == (3, 12, 20)
    assert picture.dtype == torch.uint8
    assert (picture[0] == picture[1]).all()
    assert (picture[1] == picture[2]).all()
    assert picture.unique().numel() > 50  # the image is still there


@pytest.mark.parametrize(
    ("maps", "signed"), [(spots(1.0, 0.5), False), (spots(1.0, -1.0), True), (spots(1.0, 0.5), True)]
)
def test_grey_print_keeps_strength_and_sign(maps, signed):
    light = lightness(overlay(photo(), maps, signed=signed))
    rest = light[maps == 0]
    assert light[maps == 1].min() > rest.max()
    if (maps < 0).any():
        assert light[maps < 0].max() < rest.mean()
    else:
        assert light[maps == 1].mean() > light[maps == 0.5].mean() > rest.mean()


def test_signs_have_hues_that_differ_in_blue_and_yellow():
    maps = spots(1.0, -1.0)
    picture = overlay(photo(), maps).double()
    red, _, blue = picture.unbind()
    assert (red - blue)[maps > 0].min() > 60
    assert (red - blue)[maps < 0].max() < -60


def test_the_scale_of_the_map_and_a_few_outliers_change_nothing():
    maps = torch.rand(12, 20, generator=torch.Generator().manual_seed(1))
    maps[0, 0] = maps.max()
    picture = overlay(photo(), maps)
    assert_close(overlay(photo(), maps * 1e-6), picture)
    outlier = maps.clone()
    outlier[0, 0] = 1e6
    assert_close(overlay(photo(), outlier), picture)


def test_a_lone_pixel_is_seen():
    maps = torch.zeros(64, 64)
    maps[5, 6] = 1e-3
    picture = overlay(torch.full((3, 64, 64), 128, dtype=torch.uint8), maps).double()
    assert (picture[0] - picture[2])[5, 6] > 60


def test_unsigned_maps_ignore_what_is_below_zero():
    maps = spots(1.0, -5.0)
    assert_close(overlay(photo(), maps, signed=False), overlay(photo(), maps.clamp(min=0)))


def test_saved_pictures_are_the_overlay(tmp_path):
    path = save_overlay(tmp_path / "new folder" / "wo es hinsieht ü.png", photo(), spots(1.0, -1.0))
    with Image.open(path) as picture:
        assert picture.size == (20, 12)
        assert bytes(picture.tobytes()) == overlay(photo(), spots(1.0, -1.0)).permute(1, 2, 0).numpy().tobytes()


@pytest.mark.parametrize(
    ("image", "maps", "options", "message"),
    [
        (photo() / 255, spots(1.0), {}, "torch.float32.*give uint8"),
        (photo()[0], spots(1.0), {}, r"\(12, 20\): give uint8 \(3, H, W\)"),
        (photo(), spots(1.0).mT, {}, r"map is \(20, 12\) but the image is \(3, 12, 20\)"),
        (photo(), spots(float("nan")), {}, "NaN"),
        (photo(), spots(1.0), {"percentile": 0}, "percentile is 0"),
    ],
)
def test_wrong_calls_say_what_to_do(image, maps, options, message):
    with pytest.raises(InputError, match=message):
        overlay(image, maps, **options)


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(InputError, match="names no picture format"):
        save_overlay(tmp_path / "map.pgn", photo(), spots(1.0))
    (tmp_path / "file").touch()
    with pytest.raises(WorkError, match="cannot write"):
        save_overlay(tmp_path / "file" / "map.png", photo(), spots(1.0))
