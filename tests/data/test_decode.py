"""read_image: every colour mode becomes upright RGB; what cannot be read says why."""

import io
import os
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from saccade.data import decode as decode_module
from saccade.data import read_image
from saccade.data.decode import Unreadable, decode, shorter_side
from saccade.errors import InputError
from tests.data.pictures import noise, write


def as_tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    pixels = noise(7, 12)
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(write(tmp_path / f"a.{suffix}", pixels, **options))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert_close(image, as_tensor(pixels))


UPRIGHT_TO_STORED = {  # by the EXIF standard: which side of the scene is the stored row 0 and column 0
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", UPRIGHT_TO_STORED)
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(UPRIGHT_TO_STORED[orientation](upright))
    assert_close(read_image(write(tmp_path / "a.png", stored, exif=exif)), as_tensor(upright))


def test_damaged_exif_does_not_cost_the_image(tmp_path):
    path = write(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(path).shape == (3, 9, 11)


def palette(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return encode(image, transparency=transparency)


MODES = {
    "8-bit grey": (encode(Image.fromarray(np.uint8([[0, 200]]))), [(0, 0, 0), (200, 200, 200)]),
    "16-bit grey PNG": (
        encode(Image.fromarray(np.uint16([[257 * 7, 65535, 257 * 7 + 129]]))),
        [(7,) * 3, (255,) * 3, (8,) * 3],
    ),
    "16-bit grey TIFF": (encode(Image.fromarray(np.uint16([[0, 257 * 99]])), "TIFF"), [(0,) * 3, (99,) * 3]),
    "16-bit grey PGM": (b"P5 2 1 65535\n\x00\x00\x65\x65", [(0,) * 3, (0x65,) * 3]),
    "32-bit integers run from their minimum to their maximum": (
        encode(Image.fromarray(np.int32([[-50, 0, 50]])), "TIFF"),
        [(0,) * 3, (128,) * 3, (255,) * 3],
    ),
    "floats within [0, 1] are shares of white": (
        encode(Image.fromarray(np.float32([[0.2, 0.6]])), "TIFF"),
        [(51,) * 3, (153,) * 3],
    ),
    "other floats run from their minimum to their maximum": (
        encode(Image.fromarray(np.float32([[-1.0, 3.0]])), "TIFF"),
        [(0,) * 3, (255,) * 3],
    ),
    "constant floats": (encode(Image.fromarray(np.float32([[7.0, 7.0]])), "TIFF"), [(0,) * 3, (0,) * 3]),
    "grey with alpha, on white": (
        encode(Image.fromarray(np.uint8([[[0, 255], [0, 0]]]))),
        [(0,) * 3, (255,) * 3],
    ),
    "alpha, on white": (
        encode(Image.fromarray(np.uint8([[[255, 0, 0, 255], [9, 9, 9, 0], [255, 0, 0, 51]]]))),
        [(255, 0, 0), (255,) * 3, (255, 204, 204)],
    ),
    "palette with a transparent colour": (palette(1), [(255, 0, 0), (255,) * 3]),
    "palette with an alpha for each colour": (palette(bytes([0, 255])), [(255,) * 3, (0, 0, 255)]),
    "RGB with a transparent colour": (
        encode(Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]])), transparency=(4, 5, 6)),
        [(1, 2, 3), (255,) * 3],
    ),
    "1 bit": (encode(Image.fromarray(np.array([[True, False]]))), [(255,) * 3, (0,) * 3]),
    "CMYK": (
        encode(Image.frombytes("CMYK", (2, 1), bytes([255, 0, 0, 0, 0, 0, 0, 255])), "TIFF"),
        [(0, 255, 255), (0, 0, 0)],
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_colour_modes_become_rgb(name):
    encoded, expected = MODES[name]
    assert decode(encoded)[:, 0].T.tolist() == [list(colour) for colour in expected]


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    colour = read_image(tmp_path / "a.jpg").float().mean((1, 2))
    assert_close(colour, torch.tensor([0.0, 255.0, 255.0]), atol=3, rtol=0)


def test_first_of_several_frames_is_taken(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(90, 30), (30, 90)])
def test_size_keeps_the_centre_square(tmp_path, shape):
    thirds = np.zeros((*shape, 3), np.uint8)
    long = int(np.argmax(shape))
    for colour in range(3):
        np.moveaxis(thirds, long, 0)[30 * colour : 30 * (colour + 1), :, colour] = 255
    image = read_image(write(tmp_path / "a.png", thirds), size=15)
    assert image.shape == (3, 15, 15)
    assert image[:, 4:-4, 4:-4].unique(dim=1).flatten(1).unique(dim=1).flatten().tolist() == [0, 255, 0]


def test_size_reduces_with_antialiasing_and_enlarges(tmp_path):
    checkerboard = np.repeat(np.indices((64, 64)).sum(0)[..., None] % 2 * 255, 3, axis=2).astype(np.uint8)
    small = read_image(write(tmp_path / "a.png", checkerboard), size=16).float()
    assert ((small - 127.5).abs() < 10).all()  # picking pixels would give 0 or 255
    assert read_image(tmp_path / "a.png", size=100).shape == (3, 100, 100)


def test_huge_baseline_jpeg_is_read_reduced(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("L", (20_000, 20_000), 90).save(path)
    assert_close(read_image(path, size=32), torch.full((3, 32, 32), 90, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"a\.jpg cannot be used: it has 20000 x 20000 pixels, more than 100,000,000"):
        read_image(path)


def test_pixel_limit_spares_only_what_decodes_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 100 * 100)
    pixels = noise(200, 200)
    assert read_image(write(tmp_path / "baseline.jpg", pixels), size=32).shape == (3, 32, 32)
    for path in (write(tmp_path / "a.jpg", pixels, progressive=True), write(tmp_path / "a.png", pixels)):
        with pytest.raises(InputError, match="200 x 200 pixels"):
            read_image(path, size=32)


@given(data=st.data())
def test_damaged_bytes_are_decoded_or_refused_with_a_reason(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    damaged = bytearray(encode(Image.fromarray(noise()), kind))
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    with warnings.catch_warnings(action="ignore"), suppress(Unreadable):
        assert decode(bytes(damaged), 8).shape == (3, 8, 8)


def test_shorter_side_needs_the_header_only(tmp_path):
    path = write(tmp_path / "a.png", noise(40, 30))
    path.write_bytes(path.read_bytes()[:60])
    assert shorter_side(path) == 30


UNREADABLE = {
    "text.png": (b"# not an image\n", "it is no image in a format that can be read"),
    "empty.jpg": (b"", r"it is empty \(0 bytes\)"),
    "cut.jpg": (encode(Image.fromarray(noise(64, 64)), "JPEG")[:-500], r"it cannot be decoded \(.*truncated"),
    "cut.png": (encode(Image.fromarray(noise(64, 64)))[:-500], r"it cannot be decoded \(.*truncated"),
    "head.png": (encode(Image.fromarray(noise()))[:12], "its PNG header is damaged"),
    "nan.tiff": (encode(Image.fromarray(np.float32([[0.0, np.nan]])), "TIFF"), "it holds values that are not finite"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name):
    encoded, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(encoded)
    with pytest.raises(InputError, match=rf"{name} cannot be used: {reason}"):
        read_image(tmp_path / name)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot be opened \(No such file"):
        read_image(tmp_path / "missing.png")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(InputError, match="it is no regular file"):
            read_image(path)
    with pytest.raises(InputError, match="size is 0"):
        read_image(tmp_path, size=0)
