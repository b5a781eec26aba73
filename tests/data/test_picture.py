"""Anyone's pictures as a model wants them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures import ODD, digit, on_paper, transparent
from PIL import Image, ImageDraw, ImageFilter

from noprop_dist.data.info import DataInfo
from noprop_dist.data.picture import fit, read_picture, to_eight_bits, to_pixels
from noprop_dist.trained import load, open_its_data


def info(name="npz", shape=(1, 8, 8)):
    return DataInfo(name, shape, ("a", "b"), 1, 1, (0.0,) * shape[0], (1.0,) * shape[0])


MNIST = info("mnist", (1, 28, 28))


def test_grey_becomes_rgb_and_rgb_grey():
    page = Image.new("L", (20, 20), 90)
    assert to_pixels(page, info(shape=(3, 6, 8))).unique().tolist() == [90]
    assert to_pixels(page, info(shape=(3, 6, 8))).shape == (3, 6, 8)
    assert to_pixels(Image.new("RGB", (9, 40), (255, 0, 0)), info()).unique().tolist() == [76]  # as ITU-R 601-2 weighs red


def test_the_middle_of_a_long_picture_is_kept():
    page = Image.new("L", (900, 100), 0)
    page.paste(200, (400, 0, 500, 100))
    assert fit(page, (1, 10, 10)).float().mean() > 190
    assert fit(page.transpose(Image.Transpose.ROTATE_90), (1, 10, 10)).float().mean() > 190


def test_a_line_of_pixels_is_not_blown_up_to_be_thrown_away():
    assert fit(Image.new("L", (1, 60_000_000), 7), (1, 28, 28)).unique().tolist() == [7]  # 28 times as wide: 47 GB


def test_transparent_drawings_are_laid_where_they_can_be_seen():
    dark, light = to_eight_bits(transparent(20)), to_eight_bits(transparent(240))
    assert (dark.getpixel((0, 0)), light.getpixel((0, 0))) == ((255, 255, 255), (0, 0, 0))
    photograph = Image.new("RGBA", (40, 40), (220, 220, 220, 255))
    photograph.paste((0, 0, 0, 0), (0, 0, 4, 4))  # a rounded corner is no drawing's ground
    assert to_eight_bits(photograph).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 256, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 100, 200]], np.uint16), [0, 0, 1]),
        (np.array([[0, 100, 200]], np.int32), [0, 100, 200]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 0.2, 0.8]], np.float32), [0, 51, 204]),
        (np.array([[0, 51, 204]], np.float32), [0, 51, 204]),
        (np.array([[0, 300, 1000]], np.float32), [0, 76, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.inf, 0.5]], np.float32), [0, 255, 128]),
        (np.array([[np.nan, np.nan, -np.inf]], np.float32), [0, 0, 0]),
        (np.array([[0, 0, 0]], np.float32), [0, 0, 0]),
    ],
)
def test_deep_colours_come_to_eight_bits(values, expected):
    assert np.asarray(to_eight_bits(Image.fromarray(values)))[0].tolist() == pytest.approx(expected, abs=1)


def test_ink_is_brought_to_the_size_and_place_of_mnist():
    page = Image.new("L", (640, 480), "white")
    ImageDraw.Draw(page).rectangle((500, 20, 539, 119), fill=60)  # 40 × 100, in a corner
    pixels = to_pixels(page, MNIST)[0]
    rows, columns = (torch.nonzero(pixels.amax(axis) > 128).flatten() for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (4, 23, 10, 17)
    assert pixels.max() == 255 and pixels[0, 0] == 0


def test_ink_of_mnist_is_centred_by_its_mass():
    page = Image.new("L", (300, 300), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((50, 50, 110, 250), fill=0)
    draw.rectangle((50, 240, 200, 250), fill=0)  # a heavy bar on its left, a thin foot to the right
    ink = to_pixels(page, MNIST)[0].float()
    mass = (ink.sum(dim=0) * (torch.arange(28) + 0.5)).sum() / ink.sum()
    columns = torch.nonzero(ink.amax(0) > 30).flatten()
    assert mass == pytest.approx(14, abs=0.5) and (columns[0] + columns[-1] + 1) / 2 > 15


def test_nothing_is_cut_off_whatever_its_centre_of_mass():
    page = Image.new("L", (300, 300), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((50, 50, 250, 110), fill=0)
    draw.rectangle((148, 50, 152, 250), fill=0)  # a heavy bar on a thin leg
    rows = torch.nonzero(to_pixels(page, MNIST)[0].amax(1) > 30).flatten()
    assert len(rows) == 20


def test_what_looks_like_the_data_is_left_as_it_is():
    images, _ = open_its_data(load("digits")).test.load()
    for image in images[:50]:
        assert to_pixels(Image.fromarray(image[0].numpy()), info("digits")).equal(image)


def test_an_empty_page_is_an_empty_picture():
    for page in (Image.new("L", (50, 50), "white"), Image.new("L", (50, 50), 5), Image.new("RGBA", (50, 50))):
        assert to_pixels(page, MNIST).unique().tolist() == [0]


def test_as_it_is_means_as_it_is():
    page = on_paper(digit(3))
    assert to_pixels(page, MNIST, as_is=True).equal(fit(page, (1, 28, 28)))
    assert to_pixels(page, info("fashion-mnist", (1, 28, 28))).equal(255 - fit(page, (1, 28, 28)))
    assert to_pixels(page, info(shape=(1, 28, 28))).equal(fit(page, (1, 28, 28)))


def photograph(page, rng):
    """A page under a lamp on its left, with dust on it, out of focus and with the sensor's noise."""
    values = np.asarray(page, float)
    height, width = values.shape
    values[rng.integers(0, height, 5), rng.integers(0, width, 5)] = 0
    lamp = np.linspace(0.85, 0.6, width) - np.linspace(0, 0.12, height)[:, None]
    values = values * lamp + rng.normal(0, 5, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))


def pasted(images, finish=lambda page, rng: page):
    """Real test images (N, 1, H, W) as drawings on large pages, anywhere on them, of any size."""
    for number, image in enumerate(images):
        rng = np.random.default_rng(number)
        side = int(rng.integers(150, 450))
        at = (int(rng.integers(0, 1000 - side)), int(rng.integers(0, 800 - side)))
        yield finish(on_paper(Image.fromarray(image[0].numpy()), (1000, 800), side, at), rng)


@pytest.mark.parametrize("finish", [lambda page, rng: page, photograph], ids=["drawn", "photographed"])
@pytest.mark.parametrize(("name", "count"), [("digits", 60), ("mnist", 60)])
def test_digits_on_paper_are_read_as_well_as_those_of_the_data(name, count, finish):
    if name == "mnist" and not os.environ.get("NOPROP_DATA"):
        pytest.skip("NOPROP_DATA is not set")
    model = load(name)
    images, labels = open_its_data(model).test.load()
    images, labels = images[:count], labels[:count]
    read = torch.stack([to_pixels(page, model.info) for page in pasted(images, finish)])
    as_they_are, on_pages = ((model.predict(pictures) == labels).float().mean().item() for pictures in (images, read))
    assert on_pages >= as_they_are - 0.02


MEASURE = """
import resource, sys
from pathlib import Path
from pictures import digit
from noprop_dist.data.info import DataInfo
from noprop_dist.data.picture import read_picture
info = DataInfo("mnist", (1, 28, 28), ("a", "b"), 1, 1, (0.0,), (1.0,))
digit(1).save("small.png")
read_picture("small.png", info)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    read_picture(path, info)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_huge_picture_needs_a_few_times_its_own_memory(tmp_path):
    """8000 × 6000 transparent pixels, 183 MiB, and as many grey ones of 16 bits."""
    Image.fromarray(np.full((6000, 8000), 50_000, np.uint16)).save(tmp_path / "deep.png", compress_level=1)
    Image.new("RGBA", (8000, 6000), (250, 250, 250, 200)).save(tmp_path / "huge.png", compress_level=1)
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path])
    command = [sys.executable, "-c", MEASURE, "huge.png", "deep.png"]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 4 * 183


def test_a_small_drawing_in_a_large_jpeg_is_decoded_finely_enough(tmp_path):
    on_paper(digit(4), (1000, 800), 20, (700, 100)).save(tmp_path / "scan.jpg")
    model = load("digits")
    assert model.predict(read_picture(tmp_path / "scan.jpg", model.info)[None]).tolist() == [4]


def test_the_pictures_of_these_tests_are_what_their_names_say(tmp_path):
    for name, mode in (("16-bit grey.png", "I;16"), ("16-bit colour.png", "RGB"), ("CMYK.jpg", "CMYK"), ("one bit.png", "1")):
        ODD[name][1](tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.mode == mode
